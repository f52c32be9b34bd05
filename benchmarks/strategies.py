"""What a step of every strategy costs, on four spaces.

    python benchmarks/strategies.py [--spaces ...] [--strategies ...] [--rounds 5] [--nni PYTHON]

Forward, backward and the optimizer's step (plain SGD; of the architecture the strategy's own). A
round is an arch step, if there is one, and a weight step; "step" is their sum. All of a round runs
in turn, and ratios are those of one round:

- where a step runs a path, a step of the finalized subnet of that path, in the layout in which that
  is faster (`weight_to_fixed`, and of Proxyless, `arch_to_weight` through the subnets of both);
- DARTS and FBNet: both steps of a supernet written by hand (`plain.py`), in rows and with channels
  last (`plain_to_ours`, `plain_last_to_ours`);
- second-order arch steps: the first-order one of another net (`second_to_first`);
- with `--nni`, the Python of an environment with NNI 3.0: NNI's strategy, in a process of its own,
  on the same paths (`nni_to_ours`; see `nni_peer.py`).

`--memory` adds the peak memory of single steps, each in processes of its own. Sampled strategies
draw other paths in each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    SPACES,
    Milliseconds,
    Row,
    Space,
    Step,
    Times,
    add_options,
    by_clock,
    generate_code,
    peaks,
    print_peak,
    ratio,
    report,
    searching,
    set_up,
    space_of,
    spread,
    subnet_time,
    timed,
)
from plain import Hand, MixedNet, search_steps

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
PLAIN = {"plain": torch.contiguous_format, "plain_last": torch.channels_last}
TABLES = {
    "ms": ("space", "strategy", "clock", "arch", "weight", "step", "weight_fixed", "first",
        "plain", "plain_last", "nni"),
    "ratios": ("space", "strategy", "clock", "weight_to_fixed", "arch_to_weight",
        "second_to_first", "plain_to_ours", "plain_last_to_ours", "nni_to_ours", "nni_error"),
    "peak memory, MiB": ("space", "strategy", "weight_peak", "arch_peak"),
}  # fmt: skip


class Peer:
    """NNI in a process of its own; it is built at the first step."""

    def __init__(self, python: str, name: str, strategy: str, space: Space, threads: int) -> None:
        file = str(Path(__file__).with_name("nni_peer.py"))
        numbers = [str(n) for n in (space.batch, space.size, threads)]
        self.process = subprocess.Popen(
            [python, file, name, strategy, *numbers], stdin=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip

    def ask(self, line: str) -> Milliseconds:
        """The time that NNI gives for a line."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says below why
            print(line, file=self.process.stdin, flush=True)
        if answer := self.process.stdout.readline():
            return Milliseconds(*map(float, answer.split()))
        _, errors = self.process.communicate()
        last = errors.strip().split("\n")[-1]
        raise RuntimeError(last or f"NNI's process ended with {self.process.returncode}")

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


class Bench:
    """One strategy on one space: our steps, and those that they are compared with."""

    def __init__(self, name: str, strategy: str, args: argparse.Namespace) -> None:
        space, self.threads = space_of(name, args), args.threads
        self.x, self.y = space.data()
        self.net = nasfx.transform(space.build(), STRATEGIES[strategy]())
        generate_code(self.net)
        self.steps = searching(self.net, self.x, self.y)
        self.controlled = strategy == "enas"
        self.peer: Peer | None = None
        if args.nni and strategy in NNI:
            self.peer = Peer(args.nni, name, NNI[strategy], space, args.threads)
        self.rivals: dict[str, Step] = {}
        if self.net.strategy.second_order:
            first = nasfx.transform(space.build(), nasfx.Darts())
            self.rivals["first"] = searching(first, self.x, self.y)["arch"]
        elif not self.net.strategy.samples:
            for key, layout in PLAIN.items():
                plain = Hand(16, 8) if name == "darts" else MixedNet(space.build())
                self.rivals[key] = search_steps(plain, self.x, self.y, layout)
        self.times: Times = {}
        self.update: Milliseconds | None = None
        self.error = ""

    def round(self) -> None:
        """Take every step once."""
        paths: list[dict[str, Any]] = []
        for kind in ("arch", "weight"):
            if kind not in self.steps:
                continue
            self.note(kind, timed(self.steps[kind]))
            if self.net.strategy.samples:
                paths.append(dict(self.net.path))
                if kind == "weight" or isinstance(self.net.strategy, nasfx.Proxyless):
                    self.note(f"{kind}_fixed", subnet_time(self.net, self.x, self.y))
        for name, step in self.rivals.items():
            self.note(name, timed(step))
        if self.peer is not None:
            # ENAS' controller step is a batch of its own, the second one.
            lines = [paths[1:], paths[:1]] if self.controlled else [paths]
            self.note("nni", *(self.ask(json.dumps(line)) for line in lines))

    def note(self, name: str, *parts: Milliseconds | None) -> None:
        known = [part for part in parts if part is not None]
        if len(known) == len(parts):
            total = Milliseconds(*(sum(clock) for clock in zip(*known, strict=True)))
            self.times.setdefault(name, []).append(total)

    def ask(self, line: str) -> Milliseconds | None:
        """NNI's time; None, and no more questions, once it has failed."""
        try:
            return self.peer.ask(line) if self.peer else None
        except RuntimeError as error:
            self.error, self.peer = str(error), None
            self.times.pop("nni", None)
            return None

    def finish(self) -> None:
        """Time NNI's update of ENAS' controller over all rounds, and end NNI."""
        if self.controlled and self.peer is not None:
            self.update = self.ask("update")
        if self.peer is not None:
            self.peer.close()

    def results(self) -> list[Row]:
        """A row for every clock; the first round warmed up."""
        rounds = len(self.times["weight"])
        later = {name: taken[1:] for name, taken in self.times.items()}
        rows: list[Row] = []
        for clock, t in by_clock(later, self.threads).items():
            t["step"] = [sum(pair) for pair in zip(*(t[kind] for kind in self.steps), strict=True)]
            if self.update is not None:
                share = getattr(self.update, clock) / rounds
                t["nni"] = [taken + share for taken in t["nni"]]
            row: Row = {"clock": clock, **{name: spread(taken) for name, taken in t.items()}}
            rows.append(row | compared(t) | ({"nni_error": self.error} if self.error else {}))
        return rows


def compared(t: dict[str, list[float]]) -> dict[str, Any]:
    """The ratios between the times of one clock."""
    pairs = {
        "weight_to_fixed": ("weight", "weight_fixed"),
        "second_to_first": ("arch", "first"),
        "plain_to_ours": ("plain", "step"),
        "plain_last_to_ours": ("plain_last", "step"),
        "nni_to_ours": ("nni", "step"),
    }
    found: dict[str, Any] = {
        name: ratio(t[a], t[b]) for name, (a, b) in pairs.items() if a in t and b in t
    }
    if "arch_fixed" in t:  # the paths of the two steps differ
        per_path = [
            [a / b for a, b in zip(t[kind], t[f"{kind}_fixed"], strict=True)]
            for kind in ("arch", "weight")
        ]
        found["arch_to_weight"] = ratio(*per_path)
        sums = [sum(t[kind]) / sum(t[f"{kind}_fixed"]) for kind in ("arch", "weight")]
        found["arch_to_weight_in_sums"] = sums[0] / sums[1]
    elif "arch" in t:
        found["arch_to_weight"] = ratio(t["arch"], t["weight"])
    return found


# -- memory ----------------------------------------------------------------------------------------


def peak(args: argparse.Namespace) -> None:
    """Print the peak memory of a step on a path that is the same for every strategy."""
    name, strategy, kind, seed = args.peak.split(",")
    space = space_of(name, args)
    net = nasfx.transform(space.build(), STRATEGIES[strategy]())
    generator = torch.Generator().manual_seed(int(seed))
    for alpha in net.arch_parameters() if net.strategy.samples else ():
        with torch.no_grad():  # nearly certain
            alpha[int(torch.randint(len(alpha), (), generator=generator))] += 12
    net.seed(int(seed))
    generate_code(net)
    print_peak([searching(net, *space.data())[kind]])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=list(SPACES))
    parser.add_argument(
        "--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES)
    )
    parser.add_argument("--batch", type=int, help="in place of the space's")
    parser.add_argument("--size", type=int, help="of images, in place of the space's")
    parser.add_argument("--nni", help="the Python of an environment with NNI 3.0")
    parser.add_argument("--memory", type=int, nargs="?", const=4, default=0, metavar="PROCESSES",
        help="that measure the peak memory of each kind of step, 4 if no number is given",
    )  # fmt: skip
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    add_options(parser, rounds=5)
    args = parser.parse_args(argv)
    set_up(args)
    if args.peak:
        peak(args)
        return
    rows: list[Row] = []
    for space in args.spaces:
        for strategy in args.strategies:
            bench = Bench(space, strategy, args)
            for _ in range(args.rounds + 1):
                bench.round()
            bench.finish()
            found = bench.results()
            for kind in bench.steps if args.memory else ():
                what = [f"{space},{strategy},{kind},{i}" for i in range(args.memory)]
                found[0][f"{kind}_peak"] = peaks(__file__, args, what)
            rows += [{"space": space, "strategy": strategy, **row} for row in found]
            if args.output:
                report(__file__, args, rows, {})  # what there is, should a later one fail
    report(__file__, args, rows, TABLES)


if __name__ == "__main__":
    main()
