"""Where choices are called, and under which decisions each call matters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from nasfx.choice import EMPTY, Choice, InputChoice, LayerChoice
from nasfx.rewriting.effects import Effects, inputs_read
from nasfx.rewriting.graph import join, tensor_leaves

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


def places_of(graph_modules: Iterable[fx.GraphModule]) -> list[Place]:
    """All calls of choices in a traced model's graphs, one for each mode; outer ones first."""
    places: list[Place] = []
    for gm in graph_modules:
        _collect(gm, "", None, places)
    return places


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
    for name, candidate in choice.named_candidates():
        inside = place, (str(choice.label), frozenset({name}))
        if isinstance(candidate, fx.GraphModule):
            _collect(candidate, join(path, name), inside, places)
        elif isinstance(candidate, LayerChoice):
            places.append(Place(str(candidate.label), join(path, name), inside, None))
            _collect_inside(candidate, join(path, name), len(places) - 1, places)


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
