"""Step 1 of ENAS: a controller learns which paths of the supernet earn accuracy.

Writes architecture.json, search.json and search.png to the output folder.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nasfx
from nasfx.spaces import enas

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import images
import training
from common import add_resume, parser, resume_options, say, start, write_results

TOY = {
    "threads": 1, "size": 16, "held_out": 360, "batch": 32, "epochs": 10, "restart": 2, "lr": 0.05,
    "last_lr": 5e-4, "auxiliary": 0.0, "controller_steps": 8, "aggregate": 5, "recalibrate": 20,
}  # fmt: skip
PAPER = {
    "data": "cifar10", "size": 32, "held_out": 5000, "restart": 10, "lr": 0.05, "last_lr": 5e-4,
    "workers": 4, "recalibrate": 200,
}  # fmt: skip
PRESETS = {
    "macro": {
        "toy": {**TOY, "channels": 8, "layers": 6, "weight_decay": 5e-4},
        "paper": {
            **PAPER, "channels": 36, "layers": 12, "epochs": 310, "batch": 128,
            "weight_decay": 5e-4, "controller_steps": 50, "aggregate": 20,
        },
    },
    "micro": {
        "toy": {**TOY, "channels": 4, "layers": 3, "weight_decay": 2e-4},
        "paper": {
            **PAPER, "channels": 20, "layers": 6, "epochs": 150, "batch": 160,
            "weight_decay": 2e-4, "auxiliary": 0.4, "controller_steps": 30, "aggregate": 10,
        },
    },
}  # fmt: skip
SMOKE = {
    "size": 8, "channels": 2, "layers": 3, "restart": 1, "controller_steps": 2, "aggregate": 2,
    "final_samples": 2, "recalibrate": 2,
}  # fmt: skip

_CONVOLUTIONS = ("sep_conv_3x3", "sep_conv_5x5")
_OTHERS = ("avg_pool_3x3", "max_pool_3x3", "identity")


def space_in(argv: Sequence[str] | None) -> str:
    """What `--search-for` says, on which all defaults depend; `macro` where it says nothing."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_space(first)
    return first.parse_known_args(argv)[0].search_for


def add_space(to: argparse.ArgumentParser) -> None:
    """Add `--search-for`."""
    to.add_argument("--search-for", default="macro", choices=("macro", "micro"),
        help="macro: layers and their skips; micro: two cells. The defaults of the other flags "
        "depend on it")  # fmt: skip


def arguments(space: str) -> argparse.ArgumentParser:
    """The flags."""
    made = parser(__doc__, output=f"enas-{space}-output", epochs=10)
    add_resume(made)
    images.add_data(made)
    training.add_recipe(made)
    add_space(made)
    add_net(made)
    add = made.add_argument_group("controller").add_argument
    add("--controller-steps", type=int, help="of its optimizer, after every epoch of the weights")
    add("--aggregate", type=int, help="drawn paths a step, each on a batch of its own")
    add("--final-samples", type=int, default=10, help="drawn nets; the best is the result")
    add("--recalibrate", type=int,
        help="training batches that these nets' batch-norm statistics are taken from")  # fmt: skip
    return made


def add_net(to: argparse.ArgumentParser) -> None:
    """Add the flags of the net and of its training that both steps have."""
    add = to.add_argument_group("net and training").add_argument
    add("--channels", type=int, help="of the first layers or cells")
    add("--layers", type=int, help="of macro; of micro: cells that are no reduction")
    add("--dropout", type=float, default=0.1, help="before the last layer")
    add("--auxiliary", type=float, default=0.0, metavar="WEIGHT",
        help="of micro's auxiliary head's loss; needs --size 32; 0: no head")  # fmt: skip
    add("--restart", type=int, metavar="EPOCHS",
        help="the learning rate starts again after so many epochs, then after twice as many, "
        "and so on")  # fmt: skip
    add("--last-lr", type=float, help="to which it falls each time, along a cosine")
    add("--clip-norm", type=float, default=5.0, help="of the weights' gradient")


def strategy(args: argparse.Namespace) -> nasfx.Enas:
    """The authors' constants for the space, and what the flags say.

    Their micro controller favours convolutions: by the learned bias at its start, and in normal
    cells by one that stays.
    """
    given: dict[str, Any] = {
        "steps": args.controller_steps,
        "aggregate": args.aggregate,
        "final_samples": args.final_samples,
        "recalibrate": args.recalibrate,
    }
    if args.search_for == "macro":
        return nasfx.Enas.macro(**given)
    normal = dict.fromkeys(_CONVOLUTIONS, 0.25) | dict.fromkeys(_OTHERS, -0.25)
    return nasfx.Enas.micro(
        op_bias=dict.fromkeys(_CONVOLUTIONS, 10.0), fixed_bias={"normal/*/op": normal}, **given
    )


def space_of(args: argparse.Namespace, classes: int, *, evaluation: bool = False) -> nn.Module:
    """The space that the flags say.

    Raises:
        SystemExit: macro with an auxiliary head, which it does not have.
    """
    sizes = args.channels, args.layers, classes
    if args.search_for == "macro":
        if args.auxiliary:
            raise SystemExit("--auxiliary: the macro net has no auxiliary head; leave it at 0")
        return enas.macro(*sizes, evaluation=evaluation, dropout=args.dropout)
    head = args.auxiliary > 0
    return enas.micro(*sizes, evaluation=evaluation, auxiliary=head, dropout=args.dropout)


def restarts(lr: float, last: float, *, first: int, every: int) -> training.Rate:
    """A cosine from `lr` to `last` over `first` epochs, then over 2, 4, 8 ... times as many.

    Args:
        lr: where every cosine starts.
        last: where it would end; the last of its epochs is one step short of it.
        first: epochs of the first cosine.
        every: steps of an epoch; the rate changes between epochs.
    """

    def rate(done: int) -> float:
        epoch, period = done // every, first
        while epoch >= period:
            epoch, period = epoch - period, 2 * period
        return last + (lr - last) * (1 + math.cos(math.pi * epoch / period)) / 2

    return rate


def sgd(args: argparse.Namespace, parameters: Any, steps: int) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum and the warm restarts that the flags say."""
    made = torch.optim.SGD(
        parameters, args.lr, args.momentum, weight_decay=args.weight_decay, nesterov=True
    )
    return training.scheduled(
        made, restarts(args.lr, args.last_lr, first=args.restart, every=steps)
    )


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


def reward(outputs: Any, target: Tensor) -> float:
    """The accuracy of a batch; in train mode there may be auxiliary logits, which do not count."""
    return training.accuracy(outputs[0] if isinstance(outputs, tuple) else outputs, target)


def main(argv: Sequence[str] | None = None) -> None:
    """Search as the flags say."""
    space = space_in(argv)
    args = training.parse(arguments(space), PRESETS[space], SMOKE, argv)
    fabric, began = start(args), time.perf_counter()
    data = images.load(args)
    train = images.loader(data.train, args, train=True)
    net = nasfx.transform(
        space_of(args, data.classes),
        strategy(args),
        # Two: in train mode the auxiliary head's batch norms refuse a single value a channel.
        example_inputs=torch.zeros(2, 3, args.size, args.size),
        seed=args.seed,
    )
    say(f"{float(net.space.size):.2e} architectures")
    fabric.to_device(net)
    result = nasfx.search(
        net,
        train,
        images.loader(data.held_out, args, train=True),
        loss=loss_of(args),
        metric=reward,
        epochs=args.epochs,
        clip_norm=args.clip_norm,
        optimizers=(sgd(args, net.weight_parameters(), len(train)), net.arch_optimizer()),
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
        "records": result.records,
        "seconds": seconds,
    }
    write_results(args.output / "search.json", args, results)
    say(f"written to {args.output}/ after {seconds:.0f} s")


if __name__ == "__main__":
    main()
