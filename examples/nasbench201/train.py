"""Step 1: train a single-path supernet of NAS-Bench-201's space.

Writes supernet.pt, train.json and train.png to the output folder. The accuracies of this step are
those of random cells: a sign of life, not a result.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import ranking
import torch

# isort: split
import training
from common import add_resume, parser, resume_options, say, start, write_results
from images import add_data

TOY = {"threads": 1, "size": 16, "channels": 8, "cells": 1, "held_out": 360, "batch": 64}
CIFAR = {
    "threads": 1, "data": "cifar10-jpg", "size": 16, "channels": 16, "cells": 1, "held_out": 5000,
    "batch": 128,
}  # fmt: skip
PRESETS = {
    "toy": {**TOY, "epochs": 60, "lr": 0.05},
    "cifar": {**CIFAR, "epochs": 60, "lr": 0.1},
    "benchmark": {
        **CIFAR, "threads": 0, "data": "cifar10", "size": 32, "cells": 5, "epochs": 200, "lr": 0.1,
        "batch": 256,
    },
}  # fmt: skip
SMOKE = {"size": 8, "channels": 2}


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    made = parser(__doc__, output="nasbench201-output", epochs=60)
    add_resume(made)
    add_data(made)
    ranking.add_supernet(made)
    ranking.add_training(made)
    made.add_argument("--recalibrate", type=int, default=20, metavar="BATCHES",
        help="training batches for the batch norms of the two cells that are evaluated at the end; "
        "0: the supernet's statistics")  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say."""
    args = training.parse(arguments(), PRESETS, SMOKE, argv)
    fabric, began, cpu = start(args), time.perf_counter(), time.process_time()
    data = ranking.load(args)
    net = ranking.supernet(args, data.classes, trained=True)
    result = ranking.train(net, data, args, fabric, **resume_options(args))
    cells = ranking.random_cells(2, args.seed, None)
    with fabric.autocast():
        found = ranking.accuracies(net, cells, data, args.recalibrate)
    net.to("cpu")
    torch.save({"supernet": ranking.weights(net)}, args.output / "supernet.pt")
    result.plot(args.output / "train.png")
    results = {
        "records": result.records,
        "evaluated": [{**c, "accuracy": a} for c, a in zip(cells, found, strict=True)],
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
    }
    write_results(args.output / "train.json", args, results)
    say(f"written to {args.output}/ after {results['seconds']:.0f} s")


if __name__ == "__main__":
    main()
