"""Step 1 of DARTS: search for cells, in first order or with --unrolled.

Writes epoch_0.json, epoch_1.json ..., what was found after each epoch, and architecture.json,
search.json and search.png to the output folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import nasfx
from nasfx.spaces import darts

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import images
import training
from common import add_resume, parser, resume_options, say, start, write_results

PRESETS = {
    "toy": {
        "threads": 1, "size": 16, "channels": 4, "cells": 3, "held_out": 718, "epochs": 5,
        "lr": 0.1, "last_lr": 0.004, "arch_lr": 0.01,
    },
    "paper": {
        "data": "cifar10", "size": 32, "channels": 16, "cells": 8, "held_out": 25000, "epochs": 50,
        "lr": 0.025, "last_lr": 0.001, "arch_lr": 3e-4, "workers": 4, "seed": 2,
    },
}  # fmt: skip
SMOKE = {"size": 8, "channels": 2, "epochs": 2, "held_out": 48}


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    made = parser(__doc__, output="darts-output", epochs=6)
    add_resume(made)
    images.add_data(made)
    training.add_recipe(made)
    made.set_defaults(weight_decay=3e-4)
    add = made.add_argument_group("search").add_argument
    add("--channels", type=int, help="of the first cells")
    add("--cells", type=int, help="how many; those after 1/3 and 2/3 reduce")
    add("--last-lr", type=float, help="the learning rate falls to it along a cosine, by epochs")
    add("--clip-norm", type=float, default=5.0, help="of the weights' gradient")
    add("--arch-lr", type=float, help="of Adam on the architecture")
    add("--unrolled", action="store_true", help="second order, by the authors' finite difference")
    return made


def write_every_epoch(
    net: nasfx.Supernet, optimizer: torch.optim.Optimizer, steps: int, folder: Path
) -> None:
    """Write what has been found after every `steps` steps of the weights, which end an epoch."""

    def write(changed: torch.optim.Optimizer, *_: Any) -> None:
        epoch, left = divmod(changed.param_groups[0]["done"], steps)
        if not left:
            net.derive().to_json(folder / f"epoch_{epoch - 1}.json")

    optimizer.register_step_post_hook(write)


def main(argv: Sequence[str] | None = None) -> None:
    """Search as the flags say."""
    args = training.parse(arguments(), PRESETS, SMOKE, argv)
    fabric, began = start(args), time.perf_counter()
    data = images.load(args, augment_held_out=True)
    train = images.loader(data.train, args, train=True)
    model = darts.cifar(args.channels, args.cells, data.classes)
    net = nasfx.transform(
        model,
        nasfx.Darts(unrolled="finite-difference" if args.unrolled else False),
        example_inputs=torch.zeros(1, 3, args.size, args.size),
        seed=args.seed,
    )
    say(f"{net.space.size:.2e} architectures")
    fabric.to_device(net)
    steps = len(train)
    optimizer = training.scheduled(
        torch.optim.SGD(
            net.weight_parameters(), args.lr, args.momentum, weight_decay=args.weight_decay
        ),
        training.cosine(args.lr, args.epochs * steps, last=args.last_lr, every=steps),
    )
    write_every_epoch(net, optimizer, steps, args.output)
    result = nasfx.search(
        net,
        train,
        images.loader(data.held_out, args, train=True),
        loss=lambda out, y: F.cross_entropy(out, y, label_smoothing=args.label_smoothing),
        metric=training.accuracy,
        epochs=args.epochs,
        clip_norm=args.clip_norm,
        optimizers=(optimizer, net.arch_optimizer(lr=args.arch_lr)),
        seed=args.seed,
        fabric=fabric,
        **resume_options(args),
    )
    print(result)
    arch, seconds = result.architecture, time.perf_counter() - began
    arch.to_json(args.output / "architecture.json")
    result.plot(args.output / "search.png")
    results = {
        "architecture": dict(arch),
        "supernet_accuracy": result.best_metric,
        "probabilities": {label: p.tolist() for label, p in net.probabilities().items()},
        "records": result.records,
        "seconds": seconds,
    }
    write_results(args.output / "search.json", args, results)
    say(f"written to {args.output}/ after {seconds:.0f} s")


if __name__ == "__main__":
    main()
