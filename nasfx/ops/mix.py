"""The weighted sum of candidates' outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        outputs: one output for each weight, all of one structure and of equal shapes.
        label: the choice's label, for errors and for the reader of the graph.

    Raises:
        SearchError: the outputs' structures or shapes differ.

    Source: DARTS (arXiv 1806.09055), equation 2.
    """
    if isinstance(outputs[0], Tensor):
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
        return _sum(gate, column, label)
    if any(type(v) is not type(column[0]) or v != column[0] for v in column):
        raise SearchError(f"choice {label!r}: candidates return different constants: {column}")
    return column[0]


def _sum(gate: Tensor, outputs: Sequence[Tensor], label: str) -> Tensor:
    for k, output in enumerate(outputs):
        if not isinstance(output, Tensor) or output.shape != outputs[0].shape:
            raise SearchError(unlike_shapes(label, [getattr(o, "shape", None) for o in outputs], k))
        if not (output.is_floating_point() or output.is_complex()):
            raise SearchError(f"choice {label!r}: outputs of {output.dtype} have no weighted sum")
    weights = gate.to(outputs[0].dtype).unbind(0)
    total = weights[0] * outputs[0]
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        total = total + weight * output
    return total


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
