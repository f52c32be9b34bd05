"""What a single-path step costs against the subnet that it runs.

    python benchmarks/sampled.py [--space proxyless] [--batch 64] [--size 32] [--rounds 9]

A weight step (forward, backward, plain SGD) against the same step of the finalized subnet of that
path, which shares the weights, in the layout in which that is faster. Both run a path once before
they are timed on it. CPU time of one thread; of each path the ratio of medians over some turns, and
of these the median over random paths.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from common import SPACES, cpu_seconds, generate_code, report, searching, subnet_seconds

import nasfx


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--space", default="proxyless", choices=list(SPACES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=3, help="turns on each path")
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    space = SPACES[args.space]
    x, y = torch.randn(args.batch, 3, args.size, args.size), torch.randint(10, (args.batch,))
    net = nasfx.transform(space.build(), "single-path")
    generate_code(net)
    step = searching(net, x, y)["weight"]
    ratios: list[float] = []
    for i in range(args.rounds):
        ours: list[float] = []
        fixed: list[float] = []
        for _ in range(args.repeats):
            net.seed(i)  # the same path again
            step()
            net.seed(i)
            ours.append(cpu_seconds(step))
            fixed.append(subnet_seconds(net, x, y))
        ratios.append(statistics.median(ours) / statistics.median(fixed))
    result = {
        "single_path_to_subnet": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
    }
    report(args, ("space", "batch", "size", "rounds"), result)


if __name__ == "__main__":
    main()
