"""Operators that several spaces share.

Convolutions have no bias, and all operators keep height and width at stride 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nasfx.errors import SpaceError


def relu_conv_bn(
    c_in: int, c_out: int, kernel: int = 1, stride: int = 1, *, affine: bool = True
) -> nn.Sequential:
    """ReLU, convolution, batch norm: (N, c_in, H, W) to (N, c_out, H / stride, W / stride)."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(c_out, affine=affine),
    )


def separable_conv(c: int, kernel: int, stride: int = 1, *, affine: bool = True) -> nn.Sequential:
    """Twice (ReLU, depthwise, pointwise, batch norm); the stride is in the first.

    Source: DARTS (arXiv 1806.09055), section 3.1.1.
    """
    return nn.Sequential(
        *_depthwise(c, kernel, stride, 1, affine=affine),
        *_depthwise(c, kernel, 1, 1, affine=affine),
    )


def dilated_conv(c: int, kernel: int, stride: int = 1, *, affine: bool = True) -> nn.Sequential:
    """ReLU, depthwise convolution of dilation 2, pointwise, batch norm.

    Source: DARTS (arXiv 1806.09055), section 3.1.1.
    """
    return nn.Sequential(*_depthwise(c, kernel, stride, 2, affine=affine))


def _depthwise(
    c: int, kernel: int, stride: int, dilation: int, *, affine: bool
) -> tuple[nn.Module, ...]:
    padding = dilation * (kernel // 2)
    return (
        nn.ReLU(),
        nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=False),
        nn.Conv2d(c, c, 1, bias=False),
        nn.BatchNorm2d(c, affine=affine),
    )


class FactorizedReduction(nn.Module):
    """Halve height and width by two pointwise convolutions of stride 2, one pixel apart.

    (N, c_in, H, W) to (N, c_out, H / 2, W / 2), with even H and W: each convolution makes half of
    the channels. Before them a ReLU and after them a batch norm, unless `relu` or `norm` is False.

    Source: DARTS (arXiv 1806.09055), and ENAS (arXiv 1802.03268), the authors' code.
    """

    def __init__(
        self, c_in: int, c_out: int, *, relu: bool = True, norm: bool = True, affine: bool = True
    ) -> None:
        super().__init__()
        self.relu = nn.ReLU() if relu else nn.Identity()
        self.even = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(c_in, c_out - c_out // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(c_out, affine=affine) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) to (N, c_out, H / 2, W / 2)."""
        x = self.relu(x)
        return self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], 1))


class Zero(nn.Module):
    """Zeros of the shape that an operator of the same stride gives."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to zeros of (N, C, H / stride, W / stride), rounded up."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return x * 0


class DropPath(nn.Module):
    """In train mode, zero whole samples with probability `p` and scale the others by 1 / (1 - p).

    The mask is that of a torch dropout over one channel, so the probability stays settable in a
    finalized subnet, where nothing of nasfx is left; see `set_drop_path`.

    Source: FractalNet (arXiv 1605.07648), as in the authors' code of DARTS.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout3d(p)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same; in eval mode `x` itself."""
        return self.dropout(x.unsqueeze(1)).squeeze(1)


def set_drop_path(net: nn.Module, p: float) -> None:
    """Set the probability of every drop path in a space of this package, or in its subnet.

    Args:
        net: a model in its `evaluation` form, or what `nasfx.finalize` made of one.
        p: the probability to drop a path, in [0, 1).

    Raises:
        SpaceError: `p` is out of range, or there is no drop path in `net`.

    Example:
        >>> from nasfx.spaces import darts
        >>> net = darts.cifar(channels=4, cells=3, evaluation=True)
        >>> for epoch in range(2):
        ...     set_drop_path(net, 0.2 * epoch / 2)
    """
    if not 0 <= p < 1:
        raise SpaceError(f"drop path: p={p!r} must be in [0, 1)")
    drops = [module for module in net.modules() if isinstance(module, nn.Dropout3d)]
    if not drops:
        raise SpaceError(
            f"{type(net).__name__} has no drop path: only the form with evaluation=True has"
        )
    for drop in drops:
        drop.p = p


def auxiliary_head(
    c: int, classes: int, stride: int, *, last_norm: bool = True, bias: bool = True
) -> nn.Sequential:
    """A second classifier on the features of a middle cell, for training only.

    ReLU, 5x5 average pool without padding, 1x1 convolution to 128, 2x2 convolution to 768, linear.
    The features are 8x8 for stride 3 and 7x7 for stride 2, (N, c, 8, 8) to (N, classes).

    Args:
        c: the channels of the features.
        classes: how many there are.
        stride: of the pool.
        last_norm: whether a batch norm follows the second convolution.
        bias: of the linear layer.

    Source: DARTS (arXiv 1806.09055), appendix A.2; the authors' code.
    """
    norm = [nn.BatchNorm2d(768)] if last_norm else []
    return nn.Sequential(
        nn.ReLU(),
        nn.AvgPool2d(5, stride, count_include_pad=False),
        nn.Conv2d(c, 128, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 768, 2, bias=False),
        *norm,
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(768, classes, bias),
    )


def checked_sizes(space: str, channels: int, cells: int, classes: int, fewest: int) -> None:
    """Refuse sizes that a space cannot be built with.

    Raises:
        SpaceError: odd or no channels, fewer than `fewest` cells, or no classes.
    """
    if channels < 2 or channels % 2:
        raise SpaceError(f"{space}: channels={channels!r} must be an even number, 2 or more")
    if cells < fewest:
        raise SpaceError(f"{space}: {cells!r} cells or layers are too few; give {fewest} or more")
    if classes < 1:
        raise SpaceError(f"{space}: classes={classes!r} must be 1 or more")
