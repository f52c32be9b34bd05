"""The search space of NAS-Bench-201 (arXiv 2001.00326), section 2.1.

All cells of a net are one decision. A cell has four nodes; node 0 is its input, every other node is
the sum of the edges from all earlier ones, and node 3 is its output. Every edge is one of five
operations: `"{i}<-{j}"`, a LayerChoice, for the edge from node j to node i. That makes 5**6 =
15,625 architectures. Here `none` is an ordinary candidate, as in the paper, which counts and trains
the cells that hold it. All strategies have rules for the space.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nasfx.architecture import Architecture
from nasfx.choice import LayerChoice
from nasfx.errors import SpaceError
from nasfx.spaces.blocks import Zero, checked_sizes, relu_conv_bn

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""The candidates of every edge, in the benchmark's order."""

EDGES = ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
"""(node, predecessor) of every edge, in the order of an architecture string."""


def net(channels: int = 16, cells: int = 5, classes: int = 10) -> nn.Module:
    """The net of the benchmark: (N, 3, H, W) to (N, classes), H and W multiples of 4.

    Three stages of `channels`, 2 and 4 times as many, with a residual block of stride 2 between
    them. The benchmark's nets have 16 channels and 5 cells per stage.

    Args:
        channels: of the first stage; even.
        cells: per stage; 1 or more.
        classes: how many.

    Raises:
        SpaceError: sizes that cannot be built.

    Example:
        >>> import nasfx
        >>> nasfx.search_space(net(channels=2, cells=1)).size
        15625
    """
    checked_sizes("nasbench201", channels, cells, classes, fewest=1)
    layers: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
    ]
    for stage in range(3):
        c = channels * 2**stage
        if stage:
            layers.append(_Residual(c // 2, c))
        layers += [_Cell(c) for _ in range(cells)]
    c = 4 * channels
    head = [nn.BatchNorm2d(c), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *head, nn.Linear(c, classes))


def arch(string: str) -> Architecture:
    """The architecture of a string of the benchmark.

    Args:
        string: "|op~0|+|op~0|op~1|+|op~0|op~1|op~2|", a part for each of the nodes 1 to 3.

    Raises:
        SpaceError: it is no such string, or an operation is unknown.

    Example:
        >>> arch("|none~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|")["3<-0"]
        'skip_connect'
    """
    nodes = [part.strip("|").split("|") for part in string.split("+")]
    found = [edge.rpartition("~")[::2] for edges in nodes for edge in edges]
    decisions = {
        f"{i}<-{j}": operation for (i, j), (operation, _) in zip(EDGES, found, strict=False)
    }
    unknown = set(decisions.values()) - set(OPERATIONS)
    if unknown or len(decisions) < len(EDGES) or _string(decisions) != string:
        raise SpaceError(
            f"{string!r} is no architecture of NAS-Bench-201: write "
            "'|op~0|+|op~0|op~1|+|op~0|op~1|op~2|' with the operations " + ", ".join(OPERATIONS)
        )
    return Architecture(decisions)


def arch_string(architecture: Mapping[str, Any]) -> str:
    """The string of an architecture: the inverse of `arch`.

    Raises:
        SpaceError: a label is missing, or there is another one or an unknown operation.

    Example:
        >>> string = "|none~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|"
        >>> arch_string(arch(string)) == string
        True
    """
    labels = {f"{i}<-{j}" for i, j in EDGES}
    if set(architecture) != labels or not set(architecture.values()) <= set(OPERATIONS):
        raise SpaceError(
            f"{dict(architecture)} is no architecture of NAS-Bench-201: its labels are "
            f"{', '.join(sorted(labels))}, and the operations {', '.join(OPERATIONS)}"
        )
    return _string(architecture)


def _string(architecture: Mapping[str, Any]) -> str:
    nodes = itertools.groupby(EDGES, key=lambda edge: edge[0])
    return "+".join(
        "|" + "".join(f"{architecture[f'{i}<-{j}']}~{j}|" for i, j in edges) for _, edges in nodes
    )


# -- the model -------------------------------------------------------------------------------------


def _operations(c: int) -> dict[str, nn.Module]:
    return {
        "none": Zero(),
        "skip_connect": nn.Identity(),
        "nor_conv_1x1": relu_conv_bn(c, c, 1),
        "nor_conv_3x3": relu_conv_bn(c, c, 3),
        "avg_pool_3x3": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    }


class _Cell(nn.Module):
    """(N, c, H, W) to the same."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.edges = nn.ModuleList(LayerChoice(_operations(c), label=f"{i}<-{j}") for i, j in EDGES)

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for _, group in itertools.groupby(zip(EDGES, self.edges, strict=True), lambda e: e[0][0]):
            first, *others = [edge(states[j]) for (_, j), edge in group]
            for value in others:
                first = first + value
            states.append(first)
        return states[-1]


class _Residual(nn.Module):
    """(N, c_in, H, W) to (N, c_out, H / 2, W / 2)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.block = nn.Sequential(relu_conv_bn(c_in, c_out, 3, 2), relu_conv_bn(c_out, c_out, 3))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(c_in, c_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.shortcut(x)
