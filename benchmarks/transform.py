"""What `transform` and `finalize` cost against the size of the graph.

    python benchmarks/transform.py [--models chain darts] [--strategies darts proxyless single-path]

`chain` is choices in a row, with three candidates of three layers each; `darts` is the CIFAR space
of DARTS with 4 channels and more and more cells. A size is the nodes of the lowered graph and of
the graphs of its candidates. Every size takes its turn in every round. `growth` is the time per
node over that of the size before, in the same round: 1 where the cost is linear.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from common import Milliseconds, Row, add_options, by_clock, ratio, report, set_up, spread, timed
from torch import fx, nn

import nasfx
from nasfx.spaces import darts

ACTIONS = ("transform", "finalize")
Key = tuple[str, str, int]  # model, strategy, size


class Chain(nn.Module):
    """Choices in a row, each with three candidates of three layers."""

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


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "chain": Chain,
    "darts": lambda cells: darts.cifar(4, cells),
}


def nodes(net: nasfx.Supernet) -> int:
    """The nodes of the lowered graph and of the graphs of its candidates."""
    candidates = [module for module in net.modules() if isinstance(module, fx.GraphModule)]
    return len(net.graph.nodes) + sum(len(module.graph.nodes) for module in candidates)


def measure(model: nn.Module, strategy: str) -> tuple[int, dict[str, Milliseconds]]:
    """The size of the transformed net, and what `transform` and `finalize` took."""
    nets: list[nasfx.Supernet] = []
    transform = timed(lambda: nets.append(nasfx.transform(model, strategy)))
    (net,) = nets
    arch = net.space.sample(torch.Generator().manual_seed(0))
    return nodes(net), {
        "transform": transform,
        "finalize": timed(lambda: nasfx.finalize(net, arch)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--strategies", nargs="+", default=["darts", "proxyless", "single-path"])
    parser.add_argument("--chain", type=int, nargs="+", default=[250, 500, 1000], metavar="CHOICES")
    parser.add_argument("--darts", type=int, nargs="+", default=[4, 8, 16, 20], metavar="CELLS")
    add_options(parser, rounds=3)
    args = parser.parse_args(argv)
    set_up(args)
    keys = [
        (model, strategy, size)
        for model in args.models
        for strategy in args.strategies
        for size in getattr(args, model)
    ]
    measure(MODELS[args.models[0]](4), args.strategies[0])  # torch imports some of itself late
    sizes: dict[Key, int] = {}
    times: dict[Key, dict[str, list[Milliseconds]]] = {
        key: {action: [] for action in ACTIONS} for key in keys
    }
    for _ in range(args.rounds):
        for key in keys:
            model, strategy, size = key
            sizes[key], taken = measure(MODELS[model](size), strategy)
            for action, one in taken.items():
                times[key][action].append(one)
    columns = (
        "model",
        "strategy",
        "action",
        "clock",
        "size",
        "nodes",
        "time",
        "per_node",
        "growth",
    )
    report(__file__, args, rows(keys, sizes, times, args.threads), {"milliseconds": columns})


def rows(
    keys: Sequence[Key],
    sizes: dict[Key, int],
    times: dict[Key, dict[str, list[Milliseconds]]],
    threads: int,
) -> list[Row]:
    made: list[Row] = []
    before: tuple[str, str] | None = None
    smaller: dict[tuple[str, str], list[float]] = {}
    for key in keys:
        model, strategy, size = key
        if before != (model, strategy):
            smaller = {}
        before = model, strategy
        for clock, taken in by_clock(times[key], threads).items():
            for action in ACTIONS:
                per_node = [one / sizes[key] for one in taken[action]]
                row: Row = {
                    "model": model,
                    "strategy": strategy,
                    "action": action,
                    "clock": clock,
                    "size": size,
                    "nodes": sizes[key],
                    "time": spread(taken[action]),
                    "per_node": spread(per_node),
                }
                if (action, clock) in smaller:
                    row["growth"] = ratio(per_node, smaller[action, clock])
                smaller[action, clock] = per_node
                made.append(row)
    return sorted(made, key=lambda row: (row["model"], row["strategy"], row["action"]))


if __name__ == "__main__":
    main()
