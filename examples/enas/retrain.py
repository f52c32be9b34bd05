"""Step 2 of ENAS: train the found net from scratch, in its larger form, and test it.

Writes retrain.pt, retrain.json and retrain.png to the output folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import search
import torch
from torch import fx

import nasfx
from nasfx.spaces import enas

# isort: split
import images
import training
from common import add_resume, parser, start

TOY = {"threads": 1, "batch": 32, "epochs": 14, "restart": 2, "lr": 0.05, "weight_decay": 4e-4}
PAPER = {
    "data": "cifar10", "restart": 10, "lr": 0.05, "weight_decay": 4e-4, "workers": 4,
}  # fmt: skip
PRESETS = {
    "macro": {
        "toy": {**TOY, "size": 16, "channels": 12, "last_lr": 1e-3},
        "paper": {
            **PAPER, "channels": 96, "epochs": 310, "batch": 100, "last_lr": 1e-3, "dropout": 0.5,
        },
    },
    "micro": {
        "toy": {
            **TOY, "channels": 4, "layers": 3, "last_lr": 1e-4, "dropout": 0.2, "auxiliary": 0.4,
            "drop_path": 0.2, "cutout": 8,
        },
        "paper": {
            **PAPER, "channels": 36, "layers": 15, "epochs": 630, "batch": 144, "last_lr": 1e-4,
            "dropout": 0.2, "auxiliary": 0.4, "drop_path": 0.4, "cutout": 16,
            "fixed_arc": "ENAS_MICRO",
        },
    },
}  # fmt: skip
SMOKE = {"channels": 2, "restart": 1, "held_out": 0, "limit": 32}
PUBLISHED = {"ENAS_MICRO": enas.ENAS_MICRO}


def arguments(space: str) -> argparse.ArgumentParser:
    """The flags."""
    made = parser(__doc__, output=f"enas-{space}-output", epochs=14)
    add_resume(made)
    images.add_data(made)
    training.add_recipe(made)
    search.add_space(made)
    search.add_net(made)
    add = made.add_argument_group("retraining").add_argument
    add("--fixed-arc", metavar="FILE",
        help="the architecture's JSON file, or ENAS_MICRO, the authors' cells; "
        "None: architecture.json in the output folder")  # fmt: skip
    add("--drop-path", type=float, default=0.0,
        help="micro: probability to drop a path after the last epoch; rises from 0")  # fmt: skip
    return made


def subnet_of(args: argparse.Namespace, arch: nasfx.Architecture, classes: int) -> fx.GraphModule:
    """The net to train; in train mode it gives the auxiliary logits too, if there is a head.

    A macro net has as many layers as its architecture.

    Raises:
        SystemExit: the architecture is none of the space.
    """
    layers = sum(label.startswith("op/") for label in arch)
    if (args.search_for == "macro") != (layers > 0):
        raise SystemExit(f"--search-for {args.search_for}: the architecture is none of this space")
    args.layers = layers or args.layers
    model = search.space_of(args, classes, evaluation=True)
    return nasfx.finalize(model, arch, example_inputs=torch.zeros(1, 3, args.size, args.size))


def before_epoch_of(args: argparse.Namespace, net: fx.GraphModule) -> Callable[[int], None]:
    """What sets the drop paths; macro has none.

    Raises:
        SystemExit: macro with drop paths.
    """
    if args.search_for == "macro":
        if args.drop_path:
            raise SystemExit("--drop-path: the macro net has no drop paths; leave it at 0")
        return lambda epoch: None
    return lambda epoch: enas.set_drop_path(net, args.drop_path * epoch / args.epochs)


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say."""
    space = search.space_in(argv)
    args = training.parse(arguments(space), PRESETS[space], SMOKE, argv)
    fabric = start(args)
    name = args.fixed_arc or str(args.output / "architecture.json")
    arch = training.architecture_of(name, PUBLISHED)
    data = images.load(args)
    net = subnet_of(args, arch, data.classes)
    counts = training.counted(fx.GraphModule(net.eval(), net.graph), args.size)
    fabric.to_device(net)
    steps = len(images.loader(data.train, args, train=True))
    training.retrain(
        net,
        data,
        args,
        fabric,
        optimizer=search.sgd(args, net.parameters(), steps),
        loss=search.loss_of(args),
        clip_norm=args.clip_norm,
        before_epoch=before_epoch_of(args, net),
        results={"architecture": dict(arch), **counts},
    )


if __name__ == "__main__":
    main()
