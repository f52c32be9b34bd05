"""Step 2: rank random cells under the supernet's weights, and compare with the benchmark's table.

Writes rank.json and rank.png to the output folder. The table is the file nb201_small.npz in the
folder that the environment variable NASFX_DATA names; without it cells are ranked alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ranking
import torch
import train
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import nasfx
from nasfx.spaces import nasbench201

# isort: split
import training
from common import Help, parser, say, start, write_results
from images import add_data

PRESETS = {
    "toy": {**train.TOY, "rank": 100},
    "cifar": {**train.CIFAR, "rank": 300},
    "benchmark": {
        **train.CIFAR, "threads": 0, "data": "cifar10", "size": 32, "cells": 5, "rank": 300,
        "batch": 256, "recalibrate": 100,
    },
}  # fmt: skip
SMOKE = {**train.SMOKE, "rank": 6, "recalibrate": 2}


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=Help,
        parents=[parser(None, output="nasbench201-output", epochs=0)],
        add_help=False,
        conflict_handler="resolve",
    )
    made.add_argument("--epochs", type=int, default=0, help=argparse.SUPPRESS)  # nothing is trained
    add_data(made)
    ranking.add_supernet(made)
    ranking.add_ranking(made, 100)
    made.add_argument("--checkpoint", type=Path,
        help="of the supernet; None: supernet.pt in the output folder")  # fmt: skip
    return made


def load_weights(net: nasfx.Supernet, file: Path) -> None:
    """Load what train.py wrote.

    Raises:
        SystemExit: there is no such file, or it is of a supernet of another size.
    """
    if not file.is_file():
        raise SystemExit(f"there is no file {file}; train.py writes it")
    held = torch.load(file, map_location="cpu", weights_only=True)["supernet"]
    shapes = {name: value.shape for name, value in ranking.weights(net).items()}
    if shapes != {name: value.shape for name, value in held.items()}:
        raise SystemExit(
            f"{file} is of another supernet: give the --channels and --cells of its training"
        )
    net.load_state_dict(held, strict=False)  # the strategy's own state is not in it


def plot(rows: Sequence[dict[str, Any]], file: Path) -> Path:
    """Draw the accuracy under shared weights against the MACs, and the true one against both."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    FigureCanvasAgg(figure)
    pairs = [("macs", "accuracy")]
    if rows[0]["true"] is not None:
        pairs += [("accuracy", "true"), ("macs", "true")]
    for axes, (x, y) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        axes.scatter([row[x] for row in rows], [row[y] for row in rows], s=8)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
    figure.savefig(file)
    return file


def main(argv: Sequence[str] | None = None) -> None:
    """Rank as the flags say."""
    args = training.parse(arguments(), PRESETS, SMOKE, argv)
    fabric, began = start(args), time.perf_counter()
    data = ranking.load(args)
    net = ranking.supernet(args, data.classes)
    load_weights(net, args.checkpoint or args.output / "supernet.pt")
    fabric.to_device(net)
    true = ranking.table()
    cells = ranking.random_cells(args.rank, args.seed, true)
    with fabric.autocast():
        accuracy = ranking.accuracies(net, cells, data, args.recalibrate)
    macs = ranking.macs(net, cells)
    results: dict[str, Any] = {}
    if true is None:
        say("there is no table to compare with (nb201_small.npz in the folder NASFX_DATA)")
        truth: list[float | None] = [None] * len(cells)
    else:
        truth = [true[cell] for cell in cells]
        exact = [true[cell] for cell in cells]
        results = {"tau": ranking.tau(accuracy, exact), "tau_of_macs": ranking.tau(macs, exact)}
        if args.data == "digits":
            say("the table is of CIFAR-10 and the supernet of digits: tau says nothing about it")
        print(f"Kendall tau {results['tau']}, of MACs alone {results['tau_of_macs']}")
    strings = map(nasbench201.arch_string, cells)
    rows: list[dict[str, Any]] = [
        {"cell": c, "accuracy": a, "macs": m, "true": t}
        for c, a, m, t in zip(strings, accuracy, macs, truth, strict=True)
    ]
    rows.sort(key=lambda row: -row["accuracy"])
    for row in rows[:5]:
        print(f"{100 * row['accuracy']:.2f} % {row['cell']}")
    plot(rows, args.output / "rank.png")
    results |= {"ranked": rows, "seconds": time.perf_counter() - began}
    write_results(args.output / "rank.json", args, results)
    say(f"written to {args.output}/ after {results['seconds']:.0f} s")


if __name__ == "__main__":
    main()
