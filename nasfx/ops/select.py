"""Sampled choices: of several candidates one is run, and what feeds only the others is not."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Proxy
from torch.utils import _pytree as pytree

from nasfx.choice import EMPTY, Decision, call_candidate, reduce_inputs
from nasfx.errors import TraceError
from nasfx.ops.function import graph_function
from nasfx.ops.gates import Gate


def refuse_proxies(module: nn.Module, *args: Any) -> None:
    """Raise TraceError where a foreign tracer calls `module`: its gradient would be lost."""
    if _holds_proxy(args):
        raise TraceError(
            f"{type(module).__name__} is one node of a lowered graph and must not be traced "
            "through: make it a leaf of your tracer, or finalize the net first"
        )


def _holds_proxy(value: Any) -> bool:
    # Every choice of every step asks, and of most calls the leaves are at hand.
    if value is None or isinstance(value, Tensor | str | Deferred):
        return False
    if type(value) in (tuple, list, Gate):
        return any(map(_holds_proxy, value))
    if type(value) is dict:
        return any(map(_holds_proxy, cast("dict[str, Any]", value).values()))
    return any(isinstance(leaf, Proxy) for leaf in pytree.tree_leaves(value))


class Deferred:
    """The value of a producer that the current path does not need; `force` computes it."""

    def __init__(self, body: nn.Module, inputs: Sequence[Any]) -> None:
        self.body, self.inputs = body, inputs

    def force(self) -> Any:
        """Run the producer, without a graph for gradients and without moving its buffers."""
        with torch.no_grad(), unmoved_buffers(self.body):
            return self.body(*[forced(x) for x in self.inputs])


def forced(value: Any) -> Any:
    """`value`, computed now if it was deferred."""
    return value.force() if isinstance(value, Deferred) else value


@contextmanager
def unmoved_buffers(*modules: nn.Module) -> Generator[None, None, None]:
    """Within the block the modules' buffers are copies: what is written to them is forgotten.

    The very tensors return afterwards, so neither their bytes nor their version counters change.
    """
    dictionaries = {id(m._buffers): m._buffers for root in modules for m in _all_modules(root)}
    kept = [(buffers, dict(buffers)) for buffers in dictionaries.values() if buffers]
    try:
        for buffers, originals in kept:
            for name, buffer in originals.items():
                buffers[name] = None if buffer is None else buffer.clone()
        yield
    finally:
        for buffers, originals in kept:
            buffers.update(originals)


def _all_modules(root: nn.Module) -> Iterator[nn.Module]:
    """The modules below `root`; of a graph module only those that its graph calls."""
    if not isinstance(root, fx.GraphModule):
        yield from root.modules()
        return
    yield root
    for node in root.graph.nodes:
        if node.op == "call_module":
            yield from _all_modules(root.get_submodule(str(node.target)))
        elif node.op == "get_attr":
            yield root.get_submodule(str(node.target).rpartition(".")[0])


def decision_of(drawn: Decision | Gate) -> Decision:
    """The decision of a gate, or of a plain draw."""
    return drawn.decision if isinstance(drawn, Gate) else drawn


Clause = Sequence[tuple[int, tuple[Any, ...]]]
"""Draws by position with the values of which each must have one; all must hold."""


@graph_function
def demanded(drawn: Sequence[Decision | Gate], clauses: Sequence[Clause]) -> bool:
    """Whether the current path needs a producer.

    Args:
        drawn: the draws that it depends on.
        clauses: alternatives, of which one suffices. For inputs, EMPTY stands for the empty subset.
    """
    return any(
        all(_drawn(decision_of(drawn[i]), values) for i, values in all_of) for all_of in clauses
    )


def _drawn(decision: Decision, values: tuple[Any, ...]) -> bool:
    if isinstance(decision, str):
        return decision in values
    return any(i in values for i in decision) or (not decision and EMPTY in values)


class Demanded(nn.Module):
    """Part of a graph that is run only where it is needed: `forward(needed, *inputs)`."""

    holds_graphs = True

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        # Not a child: its modules stay where they are, under the user's names.
        self.__dict__["held"] = {"body": body}

    def graph_children(self) -> Mapping[str, nn.Module]:
        """The graph inside, for printing and verification."""
        return self.__dict__["held"]

    def forward(self, needed: bool, *inputs: Any) -> Any:
        """The producer's value, or a `Deferred` where it is not needed."""
        refuse_proxies(self, inputs)
        body = self.__dict__["held"]["body"]
        # What the body needs is not deferred, since its need includes the body's. What is deferred
        # goes to a switch inside, which does not read it on this path.
        return body(*inputs) if needed else Deferred(body, inputs)


class Switch(nn.Module):
    """A LayerChoice that runs the drawn candidate alone, under the user's names.

    `names` are the candidates that may be drawn; `relaxed_only` ones are children all the same.
    `forward(drawn, args, kwargs, gates)`: the drawn name, the call's arguments, and the draws of
    the choices inside the candidates by label.
    """

    holds_graphs = True

    def __init__(
        self, label: str, structure: tuple[Any, ...] | None, names: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.label, self.structure, self.names = label, structure, names
        self.needs: dict[str, tuple[str, ...]] = {}

    def run(self, name: str, args: Any, kwargs: Any, gates: Mapping[str, Any]) -> Any:
        """Call candidate `name`."""
        candidate = self._modules[name]
        if isinstance(candidate, Switch):
            return candidate(gates[candidate.label], args, kwargs, gates)
        inner = [gates[label] for label in self.needs.get(name, ())]
        return call_candidate(candidate, self.structure, args, kwargs, *inner)

    def forward(self, drawn: Any, args: Any, kwargs: Any, gates: Mapping[str, Any]) -> Any:
        """Run the drawn candidate."""
        refuse_proxies(self, drawn, args, kwargs)
        return self.run(decision_of(drawn), args, kwargs, gates)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The label."""
        return f"label={self.label!r}"


class InputSwitch(nn.Module):
    """An InputChoice that reduces the drawn inputs: `forward(drawn, inputs)`."""

    def __init__(self, label: str, reduction: str, n_chosen: int | None) -> None:
        super().__init__()
        self.label, self.reduction, self.n_chosen = label, reduction, n_chosen

    def forward(self, drawn: Any, inputs: Sequence[Any]) -> Any:
        """Reduce the drawn ones of `inputs`."""
        refuse_proxies(self, drawn, inputs)
        return reduce_drawn(inputs, decision_of(drawn), self.reduction)

    def extra_repr(self) -> str:
        """The label and the reduction."""
        return f"label={self.label!r}, reduction={self.reduction!r}"


def reduce_drawn(inputs: Sequence[Any], decision: Any, reduction: str) -> Any:
    """Reduce the chosen inputs; only these are computed, were they deferred."""
    if not decision and reduction in ("sum", "mean"):
        return torch.zeros_like(forced(inputs[0]))
    return reduce_inputs(inputs, decision, reduction)
