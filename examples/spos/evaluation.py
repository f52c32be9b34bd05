"""Step 3 of SPOS: train the found architecture from scratch, and test it.

Writes retrain.pt, retrain.json and retrain.png to the output folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import supernet
import torch
import torch.nn.functional as F

import nasfx
from nasfx.spaces import shufflenet

# isort: split
import images
import training
from common import add_resume, parser, start

PRESETS = {
    "toy": {**supernet.TOY, "held_out": 0, "epochs": 25, "lr": 0.1},
    "paper": {
        **supernet.PAPER, "held_out": 0, "epochs": 240, "lr": 0.5, "fixed_arc": "SPOS_BEST",
    },
}  # fmt: skip
SMOKE = {**supernet.SMOKE, "held_out": 0}


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    made = parser(__doc__, output="spos-output", epochs=25)
    add_resume(made)
    images.add_data(made)
    training.add_recipe(made)
    supernet.add_space(made)
    made.add_argument("--fixed-arc", metavar="FILE",
        help="the architecture's JSON file, or SPOS_BEST, the authors' result; "
        "None: architecture.json in the output folder")  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say."""
    args = training.parse(arguments(), PRESETS, SMOKE, argv)
    fabric = start(args)
    name = args.fixed_arc or str(args.output / "architecture.json")
    arch = training.architecture_of(name, {"SPOS_BEST": shufflenet.SPOS_BEST})
    data = images.load(args)
    model = supernet.space_of(args, data.classes, evaluation=True)
    net = nasfx.finalize(model, arch, example_inputs=torch.zeros(1, 3, args.size, args.size))
    counts = training.counted(net, args.size)
    fabric.to_device(net)
    groups = training.weights_only_decay(net.parameters(), args.weight_decay)
    optimizer = torch.optim.SGD(groups, args.lr, args.momentum)
    steps = args.epochs * len(images.loader(data.train, args, train=True))
    training.retrain(
        net,
        data,
        args,
        fabric,
        optimizer=training.scheduled(optimizer, training.linear(args.lr, steps)),
        loss=lambda out, y: F.cross_entropy(out, y, label_smoothing=args.label_smoothing),
        results={"architecture": dict(arch), **counts},
    )


if __name__ == "__main__":
    main()
