"""What a DARTS supernet costs to train: nasfx against a net written by hand.

    python benchmarks/supernet.py [--small] [--batch 32] [--rounds 3] [--json FILE]

An iteration is a weight step (forward and backward on one batch) and an arch step (the same on
another), without optimizers, on the CIFAR space of DARTS with 16 channels and 8 cells. All
variants take turns in one process on one thread; medians of CPU time are printed as a table and as
JSON. Peak memory is measured in a process per variant, above what it had before the first step.

The nets written by hand are plain PyTorch with the structure of the authors' code:

- `nchw`: computes all gradients in both steps, as the authors' code and NNI do;
- `last`: the same with `.to(memory_format=torch.channels_last)`;
- `last-restricted`: that, and weights and alphas are switched off where a step does not need them.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Step, cpu_seconds, peak_mib, print_peak, report
from torch import Tensor, nn

import nasfx
from nasfx.spaces import darts

VARIANTS = ("nchw", "last", "last-restricted", "nasfx-off", "nasfx-auto")


# -- the net written by hand -----------------------------------------------------------------------


def norm(c: int) -> nn.Module:
    return nn.BatchNorm2d(c, affine=False)


def conv_relu(c_in: int, c: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c, 1, bias=False), norm(c))


class Halve(nn.Module):
    def __init__(self, c_in: int, c: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(c_in, c // 2, 1, 2, bias=False)
        self.b = nn.Conv2d(c_in, c // 2, 1, 2, bias=False)
        self.norm = norm(c)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return self.norm(torch.cat([self.a(x), self.b(x[:, :, 1:, 1:])], 1))


class Nothing(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(0.0) if self.stride == 1 else x[:, :, ::2, ::2].mul(0.0)


def depthwise(c: int, k: int, stride: int, dilation: int) -> list[nn.Module]:
    pad = dilation * (k // 2)
    return [
        nn.ReLU(),
        nn.Conv2d(c, c, k, stride, pad, dilation, c, bias=False),
        nn.Conv2d(c, c, 1, bias=False),
        norm(c),
    ]


def operations(c: int, s: int) -> nn.ModuleList:
    average = nn.AvgPool2d(3, s, 1, count_include_pad=False)
    return nn.ModuleList(
        [
            Nothing(s),
            nn.Sequential(nn.MaxPool2d(3, s, 1), norm(c)),
            nn.Sequential(average, norm(c)),
            nn.Identity() if s == 1 else Halve(c, c),
            nn.Sequential(*depthwise(c, 3, s, 1), *depthwise(c, 3, 1, 1)),
            nn.Sequential(*depthwise(c, 5, s, 1), *depthwise(c, 5, 1, 1)),
            nn.Sequential(*depthwise(c, 3, s, 2)),
            nn.Sequential(*depthwise(c, 5, s, 2)),
        ]
    )


def mixture(weights: Tensor, ops: nn.Module, x: Tensor) -> Tensor:
    terms = [w * op(x) for w, op in zip(weights, ops.children(), strict=True)]
    return functools.reduce(torch.add, terms)


class Cell(nn.Module):
    def __init__(self, c0: int, c1: int, c: int, reduces: bool, halved: bool) -> None:
        super().__init__()
        self.reduces = reduces
        self.pre0 = Halve(c0, c) if halved else conv_relu(c0, c)
        self.pre1 = conv_relu(c1, c)
        self.edges = nn.ModuleList(
            operations(c, 2 if reduces and j < 2 else 1) for i in range(4) for j in range(2 + i)
        )

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        states = [self.pre0(s0), self.pre1(s1)]
        first = 0
        for _ in range(4):
            edges = [
                mixture(weights[first + j], self.edges[first + j], s) for j, s in enumerate(states)
            ]
            first += len(states)
            states.append(functools.reduce(torch.add, edges))
        return torch.cat(states[2:], 1)


class Hand(nn.Module):
    """The search net of DARTS: (N, 3, H, W) to (N, 10)."""

    def __init__(self, channels: int, cells: int) -> None:
        super().__init__()
        c, c0, c1, halved = channels, 3 * channels, 3 * channels, False
        self.stem = nn.Sequential(nn.Conv2d(3, c0, 3, 1, 1, bias=False), nn.BatchNorm2d(c0))
        self.cells = nn.ModuleList()
        for i in range(cells):
            reduces = i in (cells // 3, 2 * cells // 3)
            c = 2 * c if reduces else c
            self.cells.append(Cell(c0, c1, c, reduces, halved))
            c0, c1, halved = c1, 4 * c, reduces
        self.head = nn.Linear(c1, 10)
        self.alphas = nn.ParameterList(1e-3 * torch.randn(14, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            weights = self.alphas[int(bool(cell.reduces))].softmax(-1)
            s0, s1 = s1, cell(s0, s1, weights)
        return self.head(s1.mean((2, 3)))


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


def peak_of(variant: str, args: argparse.Namespace) -> float:
    """The peak memory of one iteration, in a process of its own."""
    own = [f"--{name}={getattr(args, name)}" for name in ("batch", "channels", "cells", "size")]
    return peak_mib(__file__, *own, f"--peak={variant}")


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    made = {variant: steps(variant, args) for variant in args.variants}
    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(args.rounds + 1):
        for variant, both in made.items():
            for i, step in enumerate(both):
                seconds = cpu_seconds(step)
                if turn:  # the first turn warms up
                    times.setdefault((variant, i), []).append(seconds)
    del made
    rows: list[dict[str, Any]] = []
    for variant in args.variants:
        weight, arch = (times[variant, i] for i in (0, 1))
        both = [w + a for w, a in zip(weight, arch, strict=True)]
        rows.append(
            {
                "variant": variant,
                "weight": statistics.median(weight),
                "arch": statistics.median(arch),
                "iteration": statistics.median(both),
                "spread": max(both) - min(both),
                "peak_mib": None if args.no_memory else peak_of(variant, args),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="8 channels, 4 cells, 16x16")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        args.channels, args.cells, args.size = 8, 4, 16
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.peak:
        print_peak(steps(args.peak, args))
        return
    rows = measure(args)
    report(args, ("batch", "channels", "cells", "size", "rounds"), {"rows": rows})
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The medians in seconds; the ratio is to the last variant."""
    columns = ("weight", "arch", "iteration", "spread")
    head = "".join(f"{name:>11}" for name in (*columns, "ratio", "peak MiB"))
    lines = [f"{'variant':<16}{head}"]
    for row in rows:
        seconds = "".join(f"{row[name]:11.3f}" for name in columns)
        ratio = row["iteration"] / rows[-1]["iteration"]
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        lines.append(f"{row['variant']:<16}{seconds}{ratio:11.2f}{peak:>11}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
