"""Convolutions of one input that are summed are one convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from nasfx.ops.depthwise import depthwise_conv
from nasfx.ops.function import graph_function


@graph_function
def folded_conv(
    gate: Tensor,
    candidates: Sequence[int],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """sum_k gate[candidates[k]] * conv2d(x, weights[k], biases[k]), as one convolution.

    The kernel is the weighted sum of the kernels, the smaller ones with zeros around them. The
    weights' and the gate's gradients follow from that sum, so no output is kept for them.

    Args:
        gate: the weights of all candidates of the choice, shape (candidates,).
        candidates: those that are convolutions.
        x: (N, C, H, W).
        weights: (C_out, C / groups, K, K) with odd K, one for each of `candidates`.
        biases: (C_out,) or None, likewise.
        stride: of height and width alike, as the next two.
        padding: of the widest kernel, with zeros; the others' centres lie on its own.
        dilation: between the pixels that the kernels read.
        groups: of channels.
    """
    widest = max(weight.shape[3] for weight in weights)
    each = gate.to(weights[0].dtype).unbind(0)
    kernel: Tensor | None = None
    bias: Tensor | None = None
    for k, weight, own in zip(candidates, weights, biases, strict=True):
        around = (widest - weight.shape[3]) // 2
        part = each[k] * F.pad(weight, (around,) * 4)
        kernel = part if kernel is None else kernel + part
        if own is not None:
            bias = each[k] * own if bias is None else bias + each[k] * own
    assert kernel is not None
    if groups == x.shape[1] == kernel.shape[0] > 1:
        return depthwise_conv(x, kernel, bias, stride, padding, dilation)
    return F.conv2d(x, kernel, bias, stride, padding, dilation, groups)
