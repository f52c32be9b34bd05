"""The benchmarks of times: their shared parts, and every script at a toy size."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import nasfx
from nasfx.spaces import nasbench201

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("common", "plain")


@contextmanager
def on_the_path() -> Generator[SimpleNamespace]:
    """The modules that the benchmarks share; examples have modules of the same names."""
    path, before = list(sys.path), {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    finally:
        sys.path[:] = path
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture(scope="module")
def shared() -> Iterator[Any]:
    with on_the_path() as modules:
        yield modules


# -- the shared parts ------------------------------------------------------------------------------


def test_the_spread_of_ratios_is_that_of_the_rounds(shared: Any) -> None:
    found = shared.common.ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0])
    assert found == {"median": 3.0, "low": 2.0, "high": 4.0}


def test_one_thread_is_timed_by_cpu_and_two_by_the_wall_too(shared: Any) -> None:
    times = {"step": [shared.common.Milliseconds(cpu=3.0, wall=2.0)]}
    assert shared.common.by_clock(times, 1) == {"cpu": {"step": [3.0]}}
    assert shared.common.by_clock(times, 2) == {"cpu": {"step": [3.0]}, "wall": {"step": [2.0]}}


def test_cells_of_a_table(shared: Any) -> None:
    values = [None, "darts", 7, 0.12345, 1234.5, {"median": 2.0, "low": 1.5, "high": 300.4}]
    assert [shared.common.cell(value) for value in values] == [
        "", "darts", "7", "0.123", "1234", "2 1.5..300",
    ]  # fmt: skip
    assert shared.common.cell({"median": 2.0, "low": 2.0, "high": 2.0}) == "2"


def test_a_report_is_a_file_and_a_table(
    shared: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = argparse.Namespace(threads=2, rounds=3, output=tmp_path / "new", peak=None)
    rows = [{"name": "a", "time": 1.5, "none": None}, {"name": "b", "time": None}]
    shared.common.report("x/bench.py", args, rows, {"ms": ("name", "time", "none")})
    written = json.loads((tmp_path / "new" / "bench-2-threads.json").read_text())
    assert (written["threads"], written["options"], written["rows"]) == (2, {"rounds": 3}, rows)
    lines = [line.split() for line in capsys.readouterr().out.split("\n") if line.strip()]
    assert lines == [
        ["bench-2-threads:", "ms"],
        ["|", "name", "|", "time", "|"],
        ["|------|------|"],
        ["|", "a", "|", "1.5", "|"],
    ]
    args.output = None
    shared.common.report("x/bench.py", args, rows, {"ms": ("name", "time")})
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rows"] == rows
    assert "| a " in printed.err


def test_the_net_written_by_hand_computes_what_the_supernet_does(shared: Any) -> None:
    model = nasbench201.net(channels=4, cells=1).double()
    net = nasfx.transform(copy.deepcopy(model), "darts", optimize="off")
    hand = shared.plain.MixedNet(model)
    assert len(hand.alphas) == len(net.arch_parameters()) == 6
    generator = torch.Generator().manual_seed(0)
    for choice, alpha in zip(net.space.choices, net.arch_parameters(), strict=True):
        values = torch.randn(len(alpha), generator=generator, dtype=torch.float64)
        hand.alphas[choice.label] = nn.Parameter(values)
        with torch.no_grad():
            alpha.copy_(values)
    x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(hand(x), net(x), rtol=1e-10, atol=1e-10)


def test_a_round_by_hand_trains_weights_and_alphas(shared: Any) -> None:
    net = shared.plain.MixedNet(nasbench201.net(channels=2, cells=1))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    shared.plain.search_steps(net, x, y, torch.channels_last)()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in moved if name.startswith("alphas")} == {
        f"alphas.{label}" for label in net.alphas
    }
    assert any(name.startswith("model") for name in moved)


# -- the scripts -----------------------------------------------------------------------------------


def run(tmp_path: Path, script: str, *flags: str) -> list[dict[str, Any]]:
    """The rows that a script writes; warnings are errors, and it prints a table of them."""
    command = [sys.executable, "-W", "error", str(FOLDER / f"{script}.py"), *flags]
    made = subprocess.run(
        [*command, "--output", str(tmp_path)], check=False, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert f"{script}" in made.stdout
    (file,) = tmp_path.glob(f"{script}*.json")
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["benchmark"] == script
    assert written["machine"]["torch"] == torch.__version__
    assert written["rows"]
    values = [value for row in written["rows"] for value in row.values()]
    for spread in (v for v in values if isinstance(v, dict) and "median" in v):
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    return written["rows"]


def keys(row: dict[str, Any]) -> set[str]:
    """What of a row has a spread."""
    return {key for key, value in row.items() if isinstance(value, dict)}


@pytest.mark.slow
def test_transform(tmp_path: Path) -> None:
    flags = ("--chain", "2", "4", "--darts", "3", "--strategies", "darts", "--rounds", "2")
    rows = run(tmp_path, "transform", *flags)
    assert [(r["model"], r["action"], r["size"]) for r in rows] == [
        ("chain", "finalize", 2), ("chain", "finalize", 4), ("chain", "transform", 2),
        ("chain", "transform", 4), ("darts", "finalize", 3), ("darts", "transform", 3),
    ]  # fmt: skip
    assert [("growth" in keys(r)) for r in rows] == [False, True, False, True, False, False]
    # A choice adds as many nodes to a chain as the one before it.
    assert rows[1]["nodes"] > rows[0]["nodes"] > 2 * 3 * 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_supernet(tmp_path: Path) -> None:
    flags = ("--batch", "2", "--channels", "2", "--cells", "3", "--size", "8", "--rounds", "1")
    variants = ("--variants", "nchw", "last-restricted", "nasfx-auto")
    rows = run(tmp_path, "supernet", *flags, *variants, "--threads", "2")
    assert [(r["variant"], r["clock"]) for r in rows] == [
        (variant, clock) for variant in variants[1:] for clock in ("cpu", "wall")
    ]
    for row in rows:
        memory = {"peak"} if row["clock"] == "cpu" else set[str]()
        assert keys(row) == {"weight", "arch", "iteration", "ratio"} | memory
    assert rows[-1]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.slow
def test_sampled(tmp_path: Path) -> None:
    flags = ("--space", "nasbench201", "--batch", "2", "--size", "8", "--rounds", "2")
    (row,) = run(tmp_path, "sampled", *flags, "--turns", "1")
    assert keys(row) == {"weight", "fixed", "weight_to_fixed"}
    assert (row["space"], row["clock"]) == ("nasbench201", "cpu")


@pytest.mark.slow
def test_evolution(tmp_path: Path) -> None:
    flags = ("--population", "2", "--generations", "0", "1", "--batch", "2", "--size", "32")
    rows = run(tmp_path, "evolution", *flags, "--rounds", "1")
    assert [(r["generation"], r["architectures"]) for r in rows] == [(0, 2), (1, 2)]
    assert keys(rows[0]) == {"alone", "at_once", "alone_to_at_once"}


@pytest.mark.slow
def test_precision(tmp_path: Path) -> None:
    flags = ("--spaces", "nasbench201", "--batch", "2", "--size", "8", "--rounds", "1")
    rows = run(tmp_path, "precision", *flags)
    assert [(r["strategy"], r["step"]) for r in rows] == [
        ("darts", "weight"), ("darts", "arch"), ("single-path", "weight"),
    ]  # fmt: skip
    assert keys(rows[0]) == {"float32", "bf16", "to_float32"}


@pytest.mark.slow
def test_compiled_steps(tmp_path: Path) -> None:
    flags = ("--compile", "--backend", "eager", "--channels", "2", "--batch", "2", "--size", "8")
    rows = run(tmp_path, "precision", *flags, "--rounds", "1")
    assert [(r["step"], r["clock"]) for r in rows] == [
        (step, clock) for step in ("weight", "arch") for clock in ("cpu", "wall")
    ]
    for row in rows:
        assert keys(row) == {"eager", "compiled", "to_eager"}
        assert row["first"] > 0


@pytest.mark.slow
def test_latency(tmp_path: Path) -> None:
    flags = ("--runtimes", "onnxruntime", "--kernels", "1", "--seconds", "0.1", "--nets", "2")
    rows = run(tmp_path, "latency", *flags)
    for row in rows:
        assert row["runtime"] == "onnxruntime"
        assert -1 <= row["spearman"] <= 1
        assert row["mape"] >= 0


SMALL = ("--spaces", "nasbench201", "--batch", "2", "--size", "8", "--rounds", "2")
FIXED = {"weight_fixed", "weight_to_fixed"}
ARCH = {"arch", "arch_to_weight"}
PLAIN = {"plain", "plain_last", "plain_to_ours", "plain_last_to_ours"}


@pytest.mark.slow
def test_every_strategy(tmp_path: Path) -> None:
    found = {row["strategy"]: keys(row) for row in run(tmp_path, "strategies", *SMALL)}
    assert found == {
        name: {"weight", "step", *more}
        for name, more in {
            "single-path": FIXED,
            "random": FIXED,
            "enas": FIXED | ARCH,
            "proxyless-two": FIXED | ARCH | {"arch_fixed"},
            "proxyless-full_v2": FIXED | ARCH | {"arch_fixed"},
            "fbnet": PLAIN | ARCH,
            "darts": PLAIN | ARCH,
            "darts-second": ARCH | {"first", "second_to_first"},
        }.items()
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_two_threads_and_memory(tmp_path: Path) -> None:
    flags = ("--strategies", "darts", "--threads", "2", "--memory", "1")
    cpu, wall = run(tmp_path, "strategies", *SMALL, *flags)
    assert (cpu["clock"], wall["clock"]) == ("cpu", "wall")
    assert keys(cpu) - keys(wall) == {"weight_peak", "arch_peak"}


@pytest.mark.slow
def test_the_peer_is_asked_for_every_step(tmp_path: Path) -> None:
    """A program that answers each line with 1000 ms stands for NNI's Python."""
    fake = tmp_path / "fake"
    fake.write_text("#!/bin/sh\nwhile read line; do echo 1000 2000; done\n", encoding="utf-8")
    fake.chmod(0o755)
    flags = ("--strategies", "enas", "darts", "--nni", str(fake))
    enas, darts = run(tmp_path, "strategies", *SMALL, *flags)
    # Two lines a round, and a third of the update, as the run has three rounds with the first one.
    assert enas["nni"]["median"] == pytest.approx(2000 + 1000 / 3, rel=1e-4)
    assert darts["nni"]["median"] == 1000
    assert darts["nni_to_ours"]["low"] <= 1000 / darts["step"]["median"]


@pytest.mark.slow
def test_a_peer_that_fails_says_why(tmp_path: Path) -> None:
    fake = tmp_path / "fake"
    fake.write_text("#!/bin/sh\necho no module named nni >&2\nexit 1\n", encoding="utf-8")
    fake.chmod(0o755)
    (row,) = run(tmp_path, "strategies", *SMALL, "--strategies", "darts", "--nni", str(fake))
    assert row["nni_error"] == "no module named nni"
    assert "nni" not in keys(row)
    assert {"weight", "arch", *PLAIN} < keys(row)
