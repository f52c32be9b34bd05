"""Facial landmarks: the space that FBNet searches around a simplified PFLD (arXiv 1902.10859)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasfx.architecture import Architecture
from nasfx.choice import LayerChoice
from nasfx.errors import SpaceError
from nasfx.spaces.mobile import Residual, conv_bn, inverted_bottleneck

_EARLY = (
    "mb_k3_res", "mb_k3_e2_res", "mb_k3_res_d3", "mb_k5_res", "mb_k5_e2_res",
    "sep_k3", "sep_k5", "gh_k3", "gh_k5",
)  # fmt: skip
_LATE = (
    "mb_k3_e2_res", "mb_k3_e4_res", "mb_k3_e2_res_se", "mb_k3_res_d3", "mb_k5_res", "mb_k5_e2_res",
    "mb_k5_res_se", "mb_k5_e2_res_se", "gh_k5",
)  # fmt: skip

LAYERS = (_EARLY, _EARLY, _LATE, _LATE, _LATE)
"""The names of the candidates of every searched layer."""

_NAME = re.compile(
    r"mb_k(?P<kernel>[35])(?:_e(?P<ratio>[24]))?(?P<res>_res)?(?:_d(?P<dilation>[23]))?"
    r"(?P<se>_se)?|(?P<other>sep|gh)_k(?P<size>[35])"
)


class Attention(nn.Module):
    """The eSE module: x * hsigmoid(1x1(learned average of x)), for maps of one size."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.average = nn.Conv2d(channels, channels, size, groups=channels, bias=False)
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, size, size) to the same shape."""
        return x * (F.relu6(self.fc(self.average(x)) + 3) / 6)


class Ghost(nn.Module):
    """GhostNet's module (arXiv 1911.11907, section 3.1): half the maps are made of the others."""

    def __init__(self, c_in: int, c_out: int, stride: int, kernel: int) -> None:
        super().__init__()
        half = c_out // 2
        self.primary = nn.Sequential(*conv_bn(c_in, half, 1, stride))
        self.cheap = nn.Sequential(*conv_bn(half, half, kernel, groups=half))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        y = self.primary(x)
        return torch.cat((y, self.cheap(y)), 1)


class Stem(nn.Module):
    """PeleeNet's stem (arXiv 1804.06882, section 2): a convolution, and two ways to halve it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*conv_bn(3, channels, 3, 2))
        self.left = nn.Sequential(
            *conv_bn(channels, channels),
            *conv_bn(channels, channels, 1, 2, groups=channels),
            *conv_bn(channels, channels),
        )
        self.right = nn.MaxPool2d(2)
        self.last = nn.Sequential(*conv_bn(2 * channels, channels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images of side S to maps of side S / 4, and those of side S / 2 before."""
        first = self.first(x)
        return self.last(torch.cat((self.left(first), self.right(first)), 1)), first


class Landmarks(nn.Module):
    """The backbone: a stem, five searched layers, and a head over features of three scales."""

    def __init__(
        self,
        points: int,
        size: int,
        stem: int,
        widths: tuple[int, int],
        candidates: Sequence[Sequence[str]],
    ) -> None:
        super().__init__()
        early, late = widths
        last = size // 16  # the side of the smallest maps
        self.stem = Stem(stem)
        self.reduce = inverted_bottleneck(stem, 2 * stem, early, kernel=3, stride=2)
        self.layers = nn.ModuleList()
        c_in = early
        for i, names in enumerate(candidates):
            c_out, stride, side = (early, 1, 2 * last) if i < 2 else (late, 1 + (i == 2), last)
            ops = {name: _operation(name, c_in, c_out, stride, side) for name in names}
            self.layers.append(LayerChoice(ops, label=f"layer{i}"))
            c_in = c_out
        self.average1 = nn.Conv2d(stem, stem, 9, 8, 1, groups=stem, bias=False)
        self.average2 = nn.Conv2d(early, early, 3, 2, 1, groups=early, bias=False)
        self.join = nn.Conv2d(late + early + stem, late, 1, bias=False)
        attention = Attention(2 * late, last)
        self.mix = Residual(
            inverted_bottleneck(late, 2 * late, late, kernel=3, attention=attention)
        )
        self.widen = _separable(late, 2 * late, 1, 3)
        self.average3 = nn.Conv2d(2 * late, 2 * late, last, groups=2 * late, bias=False)
        self.fc = nn.Conv2d(2 * late, 2 * points, 1)
        _initialize(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, S, S) to landmarks (N, 2 points, 1, 1) and (N, stem, S / 4, S / 4)."""
        feature, large = self.stem(x)
        x = self.reduce(feature)
        x = middle = self.layers[1](self.layers[0](x))
        for layer in self.layers[2:]:
            x = layer(x)
        scales = (x, self.average2(middle), self.average1(large))
        y = self.widen(self.mix(self.join(torch.cat(scales, 1))))
        return self.fc(self.average3(y)), feature


def net(
    points: int = 106,
    *,
    size: int = 112,
    stem: int = 16,
    widths: tuple[int, int] = (32, 64),
    candidates: Sequence[Sequence[str]] = LAYERS,
) -> nn.Module:
    """The landmark network with five searched layers, `layer0` to `layer4`: 9^5 architectures.

    FBNet (arXiv 1812.03443) on a PFLD (Guo et al., arXiv 1902.10859, section 2.2) simplified for
    phones, as in NNI's example: PeleeNet's stem, averages learned by depthwise convolutions, and
    eSE attention. The kernels of those have the size of the maps, so the net takes images of one
    size. The searched net is trained from scratch in this very form. Weights are drawn as in NNI's
    example: Kaiming's normal distribution by outputs.

    Its two outputs are the landmarks, (N, 2 points, 1, 1), and a feature of the stem,
    (N, stem, size / 4, size / 4), from which `auxiliary` predicts angles in training.

    A candidate's name says what it is: `sep_k<3|5>` is a separable convolution, `gh_k<3|5>` a Ghost
    module, `mb_k<3|5>` an inverted bottleneck, followed in this order by `_e<2|4>` for the
    expansion (without it 1, or 2 where there is dilation), `_res` for a residual where the stride
    is 1, `_d<2|3>` for dilation and `_se` for eSE attention.

    Args:
        points: landmarks.
        size: the side of the images, a multiple of 16.
        stem: channels of the stem.
        widths: channels of the first two and of the last three searched layers, even ones.
        candidates: the names of the candidates of every layer.

    Raises:
        SpaceError: size is no multiple of 16, widths are odd, there are not five layers or a name
            of a candidate is unknown.

    Example:
        >>> landmarks, feature = net(points=5, size=32)(torch.zeros(2, 3, 32, 32))
        >>> landmarks.shape, feature.shape
        (torch.Size([2, 10, 1, 1]), torch.Size([2, 16, 8, 8]))
    """
    if size < 16 or size % 16:
        raise SpaceError(f"size={size} must be a multiple of 16, by which the net divides it")
    if len(widths) != 2 or any(width % 2 for width in widths):
        raise SpaceError(f"widths={widths} must be two even numbers: a Ghost module halves them")
    _check_layers(candidates)
    return Landmarks(points, size, stem, widths, candidates)


def auxiliary(channels: int = 16) -> nn.Module:
    """PFLD's auxiliary net (arXiv 1902.10859, section 2.3): from the feature to Euler angles.

    It is trained with the backbone and then dropped, so it is no part of it and has no choices. It
    takes the second output of `net`, (N, channels, 28, 28), and gives three angles, (N, 3), in
    radians: the loss takes their cosines. Maps of side 32 and 36 work too.

    Args:
        channels: of the feature, the `stem` of `net`.

    Example:
        >>> auxiliary()(torch.zeros(2, 16, 28, 28)).shape
        torch.Size([2, 3])
    """
    return nn.Sequential(
        *conv_bn(channels, 64, 3, 2),
        *conv_bn(64, 64, 3),
        *conv_bn(64, 32, 3, 2),
        *conv_bn(32, 64, 7, padding=1),
        nn.MaxPool2d(3),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.Linear(32, 3),
    )


def arch(layers: Sequence[str]) -> Architecture:
    """The architecture of NNI's list of five operation names.

    Raises:
        SpaceError: there are not five names, or one is unknown.

    Example:
        >>> arch(["mb_k3_res", "sep_k5", "gh_k5", "mb_k5_res", "mb_k3_e4_res"])["layer1"]
        'sep_k5'
    """
    _check_layers([[name] for name in layers])
    return Architecture({f"layer{i}": name for i, name in enumerate(layers)})


# -- how -------------------------------------------------------------------------------------------


def _check_layers(candidates: Sequence[Sequence[str]]) -> None:
    if len(candidates) != len(LAYERS):
        raise SpaceError(f"there are {len(LAYERS)} searched layers, not {len(candidates)}")
    for i, names in enumerate(candidates):
        for name in names:
            if _NAME.fullmatch(name) is None:
                raise SpaceError(
                    f"layer {i}: {name!r} is no operation: names are sep_k3, gh_k5 and the like, "
                    "and mb_k<3|5>[_e<2|4>][_res][_d<2|3>][_se]"
                )


def _operation(name: str, c_in: int, c_out: int, stride: int, side: int) -> nn.Module:
    """The candidate of this name, whose outputs have this side."""
    found = _NAME.fullmatch(name)
    assert found is not None
    if found["other"] == "sep":
        return _separable(c_in, c_out, stride, int(found["size"]))
    if found["other"] == "gh":
        return Ghost(c_in, c_out, stride, int(found["size"]))
    dilation = int(found["dilation"] or 1)
    middle = c_in * int(found["ratio"] or (2 if dilation > 1 else 1))
    block = inverted_bottleneck(
        c_in,
        middle,
        c_out,
        kernel=int(found["kernel"]),
        stride=stride,
        dilation=dilation,
        attention=Attention(middle, side) if found["se"] else None,
    )
    return Residual(block) if found["res"] and stride == 1 else block


def _separable(c_in: int, c_out: int, stride: int, kernel: int) -> nn.Module:
    return nn.Sequential(*conv_bn(c_in, c_in, kernel, stride, groups=c_in), *conv_bn(c_in, c_out))


def _initialize(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
