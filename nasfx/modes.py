"""Train and eval: where a model's two traces differ, and how most differences are mended.

A flag read while tracing (`F.dropout(x, training=self.training)`) is frozen in the graph. Traced in
both modes, the two graphs tell which modules do that. A functional dropout that follows the mode
becomes a dropout module; a module without choices whose own code differs is kept whole, as one
node; only where the code around a choice differs are two graphs kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, fx, nn

from nasfx.rewriting.graph import provenance, set_provenance

_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


class TracedFrame(Protocol):
    """What this module needs of a traced graph."""

    graph: fx.Graph
    added: dict[str, Tensor | nn.Module]

    def add(self, kind: str, value: nn.Module) -> str:
        """Keep a module the user's tree does not hold; the target to call it by."""
        ...


def _rule(node: fx.Node) -> Any:
    """What a node computes, without which nodes it reads; equal for one dropout in both modes."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: None)
    if node.target in _DROPOUTS:
        kwargs = {key: value for key, value in kwargs.items() if key != "training"}
    target = node.target if isinstance(node.target, str) else node.target.__name__
    return node.op, target, repr(args), repr(kwargs)


def differing_modules(
    train: Sequence[TracedFrame], evaluated: Sequence[TracedFrame]
) -> dict[str, str]:
    """The modules whose own code gives other nodes in the two modes, with what differs first."""
    sides: list[dict[str, list[Any]]] = []
    for frames in (train, evaluated):
        owned: dict[str, list[Any]] = {}
        for frame in frames:
            for node in frame.graph.nodes:
                owned.setdefault(provenance(node).module, []).append(_rule(node))
        sides.append(owned)
    differing: dict[str, str] = {}
    for path in sides[0] | sides[1]:
        a, b = sides[0].get(path, []), sides[1].get(path, [])
        if not a or not b:
            # Called in one mode only: it is the caller that differs.
            caller = path.rpartition(".")[0]
            differing.setdefault(caller, f"calls {path} in one mode only")
        elif a != b:
            first = next((x for x, y in zip(a, b, strict=False) if x != y), (a + b)[-1])
            differing[path] = first[1]
    return differing


def _pairs(
    train: Sequence[TracedFrame], evaluated: Sequence[TracedFrame]
) -> Iterator[tuple[TracedFrame, TracedFrame, fx.Node, fx.Node]]:
    for one, other in zip(train, evaluated, strict=True):
        for a, b in zip(one.graph.nodes, other.graph.nodes, strict=True):
            yield one, other, a, b


def _without_training(a: fx.Node, b: fx.Node) -> Any:
    """The arguments of `a`, with the training flag of `b` where both are one dropout."""
    if a.target in _DROPOUTS and "training" in b.kwargs:
        return a.args, {**a.kwargs, "training": b.kwargs["training"]}
    return a.args, a.kwargs


def _added(frame: TracedFrame, node: fx.Node) -> Any:
    """The value of a constant that forward made, comparable; None for other nodes."""
    prefix, _, name = str(node.target).rpartition(".")
    if node.op != "get_attr" or prefix != "_traced":
        return None
    value = frame.added[name]
    return (value.dtype, value.tolist()) if isinstance(value, Tensor) else None


def merge_modes(train: Sequence[TracedFrame], evaluated: Sequence[TracedFrame]) -> bool:
    """Make the train graphs serve both modes if they differ in functional dropouts only.

    Returns whether they do now; nothing is changed where they cannot.
    """
    sizes = [[len(frame.graph.nodes) for frame in frames] for frames in (train, evaluated)]
    if sizes[0] != sizes[1]:
        return False
    follows: list[tuple[TracedFrame, fx.Node]] = []
    partner: dict[fx.Node, fx.Node] = {}
    for frame, other, a, b in _pairs(train, evaluated):
        partner[b] = a
        if _rule(a) != _rule(b):
            return False
        if fx.map_arg((b.args, b.kwargs), partner.__getitem__) != _without_training(a, b):
            return False
        if _added(frame, a) != _added(other, b):
            return False
        if a.kwargs.get("training") is True and b.kwargs.get("training") is False:
            follows.append((frame, a))
        elif a.kwargs.get("training") != b.kwargs.get("training"):
            return False
    for frame, node in follows:
        options = {k: v for k, v in node.kwargs.items() if k in ("p", "inplace")}
        module = _DROPOUTS[node.target](**options)
        with node.graph.inserting_before(node):
            target = frame.add("dropout", module)
            new = node.graph.call_module(target, (node.args or (node.kwargs["input"],))[:1])
        set_provenance(new, provenance(node))
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
    return True
