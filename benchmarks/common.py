"""What the benchmarks share: the spaces and their batches, the steps of a net, and the clock."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import nasfx
from nasfx.spaces import darts, nasbench201, proxyless, shufflenet

Step = Callable[[], None]
LEARNING_RATE = 0.025  # of plain SGD


@dataclass(frozen=True)
class Space:
    """A search space, with the size of a batch and of its images."""

    build: Callable[[], nn.Module]
    batch: int
    size: int
    classes: int

    def data(self, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Random images and labels, the same in every call."""
        generator = torch.Generator().manual_seed(0)
        n = batch or self.batch
        x = torch.randn(n, 3, self.size, self.size, generator=generator)
        return x, torch.randint(self.classes, (n,), generator=generator)


SPACES = {
    "nasbench201": Space(lambda: nasbench201.net(16, 5), 32, 32, 10),
    "proxyless": Space(proxyless.mobile, 16, 64, 1000),
    "shufflenet": Space(shufflenet.spos, 32, 64, 1000),
    "darts": Space(lambda: darts.cifar(16, 8), 32, 32, 10),
}


def cpu_seconds(step: Step) -> float:
    """The CPU time of one call, of all threads of this process."""
    start = time.process_time()
    step()
    return time.process_time() - start


def training(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """A step of plain SGD on a net without choices."""
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE)

    def step() -> None:
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def searching(net: nasfx.Supernet, x: Tensor, y: Tensor) -> dict[str, Step]:
    """A weight step and, where the strategy has one, an arch step, each with its optimizer."""
    weights = torch.optim.SGD(net.weight_parameters(), LEARNING_RATE)
    alphas = net.arch_optimizer()

    def loss() -> Tensor:
        return F.cross_entropy(net(x), y)

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


def subnet_seconds(net: nasfx.Supernet, x: Tensor, y: Tensor) -> float:
    """The CPU time of a step of the subnet of the net's path, which shares the net's weights.

    Of two steps in a plain loop, one on images in rows, one with channels last, the faster.
    """
    subnet = nasfx.finalize(net, net.path, copy=False)
    times: list[float] = []
    for layout in (torch.contiguous_format, torch.channels_last):
        step = training(subnet, x.contiguous(memory_format=layout), y)
        step()
        times.append(cpu_seconds(step))
    return min(times)


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


def peak_mib(file: str, *arguments: str) -> float:
    """What `file` prints with these arguments, in a process of its own."""
    command = [sys.executable, file, *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(run.stdout)


# -- results ---------------------------------------------------------------------------------------


def report(args: argparse.Namespace, names: tuple[str, ...], result: dict[str, Any]) -> None:
    """Print the result as one line of JSON, with the named options; write it to `args.json`."""
    machine = {"machine": platform.machine(), "torch": torch.__version__, "threads": 1}
    whole = {name: getattr(args, name) for name in names} | machine | result
    if args.json:
        args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(whole))
