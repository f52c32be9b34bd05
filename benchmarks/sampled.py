"""What a step of a sampled strategy costs against the subnet that it runs.

    python benchmarks/sampled.py [--batch 64] [--size 32] [--rounds 15] [--json FILE]

On the space of ProxylessNAS, forward and backward without an optimizer, CPU time of one thread:

- single-path: a weight step against the same step of the finalized subnet of that path, which
  shares the weights; the median of the ratios over random paths;
- Proxyless with gate "two": an arch step against a weight step, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import nasfx
from nasfx.spaces import proxyless


def cpu_seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def single_path(args: argparse.Namespace, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """The ratios of the steps, one for each random path."""
    net = nasfx.transform(proxyless.mobile(classes=10), "single-path")

    def searching() -> None:
        with net.weight_step():
            F.cross_entropy(net(x), y).backward()
        net.zero_grad()

    ratios: list[float] = []
    for turn in range(args.rounds + 1):
        first = cpu_seconds(searching)
        subnet = nasfx.finalize(net, net.path, copy=False)

        def training(subnet: torch.nn.Module = subnet) -> None:
            F.cross_entropy(subnet(x), y).backward()
            subnet.zero_grad()

        training()
        fixed = cpu_seconds(training)
        if turn:
            ratios.append(first / fixed)
    return ratios


def two_path(args: argparse.Namespace, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """The median CPU seconds of a weight step and of an arch step."""
    net = nasfx.transform(proxyless.mobile(classes=10), nasfx.Proxyless(gate="two"))
    times: dict[str, list[float]] = {"weight": [], "arch": []}

    def weight() -> None:
        with net.weight_step():
            F.cross_entropy(net(x), y).backward()
        net.zero_grad()

    def arch() -> None:
        with net.arch_step():
            net.objective(F.cross_entropy(net(x), y)).backward()
        net.zero_grad()

    for turn in range(args.rounds + 1):
        for name, step in (("weight", weight), ("arch", arch)):
            seconds = cpu_seconds(step)
            if turn:
                times[name].append(seconds)
    return statistics.median(times["weight"]), statistics.median(times["arch"])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(args.batch, 3, args.size, args.size), torch.randint(10, (args.batch,))
    ratios = single_path(args, x, y)
    weight, arch = two_path(args, x, y)
    result = {
        "batch": args.batch,
        "size": args.size,
        "single_path_to_subnet": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "proxyless_weight": weight,
        "proxyless_arch": arch,
        "proxyless_arch_to_weight": arch / weight,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
