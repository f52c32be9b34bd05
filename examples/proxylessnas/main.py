"""Step 1 of ProxylessNAS: warm up the weights, then search, with a cost in the loss if asked for.

Writes architecture.json, search.json and search.png to the output folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nasfx
from nasfx.spaces import proxyless

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import images
import training
from common import add_resume, parser, resume_options, say, start, write_results

TOY = {
    "threads": 1, "size": 16, "stem": 8, "widths": (8, 16, 24, 32), "repeats": (2, 2, 1),
    "strides": (2, 2, 1), "head": 128, "batch": 32, "weight_decay": 4e-5, "label_smoothing": 0.1,
}  # fmt: skip
PAPER = {
    "data": "imagenet", "size": 224, "stem": 32, "widths": (16, 24, 40, 80, 96, 192, 320),
    "repeats": (4, 4, 4, 4, 4, 1), "strides": (2, 2, 2, 1, 2, 1), "head": 1280, "batch": 256,
    "workers": 16, "jitter": (32 / 255, 0, 0.5), "weight_decay": 4e-5, "label_smoothing": 0.1,
}  # fmt: skip
PRESETS = {
    "toy": {
        **TOY, "held_out": 400, "epochs": 20, "warmup": 10, "arch_lr": 0.05,
        "applied_hardware": "flops", "reference_latency": 3e5, "lr": 0.1, "warmup_lr": 0.1,
    },
    "paper": {
        **PAPER, "held_out": 50000, "epochs": 120, "warmup": 40, "arch_lr": 1e-3,
        "reference_latency": 80.0, "lr": 0.025, "warmup_lr": 0.05,
    },
}  # fmt: skip
SMOKE = {"widths": (8, 16), "repeats": (2,), "strides": (2,), "head": 32, "size": 16, "warmup": 1,
         "arch_every": 1}  # fmt: skip


def add_space(to: argparse.ArgumentParser) -> None:
    """Add the flags of the search space's size; they must be the same in both steps."""
    add = to.add_argument_group("search space, the same in both steps").add_argument
    add("--stem", type=int, help="channels of the first convolution")
    add("--widths", type=int, nargs="+", help="channels of the fixed first block and the stages")
    add("--repeats", type=int, nargs="+", help="searched blocks of the stages")
    add("--strides", type=int, nargs="+", help="of the first block of the stages")
    add("--head", type=int, help="channels of the last convolution")


def space_of(args: argparse.Namespace, classes: int) -> nn.Module:
    """The space that the flags say."""
    return proxyless.mobile(
        args.stem, args.widths, args.head, classes, repeats=args.repeats, strides=args.strides
    )


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    made = parser(__doc__, output="proxylessnas-output", epochs=20)
    add_resume(made)
    images.add_data(made)
    training.add_recipe(made)
    add_space(made)
    add = made.add_argument_group("search").add_argument
    add("--warmup", type=int, help="epochs before the others, in which only weights are trained")
    add("--warmup-lr", type=float, help="at their start; falls to 0 along a cosine of its own")
    add("--arch-every", type=int, default=5, help="an arch step before every so many weight steps")
    add("--arch-lr", type=float, help="of Adam on the architecture")
    add("--gate", default="full_v2", choices=("full_v2", "full", "two"), help="see nasfx.Proxyless")
    add("--reinforce", action="store_true",
        help="learn from rewards, accuracy * (reference / cost)^0.1")  # fmt: skip
    add("--rl-batch", type=int, default=1000, help="images of a reward; at most those held out")
    add("--rl-steps", type=int, default=300, help="arch steps an epoch, of 10 paths each")
    add = made.add_argument_group("cost").add_argument
    add("--applied-hardware", metavar="NAME",
        help="flops, or whose latency: one of nn-Meter's devices such as cortexA76cpu_tflite21; "
        f"{', '.join(training.RUNTIMES)}, measured here; or the file of a latency table. "
        "None: no cost")  # fmt: skip
    add("--reference-latency", type=float,
        help="the cost to aim at: milliseconds, or for flops multiply-accumulates")  # fmt: skip
    add("--grad-reg-loss-type", default="mul#log", choices=("mul#log", "add#linear"),
        help="how the cost enters the loss; not used with --reinforce")  # fmt: skip
    add("--grad-reg-loss-alpha", type=float, default=0.2, help="of mul#log")
    add("--grad-reg-loss-beta", type=float, default=0.3, help="of mul#log")
    add("--grad-reg-loss-lambda", type=float, default=0.1, help="of add#linear")
    return made


def objective(args: argparse.Namespace) -> nasfx.Objective | None:
    """The cost that the search weighs in, as the flags say."""
    if args.applied_hardware is None:
        return None
    loss = "mul#power" if args.reinforce else args.grad_reg_loss_type
    constants: dict[str, dict[str, float]] = {
        "mul#log": {"alpha": args.grad_reg_loss_alpha, "beta": args.grad_reg_loss_beta},
        "add#linear": {"lambda_": args.grad_reg_loss_lambda},
        "mul#power": {},
    }
    options: dict[str, Any] = {"loss": loss, **constants[loss]}
    if args.applied_hardware == "flops":
        return nasfx.Flops(args.reference_latency, **options)
    source = training.latency_source(args.applied_hardware)
    return nasfx.Latency(source, args.reference_latency, **options)


def strategy(args: argparse.Namespace, steps: int) -> nasfx.Proxyless:
    """ProxylessNAS as the flags say; `steps` are the weight steps of an epoch."""
    if args.reinforce:
        return nasfx.Proxyless(estimator="reinforce", arch_every=max(1, steps // args.rl_steps))
    return nasfx.Proxyless(gate=args.gate, arch_every=args.arch_every)


def rate(args: argparse.Namespace, steps: int) -> training.Rate:
    """A cosine over the warm-up, then another one over the search."""
    warm = args.warmup * steps
    before = training.cosine(args.warmup_lr, max(1, warm))
    after = training.cosine(args.lr, args.epochs * steps)
    return lambda done: before(done) if done < warm else after(done - warm)


def loss_of(net: nasfx.Supernet, label_smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross entropy, with smoothed labels in weight steps alone, as in the authors' code."""

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        smoothing = 0.0 if net.step_kind == "arch" else label_smoothing
        return F.cross_entropy(outputs, target, label_smoothing=smoothing)

    return loss


def expected(net: nasfx.Supernet) -> dict[str, float]:
    """The expected costs under the current probabilities."""
    return {name: float(cost.detach()) for name, cost in net.expected_cost().items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Search as the flags say."""
    args = training.parse(arguments(), PRESETS, SMOKE, argv)
    fabric, began = start(args), time.perf_counter()
    data = images.load(args)
    train = images.loader(data.train, args, train=True)
    batch = min(args.rl_batch, args.held_out) if args.reinforce else args.batch
    model = space_of(args, data.classes)
    net = nasfx.transform(
        model,
        strategy(args, len(train)),
        example_inputs=torch.zeros(1, 3, args.size, args.size),
        objective=objective(args),
        seed=args.seed,
    )
    say(f"{net.space.size} architectures")
    for name, cost in expected(net).items():
        say(f"expected {name} before the search: {cost:.4g}")
    fabric.to_device(net)
    sgd = torch.optim.SGD(
        net.weight_parameters(), args.lr, args.momentum, weight_decay=args.weight_decay,
        nesterov=True,
    )  # fmt: skip
    result = nasfx.search(
        net,
        train,
        images.loader(data.held_out, args, train=True, batch=batch),
        loss=loss_of(net, args.label_smoothing),
        metric=training.accuracy,
        epochs=args.warmup + args.epochs,
        # As in the authors' code there is no arch step in the first epoch after the warm-up.
        warmup=args.warmup + 1,
        optimizers=(
            training.scheduled(sgd, rate(args, len(train))),
            net.arch_optimizer(lr=args.arch_lr),
        ),
        seed=args.seed,
        fabric=fabric,
        **resume_options(args),
    )
    print(result)
    model.to("cpu")
    arch, seconds = result.architecture, time.perf_counter() - began
    arch.to_json(args.output / "architecture.json")
    result.plot(args.output / "search.png")
    results = {
        "architecture": dict(arch),
        "supernet_accuracy": result.best_metric,
        "expected_cost": expected(net),
        "costs": {name: float(of(arch)) for name, of in net.space.costs.items()},
        **training.counted(nasfx.finalize(net, arch), args.size),
        "probabilities": {label: p.tolist() for label, p in net.probabilities().items()},
        "records": result.records,
        "seconds": seconds,
    }
    write_results(args.output / "search.json", args, results)
    say(f"written to {args.output}/ after {seconds:.0f} s")


if __name__ == "__main__":
    main()
