"""What a step of every strategy costs, on four spaces.

    python benchmarks/strategies.py [--spaces ...] [--strategies ...] [--rounds 5] [--nni PYTHON]

Forward, backward and the optimizer's step (plain SGD; of the architecture the strategy's own), CPU
time of one thread. A round is an arch step, if there is one, and a weight step. Where a step runs a
path, what is timed next is a step of the finalized subnet of that path, in the layout in which that
is faster. Proxyless' arch steps are compared with its weight steps through the subnets of their
paths, in sums over all rounds. Second-order arch steps are compared with those of first order.

With `--nni`, the Python of an environment with NNI 3.0, NNI's strategy takes the same steps in
turn, in a process of its own, on the same paths (see `nni_peer.py`). Ratios are medians over the
rounds. `--memory` adds the peak memory of single steps, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    SPACES,
    Step,
    cpu_seconds,
    generate_code,
    peak_mib,
    print_peak,
    report,
    searching,
    subnet_seconds,
)

import nasfx
from nasfx.strategies import Strategy

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "single-path": nasfx.SinglePath,
    "random": nasfx.RandomSearch,
    "enas": nasfx.Enas,
    "proxyless-two": lambda: nasfx.Proxyless(gate="two"),
    "proxyless-full_v2": lambda: nasfx.Proxyless(gate="full_v2"),
    "fbnet": nasfx.FBNet,
    "darts": nasfx.Darts,
    "darts-second": lambda: nasfx.Darts(unrolled="finite-difference"),
}
NNI = {
    "random": "random",
    "enas": "enas",
    "proxyless-two": "proxyless",
    "proxyless-full_v2": "proxyless",
    "darts": "darts",
}
"""NNI's names of the strategies that it has."""


class Peer:
    """NNI in a process of its own; it is built at the first step."""

    def __init__(self, python: str, space: str, strategy: str) -> None:
        file = str(Path(__file__).with_name("nni_peer.py"))
        self.process = subprocess.Popen(
            [python, file, space, strategy], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def ask(self, line: str) -> float:
        """The seconds that NNI gives for a line."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        if answer := self.process.stdout.readline():
            return float(answer)
        _, errors = self.process.communicate()
        raise RuntimeError(errors.strip().split("\n")[-1])

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


class Bench:
    """One strategy on one space: our steps, the subnets of their paths, and NNI's steps."""

    def __init__(self, space: str, strategy: str, nni: str | None) -> None:
        self.x, self.y = SPACES[space].data()
        self.net = nasfx.transform(SPACES[space].build(), STRATEGIES[strategy]())
        generate_code(self.net)
        self.steps = searching(self.net, self.x, self.y)
        known = nni is not None and strategy in NNI
        self.peer = Peer(nni, space, NNI[strategy]) if known else None
        self.controlled = strategy == "enas"
        self.first: Step | None = None
        if self.net.strategy.second_order:
            plain = nasfx.transform(SPACES[space].build(), nasfx.Darts())
            self.first = searching(plain, self.x, self.y)["arch"]
        self.times: dict[str, list[float]] = {}
        self.error = ""

    def round(self) -> None:
        """Take every step once."""
        paths: list[dict[str, Any]] = []
        for kind in ("arch", "weight"):
            if kind not in self.steps:
                continue
            self.note(kind, cpu_seconds(self.steps[kind]))
            if self.net.strategy.samples:
                paths.append(dict(self.net.path))
                if kind == "weight" or isinstance(self.net.strategy, nasfx.Proxyless):
                    self.note(f"{kind}_fixed", subnet_seconds(self.net, self.x, self.y))
        if self.first is not None:
            self.note("first", cpu_seconds(self.first))
        if self.peer is not None:
            # ENAS' controller step is a batch of its own, the second one.
            lines = [paths[1:], paths[:1]] if self.controlled else [paths]
            try:
                seconds = [self.peer.ask(json.dumps(line)) for line in lines]
                self.note("nni", sum(seconds))
            except RuntimeError as error:
                self.error, self.peer = str(error), None

    def note(self, name: str, seconds: float) -> None:
        self.times.setdefault(name, []).append(seconds)

    def result(self) -> dict[str, Any]:
        """Medians; the first round warmed up."""
        rounds = len(self.times["weight"]) - 1
        t = {name: times[1:] for name, times in self.times.items()}
        ours = [sum(pair) for pair in zip(*(t[kind] for kind in self.steps), strict=True)]
        found: dict[str, Any] = {name: statistics.median(times) for name, times in t.items()}
        found["step"] = statistics.median(ours)
        if "weight_fixed" in t:
            found["weight_to_fixed"] = ratios(t["weight"], t["weight_fixed"])
        if "arch_fixed" in t:  # of all rounds, as the paths of the two steps differ
            per_path = [sum(t[kind]) / sum(t[f"{kind}_fixed"]) for kind in ("arch", "weight")]
            found["arch_to_weight"] = [round(per_path[0] / per_path[1], 3)]
        elif "arch" in t:
            found["arch_to_weight"] = ratios(t["arch"], t["weight"])
        if "first" in t:
            found["second_to_first"] = ratios(t["arch"], t["first"])
        if self.peer is not None:
            theirs = t["nni"]
            if self.controlled:
                found["nni_update"] = self.peer.ask("update") / (rounds + 1)
                theirs = [seconds + found["nni_update"] for seconds in theirs]
            found["nni_to_ours"] = ratios(theirs, ours)
            self.peer.close()
        if self.error:
            found["nni_error"] = self.error
        return found


def ratios(above: list[float], below: list[float]) -> list[float]:
    """The median, the lowest and the highest of the ratios."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    return [round(x, 3) for x in (statistics.median(each), min(each), max(each))]


# -- memory ----------------------------------------------------------------------------------------


def peak(space: str, strategy: str, kind: str, seed: str) -> None:
    """Print the peak memory of a step on a path that is the same for every strategy."""
    x, y = SPACES[space].data()
    net = nasfx.transform(SPACES[space].build(), STRATEGIES[strategy]())
    generator = torch.Generator().manual_seed(int(seed))
    for alpha in net.arch_parameters() if net.strategy.samples else ():
        with torch.no_grad():  # nearly certain
            alpha[int(torch.randint(len(alpha), (), generator=generator))] += 12
    net.seed(int(seed))
    generate_code(net)
    print_peak([searching(net, x, y)[kind]])


def memory(space: str, strategy: str, kinds: list[str]) -> dict[str, Any]:
    """Peak MiB by kind of step: the mean over four random paths."""
    found: dict[str, Any] = {}
    for kind in kinds:
        runs = [peak_mib(__file__, f"--peak={space},{strategy},{kind},{i}") for i in range(4)]
        found[f"{kind}_mib"] = statistics.mean(runs)
        found[f"{kind}_mib_paths"] = [round(run) for run in runs]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """CPU milliseconds; ratios are medians."""
    columns = ("arch", "weight", "step", "weight_fixed", "nni")
    shares = ("weight_to_fixed", "arch_to_weight", "second_to_first", "nni_to_ours")
    names = ("arch", "weight", "step", "fixed", "nni")
    head = "".join(f"{name:>9}" for name in names) + "".join(f"{name:>18}" for name in shares)
    lines = [f"{'space':<13}{'strategy':<19}{head}"]
    for row in rows:
        times = "".join(f"{1000 * row[n]:9.0f}" if n in row else " " * 9 for n in columns)
        medians = "".join(f"{row[n][0]:18.3f}" if n in row else " " * 18 for n in shares)
        peaks = "".join(f"  {k} {row[k]:.0f}" for k in ("weight_mib", "arch_mib") if k in row)
        lines.append(f"{row['space']:<13}{row['strategy']:<19}{times}{medians}{peaks}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=list(SPACES))
    parser.add_argument(
        "--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES)
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nni", help="the Python of an environment with NNI 3.0")
    parser.add_argument("--memory", action="store_true", help="peak memory of single steps, too")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.peak:
        peak(*args.peak.split(","))
        return
    rows: list[dict[str, Any]] = []
    for space in args.spaces:
        for strategy in args.strategies:
            bench = Bench(space, strategy, args.nni)
            for _ in range(args.rounds + 1):
                bench.round()
            row = {"space": space, "strategy": strategy, **bench.result()}
            if args.memory:
                row |= memory(space, strategy, list(bench.steps))
            rows.append(row)
            print(table(rows[-1:]), flush=True)
    report(args, ("rounds",), {"rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
