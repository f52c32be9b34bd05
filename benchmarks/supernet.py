"""What a DARTS supernet costs to train: nasfx against a net written by hand.

    python benchmarks/supernet.py [--small] [--batch 32] [--rounds 3] [--threads 1]

An iteration is a weight step (forward and backward on one batch) and an arch step (the same on
another), without optimizers, on the CIFAR space of DARTS with 16 channels and 8 cells. All
variants take turns in one process. Ratios are those to `nasfx-auto`, or to the last variant, in the
same round. Peak memory is that of an iteration in a process of its own, above what it had before
the first step.

The net written by hand (`plain.py`) has the structure of the authors' code:

- `nchw`: computes all gradients in both steps, as the authors' code and NNI do;
- `last`: the same with `.to(memory_format=torch.channels_last)`;
- `last-restricted`: that, and weights and alphas are switched off where a step does not need them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from common import (
    Row,
    Step,
    Times,
    add_options,
    by_clock,
    peaks,
    print_peak,
    ratio,
    report,
    set_up,
    spread,
    timed,
)
from plain import Hand
from torch import Tensor, nn

import nasfx
from nasfx.spaces import darts

VARIANTS = ("nchw", "last", "last-restricted", "nasfx-off", "nasfx-auto")


# -- steps -----------------------------------------------------------------------------------------


def hand_written(
    variant: str, args: argparse.Namespace, batch: tuple[Tensor, Tensor]
) -> list[Step]:
    x, y = batch
    net = Hand(args.channels, args.cells)
    if variant.startswith("last"):
        net.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    alphas = list(net.alphas)
    weights = [p for p in net.parameters() if all(p is not a for a in alphas)]

    def step(off: list[nn.Parameter]) -> Step:
        def run() -> None:
            for p in off:
                p.requires_grad_(False)
            F.cross_entropy(net(x), y).backward()
            for p in off:
                p.requires_grad_(True)
            for p in net.parameters():
                p.grad = None

        return run

    restricted = variant == "last-restricted"
    return [step(alphas if restricted else []), step(weights if restricted else [])]


def of_nasfx(optimize: str, args: argparse.Namespace, batch: tuple[Tensor, Tensor]) -> list[Step]:
    x, y = batch
    model = darts.cifar(args.channels, args.cells)
    net = nasfx.transform(model, "darts", optimize=optimize)

    def weight() -> None:
        with net.weight_step():
            F.cross_entropy(net(x), y).backward()
        net.zero_grad()

    def arch() -> None:
        with net.arch_step():
            net.objective(F.cross_entropy(net(x), y)).backward()
        net.zero_grad()

    return [weight, arch]


def steps(variant: str, args: argparse.Namespace) -> list[Step]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
    batch = x, torch.randint(10, (args.batch,), generator=generator)
    if variant.startswith("nasfx"):
        return of_nasfx(variant.removeprefix("nasfx-"), args, batch)
    return hand_written(variant, args, batch)


# -- measuring -------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Times]:
    """The times of every variant by kind of step; the first turn warms up."""
    made = {variant: steps(variant, args) for variant in args.variants}
    times: dict[str, Times] = {variant: {"weight": [], "arch": []} for variant in made}
    for turn in range(args.rounds + 1):
        for variant, both in made.items():
            for kind, step in zip(("weight", "arch"), both, strict=True):
                taken = timed(step)
                if turn:
                    times[variant][kind].append(taken)
    return times


def rows_of(args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    base = "nasfx-auto" if "nasfx-auto" in args.variants else args.variants[-1]
    clocks = {v: by_clock(times, args.threads) for v, times in measure(args).items()}
    iterations = {
        (variant, clock): [sum(pair) for pair in zip(taken["weight"], taken["arch"], strict=True)]
        for variant, by in clocks.items()
        for clock, taken in by.items()
    }
    for (variant, clock), both in iterations.items():
        row: Row = {"variant": variant, "clock": clock}
        row |= {kind: spread(taken) for kind, taken in clocks[variant][clock].items()}
        row |= {"iteration": spread(both), "ratio": ratio(both, iterations[base, clock])}
        if args.memory and clock == "cpu":
            row["peak"] = peaks(__file__, args, [variant] * args.memory)
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--small", action="store_true", help="8 channels, 4 cells, 16x16")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--memory", type=int, default=1, metavar="PROCESSES",
        help="that measure the peak memory of each variant")  # fmt: skip
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    add_options(parser, rounds=3)
    args = parser.parse_args(argv)
    if args.small:
        args.channels, args.cells, args.size = 8, 4, 16
    set_up(args)
    if args.peak:
        print_peak(steps(args.peak, args))
        return
    columns = ("variant", "clock", "weight", "arch", "iteration", "ratio", "peak")
    report(__file__, args, rows_of(args), {"ms, and MiB": columns})


if __name__ == "__main__":
    main()
