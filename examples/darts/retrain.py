"""Step 2 of DARTS: train the found cells from scratch in a larger net, and test it.

With an auxiliary head, drop path and cutout, as the flags say. Writes retrain.pt, retrain.json and
retrain.png to the output folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import nasfx
from nasfx.spaces import darts

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import images
import training
from common import add_resume, parser, start

PRESETS = {
    "toy": {
        "threads": 1, "channels": 4, "cells": 3, "epochs": 6, "lr": 0.1, "cutout": 8,
        "weight_decay": 3e-4,
    },
    "paper": {
        "data": "cifar10", "channels": 36, "cells": 20, "epochs": 600, "batch": 96, "lr": 0.025,
        "cutout": 16, "weight_decay": 3e-4, "workers": 4, "arc_checkpoint": "DARTS_V2",
    },
    "paper-imagenet": {
        "data": "imagenet", "size": 224, "channels": 48, "cells": 14, "epochs": 250, "batch": 128,
        "lr": 0.1, "schedule": "exponential", "weight_decay": 3e-5, "label_smoothing": 0.1,
        "drop_path": 0.0, "jitter": (0.4, 0.4, 0.4, 0.2), "workers": 16,
        "arc_checkpoint": "DARTS_V2",
    },
}  # fmt: skip
SMOKE = {"channels": 4, "held_out": 0, "limit": 32}
PUBLISHED = {"DARTS_V1": darts.DARTS_V1, "DARTS_V2": darts.DARTS_V2}


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    made = parser(__doc__, output="darts-output", epochs=8)
    add_resume(made)
    images.add_data(made)
    training.add_recipe(made)
    add = made.add_argument_group("retraining").add_argument
    add("--arc-checkpoint", metavar="FILE",
        help="the architecture's JSON file, such as epoch_49.json, or DARTS_V1 or DARTS_V2; "
        "None: architecture.json in the output folder")  # fmt: skip
    add("--channels", type=int, help="of the first cells")
    add("--cells", type=int, help="how many")
    add("--auxiliary", type=float, default=0.4, metavar="WEIGHT",
        help="of the auxiliary head's loss; 0: no head. Images must have --size 32, or 224 "
        "for imagenet")  # fmt: skip
    add("--drop-path", type=float, default=0.2,
        help="probability to drop a path after the last epoch; rises from 0")  # fmt: skip
    add("--clip-norm", type=float, default=5.0, help="of the gradient")
    add("--schedule", default="cosine", choices=("cosine", "exponential"),
        help="of the learning rate, by epochs: to 0, or times 0.97")  # fmt: skip
    return made


def subnet_of(args: argparse.Namespace, arch: nasfx.Architecture, classes: int) -> fx.GraphModule:
    """The net to train; in train mode it gives the auxiliary logits too, if there is a head."""
    build = darts.imagenet if args.data == "imagenet" else darts.cifar
    model = build(args.channels, args.cells, classes, evaluation=True, auxiliary=args.auxiliary > 0)
    return nasfx.finalize(model, arch, example_inputs=torch.zeros(1, 3, args.size, args.size))


def loss_of(args: argparse.Namespace) -> Callable[[Any, Tensor], Tensor]:
    """Cross entropy, with that of the auxiliary logits times its weight, if there are any."""

    def of(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, label_smoothing=args.label_smoothing)

    def loss(outputs: Any, target: Tensor) -> Tensor:
        if not isinstance(outputs, tuple):
            return of(outputs, target)
        logits, auxiliary = outputs
        return of(logits, target) + args.auxiliary * of(auxiliary, target)

    return loss


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say."""
    args = training.parse(arguments(), PRESETS, SMOKE, argv)
    fabric = start(args)
    name = args.arc_checkpoint or str(args.output / "architecture.json")
    arch = training.architecture_of(name, PUBLISHED)
    data = images.load(args)
    net = subnet_of(args, arch, data.classes)
    without_head = fx.GraphModule(net.eval(), net.graph)
    counts = training.counted(without_head, args.size)
    fabric.to_device(net)
    steps = len(images.loader(data.train, args, train=True))
    sgd = torch.optim.SGD(net.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    rate = {
        "cosine": training.cosine(args.lr, args.epochs * steps, every=steps),
        "exponential": training.exponential(args.lr, 0.97, every=steps),
    }

    training.retrain(
        net,
        data,
        args,
        fabric,
        optimizer=training.scheduled(sgd, rate[args.schedule]),
        loss=loss_of(args),
        clip_norm=args.clip_norm,
        before_epoch=lambda epoch: darts.set_drop_path(net, args.drop_path * epoch / args.epochs),
        results={"architecture": dict(arch), **counts},
    )


if __name__ == "__main__":
    main()
