"""What goes wrong outside of the search: it says so, and the last checkpoint is whole.

`NASFX_FAULTS=200 pytest tests/searching/test_faults.py -m slow -k one_after` meets so many by hand.
"""

from __future__ import annotations

import errno
import io
import os
import random
import resource
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

import nasfx
from nasfx import CheckpointError, SearchError
from nasfx.searching import checkpoint, saving
from nasfx.searching.checkpoint import CheckpointFolder, read
from tests.searching.test_checkpoint import (
    SEVEN,
    CrashError,
    Noisy,
    Sizes,
    assert_same_bits,
    crashes,
    losses,
    newest,
    same,
    search,
)
from tests.strategies.nets import Chain, batch, built


@pytest.fixture(autouse=True)
def _every_evaluation_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_SHARE", 0)


FAULTS = int(os.environ.get("NASFX_FAULTS", "42"))  # of all strategies together


def files(folder: Path) -> list[Path]:
    return CheckpointFolder(folder, 2).files()


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "number", "points"),
    [("darts", signal.SIGTERM, (4, 7, -2)), ("random", signal.SIGINT, (2, 4, -4))],
)
def test_a_signal_lets_the_batch_finish_and_saves(
    variant: str, number: signal.Signals, points: tuple[int, ...], tmp_path: Path
) -> None:
    """In the second step, in an epoch's evaluation, and in the last evaluation but one."""
    options: dict[str, Any] = {"data": "own", "kind": Sizes}
    count, (whole, expected) = losses(variant, tmp_path, **options)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    for at in points:
        folder, console = tmp_path / str(at), io.StringIO()
        calls: list[int] = []

        def crash(calls: list[int] = calls) -> None:
            os.kill(os.getpid(), number)
            calls.append(0)

        given: dict[str, Any] = options | {"checkpoint_every": None}
        with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt) as stop:
            search(
                variant, folder, at=at % (count + 1), crash=crash, after=calls,
                console=Console(file=console), **given,
            )  # fmt: skip
        assert number != signal.SIGTERM or stop.value.code == 143
        assert len(calls) == 1, "no loss was computed after the signal"
        assert f"{number.name}: stopped at " in console.getvalue()
        assert "search again with the same arguments to go on" in console.getvalue()
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
        run = newest(folder)["run"]
        if at == points[0]:
            assert (run["part"], run["step"], run["steps"]) == ("weights", 2, 2)
        elif at == points[1]:
            assert (run["part"], run["epoch"], run["steps"]) == ("evaluation", 0, 3)
        else:
            assert (run["epoch"], len(run["evaluated"])) == (2, 2 * (variant == "random"))
        _, result = search(variant, folder, start=1, **given)
        assert same(result, whole), at
        assert_same_bits(newest(folder), expected)


def test_a_second_signal_acts_as_without_a_search(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stopped:
        search("darts", tmp_path, at=3, crash=twice)
    assert str(stopped.value) == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_are_the_users_without_a_folder_and_in_other_threads(tmp_path: Path) -> None:
    seen: list[Any] = []

    def look() -> None:
        seen.append(signal.getsignal(signal.SIGTERM))

    search("darts", None, at=3, crash=look)
    thread = threading.Thread(target=lambda: search("darts", tmp_path, at=3, crash=look))
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL] * 2
    assert newest(tmp_path)["run"]["part"] == "finished"


# -- data ------------------------------------------------------------------------------------------


class Failing(Noisy):
    """Raises at sample 5, once `broken` is set."""

    broken = True

    def __getitem__(self, i: int) -> Any:
        if i == 5 and self.broken:
            raise OSError("the disk is gone")
        return super().__getitem__(i)


@pytest.mark.parametrize("which", ["train", "valid"])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_loader_that_raises(which: str, workers: int, tmp_path: Path) -> None:
    def run(broken: bool, folder: str) -> Any:
        torch.manual_seed(0)
        random.seed(0)
        net = nasfx.transform(built(Chain), "darts", seed=3)
        data: dict[str, Any] = {"train": Noisy(0, 8), "valid": Noisy(1, 8)}
        data[which] = Failing(0, 8)
        data[which].broken = broken
        loaders = (DataLoader(d, 2, num_workers=workers) for d in data.values())
        console = Console(file=io.StringIO())
        nasfx.search(
            net, *loaders, loss=F.mse_loss, epochs=1, checkpoint_dir=tmp_path / folder,
            checkpoint_every=1, console=console,
        )  # fmt: skip
        return newest(tmp_path / folder)

    with pytest.raises(OSError, match="the disk is gone") as error:
        run(True, "faulty")
    one, two = error.value.__notes__[-2:]
    assert one == f"{which} raised this instead of giving batch 2 of a pass"
    assert two.startswith("the last checkpoint is ")
    assert read(files(tmp_path / "faulty")[0])["run"]["step"] == 2
    # What is mended goes on as if nothing had happened, but for NumPy's and torch's noise.
    assert run(False, "faulty")["run"]["part"] == "finished"


def test_an_exhausted_loader(tmp_path: Path) -> None:
    net = nasfx.transform(built(Chain), "darts", seed=3)
    train = iter([batch(i) for i in range(3)])
    with pytest.raises(SearchError, match=r"train gave no batch; an iterator that is used") as e:
        nasfx.search(
            net, train, [batch(9)], loss=F.mse_loss, epochs=2, checkpoint_dir=tmp_path,
            console=Console(file=io.StringIO()),
        )  # fmt: skip
    assert str(files(tmp_path)[0]) in e.value.__notes__[-1]
    assert newest(tmp_path)["run"]["epoch"] == 1


def test_other_data_are_no_continuation(tmp_path: Path) -> None:
    def run(n: int) -> Any:
        net = nasfx.transform(built(Chain), "darts", seed=3)
        train = (batch(i) for i in range(n))
        return nasfx.search(
            net, train, [batch(9)], loss=F.mse_loss, epochs=1, checkpoint_dir=tmp_path,
            checkpoint_every=4, metric=fails, console=Console(file=io.StringIO()),
        )  # fmt: skip

    def fails(outputs: Tensor, target: Tensor) -> float:
        raise CrashError

    with pytest.raises(CrashError):
        run(4)
    with pytest.raises(CheckpointError, match=r"train gave 3 batches, and the checkpoint .* 4 of"):
        run(3)


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    _, expected = losses("darts", tmp_path)[1]
    folder = tmp_path / "faulty"
    called = 0

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        nonlocal called
        called += 1
        return F.mse_loss(outputs, target) * (float("nan") if called == 6 else 1)

    with pytest.raises(SearchError, match=r"training loss became nan") as error:
        search("darts", folder, loss=loss)
    assert error.value.__notes__[-1].startswith(f"the last checkpoint is {files(folder)[0]}")
    search("darts", folder, start=1)
    assert_same_bits(newest(folder), expected)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """The step that makes them so has a finite loss; what it would save could never go on."""
    net = nasfx.transform(built(Chain), "darts", seed=3)
    called = 0

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        nonlocal called
        called += 1
        value = F.mse_loss(outputs, target)
        if called == 6 and outputs.requires_grad:
            outputs.register_hook(lambda grad: grad * float("inf"))
        return value

    train, valid = [batch(i) for i in range(3)], [batch(9)]
    with pytest.raises(SearchError, match=r"epoch 0, batch 3: the parameter .* is not finite"):
        nasfx.search(
            net, train, valid, loss=loss, epochs=2, checkpoint_dir=tmp_path, checkpoint_every=1,
            console=Console(file=io.StringIO()),
        )  # fmt: skip
    content = newest(tmp_path)
    assert content["run"]["steps"] == 2
    assert all(v.isfinite().all() for k, v in content["net"]["values"].items() if "arch" not in k)


# -- disks -----------------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Call it with the size in bytes at which a file is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_in_the_middle(
    tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    _, expected = losses("darts", tmp_path)[1]
    folder = tmp_path / "faulty"
    full = lambda: small_files(20_000)  # noqa: E731
    with pytest.raises(CheckpointError, match=r"could not be written: .*File too large") as error:
        search("darts", folder, at=6, crash=full, checkpoint_every=1)
    small_files(resource.RLIM_INFINITY)
    there = files(folder)
    assert [file.name for file in there] == [f"checkpoint-{n:012d}.pt" for n in (2, 1)]
    assert f"the last whole checkpoint is {there[0]}; make room" in str(error.value)
    assert sorted(file.name for file in folder.iterdir()) == [f.name for f in reversed(there)]
    search("darts", folder, start=1)
    assert_same_bits(newest(folder), expected)


@pytest.mark.parametrize("where", ["fsync", "replace", "link"])
def test_a_full_disk(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert crashes("darts", tmp_path, 6)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, where, full)
        if where == "link":
            patch.setattr(checkpoint.shutil, "copyfile", full)
        with pytest.raises(CheckpointError, match=r"No space left on device; the last whole"):
            search("darts", tmp_path)
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert after.items() >= before.items()
    assert not any(name.endswith(".part") for name in after)
    assert all(read(file) for file in files(tmp_path))


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path: Path) -> None:
    assert crashes("darts", tmp_path, 6)
    (tmp_path / ".checkpoint-000000000009.pt.part").write_bytes(b"half")
    (tmp_path / "notes.part").write_text("the user's")
    search("darts", tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert (tmp_path / "notes.part").exists()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        place = largest.header_offset + largest.file_size
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(bytes(data))


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_newest_checkpoint_is_passed_over_aloud(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    _, expected = losses("darts", tmp_path)[1]
    folder, console = tmp_path / "faulty", io.StringIO()
    assert crashes("darts", folder, 12, checkpoint_every=1)
    last, before = files(folder)
    damage(last)
    with pytest.raises(CheckpointError, match=rf"{last.name} is damaged"):
        read(last)
    search("darts", folder, start=1, console=Console(file=console))
    assert f"{last} is damaged" in console.getvalue()
    assert f"going on from {before}" in console.getvalue()
    assert last.with_suffix(".damaged").exists()
    assert_same_bits(newest(folder), expected)


def test_no_whole_checkpoint_is_no_new_start(tmp_path: Path) -> None:
    assert crashes("darts", tmp_path, 12)
    for file in files(tmp_path):
        cut(file)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole; restore one"):
        search("darts", tmp_path)
    assert len(files(tmp_path)) == 2


class Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_foreign_files_run_no_code(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint-000000000003.pt"
    for content, message in (
        (Evil(tmp_path / "evil"), "is no checkpoint of a search: its pickle asks for posix.mkdir"),
        ({"model": torch.ones(2)}, "is no checkpoint of a search: nasfx.search writes others"),
        ([1], "is no checkpoint of a search: nasfx.search writes others"),
    ):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=message):
            search("darts", tmp_path)
    assert not (tmp_path / "evil").exists()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", b"0" * 10_000_000)
    with pytest.raises(CheckpointError, match="it is compressed"):
        read(file)


def test_broken_content_is_an_error_of_ours(tmp_path: Path) -> None:
    assert crashes("single-path", tmp_path, 4)
    file = files(tmp_path)[0]
    whole = read(file)
    for part in ("run", "net", "optimizers", "scheduler", "readers", "random", "hidden", "of"):
        for broken in ({}, None, 3, {"x": torch.ones(1)}):
            if part == "hidden" and broken == {}:
                continue  # a net may have none
            torch.save({**whole, part: broken}, file)
            with pytest.raises(CheckpointError, match=file.name):
                search("single-path", tmp_path)
    torch.save({**whole, "format": 99}, file)
    with pytest.raises(CheckpointError, match=r"has the format 99, and this nasfx reads 1"):
        search("single-path", tmp_path)


# -- many ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", SEVEN)
def test_faults_one_after_the_other(
    variant: str, tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    """A search of 300 steps that meets a fault on every start goes on to its end, as without."""
    options: dict[str, Any] = {"epochs": 100}
    whole, calls = tmp_path / "whole", [0]
    search(variant, whole, checkpoint_every=None, after=calls, **options)
    expected, needed, folder = newest(whole), len(calls), tmp_path / "faulty"
    count = -(-FAULTS // len(SEVEN))
    faults = random.Random(f"faults {variant}")

    def term() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    kinds = ["crash", "term", "full", "nan", "cut"]
    calls = [0]
    for start in range(count):
        kind, at = kinds[start % 5], faults.randrange(3, 300 // count)
        crash = {"term": term, "full": lambda: small_files(9_000)}.get(kind)
        given: dict[str, Any] = {"after": calls}
        if kind == "nan":
            given["loss"] = _nan_at(at, calls)
        with pytest.raises((CrashError, SystemExit, CheckpointError, SearchError)):
            search(variant, folder, at=at, crash=crash, start=start, **given, **options)
        small_files(resource.RLIM_INFINITY)
        if kind == "cut" and len(files(folder)) > 1:
            cut(files(folder)[0])
    search(variant, folder, start=count, after=calls, **options)
    assert_same_bits(newest(folder), expected)
    # Those of two steps, or of an evaluation, since the last checkpoint, or the one before.
    repeated = 5 * (count + sum(kinds[start % 5] == "cut" for start in range(count)))
    assert len(calls) <= needed + repeated


def _nan_at(at: int, calls: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    called = 0

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        nonlocal called
        called += 1
        calls.append(called)
        return F.mse_loss(outputs, target) * (float("nan") if called == at else 1)

    return loss
