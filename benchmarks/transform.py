"""What `transform` and `finalize` cost against the size of the graph.

    python benchmarks/transform.py [--choices 250 500 1000] [--strategy darts proxyless single-path]

A chain of choices with three candidates of two layers each gives about ten nodes a choice. Every
size runs in this process, interleaved over `--repeats`; medians are printed as JSON, and as ratios
to the size before, which are 2.0 where the cost is linear.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import nasfx


class Chain(nn.Module):
    """Choices in a row, each with three candidates of two layers."""

    def __init__(self, choices: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nasfx.LayerChoice(
                {
                    f"c{k}": nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
                    for k in range(3)
                }
            )
            for _ in range(choices)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--choices", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--strategy", nargs="+", default=["darts", "proxyless", "single-path"], metavar="NAME"
    )
    args = parser.parse_args()
    times: dict[tuple[str, int, str], list[float]] = {}
    nodes: dict[tuple[str, int], int] = {}
    for _ in range(args.repeats):
        for strategy in args.strategy:
            for n in args.choices:
                model = Chain(n)
                made: list[nasfx.Supernet] = []
                took = seconds(lambda: made.append(nasfx.transform(model, strategy)))  # noqa: B023
                times.setdefault((strategy, n, "transform"), []).append(took)
                net = made[0]
                nodes[strategy, n] = len(net.history.text().split("\n"))
                arch = net.space.sample(torch.Generator().manual_seed(0))
                took = seconds(lambda: nasfx.finalize(net, arch))  # noqa: B023
                times.setdefault((strategy, n, "finalize"), []).append(took)
    rows = []
    for strategy in args.strategy:
        for action in ("transform", "finalize"):
            before = None
            for n in args.choices:
                measured = times[strategy, n, action]
                median = statistics.median(measured)
                rows.append(
                    {
                        "strategy": strategy,
                        "action": action,
                        "choices": n,
                        "printed_lines": nodes[strategy, n],
                        "seconds": round(median, 3),
                        "spread": [round(min(measured), 3), round(max(measured), 3)],
                        "ratio_to_size_before": before and round(median / before, 2),
                    }
                )
                before = median
    machine = {"torch": torch.__version__, "cpu": platform.machine(), "threads": 1}
    print(json.dumps({"machine": machine, "repeats": args.repeats, "rows": rows}, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
