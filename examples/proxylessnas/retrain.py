"""Step 2 of ProxylessNAS: train the found architecture from scratch, and test it.

Writes retrain.pt, retrain.json and retrain.png to the output folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import main as search
import torch
import torch.nn.functional as F

import nasfx
from nasfx.spaces import proxyless

# isort: split
import images
import training
from common import add_resume, parser, start

PRESETS = {
    "toy": {**search.TOY, "epochs": 20, "lr": 0.05},
    "paper": {**search.PAPER, "epochs": 300, "lr": 0.05},
}
SMOKE = {**search.SMOKE, "held_out": 0}


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    made = parser(__doc__, output="proxylessnas-output", epochs=20)
    add_resume(made)
    images.add_data(made)
    training.add_recipe(made)
    search.add_space(made)
    made.add_argument("--fixed-arc", metavar="FILE",
        help="the architecture's JSON file, or MOBILE, the authors' result, which has --widths "
        f"{' '.join(map(str, proxyless.MOBILE_WIDTHS))}; "
        "None: architecture.json in the output folder")  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say."""
    args = training.parse(arguments(), PRESETS, SMOKE, argv)
    fabric = start(args)
    name = args.fixed_arc or str(args.output / "architecture.json")
    arch = training.architecture_of(name, {"MOBILE": proxyless.MOBILE})
    data = images.load(args)
    model = search.space_of(args, data.classes)
    net = nasfx.finalize(model, arch, example_inputs=torch.zeros(1, 3, args.size, args.size))
    counts = training.counted(net, args.size)
    fabric.to_device(net)
    optimizer = torch.optim.SGD(
        net.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, nesterov=True
    )
    steps = args.epochs * len(images.loader(data.train, args, train=True))
    training.retrain(
        net,
        data,
        args,
        fabric,
        optimizer=training.scheduled(optimizer, training.cosine(args.lr, steps)),
        loss=lambda out, y: F.cross_entropy(out, y, label_smoothing=args.label_smoothing),
        results={"architecture": dict(arch), **counts},
    )


if __name__ == "__main__":
    main()
