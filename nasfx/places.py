"""Where choices are called, and under which decisions each call matters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from nasfx.choice import EMPTY, SINGLE, Choice, Decision, InputChoice, LayerChoice
from nasfx.rewriting.effects import Effects, inputs_read
from nasfx.rewriting.graph import join, tensor_leaves

Literal = tuple[str, frozenset[Any]]
"""(label, values): true if the decision is one of the values, or holds one of the indices."""


@dataclass(frozen=True)
class Condition:
    """When something in a graph is run.

    Attributes:
        container: the place and candidate it stands in, or None at the top.
        demands: the places whose run needs its value, each with the literal under which it does
            (None: always); None where the value is always needed.
    """

    container: tuple[int, Literal] | None = None
    demands: tuple[tuple[int, Literal | None], ...] | None = None


@dataclass(frozen=True)
class Place:
    """One call of a choice.

    Attributes:
        label: the decision made there.
        path: the module path.
        condition: when it is run.
        edges: the labels of the layer choices that its inputs come straight from, if all do.
        sources: of an input choice: by index, the choice whose output the input comes from last.
    """

    label: str
    path: str
    condition: Condition
    edges: tuple[str, ...] = ()
    sources: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Use:
    """One call of something that is no choice, or of a candidate without a graph.

    Attributes:
        node: the call's node; for such a candidate that of the choice.
        owner: the graph module that holds the node.
        path: of the owner's place in the model.
        calls: the names of the choice calls around it, outer ones first: a choice that is called
            twice has its candidates' nodes once, but used twice.
        condition: when it is run.
        candidate: the name of the candidate without a graph, or "".
        place: the index of the place, for the reduction of an input choice; else None.
    """

    node: fx.Node
    owner: fx.GraphModule
    path: str
    calls: tuple[str, ...]
    condition: Condition
    candidate: str = ""
    place: int | None = None


def places_of(graph_modules: Iterable[fx.GraphModule]) -> list[Place]:
    """All calls of choices in a traced model's graphs, one for each mode; outer ones first."""
    return _collected(graph_modules).places


def places_and_uses(gm: fx.GraphModule) -> tuple[list[Place], list[Use]]:
    """All calls of choices in a graph, and all other calls, candidates' included."""
    found = _collected([gm])
    return found.places, found.uses


def _collected(graph_modules: Iterable[fx.GraphModule]) -> _Collection:
    collection = _Collection()
    for gm in graph_modules:
        collection.graph(gm, "", None, ())
    return collection


class _Collection:
    def __init__(self) -> None:
        self.places: list[Place] = []
        self.uses: list[Use] = []

    def graph(
        self,
        gm: fx.GraphModule,
        path: str,
        container: tuple[int, Literal] | None,
        calls: tuple[str, ...],
    ) -> None:
        """Append what the graph at `path` holds, then what the candidates of its choices do."""
        found = [
            (node, module)
            for node in gm.graph.find_nodes(op="call_module")
            if isinstance(module := gm.get_submodule(str(node.target)), Choice)
        ]
        index = {node: len(self.places) + i for i, (node, _) in enumerate(found)}
        needs = _demands(gm, index)
        last = _last_choices(gm, index)
        for node in gm.graph.nodes:
            demands = needs[node]
            condition = Condition(container, None if demands is None else tuple(demands))
            if node in index:
                choice = gm.get_submodule(str(node.target))
                assert isinstance(choice, Choice)
                where = join(path, str(node.target))
                edges = _edges(gm, node, choice)
                inputs: Any = node.args[0] if isinstance(choice, InputChoice) else ()
                sources = tuple(self._label_of(gm, last[value]) for value in inputs)
                self.places.append(Place(str(choice.label), where, condition, edges, sources))
                if isinstance(choice, InputChoice):
                    self.uses.append(Use(node, gm, path, calls, condition, place=index[node]))
            elif node.op not in ("placeholder", "output"):
                self.uses.append(Use(node, gm, path, calls, condition))
        for node, module in found:
            if isinstance(module, LayerChoice):
                self.candidates(gm, node, module, path, "", index[node], calls)

    @staticmethod
    def _label_of(gm: fx.GraphModule, call: fx.Node | None) -> str | None:
        return None if call is None else str(gm.get_submodule(str(call.target)).label)

    def candidates(
        self, gm: fx.GraphModule, call: fx.Node, choice: LayerChoice, path: str, inside: str,
        place: int, calls: tuple[str, ...],
    ) -> None:  # fmt: skip
        """Append what the candidates of `choice` hold; `inside` names it in an outer one."""
        for name, candidate in choice.named_candidates():
            within = place, (str(choice.label), frozenset({name}))
            here = join(inside, name)
            where = join(path, str(call.target), here)
            if isinstance(candidate, fx.GraphModule):
                self.graph(candidate, where, within, (*calls, call.name))
            elif isinstance(candidate, LayerChoice):
                self.places.append(Place(str(candidate.label), where, Condition(within)))
                last = len(self.places) - 1
                self.candidates(gm, call, candidate, path, here, last, calls)
            else:
                self.uses.append(Use(call, gm, path, calls, Condition(within), here))


def _last_choices(
    gm: fx.GraphModule, index: Mapping[fx.Node, int]
) -> dict[fx.Node, fx.Node | None]:
    """For every node the last choice call that its value comes from, itself included."""
    last: dict[fx.Node, fx.Node | None] = {}
    for node in gm.graph.nodes:
        before = [call for n in node.all_input_nodes if (call := last[n]) is not None]
        last[node] = node if node in index else max(before, key=index.__getitem__, default=None)
    return last


def _edges(gm: fx.GraphModule, call: fx.Node, choice: Choice) -> tuple[str, ...]:
    """The labels of the layer choices that the inputs come straight from, if all do.

    Each must feed this input alone: one that is read elsewhere too is more than an edge.
    """
    if not isinstance(choice, InputChoice):
        return ()
    inputs = cast("Sequence[fx.Node]", call.args[0])
    labels: list[str] = []
    for value in inputs:
        source = gm.get_submodule(str(value.target)) if value.op == "call_module" else None
        if not isinstance(source, LayerChoice) or len(value.users) > 1:
            return ()
        labels.append(str(source.label))
    return tuple(labels) if len(set(inputs)) == len(inputs) == len(set(labels)) else ()


Demands = dict[tuple[int, Literal | None], None]


def _demands(gm: fx.GraphModule, index: Mapping[fx.Node, int]) -> dict[fx.Node, Demands | None]:
    """For every node, the choice calls that need it and when; None where it is always needed."""
    effects = Effects(gm.graph)
    needs: dict[fx.Node, Demands | None] = {}
    for node in reversed(gm.graph.nodes):
        demands: Demands | None = None if effects.always_needed(node) else {}
        for user in effects.observers(node):
            if demands is None:
                break
            if user in index:
                literal = _literal(gm, user, node)
                if literal is None and needs[user] is None:
                    demands = None
                elif literal is None or literal[1]:
                    demands[index[user], literal] = None
            elif (of_user := needs[user]) is None:
                demands = None
            else:
                demands |= of_user
        needs[node] = demands
    return needs


def _literal(gm: fx.GraphModule, call: fx.Node, read: fx.Node) -> Literal | None:
    """When the choice called by `call` reads `read`; None: whatever is decided."""
    choice = gm.get_submodule(str(call.target))
    if isinstance(choice, InputChoice):
        inputs = cast("Sequence[Any]", call.args[0])
        indices = {i for i, value in enumerate(inputs) if value is read}
        if choice.n_chosen is None and 0 in indices and choice.reduction != "none":
            indices.add(EMPTY)
        # More inputs than the unchosen ones could be: whatever is chosen, one of these is.
        every = choice.n_chosen is not None and len(indices) > len(inputs) - choice.n_chosen
        return None if every else (str(choice.label), frozenset(indices))
    assert isinstance(choice, LayerChoice)
    reading = {name for name in choice.candidates if reads(choice, name, call, read)}
    every = reading >= set(choice.choosable)
    return None if every else (str(choice.label), frozenset(reading))


def reads(choice: LayerChoice, name: str, call: fx.Node, read: fx.Node) -> bool:
    """Whether candidate `name`, called by `call`, reads the value of node `read`."""
    candidate = choice._modules[name]
    if not isinstance(candidate, fx.GraphModule):
        return True
    tensors = tensor_leaves(call.args, call.kwargs)
    used = inputs_read(candidate.graph)
    return any(value is read and use for value, use in zip(tensors, used, strict=True))


class Activity:
    """Which places are run under decisions that may be known in part.

    Args:
        places: all of them; conditions name each other by index.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = tuple(places)

    def truth(
        self,
        conditions: Iterable[Condition],
        holds: Callable[[Literal], bool | None],
        memo: dict[int, bool | None],
    ) -> bool | None:
        """Whether any of `conditions` holds; None where that depends on what is not decided.

        Args:
            conditions: what is asked.
            holds: the truth of a literal, None if not decided.
            memo: what is known of the places, for further questions under the same decisions.
        """

        def of(condition: Condition) -> bool | None:
            parts = [] if condition.container is None else [condition.container]
            needs = [all_of((memo[i], holds(literal))) for i, literal in parts]
            if condition.demands is not None:
                demanding = (
                    all_of((memo[i], True if literal is None else holds(literal)))
                    for i, literal in condition.demands
                )
                needs.append(any_of(demanding))
            return all_of(needs)

        asked = list(conditions)
        stack = [i for condition in asked for i, _ in links(condition)]
        while stack:
            condition = self.places[stack[-1]].condition
            unknown = [i for i, _ in links(condition) if i not in memo]
            if unknown and stack[-1] not in memo:
                stack += unknown
                continue
            memo[stack.pop()] = of(condition)
        return any_of(map(of, asked))

    def literals(self, conditions: Iterable[Condition]) -> frozenset[Literal]:
        """The literals on which the truth of `conditions` depends."""
        found: set[Literal] = set()
        stack, seen = list(conditions), set[int]()
        while stack:
            for i, literal in links(stack.pop()):
                if literal is not None:
                    found.add(literal)
                if i not in seen:
                    seen.add(i)
                    stack.append(self.places[i].condition)
        return frozenset(found)


def links(condition: Condition) -> tuple[tuple[int, Literal | None], ...]:
    """The places that `condition` refers to."""
    container = () if condition.container is None else (condition.container,)
    return *container, *(condition.demands or ())


def any_of(values: Iterable[bool | None]) -> bool | None:
    """Three-valued or."""
    known = list(values)
    return True if True in known else None if None in known else False


def all_of(values: Iterable[bool | None]) -> bool | None:
    """Three-valued and."""
    known = list(values)
    return False if False in known else None if None in known else True


def literal_holds(literal: Literal, decided: Mapping[str, Decision]) -> bool | None:
    """Whether the decision for the literal's label is as it says; None if there is none."""
    label, values = literal
    if label not in decided:
        return None
    value = decided[label]
    if isinstance(value, str):
        return value in values
    of_size = {0: EMPTY, 1: SINGLE}.get(len(value))
    return any(i in values for i in value) or of_size in values
