"""What the benchmarks share: the spaces, the steps of a net, the clocks, and how results are told.

Every benchmark prints JSON and, on stderr, a table. With `--output FOLDER` the JSON goes to a file
of the benchmark's name in that folder, and the table to stdout. Times are in milliseconds, memory
is in MiB. What was measured several times is `{"median": ..., "low": ..., "high": ...}`, the lowest
and the highest value, and in the table `median low..high`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

import nasfx
from nasfx.spaces import darts, nasbench201, proxyless, shufflenet

Step = Callable[[], None]
Spread = dict[str, float]
Row = dict[str, Any]
LEARNING_RATE = 0.025  # of plain SGD


@dataclass(frozen=True)
class Space:
    """A search space, with the size of a batch and of its images."""

    build: Callable[[], nn.Module]
    batch: int
    size: int
    classes: int

    def data(self) -> tuple[Tensor, Tensor]:
        """Random images and labels, the same in every call."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        return x, torch.randint(self.classes, (self.batch,), generator=generator)


SPACES = {
    "nasbench201": Space(lambda: nasbench201.net(16, 5), 32, 32, 10),
    "proxyless": Space(proxyless.mobile, 16, 64, 1000),
    "shufflenet": Space(shufflenet.spos, 32, 64, 1000),
    "darts": Space(lambda: darts.cifar(16, 8), 32, 32, 10),
}


def space_of(name: str, args: argparse.Namespace) -> Space:
    """The space of that name, with the batch and the size of the options where they are given."""
    space = SPACES[name]
    return replace(space, batch=args.batch or space.batch, size=args.size or space.size)


# -- the clocks ------------------------------------------------------------------------------------


class Milliseconds(NamedTuple):
    """What a call took: CPU time of all threads of this process, and time on the wall."""

    cpu: float
    wall: float


Times = dict[str, list[Milliseconds]]


def timed(action: Callable[[], object]) -> Milliseconds:
    """The time of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return Milliseconds(1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall))


def by_clock(times: Times, threads: int) -> dict[str, dict[str, list[float]]]:
    """The times by clock: "cpu" and, with several threads, "wall".

    CPU time does not show what several threads gain; wall time shows what else the machine does.
    """
    clocks = ("cpu",) if threads == 1 else ("cpu", "wall")
    return {
        clock: {name: [getattr(one, clock) for one in taken] for name, taken in times.items()}
        for clock in clocks
    }


def spread(values: Sequence[float]) -> Spread:
    """The median, the lowest and the highest value."""
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The spread of the ratios, round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


# -- steps -----------------------------------------------------------------------------------------


def training(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """A step of plain SGD on a net without choices."""
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE)

    def step() -> None:
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def searching(
    net: nasfx.Supernet,
    x: Tensor,
    y: Tensor,
    *,
    run: Callable[[Tensor], Tensor] | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Step]:
    """A weight step and, where the strategy has one, an arch step, each with its optimizer.

    Args:
        net: the supernet.
        x: images.
        y: labels.
        run: what computes the outputs in the net's stead, such as the compiled net.
        around: the context of the forward pass and the loss, such as autocast.
    """
    outputs = net if run is None else run
    weights = torch.optim.SGD(net.weight_parameters(), LEARNING_RATE)
    alphas = net.arch_optimizer()

    def loss() -> Tensor:
        with around():
            return F.cross_entropy(outputs(x), y)

    inner = {"inner": loss, "weight_optimizer": weights} if net.strategy.second_order else {}

    def weight() -> None:
        with net.weight_step():
            loss().backward()
        weights.step()
        weights.zero_grad()

    def arch() -> None:
        with net.arch_step(**inner):
            net.objective(loss()).backward()
        alphas.step()
        alphas.zero_grad()

    return {"weight": weight, "arch": arch} if net.arch_parameters() else {"weight": weight}


def subnet_time(net: nasfx.Supernet, x: Tensor, y: Tensor) -> Milliseconds:
    """The time of a step of the subnet of the net's path, which shares the net's weights.

    Of two steps in a plain loop, one on images in rows, one with channels last, the faster.
    """
    subnet = nasfx.finalize(net, net.path, copy=False)
    times: list[Milliseconds] = []
    for layout in (torch.contiguous_format, torch.channels_last):
        step = training(subnet, x.contiguous(memory_format=layout), y)
        step()
        times.append(timed(step))
    return Milliseconds(*map(min, *times))


def generate_code(net: nn.Module) -> None:
    """Let candidates generate their code now and not where each of them first runs."""
    for module in net.modules():
        if isinstance(module, fx.GraphModule):
            _ = module.code


# -- memory ----------------------------------------------------------------------------------------


def resident(name: str) -> int:
    """A row of Linux's table of this process's memory, in KiB."""
    rows = Path("/proc/self/status").read_text(encoding="utf-8").split("\n")
    return next(int(row.split()[1]) for row in rows if row.startswith(name))


def print_peak(steps: list[Step]) -> None:
    """Print the peak memory of these steps in MiB, above what the process holds before."""
    before = resident("VmRSS")
    for step in steps:
        step()
    print((resident("VmHWM") - before) / 1024)


def peaks(file: str, args: argparse.Namespace, what: Sequence[str]) -> Spread:
    """The peaks that `file --peak=...` prints, each in a process of its own.

    Args:
        file: the benchmark.
        args: its options; those of sizes and threads are handed on.
        what: the values of `--peak`.
    """
    shared = ("batch", "size", "channels", "cells", "threads")
    own = [f"--{name}={value}" for name in shared if (value := getattr(args, name, None))]
    found: list[float] = []
    for one in what:
        command = [sys.executable, file, *own, f"--peak={one}"]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(float(run.stdout))
    return spread(found)


# -- options and results ---------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """The options that all benchmarks of times have."""
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of every variant")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    add_output(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """The option of where the result goes."""
    parser.add_argument("--output", type=Path, metavar="FOLDER",
        help="write the JSON to a file there; without it, it goes to stdout")  # fmt: skip


def set_up(args: argparse.Namespace) -> None:
    """The threads, and a seed of the weights."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)


def report(
    file: str,
    args: argparse.Namespace,
    rows: Sequence[Row],
    tables: Mapping[str, Sequence[str]],
) -> None:
    """Tell the result as JSON and as tables.

    Args:
        file: the benchmark; its name and the number of threads name the JSON's file.
        args: the options; all but the output's are in the JSON.
        rows: what was measured.
        tables: the columns of every table by its title. Columns without a value are left out.
    """
    threads = getattr(args, "threads", 1)
    name = Path(file).stem + (f"-{threads}-threads" if threads > 1 else "")
    hidden = ("output", "peak", "threads")
    whole = {
        "benchmark": Path(file).stem,
        "machine": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
        },
        "threads": threads,
        "options": {key: value for key, value in vars(args).items() if key not in hidden},
        "units": {"times": "ms", "memory": "MiB"},
        "rows": list(rows),
    }
    text = json.dumps(whole, indent=1)
    if args.output is None:
        print(text)
    else:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    for title, columns in tables.items():
        show(f"{name}: {title}", rows, columns, to_stderr=args.output is None)


def show(title: str, rows: Sequence[Row], columns: Sequence[str], *, to_stderr: bool) -> None:
    """Print the rows that have a number, to stdout or stderr, as Markdown.

    It is as wide as the terminal, or 200 columns where there is none.
    """
    rows = [r for r in rows if any(isinstance(r.get(n), int | float | dict) for n in columns)]
    used = [name for name in columns if any(row.get(name) is not None for row in rows)]
    table = Table(box=box.MARKDOWN)
    for name in used:
        justify = "left" if any(isinstance(row.get(name), str) for row in rows) else "right"
        table.add_column(name.replace("_", " "), justify=justify)
    for row in rows:
        table.add_row(*(cell(row.get(name)) for name in used))
    stream = sys.stderr if to_stderr else sys.stdout
    console = Console(file=stream, width=None if stream.isatty() else 200)
    console.print(title, table)


def cell(value: Any) -> str:
    """A value of a row as text, numbers with three digits or more."""
    if value is None:
        return ""
    if isinstance(value, dict):
        median, low, high = (cell(value[key]) for key in ("median", "low", "high"))
        return median if low == high else f"{median} {low}..{high}"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
