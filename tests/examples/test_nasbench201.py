"""The NAS-Bench-201 example and its benchmark: by hand, and the scripts at smoke size."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nasfx
from nasfx.spaces import nasbench201
from tests.examples.test_enas import FOLDER, example, results_of


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    with example("nasbench201", "ranking", "train", "rank") as modules:
        yield modules


def flags(scripts: Any, *given: str) -> argparse.Namespace:
    return scripts.training.parse(
        scripts.train.arguments(), scripts.train.PRESETS, scripts.train.SMOKE, ["--smoke", *given]
    )


@pytest.fixture
def folder(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a table in which a cell's accuracy is 40 + 10 times its 3x3 convolutions."""
    rows = np.array([np.unravel_index(i, (5,) * 6) for i in range(5**6)], dtype=np.uint8)[::-1]
    # Another order of the operations than the space's.
    names = np.array(["nor_conv_3x3", "none", "avg_pool_3x3", "skip_connect", "nor_conv_1x1"])
    accuracy = (40 + 10 * (rows == 0).sum(1)).astype(np.float32)
    np.savez(tmp_path / "nb201_small.npz", ops=rows, op_names=names, cifar10=accuracy)
    monkeypatch.setenv("NASFX_DATA", str(tmp_path))
    return tmp_path


# -- data ------------------------------------------------------------------------------------------


def test_batches_hold_every_image_once(scripts: Any) -> None:
    x, y = torch.arange(10.0)[:, None, None, None].expand(10, 3, 4, 4), torch.arange(10)
    plain = scripts.ranking.Batches(x, y, 4)
    assert [labels.tolist() for _, labels in plain] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(plain) == 3
    mirrored = scripts.ranking.Batches(x, y, 4, flip=True)
    passes = [torch.cat([labels for _, labels in mirrored]).tolist() for _ in range(2)]
    assert passes[0] != passes[1]
    for seen in passes:  # whole batches
        assert len(seen) == len(set(seen)) == 8
    assert len(mirrored) == 2


def test_images_are_moved_and_mirrored_one_by_one(scripts: Any) -> None:
    x = torch.arange(1.0, 3 * 16 + 1).reshape(1, 3, 4, 4).expand(64, 3, 4, 4)
    made = scripts.ranking.Batches(x, torch.zeros(64), 64, shift=1, flip=True)
    ((batch, _),) = made
    padded = torch.nn.functional.pad(x[0], (1, 1, 1, 1))
    moved = [padded[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    known = {image.numpy().tobytes() for m in moved for image in (m, m.flip(-1).contiguous())}
    seen = {image.contiguous().numpy().tobytes() for image in batch}
    assert seen <= known
    assert len(known) == 18
    assert len(seen) > 9


def test_the_same_images_are_plain_for_recalibration(scripts: Any) -> None:
    args = flags(scripts)
    data = scripts.ranking.load(args)
    assert torch.equal(data.train.x, data.plain.x)
    assert (len(data.train.y), len(data.held_out.y)) == (64, 32)
    assert data.train.training
    assert not data.plain.training
    for unwanted in ("--cutout", "--workers"):
        with pytest.raises(SystemExit, match=f"{unwanted}: not done here"):
            scripts.ranking.load(flags(scripts, unwanted, "1"))
    with pytest.raises(SystemExit, match="kept in memory"):
        scripts.ranking.load(flags(scripts, "--data", "imagenet"))
    with pytest.raises(SystemExit, match="--held-out 0"):
        scripts.ranking.load(flags(scripts, "--held-out", "0"))


# -- cells -----------------------------------------------------------------------------------------


def test_the_table_is_read_by_names(scripts: Any, folder: Path) -> None:
    true = scripts.ranking.table()
    assert len(true) == 15625
    cell = nasbench201.arch(
        "|nor_conv_3x3~0|+|none~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_1x1~1|avg_pool_3x3~2|"
    )
    assert true[cell] == 60.0
    assert set(true) == set(scripts.ranking.every_cell())


def test_without_a_table(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NASFX_DATA", raising=False)
    assert scripts.ranking.table() is None
    monkeypatch.setenv("NASFX_DATA", str(tmp_path))
    assert scripts.ranking.table() is None


def test_cells_are_drawn_among_those_of_more_than_half(scripts: Any, folder: Path) -> None:
    true = scripts.ranking.table()
    cells = scripts.ranking.random_cells(50, 0, true)
    assert len(set(cells)) == 50
    assert min(true[cell] for cell in cells) > 50
    assert cells == scripts.ranking.random_cells(50, 0, true)
    assert cells != scripts.ranking.random_cells(50, 1, true)
    assert len(scripts.ranking.random_cells(15625, 0, None)) == 15625
    with pytest.raises(SystemExit, match="to rank"):
        scripts.ranking.random_cells(15625, 0, true)


def test_the_cells_accuracies_are_those_of_their_subnets(scripts: Any) -> None:
    args = flags(scripts, "--size", "8", "--channels", "4", "--limit", "464", "--held-out", "400")
    data = scripts.ranking.load(args)
    net = scripts.ranking.supernet(args, data.classes)
    cells = scripts.ranking.random_cells(3, 1, None)
    for norm in net.modules():
        if isinstance(norm, torch.nn.BatchNorm2d) and norm.running_mean is not None:
            norm.running_mean.normal_()  # those of other cells
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = scripts.ranking.accuracies(net, cells, data, 2)
    for cell, accuracy in zip(cells, found, strict=True):
        subnet = nasfx.finalize(net, cell)
        norms = [m for m in subnet.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        with torch.no_grad():
            for x, _ in list(data.plain)[:2]:
                subnet.train()(x)
            logits = subnet.eval()(data.held_out.x)
        assert accuracy == pytest.approx(
            float((logits.argmax(1) == data.held_out.y).float().mean())
        )
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_macs_are_those_of_the_benchmark(scripts: Any) -> None:
    args = flags(scripts, "--size", "32", "--channels", "16", "--cells", "1")
    net = scripts.ranking.supernet(args, 10)
    strings = (
        "|none~0|+|none~0|none~1|+|skip_connect~0|none~1|avg_pool_3x3~2|",
        "|nor_conv_1x1~0|+|none~0|nor_conv_3x3~1|+|nor_conv_3x3~0|none~1|skip_connect~2|",
    )
    found = scripts.ranking.macs(net, [nasbench201.arch(s) for s in strings])
    # The benchmark's nets have 5 cells in a stage.
    assert found == [7_783_040, 7_783_040 + (3_932_160 + 2 * 35_389_440) / 5]


def test_tau_by_hand(scripts: Any) -> None:
    # Of 6 pairs 5 agree; with a tie in the first, tau-b is (5 - 0) / sqrt(5 * 6).
    assert scripts.ranking.tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert scripts.ranking.tau([1, 1, 3, 4], [1, 2, 3, 4]) == pytest.approx(5 / 30**0.5)
    assert scripts.ranking.tau([1, 1, 1], [1, 2, 3]) is None


# -- the scripts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_table", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_train_and_rank(
    scripts: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    with_table: bool,
) -> None:
    if not with_table:
        monkeypatch.delenv("NASFX_DATA")
    smoke = ["--smoke", "--output", str(tmp_path), "--device", "cpu"]
    scripts.train.main(smoke)
    assert [len(results_of(tmp_path / "train.json")[key]) for key in ("records", "evaluated")] == [
        2, 2
    ]  # fmt: skip
    scripts.rank.main(smoke)
    found = results_of(tmp_path / "rank.json")
    accuracies = [row["accuracy"] for row in found["ranked"]]
    assert len(accuracies) == 6
    assert accuracies == sorted(accuracies, reverse=True)
    if with_table:
        assert min(row["true"] for row in found["ranked"]) > 50
        assert found["tau_of_macs"] is not None
    else:
        assert "tau" not in found
        assert {row["true"] for row in found["ranked"]} == {None}


@pytest.mark.slow
def test_a_supernet_goes_on_and_is_not_overwritten(scripts: Any, tmp_path: Path) -> None:
    smoke = ["--smoke", "--output", str(tmp_path), "--device", "cpu"]
    scripts.train.main(smoke)
    first = torch.load(tmp_path / "supernet.pt")["supernet"]
    scripts.train.main([*smoke, "--resume"])  # it was finished
    again = torch.load(tmp_path / "supernet.pt")["supernet"]
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(nasfx.CheckpointError, match="is there, of a search that could go on"):
        scripts.train.main(smoke)
    with pytest.raises(SystemExit, match="of another supernet"):
        scripts.rank.main([*smoke, "--channels", "4"])


def test_rank_needs_a_supernet(scripts: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"train\.py writes it"):
        scripts.rank.main(["--smoke", "--output", str(tmp_path), "--device", "cpu"])


SMALL = (
    "--data", "digits", "--size", "8", "--channels", "2", "--limit", "96", "--held-out", "32",
    "--batch", "16",
)  # fmt: skip


@contextmanager
def benchmark(name: str) -> Generator[Any]:
    """A script of the folder benchmarks, which finds the example's modules."""
    file = FOLDER.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    with example("nasbench201", "ranking"):
        spec.loader.exec_module(made)
        yield made


@pytest.mark.slow
def test_the_benchmark_of_rankings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with benchmark("ranking") as script:
        assert script.epochs_within(1.0, 25.0) == 2
        with pytest.raises(SystemExit, match="give a smaller"):
            script.epochs_within(1.0, 61.0)
        script.main([*SMALL, "--seeds", "1", "--rank", "5", "--minutes", "0.01"])
    written = json.loads(capsys.readouterr().out)
    (row,) = written["results"]
    assert (row["seed"], row["cells"]) == (1, 5)
    assert row["epochs"] >= 1
    assert 0 < row["training_cpu_minutes"] < 0.5
    assert -1 <= row["tau_of_macs"] <= 1


@pytest.mark.slow
def test_the_benchmark_of_picks(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with benchmark("picks") as script:
        monkeypatch.setattr(script, "EVALUATED", 20)
        monkeypatch.setattr(script, "_TRIAL", 2)
        flags = ["--strategies", "darts", "single-path", "--minutes", "0.5"]
        monkeypatch.setattr(script, "epochs_within", lambda *_: 1)
        script.main([*SMALL, *flags])
    written = json.loads(capsys.readouterr().out)
    assert [row["strategy"] for row in written["results"]] == ["darts", "single-path"]
    # In the table of `folder` a cell has 40 and ten points for each 3x3 convolution.
    for row in written["results"]:
        threes = row["cell"].count("nor_conv_3x3")
        better = sum(math.comb(6, k) * 4 ** (6 - k) for k in range(threes + 1, 7))
        assert (row["true"], row["better_cells"]) == (40 + 10 * threes, better)
    assert written["all_cells"] == {"mean": pytest.approx(52), "best": 100}


def test_epochs_that_fit_in_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    with benchmark("picks") as script:
        args = script.arguments().parse_args([*SMALL, "--minutes", "1"])
        args.seed = 0
        data = script.ranking.load(args)  # 4 training batches, 1 of held out images
        # A step takes 3 s, all else 2 s for one batch of held out images.
        seconds = iter([2 + 3 * script._TRIAL, 2 + 6 * script._TRIAL])
        monkeypatch.setattr(script, "spent", lambda call: next(seconds))
        monkeypatch.setattr(script, "run", None)
        assert (len(data.train), len(data.held_out)) == (4, 1)
        assert script.epochs_within("darts", args, data) == (60 - 2) // 12
        args.minutes = 0.2
        seconds = iter([2 + 3 * script._TRIAL, 2 + 6 * script._TRIAL])
        with pytest.raises(SystemExit, match=r"darts: an epoch takes 0\.2 CPU minutes"):
            script.epochs_within("darts", args, data)
