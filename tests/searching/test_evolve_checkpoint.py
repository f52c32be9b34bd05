"""An evolution that was stopped anywhere ends with the bits of one that was not."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import nasfx
from nasfx import CheckpointError, SearchError
from nasfx.searching.checkpoint import CheckpointFolder
from tests.searching.test_checkpoint import (
    CrashError,
    Sizes,
    _loaders,
    assert_same_bits,
    newest,
    same,
)
from tests.strategies.nets import Chain, Norms, batch, built

KINDS: dict[str, Any] = {"sizes": Sizes, "norms": Norms, "chain": Chain}
GENERATIONS, POPULATION = 3, 4


def evolution(
    folder: Path | None, *, kind: str = "sizes", data: str = "lists", at: int = 0,
    crash: Callable[[], None] | None = None, start: int = 0, weights: int = 0, **options: Any,
) -> tuple[nasfx.Supernet, nasfx.SearchResult, int]:  # fmt: skip
    """An evolution in what could be a new process; it crashes at the metric of number `at`.

    `start` seeds the global generators where there is a checkpoint, which then must not matter.
    """
    resumed = folder is not None and any(folder.glob("checkpoint-*"))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(start if resumed else 0)
    net = nasfx.transform(built(KINDS[kind], weights), "single-path", seed=3)
    train, valid = _loaders(data)
    called = 0

    def metric(outputs: Tensor, target: Tensor) -> float:
        nonlocal called
        called += 1
        if called == at:
            if crash is None:
                raise CrashError
            crash()
        return -float(F.mse_loss(outputs, target))

    given: dict[str, Any] = {
        "metric": metric, "recalibrate": (train, 4), "population": POPULATION, "seed": 5,
        "generations": GENERATIONS, "checkpoint_dir": folder, "checkpoint_every": 1,
        "console": Console(file=io.StringIO()),
    }  # fmt: skip
    return net, nasfx.evolve(net, valid, **(given | options)), called


def crashes(folder: Path, at: int, **options: Any) -> bool:
    """Whether the evolution was stopped before its end."""
    try:
        evolution(folder, at=at, **options)
    except CrashError:
        return True
    return False


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# -- the same bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["lists", "own", "global", "shared"])
@pytest.mark.parametrize("kind", ["sizes", "norms"])
@pytest.mark.parametrize("every", [1, 3, None])
def test_stopped_twice_and_resumed_it_ends_with_the_same_bits(
    kind: str, data: str, every: int | None, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"kind": kind, "data": data, "checkpoint_every": every}
    net, whole, count = evolution(tmp_path / "whole", **options)
    kills = random.Random(f"{kind} {data} {every}")
    folder = tmp_path / "stopped"
    assert crashes(folder, kills.randrange(2, count), **options)
    crashes(folder, kills.randrange(2, count), start=1, **options)
    again, result, _ = evolution(folder, start=2, **options)
    assert same(result, whole)
    assert_same_bits(newest(folder), newest(tmp_path / "whole"))
    assert_same_bits(dict(again.state_dict()), dict(net.state_dict()))
    assert same(evolution(None, **options)[1], whole)


@pytest.mark.parametrize(
    ("kind", "data", "kills"),
    [
        ("norms", "lists", 1), ("sizes", "own", 1),
        *(
            pytest.param(kind, data, 3, marks=pytest.mark.slow)
            for kind in ("sizes", "norms") for data in ("lists", "own", "global", "workers")
        ),
    ],
)  # fmt: skip
def test_killed_and_resumed_in_new_processes_it_ends_with_the_same_bits(
    kind: str, data: str, kills: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"kind": kind, "data": data}
    _, _, count = evolution(tmp_path / "whole", **options)
    points = random.Random(f"kill {kind} {data}")
    folder = tmp_path / "killed"
    for start in range(kills):
        at = points.randrange(1, count // kills + 1)
        assert _run(folder, kind, data, at, start) == -signal.SIGKILL
    assert _run(folder, kind, data, 0, kills) == 0
    assert_same_bits(newest(folder), newest(tmp_path / "whole"))


def _run(folder: Path, kind: str, data: str, at: int, start: int) -> int:
    """An evolution in a process of its own, which kills itself at the metric of number `at`."""
    arguments = [str(folder), kind, data, str(at), str(start)]
    command = [
        sys.executable, "-W", "error", "-m", "tests.searching.test_evolve_checkpoint", *arguments,
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    return subprocess.run(command, timeout=300, check=False, cwd=root).returncode


@pytest.mark.parametrize("every", [1, None])
@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
@pytest.mark.parametrize("kind", ["sizes", "norms"])
def test_a_signal_lets_the_evaluation_finish_and_saves(
    kind: str, number: Any, error: type[BaseException], every: int | None, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"kind": kind, "checkpoint_every": every}
    _, whole, count = evolution(tmp_path / "whole", **options)
    with pytest.raises(error):
        evolution(tmp_path / "stopped", at=3, crash=lambda: signal.raise_signal(number), **options)
    assert newest(tmp_path / "stopped")["run"]["ready"]
    net, result, called = evolution(tmp_path / "stopped", start=1, **options)
    assert same(result, whole)
    assert called < count
    assert called > 0 or every is None  # the few of a small space are evaluated, and saved, at once
    assert net.space.size


def test_a_finished_evolution_returns_its_result_at_once(tmp_path: Path) -> None:
    _, whole, _ = evolution(tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    _, result, called = evolution(tmp_path, start=1)
    assert called == 0
    assert same(result, whole)
    assert [r["seconds"] for r in result.records] == [r["seconds"] for r in whole.records]
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


def test_a_space_that_is_used_up_is_finished_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": "norms", "population": 5, "generations": 9}
    _, whole, _ = evolution(tmp_path, **options)
    assert len(whole.evaluated) == 3
    _, result, called = evolution(tmp_path, start=1, **options)
    assert called == 0
    assert same(result, whole)


@pytest.mark.parametrize("kind", ["sizes", "norms"])
def test_nothing_that_was_saved_is_evaluated_again(kind: str, tmp_path: Path) -> None:
    _, _, count = evolution(tmp_path / "whole", kind=kind)
    assert crashes(tmp_path / "stopped", count, kind=kind)
    _, _, called = evolution(tmp_path / "stopped", start=1, kind=kind)
    assert called == 2, "the two batches of the one that was stopped"


def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    _, whole, count = evolution(tmp_path / "whole")
    folder = tmp_path / "stopped"
    assert crashes(folder, count - 3)
    file = CheckpointFolder(folder, 2).files()[0]
    file.write_bytes(file.read_bytes()[:-40])
    text = io.StringIO()
    _, result, _ = evolution(folder, start=1, console=Console(file=text))
    assert same(result, whole)
    assert "the one before it is used" in text.getvalue()
    assert file.with_suffix(".damaged").exists()


def test_how_many_are_kept(tmp_path: Path) -> None:
    evolution(tmp_path, keep=3)
    names = sorted(file.name for file in tmp_path.iterdir())
    # 12 evaluations, 3 generations, the end
    assert names == [f"checkpoint-{n:012d}.pt" for n in (14, 15, 16)]


# -- what it belongs to ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    assert crashes(folder, 7)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": 1}, r"the search differs in weights: '\w{64}' in the checkpoint, '\w{64}' "),
        ({"kind": "chain"}, r"the space differs in"),
        ({"population": 6}, r"differs in population: 4 in the checkpoint, 6 now"),
        ({"generations": 4}, r"differs in generations: 3 in the checkpoint, 4 now"),
        ({"seed": 6}, r"differs in seed: 5 in the checkpoint, 6 now"),
        ({"constraints": [lambda a: True]}, r"differs in constraints: 0 in the checkpoint, 1"),
        ({"recalibrate": ([batch()], 4)}, r"differs in train: .*'batches': 3.*'batches': 1"),
        ({"recalibrate": False}, r"differs in recalibrate: 4 in the checkpoint, None now"),
    ],
)
def test_the_first_difference_is_named(
    options: dict[str, Any], message: str, stopped: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"it belongs to another search; .*{message}"):
        evolution(stopped, **options)


def test_a_buffer_that_no_state_dict_has_is_compared_too(stopped: Path) -> None:
    net = nasfx.transform(built(Sizes), "single-path", seed=3)
    net.get_buffer("calls").add_(1)
    train, valid = _loaders("lists")
    with pytest.raises(CheckpointError, match=r"the search differs in weights"):
        nasfx.evolve(
            net, valid, metric=lambda o, t: 0.0, recalibrate=(train, 4), population=4,
            generations=3, seed=5, checkpoint_dir=stopped,
        )  # fmt: skip


def test_the_drawn_path_does_not_matter(stopped: Path, tmp_path: Path) -> None:
    net = nasfx.transform(built(Sizes), "single-path", seed=9)
    with net.weight_step():
        pass
    train, valid = _loaders("lists")
    result = nasfx.evolve(
        net, valid, metric=lambda o, t: -float(F.mse_loss(o, t)), recalibrate=(train, 4),
        population=4, generations=3, seed=5, console=Console(file=io.StringIO()),
        checkpoint_dir=tmp_path, resume=CheckpointFolder(stopped, 2).files()[0],
    )  # fmt: skip
    assert same(result, evolution(None)[1])


def test_a_checkpoint_of_search_is_refused_and_the_other_way_round(
    stopped: Path, tmp_path: Path
) -> None:
    net = nasfx.transform(built(Sizes), "single-path", seed=3)
    train, valid = _loaders("lists")
    given: dict[str, Any] = {"loss": F.mse_loss, "epochs": 1}
    with pytest.raises(CheckpointError, match=r"belongs to another search"):
        nasfx.search(net, train, valid, checkpoint_dir=stopped, **given)
    strategy = nasfx.SinglePath(population=2, generations=1, recalibrate=1)
    net = nasfx.transform(built(Sizes), strategy, seed=3)
    nasfx.search(net, train, valid, checkpoint_dir=tmp_path, **given)
    with pytest.raises(CheckpointError, match=r"belongs to another search"):
        evolution(tmp_path)


def test_what_resume_means(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"resume=True, and there is no checkpoint in"):
        evolution(tmp_path, resume=True)
    assert crashes(tmp_path, 9, resume=False)
    with pytest.raises(CheckpointError, match=r"resume=False, and .*checkpoint-0.* is there"):
        evolution(tmp_path, resume=False)
    for options, message in (
        ({"resume": 3}, "resume=3 must be"),
        ({"keep": 0}, "keep=0 must be"),
        ({"checkpoint_every": 0}, "checkpoint_every=0 must be"),
    ):
        with pytest.raises(SearchError, match=message):
            evolution(tmp_path, **options)


def test_an_error_names_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CrashError) as caught:
        evolution(tmp_path, at=9)
    assert "the last checkpoint is" in caught.value.__notes__[-1]


def test_it_says_where_it_goes_on(tmp_path: Path) -> None:
    assert crashes(tmp_path, 2 * 5 + 1)
    text = io.StringIO()
    evolution(tmp_path, console=Console(file=text))
    assert text.getvalue().startswith(f"going on from {tmp_path}/checkpoint-")
    assert text.getvalue().endswith("generation 1, with 5 architectures evaluated\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    _folder, _kind, _data, _at, _start = sys.argv[1:]
    evolution(Path(_folder), kind=_kind, data=_data, at=int(_at), crash=_killed, start=int(_start))
