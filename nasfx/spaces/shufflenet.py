"""The space of Single Path One-Shot NAS (arXiv 1904.00420): blocks of ShuffleNetV2."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from nasfx.architecture import Architecture
from nasfx.choice import LayerChoice
from nasfx.errors import CheckpointError, SpaceError
from nasfx.spaces.mobile import conv_bn

CHOICES = ("shuffle3", "shuffle5", "shuffle7", "xception")
"""The candidates of every block, in the order of the authors' numbers 0 to 3."""


class ShuffleBlock(nn.Module):
    """A block of ShuffleNetV2 (arXiv 1807.11164, figure 3c, d) around a given main branch.

    At stride 1 the even channels pass and the odd ones go through the main branch. At stride 2 all
    channels go through both branches. The outputs are concatenated.
    """

    def __init__(self, main: list[nn.Module], projection: list[nn.Module] | None) -> None:
        super().__init__()
        self.branch_main = nn.Sequential(*main)
        self.branch_proj = None if projection is None else nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C_out, H / stride, W / stride)."""
        if self.branch_proj is None:
            return torch.cat((x[:, ::2], self.branch_main(x[:, 1::2])), 1)
        return torch.cat((self.branch_proj(x), self.branch_main(x)), 1)


class ShuffleNet(nn.Module):
    """Stem, blocks, 1x1 convolution, global average, dropout and a classifier without bias."""

    def __init__(
        self,
        classes: int,
        stem: int,
        widths: Sequence[int],
        repeats: Sequence[int],
        head: int,
        dropout: float,
        affine: bool,
    ) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*conv_bn(3, stem, 3, 2, affine=affine))
        plan = list(_plan(stem, widths, repeats))
        self.features = nn.Sequential(
            *(
                LayerChoice(_candidates(c_in, c_out, stride, affine), label=f"block{i}")
                for i, (c_in, c_out, stride) in enumerate(plan)
            )
        )
        self.conv_last = nn.Sequential(*conv_bn(widths[-1], head, affine=affine))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Sequential(nn.Linear(head, classes, bias=False))
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W), of sides that are multiples of 32, to logits (N, classes)."""
        x = self.conv_last(self.features(self.first_conv(x)))
        return self.classifier(self.dropout(self.pool(x)).flatten(1))


def spos(
    classes: int = 1000,
    evaluation: bool = False,
    *,
    stem: int = 16,
    widths: Sequence[int] = (64, 160, 320, 640),
    repeats: Sequence[int] = (4, 4, 8, 4),
    head: int = 1024,
    dropout: float = 0.1,
) -> nn.Module:
    """The search space of Single Path One-Shot NAS: 20 blocks of 4 choices.

    Guo et al., arXiv 1904.00420, sections 3.3 and 4, built as in the authors' released code: a
    block is a ShuffleNetV2 unit with kernel 3, 5 or 7, or the deeper "Shuffle Xception" unit. There
    are 4^20 architectures, `block0` to `block19`. The search over channels is not part of it.
    Weights are drawn as by the authors: N(0, 0.01) for the stem and the classifier, standard
    deviation 1 / (input channels of a group) for all other convolutions.

    Args:
        classes: outputs of the classifier.
        evaluation: the form that the chosen architecture is trained in from scratch: batch norms
            have weights and biases, which those of the supernet have not.
        stem: channels of the first convolution.
        widths: output channels of every stage, even ones, each larger than the one before; every
            stage begins with stride 2.
        repeats: blocks of every stage.
        head: channels of the last convolution.
        dropout: probability before the classifier.

    Raises:
        SpaceError: widths and repeats do not fit each other.

    Example:
        >>> net = spos(classes=10, stem=4, widths=(8, 16), repeats=(1, 1), head=16)
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return ShuffleNet(classes, stem, widths, repeats, head, dropout, evaluation)


def arch(choices: Sequence[int]) -> Architecture:
    """The architecture of the authors' notation: a number from 0 to 3 for every block.

    0, 1 and 2 are the Shuffle blocks of kernel 3, 5 and 7, and 3 is Shuffle Xception. The default
    space has 20 blocks.

    Raises:
        SpaceError: a number is out of range.

    Example:
        >>> arch([2, 3])
        Architecture({'block0': 'shuffle7', 'block1': 'xception'})
    """
    for i, choice in enumerate(choices):
        if choice not in range(len(CHOICES)):
            raise SpaceError(
                f"block {i}: choice {choice!r} is none of 0 to {len(CHOICES) - 1}, which stand "
                f"for {CHOICES}"
            )
    return Architecture({f"block{i}": CHOICES[choice] for i, choice in enumerate(choices)})


SPOS_BEST = arch([2, 1, 0, 1, 2, 0, 2, 0, 2, 0, 2, 3, 0, 0, 0, 0, 3, 2, 3, 3])
"""The authors' released result: 3.5 M parameters, 323 M MACs, 74.4 % top-1 when retrained."""


def from_authors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' supernet checkpoint under the names of `spos()`, for `load_state_dict`.

    The checkpoint of the repository megvii-model/SinglePathOneShot holds its state dict under
    "state_dict", with or without the prefix "module." of DataParallel; block i, choice j is
    `features.{i}.{j}`. It was trained on images in BGR order with values from 0 to 255.

    Args:
        state_dict: tensors by the authors' names.

    Raises:
        CheckpointError: a name is not one of the supernet's.

    Example:
        >>> list(from_authors({"module.features.4.3.branch_main.0.weight": torch.zeros(1)}))
        ['features.4.xception.branch_main.0.weight']
    """
    return {_renamed(key): value for key, value in state_dict.items()}


# -- how -------------------------------------------------------------------------------------------

_OUTSIDE = re.compile(r"(first_conv|conv_last|classifier)\.\d+\.\w+")
_BLOCK = re.compile(r"features\.(\d+)\.([0-3])\.(branch_(?:main|proj)\.\d+\.\w+)")


def _renamed(key: str) -> str:
    name = key.removeprefix("module.")
    if _OUTSIDE.fullmatch(name):
        return name
    found = _BLOCK.fullmatch(name)
    if found is None:
        raise CheckpointError(
            f"{key!r} is no name of the authors' supernet (features.<block>.<choice>.branch_main..."
            "); the checkpoint of a network trained on its own has no choices: give the supernet's"
        )
    block, choice, rest = found.groups()
    return f"features.{block}.{CHOICES[int(choice)]}.{rest}"


def _plan(
    stem: int, widths: Sequence[int], repeats: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """Input channels, output channels and stride of every block."""
    if len(widths) != len(repeats) or not widths:
        raise SpaceError(
            f"widths={tuple(widths)} and repeats={tuple(repeats)} must have one value for every "
            "stage"
        )
    c_in = stem
    for width, n in zip(widths, repeats, strict=True):
        if width % 2 or width <= c_in or n < 1:
            raise SpaceError(
                f"a stage of {n} blocks from {c_in} to {width} channels: there must be a block, "
                "and a width must be even and larger than the one before"
            )
        for i in range(n):
            yield c_in, width, 2 if i == 0 else 1
            c_in = width


def _candidates(c_in: int, c_out: int, stride: int, affine: bool) -> dict[str, nn.Module]:
    return {
        name: _block(c_in, c_out, stride, kernel, affine)
        for name, kernel in zip(CHOICES, (3, 5, 7, None), strict=True)
    }


def _block(c_in: int, c_out: int, stride: int, kernel: int | None, affine: bool) -> nn.Module:
    """A block of the kernel given, or an Xception block."""
    source = c_in if stride == 2 else c_in // 2
    target, middle = c_out - source, c_out // 2
    if kernel:
        main = _shuffle(source, middle, target, kernel, stride, affine)
    else:
        main = _xception(source, middle, target, stride, affine)
    if stride == 1:
        return ShuffleBlock(main, None)
    projection = _depthwise(c_in, kernel or 3, 2, affine) + conv_bn(c_in, c_in, affine=affine)
    return ShuffleBlock(main, projection)


def _depthwise(c: int, kernel: int, stride: int, affine: bool) -> list[nn.Module]:
    return conv_bn(c, c, kernel, stride, groups=c, act=None, affine=affine)


def _shuffle(
    c_in: int, middle: int, c_out: int, kernel: int, stride: int, affine: bool
) -> list[nn.Module]:
    return [
        *conv_bn(c_in, middle, affine=affine),
        *_depthwise(middle, kernel, stride, affine),
        *conv_bn(middle, c_out, affine=affine),
    ]


def _xception(c_in: int, middle: int, c_out: int, stride: int, affine: bool) -> list[nn.Module]:
    return [
        *_depthwise(c_in, 3, stride, affine),
        *conv_bn(c_in, middle, affine=affine),
        *_depthwise(middle, 3, 1, affine),
        *conv_bn(middle, middle, affine=affine),
        *_depthwise(middle, 3, 1, affine),
        *conv_bn(middle, c_out, affine=affine),
    ]


def _initialize(net: nn.Module) -> None:
    for path, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            deviation = 0.01 if path.startswith("first_conv") else 1 / module.weight.shape[1]
            nn.init.normal_(module.weight, 0, deviation)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.constant_(module.bias, 0.0001)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
