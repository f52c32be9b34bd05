"""The search space: which decisions there are, which of them count, and how many subnets they make.

A decision counts (is *active*) only where it changes what is computed: a choice inside a candidate
while that candidate is chosen, a choice that feeds only an input of an InputChoice while that input
is chosen. An `Architecture` that holds exactly the active decisions is *canonical*; two different
canonical architectures are two different subnets, and sizes count those.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn

from nasfx.choice import EMPTY, Choice, Decision, InputChoice, LayerChoice, checked_indices
from nasfx.errors import SpaceError
from nasfx.rewriting.effects import always_needed, observers
from nasfx.rewriting.graph import join
from nasfx.tracing import TracedModel, trace


class Architecture(Mapping[str, Any]):
    """Immutable decisions: a candidate's name, or a list of input indices, for each label.

    Example:
        >>> arch = Architecture({"block": "conv3", "skips": [0, 2]})
        >>> arch["skips"], arch == {"block": "conv3", "skips": [0, 2]}
        ([0, 2], True)
    """

    __slots__ = ("_decisions",)

    def __init__(self, decisions: Mapping[str, Any]) -> None:
        self._decisions: dict[str, Decision] = {
            label: value if isinstance(value, str) else _indices(label, value)
            for label, value in decisions.items()
        }

    def __getitem__(self, label: str) -> Any:
        value = self._decisions[label]
        return value if isinstance(value, str) else list(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._decisions)

    def __len__(self) -> int:
        return len(self._decisions)

    def __hash__(self) -> int:
        return hash(frozenset(self._decisions.items()))

    def __repr__(self) -> str:
        return f"Architecture({dict(self)})"

    def decision(self, label: str) -> Decision:
        """The decision for `label`: a name, or a tuple of indices."""
        return self._decisions[label]

    def to_json(self, path: str | Path) -> None:
        """Write the architecture to a file."""
        Path(path).write_text(json.dumps(dict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> Architecture:
        """Read an architecture from a file.

        Raises:
            SpaceError: the file is no JSON object of names and lists of indices.
        """
        try:
            data: object = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise SpaceError(f"{path} is not a JSON file: {error}") from error
        if not isinstance(data, dict):
            raise SpaceError(f"{path} holds no JSON object of labels and decisions")
        return cls(cast("dict[str, Any]", data))


def _indices(label: str, value: Any) -> tuple[int, ...]:
    values: list[Any] = [value] if isinstance(value, int) else list(_sequence(label, value))
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in values):
        raise SpaceError(f"decision {value!r} of {label!r} is no name and no list of indices")
    return tuple(sorted(values))


def _sequence(label: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, Sequence):
        raise SpaceError(f"decision {value!r} of {label!r} is no name and no list of indices")
    return cast("Sequence[Any]", value)


@dataclass(frozen=True)
class SpaceChoice:
    """One decision of the space.

    Attributes:
        label: its name.
        kind: "layer" or "input".
        candidates: names (layer) or indices (input), in order.
        n_chosen: how many inputs are chosen; None for any subset; 1 for a layer.
        places: the paths of the choice modules with this label.
        relaxed_only: candidates of mixtures only, which are never chosen.
        edges: for an input choice whose every input comes straight from a layer choice of its own
            (*edge-scored*, as in a DARTS cell), the labels of those, by index; else empty.
    """

    label: str
    kind: str
    candidates: tuple[Any, ...]
    n_chosen: int | None
    places: tuple[str, ...]
    relaxed_only: tuple[str, ...] = ()
    edges: tuple[str, ...] = ()

    @property
    def n_values(self) -> int:
        """How many ways there are to decide."""
        n = len(self.candidates)
        if self.kind == "layer":
            return n - len(self.relaxed_only)
        return 2**n if self.n_chosen is None else comb(n, self.n_chosen)

    def values(self) -> Iterator[Decision]:
        """All ways to decide, in a fixed order."""
        if self.kind == "layer":
            yield from (name for name in self.candidates if name not in self.relaxed_only)
            return
        n = len(self.candidates)
        for k in range(n + 1) if self.n_chosen is None else (self.n_chosen,):
            yield from itertools.combinations(range(n), k)

    def draw(self, generator: torch.Generator | None) -> Decision:
        """One way to decide, uniformly."""
        n = len(self.candidates)
        if self.kind == "layer":
            names = [name for name in self.candidates if name not in self.relaxed_only]
            return names[int(torch.randint(len(names), (), generator=generator))]
        if self.n_chosen is None:
            taken = torch.randint(2, (n,), generator=generator).tolist()
            return tuple(i for i in range(n) if taken[i])
        chosen: list[int] = torch.randperm(n, generator=generator)[: self.n_chosen].tolist()
        return tuple(sorted(chosen))

    def checked(self, value: Decision) -> Decision:
        """`value`, if this choice can be decided so; SpaceError otherwise."""
        if self.kind == "input":
            if isinstance(value, str):
                raise SpaceError(f"{self.label!r} chooses inputs: give indices, not {value!r}")
            return checked_indices(value, len(self.candidates), self.n_chosen, repr(self.label))
        if value in self.relaxed_only:
            raise SpaceError(f"{self.label!r}: {value!r} is relaxed_only and cannot be chosen")
        if value not in self.candidates:
            raise SpaceError(
                f"{self.label!r} has no candidate {value!r}; its candidates are {self.candidates}"
            )
        return value


Literal = tuple[str, frozenset[Any]]
"""(label, values): true if the decision is one of the values, or holds one of the indices."""


@dataclass(frozen=True)
class Place:
    """One call of a choice, and when it is run.

    Attributes:
        label: the decision made there.
        path: the module path.
        container: the place and candidate it stands in, or None at the top.
        demands: the places whose run needs this one's output, each with the literal under which
            it does (None: always); None where the output is always needed.
    """

    label: str
    path: str
    container: tuple[int, Literal] | None
    demands: tuple[tuple[int, Literal | None], ...] | None
    edges: tuple[str, ...] = ()


class SearchSpace:
    """All architectures of a model.

    Attributes:
        choices: the decisions, outer ones first, in the order of the graph.
        size: the exact number of canonical architectures.
    """

    def __init__(self, choices: Sequence[SpaceChoice], places: Sequence[Place]) -> None:
        self.choices = tuple(choices)
        self._by_label = {choice.label: choice for choice in choices}
        self._places = tuple(places)
        self._places_of: dict[str, list[int]] = {}
        for i, place in enumerate(places):
            self._places_of.setdefault(place.label, []).append(i)
        self._literals = {choice.label: self._mentioned(choice.label) for choice in choices}
        self._counts: dict[Any, int] = {}

    def __getitem__(self, label: str) -> SpaceChoice:
        return self._by_label[label]

    def __repr__(self) -> str:
        lines = [f"SearchSpace of {self.size:,} architectures"]
        for c in self.choices:
            kind = "" if c.kind == "layer" else f", choose {c.n_chosen or 'any'}"
            lines.append(f"  {c.label}: {', '.join(map(str, c.candidates))}{kind}")
        return "\n".join(lines)

    # -- which decisions count -------------------------------------------------------------------

    def _mentioned(self, label: str) -> frozenset[Literal]:
        """The literals on which it depends whether `label` is active."""
        found: set[Literal] = set()
        stack, seen = list(self._places_of[label]), set[int]()
        while stack:
            i = stack.pop()
            if i in seen:
                continue
            seen.add(i)
            place = self._places[i]
            container = () if place.container is None else (place.container,)
            for other, literal in (*container, *(place.demands or ())):
                stack.append(other)
                if literal is not None:
                    found.add(literal)
        return frozenset(found)

    def _active(self, label: str, decided: Mapping[str, Decision]) -> bool | None:
        """Whether `label` is active; None where that depends on what is not decided yet."""
        memo: dict[int, bool | None] = {}
        return _any(self._runs(i, decided, memo) for i in self._places_of[label])

    def _runs(
        self, index: int, decided: Mapping[str, Decision], memo: dict[int, bool | None]
    ) -> bool | None:
        if index not in memo:
            place = self._places[index]
            needs: list[bool | None] = []
            if place.container is not None:
                outer, literal = place.container
                needs.append(_all((self._runs(outer, decided, memo), _holds(literal, decided))))
            if place.demands is not None and False not in needs:
                needs.append(
                    _any(
                        _all((self._runs(user, decided, memo), _holds(literal, decided)))
                        for user, literal in place.demands
                    )
                )
            memo[index] = _all(needs)
        return memo[index]

    def active(self, architecture: Mapping[str, Decision]) -> tuple[str, ...]:
        """The labels that are active in a complete `architecture`."""
        return tuple(c.label for c in self.choices if self._active(c.label, architecture) is True)

    # -- what a user asks ------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The exact number of canonical architectures."""
        return self._count(frozenset(self._by_label), {})

    def validate(self, architecture: Mapping[str, Any]) -> Architecture:
        """The canonical form: exactly the active decisions, in the order of `choices`.

        Raises:
            SpaceError: an unknown label, a decision that the choice does not have, or an active
                label without a decision. Decisions for inactive labels are dropped.
        """
        given = Architecture(architecture)
        if unknown := [label for label in given if label not in self._by_label]:
            raise SpaceError(
                f"no choice has the label {unknown[0]!r}; the labels are "
                f"{', '.join(map(repr, self._by_label))}"
            )
        decided = {label: self._by_label[label].checked(given.decision(label)) for label in given}
        canonical: dict[str, Decision] = {}
        for choice in self.choices:
            active = self._active(choice.label, decided)
            if active is not False and choice.label not in decided:
                if active is None:
                    continue  # it depends on a missing label, which is reported itself
                raise SpaceError(
                    f"the architecture has no decision for {choice.label!r}, which is active; "
                    f"its candidates are {choice.candidates}"
                )
            if active:
                canonical[choice.label] = decided[choice.label]
        return Architecture(canonical)

    def sample(self, generator: torch.Generator | None = None) -> Architecture:
        """A canonical architecture, each active decision drawn uniformly."""
        return self._walk(lambda choice: choice.draw(generator))

    def mutate(
        self,
        architecture: Mapping[str, Any],
        p: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> Architecture:
        """`architecture` with each decision drawn anew with probability `p`.

        Decisions that become active are drawn; those that become inactive are dropped.
        """
        if not 0 <= p <= 1:
            raise SpaceError(f"p={p!r} is not a probability")
        old = self.validate(architecture)

        def decide(choice: SpaceChoice) -> Decision:
            anew = float(torch.rand((), generator=generator)) < p
            if choice.label in old and not anew:
                return old.decision(choice.label)
            return choice.draw(generator)

        return self._walk(decide)

    def enumerate(self) -> Iterator[Architecture]:
        """All canonical architectures, in a fixed order."""
        stack: list[tuple[dict[str, Decision], str, Iterator[Decision]]] = []
        decided: dict[str, Decision] = {}
        while True:
            label = next((c.label for c in self._undecided(decided)), None)
            if label is None:
                yield self.validate(decided)
            else:
                stack.append((decided, label, self._by_label[label].values()))
            while stack:
                before, label, values = stack[-1]
                value = next(values, None)
                if value is not None:
                    decided = {**before, label: value}
                    break
                stack.pop()
            else:
                return

    # -- how --------------------------------------------------------------------------------------

    def _undecided(self, decided: Mapping[str, Decision]) -> Iterator[SpaceChoice]:
        for choice in self.choices:
            if choice.label not in decided and self._active(choice.label, decided):
                yield choice

    def _walk(self, decide: Any) -> Architecture:
        """Decide every active label by `decide`, outer ones first."""
        decided: dict[str, Decision] = {}
        while todo := list(self._undecided(decided)):
            for choice in todo:
                decided[choice.label] = decide(choice)
        return Architecture({c.label: decided[c.label] for c in self.choices if c.label in decided})

    def _count(self, labels: frozenset[str], decided: Mapping[str, Decision]) -> int:
        """The canonical ways to decide `labels`, given what is decided of the others."""
        active = {label: self._active(label, decided) for label in labels}
        alive = {label for label in labels if active[label] is not False}
        total = 1
        for component in self._components(alive):
            sure = [c.label for c in self.choices if c.label in component and active[c.label]]
            if not sure:
                continue  # labels that only activate each other are never active
            literals = {lit for label in component for lit in self._literals[label]}
            key = (
                component,
                frozenset((lit, _holds(lit, decided)) for lit in literals if lit[0] in decided),
            )
            if key not in self._counts:
                self._counts[key] = self._count_component(component, sure, literals, decided)
            total *= self._counts[key]
        return total

    def _count_component(
        self,
        component: frozenset[str],
        sure: Sequence[str],
        literals: set[Literal],
        decided: Mapping[str, Decision],
    ) -> int:
        mentioned = {label for label, _ in literals}
        first = next((label for label in sure if label in mentioned), sure[0])
        choice = self._by_label[first]
        rest = component - {first}
        if not rest:
            return choice.n_values
        # Values under which the same literals hold leave the same count behind.
        relevant = [lit for lit in literals if lit[0] == first]
        groups: dict[tuple[bool | None, ...], list[Decision]] = {}
        for value in choice.values():
            truth = tuple(_holds(lit, {first: value}) for lit in relevant)
            groups.setdefault(truth, []).append(value)
        return sum(
            len(values) * self._count(rest, {**decided, first: values[0]})
            for values in groups.values()
        )

    def _components(self, labels: set[str]) -> Iterator[frozenset[str]]:
        """`labels` in sets that do not depend on each other."""
        near: dict[str, set[str]] = {label: set() for label in labels}
        for label in labels:
            for other, _ in self._literals[label]:
                if other in labels:
                    near[label].add(other)
                    near[other].add(label)
        left = set(labels)
        for choice in self.choices:
            if choice.label not in left:
                continue
            component, stack = set[str](), [choice.label]
            while stack:
                label = stack.pop()
                if label not in component:
                    component.add(label)
                    stack.extend(near[label])
            left -= component
            yield frozenset(component)


def _any(values: Any) -> bool | None:
    known = list(values)
    return True if True in known else None if None in known else False


def _all(values: Any) -> bool | None:
    known = list(values)
    return False if False in known else None if None in known else True


def _holds(literal: Literal | None, decided: Mapping[str, Decision]) -> bool | None:
    if literal is None:
        return True
    label, values = literal
    if label not in decided:
        return None
    value = decided[label]
    if isinstance(value, str):
        return value in values
    return any(i in values for i in value) or (not value and EMPTY in values)


def search_space(model_or_net: nn.Module) -> SearchSpace:
    """The search space of a model with choices, or of what `trace` or `transform` made of one.

    Raises:
        TraceError, SpaceError: as `trace`.

    Example:
        >>> search_space(nn.Sequential(LayerChoice([nn.ReLU(), nn.Tanh()], label="act"))).size
        2
    """
    space = getattr(model_or_net, "space", None)
    if isinstance(space, SearchSpace):
        return space
    traced = model_or_net if isinstance(model_or_net, TracedModel) else trace(model_or_net)
    return space_of(traced)


def space_of(traced: TracedModel) -> SearchSpace:
    """The search space of a traced model."""
    places: list[Place] = []
    _collect(traced.graph_modules["train"], "", None, places)
    modules: dict[str, Choice] = {}
    paths: dict[str, list[str]] = {}
    for place in places:
        module = traced.get_submodule(place.path)
        assert isinstance(module, Choice)
        modules.setdefault(place.label, module)
        if place.path not in paths.setdefault(place.label, []):
            paths[place.label].append(place.path)
    choices = [
        SpaceChoice(
            label,
            module.kind,
            module.candidates if module.kind == "layer" else tuple(range(len(module.candidates))),
            module.n_chosen,
            tuple(paths[label]),
            module.relaxed_only,
            edges.pop() if len(edges := {p.edges for p in places if p.label == label}) == 1 else (),
        )
        for label, module in modules.items()
    ]
    return SearchSpace(choices, places)


def _collect(
    gm: fx.GraphModule, path: str, container: tuple[int, Literal] | None, places: list[Place]
) -> None:
    """Append the places of the graph at `path`, then of the candidates of its choices."""
    found = [
        (node, module)
        for node in gm.graph.find_nodes(op="call_module")
        if isinstance(module := gm.get_submodule(str(node.target)), Choice)
    ]
    index = {node: len(places) + i for i, (node, _) in enumerate(found)}
    needs = _demands(gm, index)
    for node, module in found:
        label = str(module.label)
        demands = needs[node]
        places.append(
            Place(
                label,
                join(path, str(node.target)),
                container,
                None if demands is None else tuple(demands),
                _edges(gm, node, module),
            )
        )
    for node, module in found:
        if isinstance(module, LayerChoice):
            _collect_inside(module, join(path, str(node.target)), index[node], places)


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


def _collect_inside(choice: LayerChoice, path: str, place: int, places: list[Place]) -> None:
    for name, candidate in choice.named_children():
        inside = place, (str(choice.label), frozenset({name}))
        if isinstance(candidate, fx.GraphModule):
            _collect(candidate, join(path, name), inside, places)
        elif isinstance(candidate, LayerChoice):
            places.append(Place(str(candidate.label), join(path, name), inside, None))
            _collect_inside(candidate, join(path, name), len(places) - 1, places)


Demands = dict[tuple[int, Literal | None], None]


def _demands(gm: fx.GraphModule, index: Mapping[fx.Node, int]) -> dict[fx.Node, Demands | None]:
    """For every node, the choice calls that need it and when; None where it is always needed."""
    needs: dict[fx.Node, Demands | None] = {}
    for node in reversed(gm.graph.nodes):
        demands: Demands | None = None if always_needed(node) else {}
        for user in observers(node):
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
        if choice.n_chosen is None and 0 in indices:
            indices.add(EMPTY)
        every = len(indices) == len(inputs) and choice.n_chosen is not None
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
    tensors: list[fx.Node] = []
    fx.map_arg((call.args, call.kwargs), lambda node: tensors.append(node) or node)
    placeholders = candidate.graph.find_nodes(op="placeholder")
    return any(
        value is read and placeholder.users
        for value, placeholder in zip(tensors, placeholders, strict=True)
    )
