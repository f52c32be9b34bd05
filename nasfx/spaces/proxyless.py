"""The mobile space of ProxylessNAS (arXiv 1812.00332): inverted bottlenecks, or none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from nasfx.architecture import Architecture
from nasfx.choice import LayerChoice
from nasfx.errors import SpaceError
from nasfx.spaces.mobile import Residual, conv_bn, inverted_bottleneck

BLOCKS = {f"k{kernel}e{ratio}": (kernel, ratio) for kernel in (3, 5, 7) for ratio in (3, 6)}
"""Kernel and expansion ratio of the candidates that compute something, by name."""

ZERO = "zero"
"""The candidate that skips a block."""


class MobileNet(nn.Module):
    """Stem, a fixed block, the searched blocks, 1x1 convolution, global average and classifier."""

    def __init__(
        self,
        stem: int,
        widths: Sequence[int],
        head: int,
        classes: int,
        repeats: Sequence[int],
        strides: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        plan = list(_plan(widths, repeats, strides))
        self.first_conv = nn.Sequential(*conv_bn(3, stem, 3, 2, act=nn.ReLU6))
        self.blocks = nn.Sequential(
            _bottleneck(stem, widths[0], 1, kernel=3, ratio=1),
            *(
                LayerChoice(_candidates(c_in, c_out, stride), label=f"block{i}")
                for i, (c_in, c_out, stride) in enumerate(plan)
            ),
        )
        self.feature_mix_layer = nn.Sequential(*conv_bn(widths[-1], head, act=nn.ReLU6))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(head, classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes)."""
        x = self.feature_mix_layer(self.blocks(self.first_conv(x)))
        return self.classifier(self.dropout(self.pool(x).flatten(1)))


def mobile(
    stem: int = 32,
    widths: Sequence[int] = (16, 24, 40, 80, 96, 192, 320),
    head: int = 1280,
    classes: int = 1000,
    *,
    repeats: Sequence[int] = (4, 4, 4, 4, 4, 1),
    strides: Sequence[int] = (2, 2, 2, 1, 2, 1),
    dropout: float = 0.0,
) -> nn.Module:
    """The search space of ProxylessNAS on ImageNet: 21 inverted bottlenecks.

    Cai et al., arXiv 1812.00332, section 4.2 and the authors' released code. A block has kernel 3,
    5 or 7 and expansion ratio 3 or 6. One that changes neither size nor channels has a residual,
    and "zero" as a further candidate, which skips the block: its output is x. By default there are
    6^6 7^15 architectures, `block0` to `block20`. The net is trained from scratch in this very
    form. Weights are drawn as by the authors: N(0, 2 / (k^2 output channels)) for convolutions.

    Args:
        stem: channels of the first convolution.
        widths: output channels of the fixed first block, then of every stage. `MOBILE` was
            published with `MOBILE_WIDTHS`, which differ from the authors' default for the search.
        head: channels of the last convolution.
        classes: outputs of the classifier.
        repeats: blocks of every stage.
        strides: of the first block of every stage.
        dropout: probability before the classifier.

    Raises:
        SpaceError: widths, repeats and strides do not fit each other.

    Example:
        >>> import torch
        >>> net = mobile(4, (4, 8, 8), head=8, classes=10, repeats=(2, 1), strides=(2, 1))
        >>> net(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """
    return MobileNet(stem, widths, head, classes, repeats, strides, dropout)


def arch(blocks: Sequence[str]) -> Architecture:
    """The architecture of a list of block names: "k3e3" to "k7e6", or "zero" for a skipped one.

    "k5e3" has kernel 5 and expansion ratio 3: the authors' "5x5_MBConv3". The default space has 21
    blocks. The fixed first block is not listed.

    Raises:
        SpaceError: a name is unknown.

    Example:
        >>> arch(["k5e3", "zero"])
        Architecture({'block0': 'k5e3', 'block1': 'zero'})
    """
    for i, name in enumerate(blocks):
        if name not in BLOCKS and name != ZERO:
            raise SpaceError(f"block {i}: {name!r} is none of {(*BLOCKS, ZERO)}")
    return Architecture({f"block{i}": name for i, name in enumerate(blocks)})


MOBILE = arch(
    [
        *("k5e3", "k3e3", "zero", "zero"),
        *("k7e3", "k3e3", "k5e3", "k5e3"),
        *("k7e6", "k5e3", "k5e3", "k5e3"),
        *("k5e6", "k5e3", "k5e3", "k5e3"),
        *("k7e6", "k7e6", "k7e3", "k7e3"),
        "k7e6",
    ]
)
"""ProxylessNAS (Mobile): 4.08 M parameters, 320 M MACs, 74.6 % top-1; see `MOBILE_WIDTHS`."""

MOBILE_WIDTHS = (16, 32, 40, 80, 96, 192, 320)
"""The widths that `MOBILE` was published with: `mobile(widths=MOBILE_WIDTHS)`."""


# -- how -------------------------------------------------------------------------------------------


def _plan(
    widths: Sequence[int], repeats: Sequence[int], strides: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """Input channels, output channels and stride of every searched block."""
    if not len(widths) - 1 == len(repeats) == len(strides) > 0 or min(repeats) < 1:
        raise SpaceError(
            f"repeats={tuple(repeats)} and strides={tuple(strides)} must have one value, and each "
            f"stage a block, for every one of widths={tuple(widths)} but the first, which is the "
            "fixed block's"
        )
    c_in = widths[0]
    for width, n, stride in zip(widths[1:], repeats, strides, strict=True):
        for i in range(n):
            yield c_in, width, stride if i == 0 else 1
            c_in = width


def _candidates(c_in: int, c_out: int, stride: int) -> dict[str, nn.Module]:
    residual = stride == 1 and c_in == c_out
    candidates: dict[str, nn.Module] = {}
    for name, (kernel, ratio) in BLOCKS.items():
        block = _bottleneck(c_in, c_out, stride, kernel=kernel, ratio=ratio)
        candidates[name] = Residual(block) if residual else block
    if residual:
        candidates[ZERO] = nn.Identity()
    return candidates


def _bottleneck(c_in: int, c_out: int, stride: int, *, kernel: int, ratio: int) -> nn.Module:
    return inverted_bottleneck(
        c_in, c_in * ratio, c_out, kernel=kernel, stride=stride, expand=ratio > 1, act=nn.ReLU6
    )


def _initialize(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
