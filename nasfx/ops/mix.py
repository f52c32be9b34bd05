"""The weighted sum of candidates' outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nasfx.errors import SearchError
from nasfx.ops.function import graph_function


@graph_function
def mix(gate: Tensor, outputs: Sequence[Any], label: str = "") -> Any:
    """sum_k gate[k] * outputs[k]; tuples, lists and dicts of tensors are mixed item by item.

    Args:
        gate: the weights, shape (candidates,); cast to the outputs' dtype.
        outputs: one output for each weight, all of one structure and of equal shapes; the number 0
            stands for zeros of that shape.
        label: the choice's label, for errors and for the reader of the graph.

    Raises:
        SearchError: the outputs' structures or shapes differ.

    Source: DARTS (arXiv 1806.09055), equation 2.
    """
    if any(isinstance(output, Tensor) for output in outputs):
        return _sum(gate, outputs, label)
    first, spec = pytree.tree_flatten(outputs[0])
    rows = [first]
    for k, output in enumerate(outputs[1:], 1):
        leaves, other = pytree.tree_flatten(output)
        if other != spec:
            raise SearchError(f"choice {label!r}: outputs 0 and {k} have different structures")
        rows.append(leaves)
    mixed = [_mixed(gate, column, label) for column in zip(*rows, strict=True)]
    return pytree.tree_unflatten(mixed, spec)


def _mixed(gate: Tensor, column: Sequence[Any], label: str) -> Any:
    if any(isinstance(value, Tensor) for value in column):
        # Only as a whole output does the number 0 stand for zeros.
        return _sum(gate, [v if isinstance(v, Tensor) else None for v in column], label)
    if any(type(v) is not type(column[0]) or v != column[0] for v in column):
        raise SearchError(f"choice {label!r}: candidates return different constants: {column}")
    return column[0]


def add_mixed(total: Tensor, gate: Tensor, outputs: Sequence[Any], label: str = "") -> Tensor:
    """`total + mix(gate, outputs)` in the memory of `total`, which no backward may read.

    Args:
        total: of the shape of the outputs.
        gate: as for `mix`, as the next two.
        outputs: tensors, one of them at least, and the number 0.
        label: the choice's label.

    Raises:
        SearchError: as `mix`.
    """
    return _sum(gate, outputs, label, total)


def _sum(gate: Tensor, outputs: Sequence[Any], label: str, start: Tensor | None = None) -> Tensor:
    kept = _kept(outputs)
    check_alike(outputs, label)
    tensors: list[Tensor] = [outputs[k] for k in kept]
    first = tensors[0]
    weights = gate.to(first.dtype)
    every = tensors if start is None else [start, *tensors]
    one_dtype = all(tensor.dtype == first.dtype for tensor in every)
    if one_dtype and not first.is_complex() and not torch.compiler.is_compiling():
        return cast("Tensor", _WeightedSum.apply(weights, kept, start, *tensors))
    each = weights.unbind(0)
    total = each[kept[0]] * first
    for k, output in zip(kept[1:], tensors[1:], strict=True):
        total = total + each[k] * output
    return total if start is None else start.add_(total)


def _kept(outputs: Sequence[Any]) -> list[int]:
    """The outputs that are not the number 0."""
    return [k for k, output in enumerate(outputs) if not (type(output) is int and output == 0)]


def check_alike(outputs: Sequence[Any], label: str) -> None:
    """Refuse what has no weighted sum: other things than floating-point tensors of one shape."""
    kept = _kept(outputs)
    for k in kept:
        output = outputs[k]
        if not isinstance(output, Tensor) or output.shape != outputs[kept[0]].shape:
            raise SearchError(unlike_shapes(label, [getattr(o, "shape", None) for o in outputs], k))
        if not (output.is_floating_point() or output.is_complex()):
            raise SearchError(f"choice {label!r}: outputs of {output.dtype} have no weighted sum")


class _WeightedSum(torch.autograd.Function):
    """sum_k weights[kept[k]] * outputs[k], added up in place, on `start` if given; one real dtype.

    The outputs are kept for the backward only where the weights need a gradient, which is a dot
    product for each of them: no product of two outputs is ever stored.
    """

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, kept: Sequence[int], start: Tensor | None, *outputs: Tensor
    ) -> Tensor:
        """The sum, of the shape of the outputs."""
        ctx.kept = kept
        ctx.save_for_backward(weights, *(outputs if ctx.needs_input_grad[0] else ()))
        terms = list(zip(kept, outputs, strict=True))
        each = weights.unbind(0)
        if start is None:
            k, output = terms.pop(0)
            total = each[k] * output
        else:
            ctx.mark_dirty(start)
            total = start
        for k, output in terms:
            total.addcmul_(each[k], output)
        ctx.last = total.dim() == 4 and total.is_contiguous(memory_format=torch.channels_last)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients, made of differentiable operations: a second backward runs through them."""
        (grad,) = grads
        if ctx.last:  # the backward of a slice gives rows, in which all before it would be slower
            grad = grad.contiguous(memory_format=torch.channels_last)
        weights, *outputs = ctx.saved_tensors
        each = weights.unbind(0)
        of_weights = None
        if outputs:
            dots = dict(zip(ctx.kept, (_dot(grad, output) for output in outputs), strict=True))
            nothing = torch.zeros_like(each[0])
            of_weights = torch.stack([dots.get(k, nothing) for k in range(len(each))])
        needs = ctx.needs_input_grad[3:]
        return (
            of_weights,
            None,
            grad if ctx.needs_input_grad[2] else None,
            *(each[k] * grad if need else None for k, need in zip(ctx.kept, needs, strict=True)),
        )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products, 0-d; in one sweep where both lie in memory in one order."""
    if a.dtype in (torch.float32, torch.float64):
        if a.is_contiguous() and b.is_contiguous():
            return torch.dot(a.view(-1), b.view(-1))
        last = torch.channels_last
        if a.dim() == 4 and all(t.is_contiguous(memory_format=last) for t in (a, b)):
            return torch.dot(*(t.permute(0, 2, 3, 1).reshape(-1) for t in (a, b)))
    return (a * b).sum()


def unlike_shapes(label: str, shapes: Sequence[Any], k: int, where: str = "") -> str:
    """The message for candidates whose outputs cannot be summed."""
    listed = ", ".join(
        "no tensor" if s is None else str(tuple(s)) if isinstance(s, torch.Size) else str(s)
        for s in shapes
    )
    return (
        f"choice {label!r}{where}: a weighted sum, or the gradient of a gate, needs outputs of one "
        f"shape, but candidate {k} differs: {listed}. Make the candidates agree (stride, padding, "
        "channels), or use a strategy that samples one path and gives its gate no gradient, such "
        "as 'enas' or 'single-path'"
    )
