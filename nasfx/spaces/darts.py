"""The search space of DARTS (arXiv 1806.09055), section 2.1, 3.1.1 and appendix A.

A net is a row of cells of two kinds, "normal" and "reduce"; all cells of a kind are one decision. A
cell has six states: 0 and 1 are the outputs of the two cells before it, 2 to 5 are its nodes. Its
output is the nodes' concatenation. Node i is the sum of two of the edges that lead to it from
earlier states, and every edge is one of seven operations:

- `"normal/{i}<-{j}"`, a LayerChoice: the operation on the edge from state j to node i;
- `"normal/{i}"`, an InputChoice: the two states that node i reads.

An eighth operation, `none`, takes part in mixtures only (`relaxed_only`), as in the paper, whose
derivation never keeps it. So a kind has 180 * 7**8 cells, and the space (180 * 7**8)**2 nets. All
strategies have rules for it; with "darts" the edges are summed, each with its own weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nasfx.architecture import Architecture
from nasfx.choice import InputChoice, LayerChoice
from nasfx.errors import SpaceError
from nasfx.spaces.blocks import (
    DropPath,
    FactorizedReduction,
    Zero,
    auxiliary_head,
    checked_sizes,
    dilated_conv,
    relu_conv_bn,
    separable_conv,
    set_drop_path,
)

__all__ = ["DARTS_V1", "DARTS_V2", "cifar", "genotype", "imagenet", "set_drop_path"]

OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""The candidates of every edge, in the authors' order."""

NODES = range(2, 6)


def cifar(
    channels: int = 16,
    cells: int = 8,
    classes: int = 10,
    *,
    evaluation: bool = False,
    auxiliary: bool = False,
) -> nn.Module:
    """The net for CIFAR-10: (N, 3, 32, 32) to (N, classes).

    Cells `cells // 3` and `2 * cells // 3` reduce and double the channels. The paper searches with
    16 channels and 8 cells, and retrains with 36 channels and 20 cells (appendix A.2).

    Args:
        channels: of the first cells; even.
        cells: how many; 3 or more.
        classes: how many.
        evaluation: the form for retraining an architecture from scratch: batch norms have weights,
            pools have no batch norm, and every operation but the identity has a drop path, whose
            probability is 0 until `set_drop_path` changes it.
        auxiliary: in train mode return (logits, auxiliary logits), the latter of a second
            classifier after the second reduction, which needs an input of 32x32; in eval mode
            logits alone. The subnet has a graph for each mode: to count, copy or export it without
            the head, take `torch.fx.GraphModule(subnet.eval(), subnet.graph)`.

    Raises:
        SpaceError: sizes that cannot be built, or an auxiliary head without `evaluation`.

    Example:
        >>> import nasfx, torch
        >>> model = cifar(channels=4, cells=3, evaluation=True)
        >>> subnet = nasfx.finalize(model, DARTS_V2)
        >>> subnet(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    stem = nn.Sequential(
        nn.Conv2d(3, 3 * channels, 3, padding=1, bias=False), nn.BatchNorm2d(3 * channels)
    )
    net = _Net(stem, nn.Identity(), 3 * channels, channels, cells, classes, evaluation=evaluation)
    return _with_head(net, 3, evaluation=evaluation) if auxiliary else net


def imagenet(
    channels: int = 48,
    cells: int = 14,
    classes: int = 1000,
    *,
    evaluation: bool = False,
    auxiliary: bool = False,
) -> nn.Module:
    """The net for ImageNet, the mobile setting: (N, 3, 224, 224) to (N, classes).

    Three convolutions of stride 2 come before the cells; else as `cifar`. The paper retrains cells
    found on CIFAR-10 with 48 channels and 14 cells (appendix A.2).

    Args:
        channels: of the first cells; even.
        cells: how many; 3 or more.
        classes: how many.
        evaluation: as for `cifar`.
        auxiliary: as for `cifar`; the head needs an input of 224x224.

    Raises:
        SpaceError: as for `cifar`.
    """
    stem0 = nn.Sequential(
        nn.Conv2d(3, channels // 2, 3, 2, 1, bias=False),
        nn.BatchNorm2d(channels // 2),
        nn.ReLU(),
        nn.Conv2d(channels // 2, channels, 3, 2, 1, bias=False),
        nn.BatchNorm2d(channels),
    )
    stem1 = relu_conv_bn(channels, channels, 3, 2)
    net = _Net(
        stem0, stem1, channels, channels, cells, classes, evaluation=evaluation, stem_reduces=True
    )
    return _with_head(net, 2, evaluation=evaluation) if auxiliary else net


def genotype(normal: Sequence[tuple[str, int]], reduce: Sequence[tuple[str, int]]) -> Architecture:
    """The architecture of a published genotype.

    Args:
        normal: (operation, predecessor) twice for each of the nodes 2 to 5, in order.
        reduce: the same for the reduction cells.

    Raises:
        SpaceError: no eight pairs, an unknown operation, or predecessors that are not two different
            earlier states.

    Example:
        >>> pairs = [("skip_connect", 0), ("sep_conv_3x3", 1)] * 4
        >>> genotype(pairs, pairs)["normal/2<-1"]
        'sep_conv_3x3'
    """
    decisions: dict[str, str | list[int]] = {}
    for kind, pairs in (("normal", normal), ("reduce", reduce)):
        if len(pairs) != 2 * len(NODES):
            raise SpaceError(
                f"genotype, {kind}: {len(pairs)} pairs of operation and predecessor, but the nodes "
                f"2 to 5 take two each: {2 * len(NODES)}"
            )
        for node, two in zip(NODES, zip(pairs[::2], pairs[1::2], strict=True), strict=True):
            states = sorted(state for _, state in two)
            if states[0] == states[1] or not all(state in range(node) for state in states):
                raise SpaceError(
                    f"genotype, {kind}: node {node} reads {states}; it must read two different "
                    f"states below {node}"
                )
            decisions[f"{kind}/{node}"] = states
            for operation, state in two:
                if operation not in OPERATIONS[1:]:
                    raise SpaceError(
                        f"genotype, {kind}: {operation!r} is none of {', '.join(OPERATIONS[1:])}"
                    )
                decisions[f"{kind}/{node}<-{state}"] = operation
    return Architecture(decisions)


# -- the model -------------------------------------------------------------------------------------


def _operations(c: int, stride: int, *, evaluation: bool) -> dict[str, nn.Module]:
    """The candidates of an edge, of `c` channels."""
    affine = evaluation
    norm = [] if evaluation else [nn.BatchNorm2d(c, affine=False)]
    skip = nn.Identity() if stride == 1 else FactorizedReduction(c, c, affine=affine)
    found: dict[str, nn.Module] = {
        "none": Zero(stride),
        "max_pool_3x3": nn.Sequential(nn.MaxPool2d(3, stride, 1), *norm),
        "avg_pool_3x3": nn.Sequential(nn.AvgPool2d(3, stride, 1, count_include_pad=False), *norm),
        "skip_connect": skip,
        "sep_conv_3x3": separable_conv(c, 3, stride, affine=affine),
        "sep_conv_5x5": separable_conv(c, 5, stride, affine=affine),
        "dil_conv_3x3": dilated_conv(c, 3, stride, affine=affine),
        "dil_conv_5x5": dilated_conv(c, 5, stride, affine=affine),
    }
    if not evaluation:
        return found
    whole = (Zero, nn.Identity)
    return {
        n: m if isinstance(m, whole) else nn.Sequential(m, DropPath()) for n, m in found.items()
    }


class _Cell(nn.Module):
    """(N, c0, H0, W0) and (N, c1, H, W) to (N, 4 c, H / s, W / s), s = 2 for a reduction."""

    def __init__(
        self, c0: int, c1: int, c: int, kind: str, *, after_reduction: bool, evaluation: bool
    ) -> None:
        super().__init__()
        affine = evaluation
        self.preprocess0 = (
            FactorizedReduction(c0, c, affine=affine)
            if after_reduction
            else relu_conv_bn(c0, c, affine=affine)
        )
        self.preprocess1 = relu_conv_bn(c1, c, affine=affine)

        def edge(node: int, state: int) -> LayerChoice:
            stride = 2 if kind == "reduce" and state < 2 else 1
            operations = _operations(c, stride, evaluation=evaluation)
            return LayerChoice(operations, label=f"{kind}/{node}<-{state}", relaxed_only=("none",))

        self.edges = nn.ModuleList(
            nn.ModuleList(edge(node, state) for state in range(node)) for node in NODES
        )
        self.nodes = nn.ModuleList(
            InputChoice(node, n_chosen=2, label=f"{kind}/{node}") for node in NODES
        )

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for edges, node in zip(self.edges, self.nodes, strict=True):
            assert isinstance(edges, nn.ModuleList)
            states.append(node([edge(s) for edge, s in zip(edges, states, strict=True)]))
        return torch.cat(states[2:], 1)


class _Net(nn.Module):
    """Stems, cells, global average pool, linear.

    Args:
        stem0: from the image to the first state.
        stem1: from the first state to the second.
        c_stem: the channels of both states.
        channels: of the first cells.
        cells: how many.
        classes: how many.
        evaluation: see `cifar`.
        stem_reduces: whether the second state has half the first one's height and width.
    """

    def __init__(
        self, stem0: nn.Module, stem1: nn.Module, c_stem: int, channels: int, cells: int,
        classes: int, *, evaluation: bool, stem_reduces: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        checked_sizes("darts", channels, cells, classes, fewest=3)
        self.stem0, self.stem1 = stem0, stem1
        self.cells = nn.ModuleList()
        self.head: nn.Module | None = None
        self.head_at, self.head_channels, self.classes = 2 * cells // 3, 0, classes
        c0 = c1 = c_stem
        c, after_reduction = channels, stem_reduces
        for i in range(cells):
            reduces = i in (cells // 3, 2 * cells // 3)
            c = 2 * c if reduces else c
            kind = "reduce" if reduces else "normal"
            self.cells.append(
                _Cell(c0, c1, c, kind, after_reduction=after_reduction, evaluation=evaluation)
            )
            c0, c1, after_reduction = c1, len(NODES) * c, reduces
            if i == self.head_at:
                self.head_channels = c1
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(c1, classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        s0 = self.stem0(x)
        s1 = self.stem1(s0)
        features = s1
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1)
            if i == self.head_at:
                features = s1
        logits = self.classifier(self.pool(s1).flatten(1))
        if self.head is not None and self.training:
            return logits, self.head(features)
        return logits


def _with_head(net: _Net, stride: int, *, evaluation: bool) -> _Net:
    """`net` with the auxiliary head of CIFAR (stride 3) or ImageNet (stride 2)."""
    if not evaluation:
        raise SpaceError(
            "darts: the auxiliary head belongs to the form for retraining: give evaluation=True too"
        )
    net.head = auxiliary_head(net.head_channels, net.classes, stride, last_norm=stride == 3)
    return net


# -- published architectures -----------------------------------------------------------------------

DARTS_V1 = genotype(
    normal=[
        ("sep_conv_3x3", 1), ("sep_conv_3x3", 0),
        ("skip_connect", 0), ("sep_conv_3x3", 1),
        ("skip_connect", 0), ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0), ("skip_connect", 2),
    ],
    reduce=[
        ("max_pool_3x3", 0), ("max_pool_3x3", 1),
        ("skip_connect", 2), ("max_pool_3x3", 0),
        ("max_pool_3x3", 0), ("skip_connect", 2),
        ("skip_connect", 2), ("avg_pool_3x3", 0),
    ],
)  # fmt: skip
"""The cells found on CIFAR-10 by the first-order method; test error 3.00 % (paper, table 1)."""

DARTS_V2 = genotype(
    normal=[
        ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1), ("skip_connect", 0),
        ("skip_connect", 0), ("dil_conv_3x3", 2),
    ],
    reduce=[
        ("max_pool_3x3", 0), ("max_pool_3x3", 1),
        ("skip_connect", 2), ("max_pool_3x3", 1),
        ("max_pool_3x3", 0), ("skip_connect", 2),
        ("skip_connect", 2), ("max_pool_3x3", 1),
    ],
)  # fmt: skip
"""The cells found on CIFAR-10 by the second-order method; test error 2.76 % (paper, table 1)."""
