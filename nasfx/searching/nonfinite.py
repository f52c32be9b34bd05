"""Where a NaN comes from: the node, the candidate and the choice that produced it first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from nasfx.architecture import Architecture
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


def nonfinite_error(net: Supernet, inputs: tuple[Any, ...], when: str) -> SearchError:
    """The error for a loss, or a gradient of the architecture, that is not finite.

    Runs subnets one after the other, the current one first and then with each candidate of each
    choice in turn, until one produces the value.
    """
    if not finite(inputs):
        return SearchError(f"{when}: the batch itself holds values that are not finite")
    if not all(finite(p) for p in net.parameters()):
        return SearchError(
            f"{when}: parameters are not finite any more, so an earlier step made them so; lower "
            "the learning rate, or clip the gradients"
        )
    for arch in _subnets(net):
        interpreter = _FirstNonFinite(net.subnet_graph(arch))
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
                f"{whose} ({origin.site}), in the architecture {dict(arch)}"
            )
    return SearchError(f"{when}: every subnet's output is finite, so it is the loss that is not")


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
    base = net.path if net.strategy.samples else net.space.sample(torch.Generator().manual_seed(0))
    found = {base: None}
    for choice in net.space.choices:
        for value in choice.values() if choice.kind == "layer" else ():
            filled = {c.label: next(c.values()) for c in net.space.choices}
            found[net.space.validate({**filled, **base, choice.label: value})] = None
    return list(found)
