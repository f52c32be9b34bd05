"""Step 1 of SPOS: train the supernet, one drawn path a step.

Writes supernet.pt, supernet.json and supernet.png to the output folder. The accuracies of this step
are those of random paths: a sign of life, not a result.
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
from torch import nn

import nasfx
from nasfx.spaces import shufflenet

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import images
import training
from common import add_resume, parser, resume_options, say, start, write_results

TOY = {
    "threads": 1,
    "size": 32, "stem": 8, "widths": (16, 32, 64), "repeats": (2, 2, 2), "head": 128,
    "held_out": 300, "batch": 32, "weight_decay": 4e-5, "label_smoothing": 0.1,
}  # fmt: skip
PAPER = {
    "data": "imagenet", "size": 224, "stem": 16, "widths": (64, 160, 320, 640),
    "repeats": (4, 4, 8, 4), "head": 1024, "held_out": 50000, "batch": 1024, "workers": 16,
    "jitter": (0.4, 0.4, 0.4), "weight_decay": 4e-5, "label_smoothing": 0.1,
}  # fmt: skip
PRESETS = {
    "toy": {**TOY, "epochs": 40, "lr": 0.1},
    "paper": {**PAPER, "epochs": 120, "lr": 0.5, "flops_bins": (290, 360, 10)},
}
SMOKE = {"widths": (16, 32), "repeats": (1, 1), "head": 32}


def add_space(to: argparse.ArgumentParser) -> None:
    """Add the flags of the search space's size; they must be the same in all three steps."""
    add = to.add_argument_group("search space, the same in all steps").add_argument
    add("--stem", type=int, help="channels of the first convolution")
    add("--widths", type=int, nargs="+", help="channels of the stages")
    add("--repeats", type=int, nargs="+", help="blocks of the stages")
    add("--head", type=int, help="channels of the last convolution")


def space_of(args: argparse.Namespace, classes: int, *, evaluation: bool = False) -> nn.Module:
    """The space that the flags say."""
    sizes = {"stem": args.stem, "widths": args.widths, "repeats": args.repeats, "head": args.head}
    return shufflenet.spos(classes, evaluation, **sizes)


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    made = parser(__doc__, output="spos-output", epochs=25)
    add_resume(made)
    images.add_data(made)
    training.add_recipe(made)
    add_space(made)
    made.add_argument("--flops-bins", type=float, nargs="*", metavar="M", default=(),
        help="low, high and step: draw a bin of so many million multiply-accumulates, then a path "
        "in it, as the authors' code; without values uniformly, as the paper")  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say."""
    args = training.parse(arguments(), PRESETS, SMOKE, argv)
    fabric, began = start(args), time.perf_counter()
    data = images.load(args)
    model = space_of(args, data.classes)
    # The search proper is the next step: here two paths are evaluated at the end.
    bins: Any = {"bins": tuple(args.flops_bins)} if args.flops_bins else {}
    strategy = nasfx.SinglePath(population=2, generations=1, **bins)
    net = nasfx.transform(
        model,
        strategy,
        example_inputs=torch.zeros(1, 3, args.size, args.size),
        objective=nasfx.Flops(unit="M") if bins else None,
        seed=args.seed,
    )
    say(f"{net.space.size} architectures")
    fabric.to_device(net)
    train = images.loader(data.train, args, train=True)
    groups = training.weights_only_decay(net.weight_parameters(), args.weight_decay)
    optimizer = training.scheduled(
        torch.optim.SGD(groups, args.lr, args.momentum),
        training.linear(args.lr, args.epochs * len(train)),
    )
    result = nasfx.search(
        net,
        train,
        images.loader(data.held_out, args),
        loss=lambda out, y: F.cross_entropy(out, y, label_smoothing=args.label_smoothing),
        metric=training.accuracy,
        epochs=args.epochs,
        optimizers=(optimizer, net.arch_optimizer()),
        seed=args.seed,
        fabric=fabric,
        **resume_options(args),
    )
    torch.save({"supernet": model.to("cpu").state_dict()}, args.output / "supernet.pt")
    result.plot(args.output / "supernet.png")
    seconds = time.perf_counter() - began
    write_results(
        args.output / "supernet.json", args, {"records": result.records, "seconds": seconds}
    )
    say(f"written to {args.output}/ after {seconds:.0f} s")


if __name__ == "__main__":
    main()
