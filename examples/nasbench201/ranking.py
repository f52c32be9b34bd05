"""What train.py, rank.py and benchmarks/ranking.py share: the supernet, the cells, the table."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from scipy.stats import kendalltau
from torch import Tensor
from torch.utils.data import Dataset

import nasfx
from nasfx.searching.recalibration import Judge, Recalibration
from nasfx.spaces import nasbench201

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import images
import training
from common import DATA_VARIABLE, say

TABLE = "nb201_small.npz"
LEAST = 50.0
"""Cells of the comparison have more than this true accuracy, in percent."""

DATA = ("digits", "cifar10", "cifar10-jpg", "cifar10-jpg-fixture")


# -- flags -----------------------------------------------------------------------------------------


def add_supernet(to: argparse.ArgumentParser) -> None:
    """Add the flags of the supernet's size, which must be the same in both steps."""
    add = to.add_argument_group("supernet, the same in all steps").add_argument
    add("--channels", type=int, default=16, help="of the first of the three stages")
    add("--cells", type=int, default=1, help="in each stage; the benchmark's nets have 5")


def add_training(to: argparse.ArgumentParser) -> None:
    """Add the flags of the supernet's training."""
    training.add_recipe(to)
    to.set_defaults(weight_decay=5e-4)
    add = to.add_argument_group("training").add_argument
    add("--paths", choices=("fair", "uniform", "bins"), default="fair",
        help="those that are trained. fair: every 5 steps train each operation of an edge once; "
        "bins: of multiply-accumulates that are spread evenly")  # fmt: skip
    add("--bins", type=int, default=4, help="of multiply-accumulates, for --paths bins")
    add("--least", type=float, default=0.0,
        help="where the bins begin: 0 is the smallest cell, 1 the largest")  # fmt: skip
    add("--clip-norm", type=float, default=5.0, help="of the gradient; 0: not clipped")


def add_ranking(to: argparse.ArgumentParser, cells: int) -> None:
    """Add the flags of the ranking."""
    add = to.add_argument_group("ranking").add_argument
    add("--rank", type=int, default=cells, metavar="N", help="random cells to rank")
    add("--recalibrate", type=int, default=20, metavar="BATCHES",
        help="training batches that the batch norms of each cell get their statistics from; 0: "
        "those of the supernet")  # fmt: skip


# -- data ------------------------------------------------------------------------------------------


class Batches:
    """Images in memory, in batches; cropped, flipped and shuffled by the batch, which is quick.

    Attributes:
        generator: for all draws, so that a search that goes on reads the same.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        batch: int,
        *,
        shift: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        """Batches of these images.

        Args:
            pixels: (N, 3, S, S).
            labels: (N,).
            batch: size of the batches.
            shift: by how many pixels images are moved at most, for training.
            flip: whether half of them are mirrored, for training.
            seed: for the draws. Without `shift` and `flip` there are none: then images come in
                their own order, and the last batch may be smaller.
        """
        self.x, self.y, self.batch = pixels, labels, batch
        self.shift, self.flip = shift, flip
        self.training = flip or shift > 0
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """How many batches a pass has."""
        whole, rest = divmod(len(self.y), self.batch)
        return whole if self.training and whole else whole + (rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.y)
        order = torch.randperm(n, generator=self.generator) if self.training else torch.arange(n)
        for chosen in order.split(self.batch)[: len(self)]:
            x = self.x[chosen]
            if self.shift:
                x = self._shifted(x)
            if self.flip:
                mirrored = torch.rand(len(x), generator=self.generator) < 0.5
                x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
            yield x, self.y[chosen]

    def _shifted(self, x: Tensor) -> Tensor:
        n, side, s = len(x), x.shape[-1], self.shift
        corners = torch.randint(2 * s + 1, (2, n, 1), generator=self.generator)
        rows, columns = corners + torch.arange(side)
        padded = F.pad(x, (s, s, s, s))
        moved = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None]]
        return moved.permute(0, 3, 1, 2)


class Loaders(NamedTuple):
    """Batches: augmented training images, the same as they are, and held out ones."""

    train: Batches
    plain: Batches
    held_out: Batches
    classes: int


def load(args: argparse.Namespace) -> Loaders:
    """The data that the flags name, in memory.

    Raises:
        SystemExit: it is not there or too large, or a flag asks for what is not done here.
    """
    if args.data not in DATA:
        raise SystemExit(f"--data {args.data}: the images are kept in memory; {', '.join(DATA)}")
    given = [f"--{name}" for name in ("cutout", "jitter", "workers") if getattr(args, name)]
    if given:
        raise SystemExit(f"{', '.join(given)}: not done here; images are moved and mirrored alone")
    data = images.load(args)
    augmented: Any = data.train
    pixels, labels = _in_memory(images.Images(augmented.source, images.transform_of(args)))
    flip, shift = args.data != "digits", args.size // 8
    return Loaders(
        Batches(pixels, labels, args.batch, shift=shift, flip=flip, seed=args.seed),
        Batches(pixels, labels, args.batch),
        Batches(*_in_memory(data.held_out), args.eval_batch),
        data.classes,
    )


def _in_memory(source: Dataset[Any]) -> tuple[Tensor, Tensor]:
    """All images, (N, 3, S, S), and their labels, (N,)."""
    pairs = [source[i] for i in range(len(source))]  # pyright: ignore[reportArgumentType]
    if not pairs:
        raise SystemExit("--held-out 0: cells are judged by images that were held out")
    pixels = torch.stack([image for image, _ in pairs])
    labels = torch.tensor([y for _, y in pairs])
    return pixels.contiguous(memory_format=torch.channels_last), labels


# -- the supernet ----------------------------------------------------------------------------------


def supernet(args: argparse.Namespace, classes: int, *, trained: bool = False) -> nasfx.Supernet:
    """The single-path supernet of the flags' size; it knows the cells' MACs as "flops".

    Args:
        args: with `channels`, `cells`, `size` and `seed`.
        classes: how many.
        trained: whether paths are drawn as `paths`, `bins` and `least` of `args` say.
    """
    how: dict[str, Any] = {"fair": trained and args.paths == "fair"}
    if trained and args.paths == "bins":
        how["bins"] = bins(args, classes)
    return _supernet(args, classes, nasfx.SinglePath(2, 1, recalibrate=0, **how))


def bins(args: argparse.Namespace, classes: int) -> tuple[float, float, float]:
    """The bins of MACs from which paths are drawn: lowest, highest and width.

    Many cells have few MACs and few have many, so uniform paths train the largest cells least,
    which need it most; and a supernet's ranking of them is the worse for it.
    """
    net = _supernet(args, classes, nasfx.SinglePath(recalibrate=0))
    labels = [choice.label for choice in net.space.choices]
    cells = [dict.fromkeys(labels, op) for op in ("none", "nor_conv_3x3")]
    smallest, largest = macs(net, [nasfx.Architecture(cell) for cell in cells])
    low = smallest + args.least * (largest - smallest)
    return low, largest, (largest - low) / args.bins


def _supernet(args: argparse.Namespace, classes: int, strategy: nasfx.SinglePath) -> nasfx.Supernet:
    torch.manual_seed(args.seed)
    net = nasfx.transform(
        nasbench201.net(args.channels, args.cells, classes),
        strategy,
        example_inputs=torch.zeros(1, 3, args.size, args.size),
        objective=nasfx.Flops(),
        seed=args.seed,
    )
    return net.to(memory_format=torch.channels_last)


def train(
    net: nasfx.Supernet, data: Loaders, args: argparse.Namespace, fabric: Fabric, **options: Any
) -> nasfx.SearchResult:
    """Train the supernet for `args.epochs`, one path a step, with one cosine to 0.

    Paths are judged on the first held out batch after every epoch: a sign of life, not a result.

    Args:
        net: what `supernet` made; it is trained.
        data: what `load` made.
        args: the flags.
        fabric: device and precision.
        options: further ones of `nasfx.search`.
    """
    groups = training.weights_only_decay(net.weight_parameters(), args.weight_decay)
    optimizer = training.scheduled(
        torch.optim.SGD(groups, args.lr, args.momentum, nesterov=args.momentum > 0),
        training.cosine(args.lr, args.epochs * len(data.train)),
    )
    return nasfx.search(
        net,
        data.train,
        list(itertools.islice(data.held_out, 1)),
        loss=lambda out, y: F.cross_entropy(out, y, label_smoothing=args.label_smoothing),
        metric=training.accuracy,
        epochs=args.epochs,
        clip_norm=args.clip_norm or None,
        optimizers=(optimizer, net.arch_optimizer()),
        seed=args.seed,
        fabric=fabric,
        **options,
    )


def weights(net: nasfx.Supernet) -> dict[str, Tensor]:
    """The supernet's weights and batch-norm statistics, without the strategy's own state."""
    return {name: v for name, v in net.state_dict().items() if not name.startswith("arch.")}


def seconds_per_step(net: nasfx.Supernet, data: Loaders, steps: int = 30) -> float:
    """CPU seconds of a training step, measured over so many, after 5 that do not count.

    The net is trained by them: give one that is thrown away.
    """
    optimizer = torch.optim.SGD(net.weight_parameters(), 0.01, 0.9)
    began = 0.0
    for i, (x, y) in enumerate(itertools.islice(itertools.cycle(data.train), steps + 5)):
        if i == 5:
            began = time.process_time()
        with net.weight_step():
            F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.process_time() - began) / steps


# -- the cells and the table -----------------------------------------------------------------------


def every_cell() -> list[nasfx.Architecture]:
    """All 15,625 cells, the operation of the last edge changing first."""
    labels = [f"{i}<-{j}" for i, j in nasbench201.EDGES]
    rows = itertools.product(nasbench201.OPERATIONS, repeat=len(labels))
    return [nasfx.Architecture(dict(zip(labels, row, strict=True))) for row in rows]


def table() -> dict[nasfx.Architecture, float] | None:
    """The test accuracy on CIFAR-10 of every cell after 200 epochs alone, in percent.

    Returns:
        None where the folder that NASFX_DATA names has no file nb201_small.npz.
    """
    folder = os.environ.get(DATA_VARIABLE)
    if not folder or not Path(folder, TABLE).is_file():
        return None
    labels = [f"{i}<-{j}" for i, j in nasbench201.EDGES]
    with np.load(Path(folder, TABLE)) as file:
        names, rows, accuracies = (file[key].tolist() for key in ("op_names", "ops", "cifar10"))
    cells = [{label: names[i] for label, i in zip(labels, row, strict=True)} for row in rows]
    return {nasfx.Architecture(c): a for c, a in zip(cells, accuracies, strict=True)}


def random_cells(
    n: int, seed: int, true: dict[nasfx.Architecture, float] | None
) -> list[nasfx.Architecture]:
    """`n` different cells, uniformly drawn; of a table only those of more than 50 %.

    Raises:
        SystemExit: there are fewer.
    """
    cells = [cell for cell in every_cell() if true is None or true[cell] > LEAST]
    if not 0 < n <= len(cells):
        raise SystemExit(f"--rank {n}: there are {len(cells)} cells to rank")
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))
    return [cells[i] for i in order[:n].tolist()]


def accuracies(
    net: nasfx.Supernet,
    cells: Sequence[nasfx.Architecture],
    data: Loaders,
    recalibrate: int,
    run: Callable[[tuple[Any, ...]], Any] | None = None,
) -> list[float]:
    """The accuracy of every cell on the held out images, under the shared weights.

    Args:
        net: the trained supernet, which does not change.
        cells: the cells.
        data: what `load` made.
        recalibrate: the first so many training batches, not augmented and the same for all cells,
            give each cell's batch norms their statistics; 0: they keep those of the supernet.
        run: calls the net; by default `net(*inputs)`.
    """
    batches = list(itertools.islice(data.plain, recalibrate))
    how = Recalibration(batches, len(batches)) if batches else None
    judge = Judge(net, data.held_out, training.accuracy, how, 0, run)
    found: list[float] = []
    for i, cell in enumerate(cells):
        found.append(judge.evaluate(cell, f"for the cell {nasbench201.arch_string(cell)}"))
        if (i + 1) % 50 == 0:
            say(f"{i + 1} of {len(cells)} cells")
    return found


def macs(net: nasfx.Supernet, cells: Sequence[nasfx.Architecture]) -> list[float]:
    """The multiply-accumulates of every cell's net, at the supernet's size."""
    return [float(net.space.costs["flops"](cell)) for cell in cells]


def tau(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Kendall's tau-b of two rankings of the same cells; None where one of them is constant."""
    result: Any = kendalltau(one, two)
    value = float(result.statistic)
    return None if math.isnan(value) else value
