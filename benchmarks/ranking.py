"""How well a supernet of NAS-Bench-201 ranks cells, against training each of them alone.

    NASFX_DATA=folder python benchmarks/ranking.py [--seeds 0 1 2] [--cells 2] [--size 16]
        [--minutes 60] [--epochs 40] [--rank 300]

For every seed a single-path supernet is trained for as many epochs as fit in the budget of CPU
minutes, or fewer. Then random cells with more than 50 % true accuracy are ranked by their accuracy
on held out images under the shared weights, with batch norms of their own; Kendall's tau is that
with their accuracy after 200 epochs alone, of the table nb201_small.npz in NASFX_DATA. Beside it
stands tau of the same cells' multiply-accumulates. Progress goes to stderr, JSON to stdout. One
thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

import nasfx
from nasfx.spaces import nasbench201

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "nasbench201"))
import ranking

# isort: split
from common import Help, say
from images import add_data


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a supernet each")
    made.add_argument("--minutes", type=float, default=60.0,
        help="CPU minutes that the training of a supernet may take")  # fmt: skip
    made.add_argument("--epochs", type=int, default=0, help="0: as many as fit in --minutes")
    add_data(made)
    ranking.add_supernet(made)
    ranking.add_training(made)
    ranking.add_ranking(made, 300)
    made.set_defaults(
        data="cifar10-jpg", size=16, held_out=5000, batch=128, lr=0.1, smoke=False, channels=8,
        cells=2, paths="bins", least=1 / 3,
    )  # fmt: skip
    return made


def epochs_within(minutes: float, seconds_per_epoch: float) -> int:
    """How many epochs fit, with a twentieth of the budget to spare.

    Raises:
        SystemExit: not even one.
    """
    epochs = int(0.95 * 60 * minutes / seconds_per_epoch)
    if epochs < 1:
        raise SystemExit(
            f"an epoch takes {seconds_per_epoch / 60:.1f} CPU minutes, which is over --minutes "
            f"{minutes:g}: give a smaller --size, --cells or --channels, or --limit"
        )
    return epochs


def measure(args: argparse.Namespace, true: dict[nasfx.Architecture, float]) -> dict[str, Any]:
    """Train, rank and compare, for `args.seed`."""
    data = ranking.load(args)
    trial = ranking.supernet(args, data.classes, trained=True)
    epoch = ranking.seconds_per_step(trial, data) * len(data.train)
    fit = epochs_within(args.minutes, epoch)
    args.epochs = min(args.epochs or fit, fit)
    say(f"seed {args.seed}: {args.epochs} epochs of about {epoch:.1f} CPU seconds")
    data.train.generator.manual_seed(args.seed)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    net, began = ranking.supernet(args, data.classes, trained=True), time.process_time()
    ranking.train(net, data, args, fabric)
    trained = time.process_time()
    cells = ranking.random_cells(args.rank, args.seed, true)
    found = ranking.accuracies(net, cells, data, args.recalibrate)
    ranked = time.process_time()
    macs, truth = ranking.macs(net, cells), [true[cell] for cell in cells]
    return {
        "seed": args.seed,
        "epochs": args.epochs,
        "cells": len(cells),
        "tau": ranking.tau(found, truth),
        "tau_of_macs": ranking.tau(macs, truth),
        "mean_accuracy": sum(found) / len(found),
        "ranked": [
            {"cell": nasbench201.arch_string(c), "accuracy": a, "macs": m, "true": t}
            for c, a, m, t in zip(cells, found, macs, truth, strict=True)
        ],
        "training_cpu_minutes": (trained - began) / 60,
        "ranking_cpu_minutes": (ranked - trained) / 60,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all seeds."""
    args = arguments().parse_args(argv)
    torch.set_num_threads(1)
    true = ranking.table()
    if true is None:
        raise SystemExit(
            f"set NASFX_DATA to the folder of {ranking.TABLE}: there is nothing to compare with"
        )
    flags = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    results: list[dict[str, Any]] = []
    for seed in args.seeds:
        results.append(measure(argparse.Namespace(**{**vars(args), "seed": seed}), true))
        say(f"{ {key: v for key, v in results[-1].items() if key != 'ranked'} }")
    machine = {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "threads": 1,
        "load": os.getloadavg()[0],
    }
    print(json.dumps({"machine": machine, "arguments": flags, "results": results}, indent=1))


if __name__ == "__main__":
    main()
