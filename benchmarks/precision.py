"""What bf16 autocast and `torch.compile` give a supernet's steps on this CPU.

    python benchmarks/precision.py [--spaces ...] [--strategies darts single-path] [--rounds 3]
    python benchmarks/precision.py --compile [--channels 4] [--cells 3]

A weight step and an arch step, if there is one, each with its optimizer, in float32 and with the
forward pass and the loss under `torch.autocast("cpu", torch.bfloat16)`; both take turns.
`to_float32` is below 1 where autocast pays. `bf16_instructions` names what the processor has.

With `--compile` that is not measured. Instead the steps of a small DARTS net that
`torch.compile(net, fullgraph=True)` compiled take turns with those of the same net as it is, by
both clocks. `first` is the first call, which compiles, for minutes; the CPU time of C++ compilers
is not in it, as they are processes of their own. `to_eager` is below 1 where compiled steps are
faster, and `pays_after` is the number of steps that make up for compilation.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from common import (
    SPACES,
    Row,
    Step,
    Times,
    add_options,
    by_clock,
    generate_code,
    ratio,
    report,
    searching,
    set_up,
    space_of,
    spread,
    timed,
)

import nasfx
from nasfx.spaces import darts


def bf16_instructions() -> list[str]:
    """The processor's flags of bf16 arithmetic; of Linux."""
    file = Path("/proc/cpuinfo")
    flags = set(file.read_text(encoding="utf-8").split()) if file.exists() else set[str]()
    return sorted(flags & {"avx512_bf16", "avx_ne_convert", "amx_bf16", "bf16", "i8mm"})


def taken_in_turn(variants: dict[str, Step], rounds: int) -> Times:
    """The times of every variant, all warm."""
    times: Times = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in variants.items():
            times[name].append(timed(step))
    return times


def precisions(args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    bf16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    for name in args.spaces:
        space = space_of(name, args)
        x, y = space.data()
        for strategy in args.strategies:
            net = nasfx.transform(space.build(), strategy)
            generate_code(net)
            plain, low = searching(net, x, y), searching(net, x, y, around=bf16)
            for kind in plain:
                pair = {"float32": seeded(net, plain[kind]), "bf16": seeded(net, low[kind])}
                taken_in_turn(pair, 1)
                times = taken_in_turn(pair, args.rounds)
                for clock, t in by_clock(times, args.threads).items():
                    row: Row = {"space": name, "strategy": strategy, "step": kind, "clock": clock}
                    row |= {key: spread(values) for key, values in t.items()}
                    rows.append(row | {"to_float32": ratio(t["bf16"], t["float32"])})
    return rows


def seeded(net: nasfx.Supernet, step: Step) -> Step:
    """The step on paths that are the same for all variants of a round."""
    calls = iter(range(10**9))

    def run() -> None:
        net.seed(next(calls))
        step()

    return run


def compiled(args: argparse.Namespace) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.batch or 8, 3, args.size or 16, args.size or 16, generator=generator)
    y = torch.randint(10, (len(x),), generator=generator)
    net = nasfx.transform(darts.cifar(args.channels, args.cells), "darts")
    plain = searching(net, x, y)
    fast = searching(net, x, y, run=torch.compile(net, fullgraph=True, backend=args.backend))
    rows: list[Row] = []
    for kind in plain:
        taken_in_turn({"eager": plain[kind]}, 1)
        first = timed(fast[kind])
        times = taken_in_turn({"eager": plain[kind], "compiled": fast[kind]}, args.rounds + 1)
        later = {name: taken[1:] for name, taken in times.items()}
        for clock, t in by_clock(later, threads=2).items():  # by both clocks always
            cost = getattr(first, clock)
            gain = statistics.median(t["eager"]) - statistics.median(t["compiled"])
            rows.append(
                {
                    "step": kind,
                    "clock": clock,
                    "first": cost,
                    **{name: spread(values) for name, values in t.items()},
                    "to_eager": ratio(t["compiled"], t["eager"]),
                    "pays_after": round(cost / gain) if gain > 0 else None,
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=list(SPACES))
    parser.add_argument("--strategies", nargs="+", default=["darts", "single-path"])
    parser.add_argument("--batch", type=int, help="in place of the space's; of --compile 8")
    parser.add_argument("--size", type=int, help="of images, in place of the space's; 16")
    parser.add_argument("--compile", action="store_true", help="compare compiled steps instead")
    parser.add_argument("--backend", default="inductor", help="of --compile")
    parser.add_argument("--channels", type=int, default=4, help="of --compile")
    parser.add_argument("--cells", type=int, default=3, help="of --compile")
    add_options(parser, rounds=3)
    args = parser.parse_args(argv)
    set_up(args)
    if args.compile:
        columns = ("step", "clock", "first", "eager", "compiled", "to_eager", "pays_after")
        report(__file__, args, compiled(args), {"torch.compile, ms": columns})
    else:
        found = bf16_instructions()
        rows = [row | {"bf16_instructions": found} for row in precisions(args)]
        columns = ("space", "strategy", "step", "clock", "float32", "bf16", "to_float32")
        report(__file__, args, rows, {f"bf16 autocast, ms; processor: {found}": columns})


if __name__ == "__main__":
    main()
