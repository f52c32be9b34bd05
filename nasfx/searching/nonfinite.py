"""Where a NaN comes from: the node, the candidate and the choice that produced it first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from nasfx.architecture import Architecture, Decision, SpaceChoice
from nasfx.errors import SearchError
from nasfx.rewriting.graph import provenance
from nasfx.rewriting.printing import format_node
from nasfx.subnet import evaluating
from nasfx.supernet import Supernet


def finite(value: Any) -> bool:
    """Whether every floating-point tensor in `value` is finite throughout."""
    return all(
        bool(torch.isfinite(leaf).all())
        for leaf in pytree.tree_leaves(value)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )


class _FirstNonFinite(fx.Interpreter):
    found: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.found is None and n.op not in ("placeholder", "output") and not finite(value):
            self.found = n
        return value


def nonfinite_error(
    net: Supernet, inputs: tuple[Any, ...], when: str, *, backward: bool = False
) -> SearchError:
    """The error for a loss, or a gradient of the architecture, that is not finite.

    Runs subnets one after the other, the current one first and then with each candidate of each
    choice in turn, and at last the mixture, until one produces the value.

    Args:
        net: the net, in the step that failed.
        inputs: the batch's.
        when: what is not finite, and where the search is.
        backward: whether that is a gradient; the loss was finite.
    """
    if not finite(inputs):
        return SearchError(f"{when}: the batch itself holds values that are not finite")
    if not all(finite(p) for p in net.parameters()):
        return SearchError(
            f"{when}: parameters are not finite any more, so an earlier step made them so; lower "
            "the learning rate, or clip the gradients"
        )
    for graph, where in _graphs(net):
        interpreter = _FirstNonFinite(graph)
        modes = [(m, m.training) for m in net.modules()]
        with evaluating(net):
            for m, training in modes:
                m.training = training  # batch statistics as in the step; buffers are copies here
            interpreter.run(*inputs)
        node = interpreter.found
        if node is not None:
            origin = provenance(node)
            whose = (
                f"candidate {origin.part!r} of choice {origin.label!r}" if origin.label
                else "a part that belongs to no choice"
            )  # fmt: skip
            return SearchError(
                f"{when}: the first value that is not finite comes from {format_node(node)}, "
                f"{whose} ({origin.site}), in {where}"
            )
    fault = (
        "so a derivative is not, as that of a square root or a norm at 0" if backward
        else "so it is the loss that is not"
    )  # fmt: skip
    return SearchError(f"{when}: every subnet's output is finite, {fault}")


def _graphs(net: Supernet) -> Iterator[tuple[fx.GraphModule, str]]:
    """What may have produced the value, and what the message calls it."""
    for arch in _subnets(net):
        yield net.subnet_graph(arch), f"the architecture {dict(arch)}"
    if not net.strategy.samples:
        yield net.graph_module, "the mixture of all candidates"


def check_parameters(net: Supernet, when: str) -> None:
    """Check that the parameters are finite, before they are saved.

    Raises:
        SearchError: one is not; it is named.
    """
    for name, p in net.named_parameters():
        if not finite(p):
            raise SearchError(
                f"{when}: the parameter {name} is not finite any more, so an earlier step made it "
                "so, and nothing was saved; lower the learning rate, or clip the gradients"
            )


def _subnets(net: Supernet) -> list[Architecture]:
    """Architectures that hold every candidate of every choice, nested ones too; few of them.

    From each, every choice that is active there is decided anew in every way; what has a decision
    that none before had is one more.
    """
    first = net.path if net.strategy.samples else net.space.sample(torch.Generator().manual_seed(0))
    defaults = {choice.label: next(choice.values()) for choice in net.space.choices}
    found = [first]
    seen = _decisions(first)
    for arch in found:  # which grows
        for choice in net.space.choices:
            for value in _values(choice) if choice.label in arch else ():
                other = net.space.validate({**defaults, **arch, choice.label: value})
                if not seen.issuperset(_decisions(other)):
                    seen.update(_decisions(other))
                    found.append(other)
    return found


def _decisions(arch: Architecture) -> set[tuple[str, str]]:
    return {(label, str(value)) for label, value in arch.items()}


def _values(choice: SpaceChoice) -> Iterator[Decision]:
    """Every candidate of a layer choice; of an input choice a set with every input."""
    if choice.kind == "layer":
        yield from choice.values()
        return
    n, chosen = len(choice.candidates), choice.n_chosen or 1
    for i in range(n):
        yield tuple(sorted((i + k) % n for k in range(chosen)))
