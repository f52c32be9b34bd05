"""Average pools as depthwise convolutions, which torch runs faster on a CPU."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nasfx.ops.function import graph_function


@graph_function
def average_pool(
    x: Tensor, kernel: int, padding: int = 0, count_include_pad: bool = True
) -> Tensor:
    """An average pool that moves by one pixel, as a depthwise convolution with equal weights.

    At the border, where a window holds padding that does not count, what it gives is divided by the
    part of the window that lies in the image. The gradient is the same in reverse.

    Under autocast, in a compiled graph and off CPU it is `F.avg_pool2d`.

    Args:
        x: (N, C, H, W).
        kernel: height and width of the window.
        padding: with zeros, on each side.
        count_include_pad: whether the padding counts as pixels.

    Returns:
        What `F.avg_pool2d(x, kernel, 1, padding, False, count_include_pad)` gives.
    """
    compiled = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    if compiled or x.device.type != "cpu" or 2 * padding > kernel or x.dim() != 4:
        return F.avg_pool2d(x, kernel, 1, padding, False, count_include_pad)
    inverse = None
    if padding and not count_include_pad:
        inverse = F.avg_pool2d(x.new_ones(1, 1, *x.shape[2:]), kernel, 1, padding).reciprocal_()
    return cast("Tensor", _AveragePool.apply(x, inverse, kernel, padding))


class _AveragePool(torch.autograd.Function):
    """Its backward is made of differentiable operations: a second backward runs through them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor | None, k: int, p: int) -> Tensor:
        """The means; `inverse`, (1, 1, H', W'), is one over the part of a window that counts."""
        ctx.settings = k, p
        ctx.save_for_backward(inverse)
        y = _mean(x, k, p)
        return y if inverse is None else y.mul_(inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradient of the input."""
        (grad,) = grads
        (inverse,) = ctx.saved_tensors
        k, p = ctx.settings
        return _mean(grad if inverse is None else grad * inverse, k, k - 1 - p), None, None, None


def _mean(x: Tensor, k: int, p: int) -> Tensor:
    channels = x.shape[1]
    return F.conv2d(x, x.new_full((channels, 1, k, k), k**-2), None, 1, p, 1, channels)
