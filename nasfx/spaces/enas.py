"""The two search spaces of ENAS (arXiv 1802.03268): macro (section 2.3) and micro (section 2.4).

**Macro**: a row of layers. Layer l decides its operation, `"op/{l}"`, a LayerChoice of six, and
which of the l states before its input it adds, `"skip/{l}"`, an InputChoice of any of them: state 0
is the stem, state j the layer j - 1. Layer l reads layer l - 1 in any case. 12 layers make
6**12 * 2**66 nets, about 1.6e29, the paper's figure. A layer without skips adds zeros of the shape
of its first skip, so its subnet keeps, and counts, what makes that skip.

**Micro**: a row of cells of two kinds, "normal" and "reduce"; all cells of a kind are one decision.
States 0 and 1 of a cell are the outputs of the two cells before it, 2 to 6 its nodes. A node is the
sum of two operations on earlier states; each side s, "x" or "y", of node i decides

- `"{kind}/{i}/{s}"`, a LayerChoice of "0", "1", ...: the state that is read;
- `"{kind}/{i}/{s}/op"`, a LayerChoice of five: the operation.

The output of a cell is made of its *loose ends*, the states that no node reads. As in the authors'
code every operation has weights of its own for every state that it may read, and the loose ends are
concatenated, then ReLU, 1x1 convolution, batch norm. That convolution takes the rows of its weight
that belong to the loose ends, so it is the sum of one convolution per loose end; this is how it is
built here. The terms of the sum are kept or left out by further choices with the labels of the
nodes, so nothing is indexed by data, and a finalized net holds the loose ends' convolutions alone.
A mixture weighs each term by the probability that its state is loose. The expected cost of a
supernet, and the cost that a bound looks at, count these convolutions for all states: an upper
bound; the count of a finalized net is exact.

The architectures that are enumerated are all values of the 40 decisions, (5**5 * 6!)**4, about
2.6e25. The paper's figure is (5 * 5!)**4, 1.3e11: for each side and kind of cell it counts the
operation once, not once for each of the five nodes, and 5! ways to read where the nodes have 2, 3,
4, 5 and 6 states to read. Many architectures compute the same function, as sides may be swapped.

All strategies have rules for both spaces. In a mixture each skip of macro is weighted by the
probability that it is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from nasfx.architecture import Architecture
from nasfx.errors import SpaceError
from nasfx.spaces.blocks import checked_sizes, set_drop_path
from nasfx.spaces.enas_nets import (
    MACRO_OPERATIONS,
    MICRO_OPERATIONS,
    NODES,
    SIDES,
    MacroNet,
    MicroFixedNet,
    MicroSearchNet,
)

__all__ = ["ENAS_MICRO", "macro", "macro_arch", "micro", "micro_arch", "set_drop_path"]

# -- macro -----------------------------------------------------------------------------------------


def macro(
    channels: int = 36,
    layers: int = 12,
    classes: int = 10,
    *,
    evaluation: bool = False,
    dropout: float = 0.1,
) -> nn.Module:
    """The macro net for CIFAR-10: (N, 3, 32, 32) to (N, classes).

    After layers `layers // 3 - 1` and `2 * (layers // 3) - 1` all states are halved in height and
    width. The paper searches with 12 layers.

    Args:
        channels: of the stem and the first layers; even.
        layers: how many; 3 or more.
        classes: how many.
        evaluation: the authors' form for retraining: channels double where height and width halve;
            a layer is ReLU-1x1-BN, ReLU-kxk-BN, a full convolution for the separable operations
            too; the layer and its skips are concatenated before ReLU-1x1-BN, here as a sum of
            convolutions, one for each. The authors' form has no pools: here they are ReLU-1x1-BN,
            pool.
        dropout: the probability before the linear layer.

    Raises:
        SpaceError: sizes that cannot be built.

    Example:
        >>> import nasfx
        >>> nasfx.search_space(macro(channels=2, layers=3)).size == 6**3 * 2**3
        True
    """
    checked_sizes("enas.macro", channels, layers, classes, fewest=3)
    return MacroNet(channels, layers, classes, evaluation=evaluation, dropout=dropout)


def macro_arch(numbers: Sequence[int]) -> Architecture:
    """The macro architecture of a flat list of the authors' kind.

    Args:
        numbers: for each layer l its operation, then l bits, 1 for a skip that is added.

    Raises:
        SpaceError: the list ends within a layer, or holds a number out of range.

    Example:
        >>> dict(macro_arch([0, 3, 1]))
        {'op/0': 'conv_3x3', 'op/1': 'sep_conv_5x5', 'skip/1': [0]}
    """
    decisions: dict[str, str | list[int]] = {}
    rest, layer = list(numbers), 0
    while rest:
        bits = rest[1 : layer + 1]
        if len(bits) < layer or rest[0] not in range(6) or not set(bits) <= {0, 1}:
            raise SpaceError(
                f"macro_arch: layer {layer} is {rest[: layer + 1]}, but takes an operation, 0 to "
                f"5, and {layer} bits"
            )
        decisions[f"op/{layer}"] = MACRO_OPERATIONS[rest[0]]
        if layer:
            decisions[f"skip/{layer}"] = [i for i, bit in enumerate(bits) if bit]
        rest, layer = rest[layer + 1 :], layer + 1
    return Architecture(decisions)


# -- micro -----------------------------------------------------------------------------------------


def micro(
    channels: int = 20,
    cells: int = 6,
    classes: int = 10,
    *,
    evaluation: bool = False,
    auxiliary: bool = False,
    dropout: float = 0.1,
) -> nn.Module:
    """The micro net for CIFAR-10: (N, 3, 32, 32) to (N, classes).

    Two reduction cells, which double the channels, stand among the normal ones: cells `cells // 3`
    and `2 * (cells // 3) + 1` of `cells + 2`. In the search a reduction cell reads the output
    before it, and that output halved; its own operations keep the size. The authors search with 20
    channels and 6 normal cells, and retrain with 36 channels and 15.

    Args:
        channels: of the first cells; even.
        cells: how many normal ones; 3 or more.
        classes: how many.
        evaluation: the authors' form for retraining: a reduction cell reads the two outputs before
            it with operations of stride 2; loose ends are concatenated as they are and the next
            cells' 1x1 convolutions read them, here as sums of convolutions, one for each; every
            operation but the identity has a drop path (see `set_drop_path`). The authors leave the
            convolution out where a single loose end has the right width; here it is always there.
        auxiliary: in train mode return (logits, auxiliary logits), the latter of a second
            classifier after the cell that follows the second reduction, which needs an input of
            32x32; in eval mode logits alone. For its subnet see `nasfx.spaces.darts.cifar`.
        dropout: the probability before the linear layer.

    Raises:
        SpaceError: sizes that cannot be built.

    Example:
        >>> import torch
        >>> model = micro(channels=4, cells=3)
        >>> model(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """
    checked_sizes("enas.micro", channels, cells, classes, fewest=3)
    kind = MicroFixedNet if evaluation else MicroSearchNet
    return kind(channels, cells, classes, auxiliary=auxiliary, dropout=dropout)


def micro_arch(numbers: Sequence[int]) -> Architecture:
    """The micro architecture of a flat list of the authors' kind.

    Args:
        numbers: for each of the five nodes of the normal cell, then of the reduction cell: the
            state and the operation (0 to 4) of its first side, then of its second.

    Raises:
        SpaceError: not 40 numbers, or one that is out of range.

    Example:
        >>> micro_arch([0, 2, 1, 0] * 10)["normal/2/x/op"]
        'avg_pool_3x3'
    """
    if len(numbers) != 8 * len(NODES):
        raise SpaceError(
            f"micro_arch: {len(numbers)} numbers; two cells of five nodes of two sides take "
            f"{8 * len(NODES)}"
        )
    sides = [(kind, i, side) for kind in ("normal", "reduce") for i in NODES for side in SIDES]
    decisions: dict[str, str] = {}
    for (kind, i, side), state, operation in zip(sides, numbers[::2], numbers[1::2], strict=True):
        if state not in range(i) or operation not in range(len(MICRO_OPERATIONS)):
            raise SpaceError(
                f"micro_arch: {kind}/{i}/{side} reads state {state!r} with operation "
                f"{operation!r}; states go up to {i - 1}, operations up to 4"
            )
        decisions[f"{kind}/{i}/{side}"] = str(state)
        decisions[f"{kind}/{i}/{side}/op"] = MICRO_OPERATIONS[operation]
    return Architecture(decisions)


ENAS_MICRO = micro_arch(
    [
        0, 2, 0, 0, 0, 4, 0, 1, 0, 4, 1, 1, 1, 0, 0, 1, 0, 2, 1, 1,
        1, 0, 1, 0, 0, 3, 0, 2, 1, 1, 3, 1, 1, 0, 0, 4, 0, 3, 1, 1,
    ]
)  # fmt: skip
"""The cells that the authors retrain on CIFAR-10, from their code."""
