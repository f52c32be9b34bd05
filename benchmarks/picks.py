"""What the cell that each strategy picks on NAS-Bench-201 is worth, trained alone.

    NASFX_DATA=folder python benchmarks/picks.py [--strategies darts ...] [--minutes 20]
        [--seeds 0] [--channels 8] [--cells 1] [--size 16]

Every strategy searches the cell on the same images for the same CPU minutes; random search, which
trains the same supernet on random paths and takes the best of the same number of cells as SPOS
evaluates, is the rival. The accuracy after 200 epochs alone, of the table nb201_small.npz in
NASFX_DATA, is that of the benchmark's own nets of 15 cells; so is the mean over all cells, which a
blind draw has. A seed is one run: differences of a point are chance. Progress goes to stderr, JSON
to stdout. One thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric

import nasfx
from nasfx.spaces import nasbench201
from nasfx.strategies import Strategy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "nasbench201"))
import ranking

# isort: split
import training
from common import Help, say
from images import add_data

EVALUATED = 100
"""Cells that SPOS and random search evaluate at the end."""

_TRIAL = 25
"""Batches of the trial by which epochs are chosen."""

STRATEGIES: Mapping[str, Callable[[], Strategy]] = {
    "random": lambda: nasfx.RandomSearch(EVALUATED, recalibrate=20),
    "darts": nasfx.Darts,
    "fbnet": lambda: nasfx.FBNet(recalibrate=20),
    "proxyless": lambda: nasfx.Proxyless(gate="two"),
    "enas": lambda: nasfx.Enas(recalibrate=20),
    "single-path": lambda: nasfx.SinglePath(20, EVALUATED // 20, fair=True, recalibrate=20),
}


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    made.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES,
        help="those to run")  # fmt: skip
    made.add_argument("--seeds", type=int, nargs="+", default=[0], help="a search each")
    made.add_argument("--minutes", type=float, default=20.0, help="CPU minutes of a search")
    add_data(made)
    ranking.add_supernet(made)
    training.add_recipe(made)
    made.set_defaults(
        data="cifar10-jpg", size=16, held_out=10000, batch=128, eval_batch=256, channels=8, lr=0.1,
        weight_decay=5e-4, smoke=False,
    )  # fmt: skip
    return made


def run(
    name: str,
    args: argparse.Namespace,
    data: ranking.Loaders,
    epochs: int,
    batches: Any,
    valid: Any,
) -> nasfx.SearchResult:
    """Search with a strategy for so many epochs."""
    torch.manual_seed(args.seed)
    net = nasfx.transform(
        nasbench201.net(args.channels, args.cells, data.classes),
        STRATEGIES[name](),
        example_inputs=torch.zeros(1, 3, args.size, args.size),
        seed=args.seed,
    )
    groups = training.weights_only_decay(net.weight_parameters(), args.weight_decay)
    optimizer = training.scheduled(
        torch.optim.SGD(groups, args.lr, args.momentum, nesterov=True),
        training.cosine(args.lr, epochs * len(batches)),
    )
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    return nasfx.search(
        net, batches, valid,
        loss=lambda out, y: F.cross_entropy(out, y, label_smoothing=args.label_smoothing),
        metric=training.accuracy, epochs=epochs, clip_norm=5.0,
        optimizers=(optimizer, net.arch_optimizer()), seed=args.seed, fabric=fabric,
    )  # fmt: skip


def spent(call: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    call()
    return time.process_time() - began


def epochs_within(name: str, args: argparse.Namespace, data: ranking.Loaders) -> int:
    """How many epochs fit in the budget beside the evaluations at the end.

    By two trials, of which one has twice the steps; both end with all evaluations, on less data.

    Raises:
        SystemExit: not even one.
    """
    valid = list(itertools.islice(data.held_out, _TRIAL))
    steps = list(itertools.islice(data.train, 2 * _TRIAL))
    once, twice = (
        spent(lambda n=n: run(name, args, data, 1, steps[:n], valid)) for n in (_TRIAL, 2 * _TRIAL)
    )
    step = max(twice - once, 1e-6) / _TRIAL
    rest = max(once - step * _TRIAL, 0.0) * len(data.held_out) / len(valid)
    epochs = int((60 * args.minutes - rest) / (step * len(data.train)))
    if epochs < 1:
        raise SystemExit(
            f"{name}: an epoch takes {step * len(data.train) / 60:.1f} CPU minutes and the "
            f"evaluations {rest / 60:.1f}, which is over --minutes {args.minutes:g}"
        )
    return epochs


def main(argv: Sequence[str] | None = None) -> None:
    """Search with all strategies."""
    args = arguments().parse_args(argv)
    torch.set_num_threads(1)
    true = ranking.table()
    if true is None:
        raise SystemExit(f"set NASFX_DATA to the folder of {ranking.TABLE}")
    results: list[dict[str, Any]] = []
    for seed, name in itertools.product(args.seeds, args.strategies):
        args.seed = seed
        data = ranking.load(args)
        epochs = epochs_within(name, args, data)
        say(f"{name}, seed {seed}: {epochs} epochs")
        data.train.generator.manual_seed(seed)
        began = time.process_time()
        cell = run(name, args, data, epochs, data.train, data.held_out).architecture
        results.append(
            {
                "strategy": name, "seed": seed, "epochs": epochs,
                "cpu_minutes": (time.process_time() - began) / 60,
                "cell": nasbench201.arch_string(cell), "true": true[cell],
                "better_cells": sum(accuracy > true[cell] for accuracy in true.values()),
            }
        )  # fmt: skip
        say(f"{results[-1]}")
    flags = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    blind = {"mean": statistics.mean(true.values()), "best": max(true.values())}
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    found = {"machine": machine, "arguments": flags, "all_cells": blind, "results": results}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
