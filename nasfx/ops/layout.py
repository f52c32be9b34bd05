"""How the channels of images lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from nasfx.ops.function import graph_function


@graph_function
def channels_last(x: Tensor) -> Tensor:
    """`x` with its channels last in memory; values, shape and gradients are those of `x`.

    Convolutions, pools and batch norms of torch then compute in that layout, which is faster on
    CPU. What is no 4-d floating-point tensor on a CPU is returned as it is.

    Args:
        x: images, (N, C, H, W).
    """
    if x.dim() != 4 or x.device.type != "cpu" or not x.is_floating_point():
        return x
    return x.contiguous(memory_format=torch.channels_last)
