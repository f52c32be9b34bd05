"""Depthwise convolutions whose backward is made of calls that torch runs fast on a CPU."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nasfx.ops.function import graph_function

_FAST_WIDTH = 3
"""The widest depthwise kernel whose weight gradient has a fast form in torch on a CPU."""


@graph_function
def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """A depthwise convolution, `F.conv2d` with a group per channel and another backward.

    On a CPU torch has slow forms of the gradients of wide and of dilated depthwise kernels. These
    are the same sums, by calls of fast ones:

    - an image of one pixel is multiplied by one number of the kernel;
    - stride equal to dilation: the kernel reads every such pixel alone, so the convolution is one
      without stride and dilation of `x[:, :, ::stride, ::stride]`;
    - the gradient of `x` at stride 1 is a convolution with the flipped kernel;
    - the gradient of a dilated weight: pixels that the kernel reads together are a batch of their
      own (space to batch), and the kernel is dense there;
    - the gradient of a wide weight: columns of the kernel, three at a time; of small images those
      rows and columns alone that see more than padding.

    Under autocast, in a compiled graph and off CPU it is `F.conv2d`.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, K, K).
        bias: (C,), or None.
        stride: of height and width alike, as the next two.
        padding: with zeros, on each side.
        dilation: between the pixels that the kernel reads.

    Returns:
        What `F.conv2d(x, weight, bias, stride, padding, dilation, groups=C)` gives.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return F.conv2d(x, weight, bias, stride, padding, dilation, x.shape[1])
    tap, rest = divmod(padding, dilation)
    k = weight.shape[2]
    one = x.shape[2:] == (1, 1) and 0 <= 2 * padding - dilation * (k - 1) < stride
    if one and not rest and tap < k:
        y = x * weight[:, 0, tap, tap, None, None]  # all but one see padding
        return y if bias is None else y + bias[:, None, None]
    if stride == dilation > 1 and padding % stride == 0:
        x, padding, stride, dilation = x[:, :, ::stride, ::stride], padding // stride, 1, 1
    return cast("Tensor", _Depthwise.apply(x, weight, bias, stride, padding, dilation))


class _Depthwise(torch.autograd.Function):
    """Its backward is made of differentiable operations: a second backward runs through them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, s: int, p: int, d: int
    ) -> Tensor:
        """The convolution."""
        ctx.settings = s, p, d
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, s, p, d, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients of input, weight and bias."""
        (grad,) = grads
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        return (
            _of_input(grad, x, weight, *ctx.settings) if of_x else None,
            _of_weight(grad, x, weight, *ctx.settings) if of_weight else None,
            grad.sum((0, 2, 3)) if of_bias else None,
            None, None, None,
        )  # fmt: skip


def _of_input(grad: Tensor, x: Tensor, weight: Tensor, s: int, p: int, d: int) -> Tensor:
    back = d * (weight.shape[2] - 1) - p
    if s > 1 or back < 0:
        mask = [True, False, False]
        return _backward(grad, x, weight, (s, s), (p, p), (d, d), mask)[0]
    return F.conv2d(grad, weight.flip(2, 3), None, 1, back, d, x.shape[1])


def _of_weight(grad: Tensor, x: Tensor, weight: Tensor, s: int, p: int, d: int) -> Tensor:
    same = x.shape[2:] == grad.shape[2:]
    if d > 1 and s == 1 and same and p % d == 0 and all(n % d == 0 for n in x.shape[2:]):
        return _of_weight(_space_to_batch(grad, d), _space_to_batch(x, d), weight, 1, p // d, 1)
    mask = [False, True, False]
    k = weight.shape[3]
    rows, columns = (_seen(k, x.shape[i], grad.shape[i], s, p) for i in (2, 3))
    if d > 1 or k <= _FAST_WIDTH or not rows or not columns:
        return _backward(grad, x, weight, (s, s), (p, p), (d, d), mask)[1]
    # Torch is slow, too, where a kernel with padding is higher than the image, or is wide and moves
    # by more than a pixel: there the rows are padded before.
    padded = len(rows) < k or x.shape[2] < k or (s > 1 and k > 5)
    high = _margins(rows, x.shape[2], grad.shape[2], s, p) if padded else (0, 0)
    parts: list[Tensor] = []
    for first in columns[::_FAST_WIDTH]:
        some = range(first, min(first + _FAST_WIDTH, columns.stop))
        moved = F.pad(x, (*_margins(some, x.shape[3], grad.shape[3], s, p), *high))
        part = weight[:, :, rows.start : rows.stop, some.start : some.stop]
        rest = 0 if padded else p, 0
        parts.append(_backward(grad, moved, part, (s, s), rest, (1, 1), mask)[1])
    outside = columns.start, k - columns.stop, rows.start, k - rows.stop
    return F.pad(torch.cat(parts, 3), outside)


def _seen(k: int, pixels: int, outputs: int, s: int, p: int) -> range:
    """Which rows of a kernel of k see an image of so many rows, and not padding alone."""
    return range(max(0, p - s * (outputs - 1)), min(k, p + pixels))


def _margins(rows: range, pixels: int, outputs: int, s: int, p: int) -> tuple[int, int]:
    """What is padded before and after an image that these rows of the kernel see; or cropped."""
    before = p - rows.start
    return before, (outputs - 1) * s + len(rows) - pixels - before


def _space_to_batch(x: Tensor, d: int) -> Tensor:
    """(N, C, H, W) to (d d N, C, H / d, W / d): every d-th pixel, from every start."""
    return torch.cat([x[:, :, i::d, j::d] for i in range(d) for j in range(d)])


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor,
    s: tuple[int, int], p: tuple[int, int], d: tuple[int, int], mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Torch's own gradients; those that `mask` leaves out are undefined."""
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, s, p, d, False, (0, 0), x.shape[1], mask
    )
