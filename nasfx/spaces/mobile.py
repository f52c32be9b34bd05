"""Convolutions with batch norm, and the inverted bottleneck, that the mobile spaces share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """The sum, of the shape of `x`."""
        return x + self.branch(x)


def conv_bn(
    c_in: int,
    c_out: int,
    kernel: int = 1,
    stride: int = 1,
    *,
    groups: int = 1,
    dilation: int = 1,
    padding: int | None = None,
    act: Callable[[], nn.Module] | None = nn.ReLU,
    affine: bool = True,
) -> list[nn.Module]:
    """A convolution without bias, batch norm and, unless `act` is None, an activation.

    By default the padding is the one that keeps the size at stride 1.
    """
    if padding is None:
        padding = dilation * (kernel // 2)
    layers: list[nn.Module] = [
        nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(c_out, affine=affine),
    ]
    return layers if act is None else [*layers, act()]


def inverted_bottleneck(
    c_in: int,
    middle: int,
    c_out: int,
    *,
    kernel: int,
    stride: int = 1,
    dilation: int = 1,
    expand: bool = True,
    attention: nn.Module | None = None,
    act: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """1x1 to `middle` channels, depthwise, 1x1 without activation: MobileNetV2's block.

    MobileNetV2 is arXiv 1801.04381, section 3.3. There is no residual in it.

    Args:
        c_in: channels of the input.
        middle: channels between the two 1x1 convolutions.
        c_out: channels of the output.
        kernel: of the depthwise convolution.
        stride: of the depthwise convolution.
        dilation: of the depthwise convolution.
        expand: whether there is a first 1x1 convolution; without it `middle` must be `c_in`.
        attention: a module between the depthwise batch norm and its activation.
        act: makes an activation.
    """
    layers = conv_bn(c_in, middle, act=act) if expand else []
    layers += conv_bn(middle, middle, kernel, stride, groups=middle, dilation=dilation, act=None)
    layers += [act()] if attention is None else [attention, act()]
    return nn.Sequential(*layers, *conv_bn(middle, c_out, act=None))
