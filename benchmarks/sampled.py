"""What a single-path step costs against the subnet that it runs.

    python benchmarks/sampled.py [--space proxyless] [--batch 64] [--size 32] [--rounds 9]

A weight step (forward, backward, plain SGD) against the same step of the finalized subnet of that
path, which shares the weights, in the layout in which that is faster. Both run a path once before
they are timed on it. A round is a random path, and its times are medians over some turns; the first
path warms up.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from common import (
    SPACES,
    Milliseconds,
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
    subnet_time,
    timed,
)

import nasfx


def median(times: Sequence[Milliseconds]) -> Milliseconds:
    return Milliseconds(*(statistics.median(clock) for clock in zip(*times, strict=True)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--space", default="proxyless", choices=list(SPACES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3, help="on each path")
    add_options(parser, rounds=9)
    args = parser.parse_args(argv)
    set_up(args)
    space = space_of(args.space, args)
    x, y = space.data()
    net = nasfx.transform(space.build(), "single-path")
    generate_code(net)
    step = searching(net, x, y)["weight"]
    times: Times = {"weight": [], "fixed": []}
    for i in range(args.rounds + 1):
        ours: list[Milliseconds] = []
        fixed: list[Milliseconds] = []
        for _ in range(args.turns):
            net.seed(i)  # the same path again
            step()
            net.seed(i)
            ours.append(timed(step))
            fixed.append(subnet_time(net, x, y))
        times["weight"].append(median(ours))
        times["fixed"].append(median(fixed))
    later = {name: taken[1:] for name, taken in times.items()}
    rows = [
        {
            "space": args.space,
            "clock": clock,
            "weight": spread(taken["weight"]),
            "fixed": spread(taken["fixed"]),
            "weight_to_fixed": ratio(taken["weight"], taken["fixed"]),
        }
        for clock, taken in by_clock(later, args.threads).items()
    ]
    columns = ("space", "clock", "weight", "fixed", "weight_to_fixed")
    report(__file__, args, rows, {"a single-path step against its subnet's, ms": columns})


if __name__ == "__main__":
    main()
