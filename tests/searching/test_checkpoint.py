"""A search that was stopped anywhere ends with the bits of one that was not.

`NASFX_KILLS=50 pytest tests/searching/test_checkpoint.py -m slow -k killed` kills every strategy
that often by hand.
"""

from __future__ import annotations

import io
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import nasfx
from nasfx import CheckpointError, InputChoice, LayerChoice, SearchError
from nasfx.searching import loop, saving
from nasfx.searching.checkpoint import CheckpointFolder, read
from tests.strategies.nets import WIDTH, Chain, Scale, batch, built, dense

VARIANTS: dict[str, Any] = {
    "darts": "darts",
    "unrolled": nasfx.Darts(unrolled="finite-difference"),
    "fbnet": nasfx.FBNet(recalibrate=2),
    "proxyless": "proxyless",
    "two": nasfx.Proxyless(gate="two"),
    "reinforce": nasfx.Proxyless(estimator="reinforce", draws=2, arch_every=2),
    "enas": nasfx.Enas(aggregate=2, final_samples=3, recalibrate=2),
    "enas steps": nasfx.Enas(aggregate=2, steps=2, final_samples=3, recalibrate=2),
    "single-path": nasfx.SinglePath(population=4, generations=2, recalibrate=2),
    "fair": nasfx.SinglePath(population=4, generations=2, recalibrate=2, fair=True),
    "random": nasfx.RandomSearch(final_samples=4, recalibrate=2),
}
SEVEN = ("darts", "fbnet", "proxyless", "two", "enas", "single-path", "random")
EPOCHS, BATCHES = 2, 3
KILLS = int(os.environ.get("NASFX_KILLS", "5"))  # of every strategy, in series of five


def _candidates(n: int) -> dict[str, nn.Module]:
    """Of unlike sizes, and not all with parameters."""
    made = (
        lambda: nn.Linear(WIDTH, WIDTH), lambda: Scale(0.5), lambda: dense(norm=True), nn.Tanh,
        lambda: nn.Sequential(dense(), nn.Dropout(0.2)), dense, nn.Identity,
    )  # fmt: skip
    return {f"c{i}": make() for i, make in enumerate(made[:n])}


class Sizes(nn.Module):
    """Choices of 2 to 7 candidates, with batch norm, dropout, and a hidden buffer that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.blocks = nn.Sequential(
            *(LayerChoice(_candidates(n), label=f"of{n}") for n in (4, 2, 7, 3, 6, 5))
        )
        self.pick = InputChoice(3, 1, label="pick")
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("calls", torch.ones(()), persistent=False)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        self.calls.mul_(0.9).add_(0.1 + 0.1 * x.detach().mean())
        y = self.blocks(x)
        x = self.norm(self.pick([x, y, x * y])) * self.calls
        return self.head(F.dropout(x, 0.1, self.training))


class Noisy(Dataset[Any]):
    """Samples with noise from the global generators of Python, NumPy and torch."""

    def __init__(self, seed: int, n: int = 4 * BATCHES - 1) -> None:
        self.x, self.y = batch(seed, n)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = random.gauss(0, 0.1) + 0.1 * np.random.randn() + 0.1 * torch.randn(())
        return self.x[i] + noise, self.y[i]


def _loaders(kind: str) -> tuple[Any, Any]:
    if kind == "lists":
        return [batch(i) for i in range(BATCHES)], [batch(50 + i) for i in range(2)]
    own = {"own": 5, "shared": 6}.get(kind)
    generators = [None, None]
    if own is not None:
        generators = [torch.Generator().manual_seed(own + i) for i in range(2)]
        if kind == "shared":
            generators[1] = generators[0]
    options: dict[str, Any] = {"shuffle": True, "num_workers": int(kind == "workers")}
    train, valid = (
        DataLoader(Noisy(s, n), 4, generator=g, **options)
        for s, n, g in zip((1, 2), (11, 7), generators, strict=True)
    )
    return train, valid


class CrashError(Exception):
    pass


def _raise() -> None:
    raise CrashError


def search(
    variant: str, folder: Path | None, *, data: str = "lists", at: int | None = None,
    crash: Callable[[], None] | None = None, start: int = 0,
    kind: Callable[[], nn.Module] = Chain, after: list[int] | None = None, **options: Any,
) -> tuple[nasfx.Supernet, nasfx.SearchResult]:  # fmt: skip
    """A search in what could be a new process; it crashes at the loss of number `at`.

    Losses after `after` has become true are added to it.
    `start` seeds the global generators where there is a checkpoint, which then must not matter.
    """
    start = start if folder is not None and any(folder.glob("checkpoint-*")) else 0
    random.seed(start)
    np.random.seed(start)
    torch.manual_seed(start)
    net = nasfx.transform(built(kind), VARIANTS[variant], seed=3)
    train, valid = _loaders(data)
    called = 0

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        nonlocal called
        called += 1
        if after:
            after.append(called)
        if called == at:
            (crash or _raise)()
        return F.mse_loss(outputs, target)

    given: dict[str, Any] = {
        "loss": loss, "epochs": EPOCHS, "clip_norm": 1.0, "seed": 7, "checkpoint_dir": folder,
        "checkpoint_every": 2, "console": Console(file=io.StringIO()),
    }  # fmt: skip
    return net, nasfx.search(net, train, valid, **(given | options))


def crashes(variant: str, folder: Path, at: int, **options: Any) -> bool:
    """Whether the search was stopped before its end."""
    try:
        search(variant, folder, at=at, **options)
    except CrashError:
        return True
    return False


def newest(folder: Path) -> Any:
    found = CheckpointFolder(folder, 2).newest()
    assert found is not None
    return found[1]


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf by its path, without what a clock says."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key != "seconds":
                yield from flat(part, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        yield f"{path}/length", len(value)
        for i, part in enumerate(value):
            yield from flat(part, f"{path}/{i}")
    else:
        yield path, value


def assert_same_bits(found: Any, expected: Any) -> None:
    a, b = dict(flat(found)), dict(flat(expected))
    assert a.keys() == b.keys()
    for key, value in b.items():
        if isinstance(value, Tensor):
            assert a[key].dtype == value.dtype, key
            assert torch.equal(a[key].nan_to_num(7.5), value.nan_to_num(7.5)), key
        else:
            assert a[key] == value, key


def same(one: nasfx.SearchResult, two: nasfx.SearchResult) -> bool:
    return (
        [{k: v for k, v in r.items() if k != "seconds"} for r in one.records]
        == [{k: v for k, v in r.items() if k != "seconds"} for r in two.records]
        and one.architecture == two.architecture
        and one.best_metric == two.best_metric
        and list(one.evaluated.items()) == list(two.evaluated.items())
    )


@pytest.fixture(autouse=True)
def _every_evaluation_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_SHARE", 0)


# -- the same bits ---------------------------------------------------------------------------------


def losses(
    variant: str, tmp_path: Path, data: str = "lists", kind: Callable[[], nn.Module] = Chain
) -> tuple[int, Any]:
    """How often an unstopped search calls the loss, and its last checkpoint."""
    count = 0

    def counted(outputs: Tensor, target: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return F.mse_loss(outputs, target)

    folder = tmp_path / "whole"
    options: dict[str, Any] = {"loss": counted, "checkpoint_every": None}
    _, result = search(variant, folder, data=data, kind=kind, **options)
    return count, (result, newest(tmp_path / "whole"))


@pytest.mark.parametrize(
    "variant", [v if v in SEVEN else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]
)
def test_stopped_twice_and_resumed_it_ends_with_the_same_bits(variant: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": "own", "kind": Sizes}
    count, (whole, expected) = losses(variant, tmp_path, **options)
    kills = random.Random(variant)
    first, second = kills.randrange(2, count), kills.randrange(2, count)
    folder = tmp_path / "stopped"
    assert crashes(variant, folder, first, **options)
    crashes(variant, folder, second, start=1, **options)
    net, result = search(variant, folder, start=2, **options)
    assert same(result, whole), (first, second)
    assert_same_bits(newest(folder), expected)
    assert_same_bits(dict(net.state_dict()), expected["net"]["values"])


@pytest.mark.parametrize(
    ("variant", "data"),
    [
        ("darts", "workers"), ("proxyless", "global"), ("fbnet", "shared"),
        *(
            pytest.param(variant, data, marks=pytest.mark.slow)
            for variant in ("enas", "single-path") for data in ("global", "shared", "workers")
        ),
    ],
)  # fmt: skip
def test_the_order_of_the_data_is_found_again(variant: str, data: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": data, "kind": Sizes}
    count, (whole, expected) = losses(variant, tmp_path, **options)
    folder = tmp_path / "stopped"
    assert crashes(variant, folder, count // 3, **options)
    _, result = search(variant, folder, start=1, **options)
    assert same(result, whole)
    assert_same_bits(newest(folder), expected)


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("series", range(KILLS // 5))
@pytest.mark.parametrize("variant", SEVEN)
def test_killed_twice_and_resumed_in_new_processes_it_ends_with_the_same_bits(
    variant: str, series: int, tmp_path: Path
) -> None:
    """Five seeded kill points; shuffled loaders, with a worker in the second search."""
    kills = random.Random(f"kill {variant} {series}")
    for data, n in (("own", 3), ("workers", 2)):
        folder = tmp_path / data
        count, (_, expected) = losses(variant, folder, data, Sizes)
        for start in range(n):
            at = kills.randrange(2, count // n)
            assert _run(variant, folder / "killed", data, at, start) == -signal.SIGKILL
        assert _run(variant, folder / "killed", data, 0, n) == 0
        assert_same_bits(newest(folder / "killed"), expected)


def _run(variant: str, folder: Path, data: str, at: int, start: int) -> int:
    """A search in a process of its own, which kills itself at the loss of number `at`."""
    arguments = [variant, str(folder), data, str(at), str(start)]
    command = [sys.executable, "-W", "error", "-m", "tests.searching.test_checkpoint", *arguments]
    root = Path(__file__).parents[2]
    return subprocess.run(command, timeout=300, check=False, cwd=root).returncode


# -- what is there and what is not -----------------------------------------------------------------


def test_saving_changes_nothing(tmp_path: Path) -> None:
    net, result = search("single-path", None, data="global", kind=Sizes, checkpoint_every=None)
    saved, with_folder = search("single-path", tmp_path, data="global", kind=Sizes)
    assert same(result, with_folder)
    assert_same_bits(dict(net.state_dict()), dict(saved.state_dict()))


def test_a_finished_search_returns_its_result_at_once(tmp_path: Path) -> None:
    net, result = search("random", tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again, found = search("random", tmp_path, at=1, start=1)  # no loss is called
    assert same(result, found)
    assert [r["seconds"] for r in result.records] == [r["seconds"] for r in found.records]
    assert_same_bits(dict(again.state_dict()), dict(net.state_dict()))
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("variant", ["single-path", "random", "enas", "fbnet"])
def test_nothing_is_evaluated_twice(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_GROUP", 1)  # else a group is, whose results are saved together
    asked: list[Any] = []
    stop = 0

    def metric(outputs: Tensor, target: Tensor) -> float:
        if 0 < stop == len(asked):
            raise CrashError
        asked.append(None)
        return -float(F.mse_loss(outputs, target))

    _, result = search(variant, tmp_path / "whole", metric=metric)
    count, asked = len(asked), []
    stop = count - 2 * 2 - 1  # in the conclusion, with two whole evaluations to go
    with pytest.raises(CrashError):
        search(variant, tmp_path / "stopped", metric=metric)
    stop = 0
    _, found = search(variant, tmp_path / "stopped", metric=metric, start=1)
    assert same(result, found)
    assert len(asked) == count + 1, "but for a batch of the evaluation that was stopped"


def test_optimizers_are_resumed_by_the_names_of_parameters(tmp_path: Path) -> None:
    def run(folder: str, order: int, at: int | None) -> None:
        torch.manual_seed(order)
        net = nasfx.transform(built(Sizes), "proxyless", seed=3)
        weights = net.weight_parameters()
        named = [(n, p) for n, p in net.named_parameters() if not n.startswith("arch.")][::order]
        groups: list[Any] = [{"params": named[:5], "lr": 0.1}, {"params": named[5:], "lr": 0.01}]
        if order < 0:
            groups = [{"params": named[-5:], "lr": 7.0}, {"params": named[:-5], "lr": 7.0}]
        assert len(weights) == len(named)
        optimizers = (
            torch.optim.Adam(groups, lr=0.5),
            torch.optim.SGD(net.arch_parameters()[::order], 0.1, momentum=0.9),
        )
        called = 0

        def loss(outputs: Tensor, target: Tensor) -> Tensor:
            nonlocal called
            called += 1
            if called == at:
                raise CrashError
            return F.mse_loss(outputs, target)

        train, valid = _loaders("lists")
        nasfx.search(
            net, train, valid, loss=loss, epochs=2, optimizers=optimizers, checkpoint_every=1,
            checkpoint_dir=tmp_path / folder, console=Console(file=io.StringIO()),
        )  # fmt: skip

    run("whole", 1, None)
    with pytest.raises(CrashError):
        run("stopped", 1, 8)
    run("stopped", -1, None)
    expected, found = newest(tmp_path / "whole"), newest(tmp_path / "stopped")
    for content in (expected, found):
        for group in content["optimizers"]["weights"]["groups"]:
            group["params"] = sorted(group["params"])
            group["param_names"] = sorted(group["param_names"])
        for group in content["optimizers"]["architecture"]["groups"]:
            group["params"] = sorted(group["params"])
    assert_same_bits(found, expected)
    assert {g["lr"] for g in found["optimizers"]["weights"]["groups"]} == {0.1, 0.01}
    state = found["optimizers"]["weights"]["state"]
    shapes = {n: p.shape for n, p in built(Sizes).named_parameters()}
    assert all(held["exp_avg"].shape == shapes[name] for name, held in state.items())
    assert "blocks.2.c0.weight" in state


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    metrics = iter([0.5, 0.9, 0.2, 0.9] + [0.0] * 99)
    current = 0.0

    def metric(outputs: Tensor, target: Tensor) -> float:
        nonlocal current
        current = next(metrics)
        return current

    valid = [batch(50)]
    net = nasfx.transform(built(Chain), "proxyless", seed=3)
    nasfx.search(
        net, _loaders("lists")[0], valid, loss=F.mse_loss, metric=metric, epochs=4, keep=3,
        checkpoint_dir=tmp_path, console=Console(file=io.StringIO()),
    )  # fmt: skip
    names = sorted(file.name for file in tmp_path.iterdir())
    steps = [int(name[11:23]) for name in names if name != "best.pt"]
    assert names == ["best.pt", *(f"checkpoint-{n:012d}.pt" for n in steps)]
    assert len(steps) == 3
    best = read(tmp_path / "best.pt")
    assert [r["metric"] for r in best["run"]["records"]] == [0.5, 0.9]
    assert best["run"]["epoch"] == 2


def test_a_search_goes_on_from_a_path(tmp_path: Path) -> None:
    _, whole = search("darts", tmp_path / "whole")
    assert crashes("darts", tmp_path / "stopped", 9)
    file = CheckpointFolder(tmp_path / "stopped", 2).files()[0]
    _, result = search("darts", None, resume=str(file), start=1)
    assert same(result, whole)
    _, result = search("darts", tmp_path / "other", resume=file, start=1)
    assert same(result, whole)
    with pytest.raises(CheckpointError, match=r"would be taken for its continuation"):
        search("darts", tmp_path / "whole", resume=file)
    older = CheckpointFolder(tmp_path / "stopped", 2).files()[1]
    with pytest.raises(CheckpointError, match=rf"{file.name} would be taken"):
        search("darts", tmp_path / "stopped", resume=older)


def test_what_resume_means(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"resume=True, and there is no checkpoint in"):
        search("darts", tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"resume=True, and there is no checkpoint_dir"):
        search("darts", None, resume=True)
    assert crashes("darts", tmp_path, 9, resume=False)
    with pytest.raises(CheckpointError, match=r"resume=False, and .*checkpoint-0.* is there"):
        search("darts", tmp_path, resume=False)
    assert crashes("darts", tmp_path, 2, resume=True)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*nowhere\.pt"):
        search("darts", tmp_path, resume=tmp_path / "nowhere.pt")
    for options, message in (
        ({"resume": 3}, "resume=3 must be"),
        ({"keep": 0}, "keep=0 must be"),
        ({"checkpoint_every": 0}, "checkpoint_every=0 must be"),
    ):
        with pytest.raises(SearchError, match=message):
            search("darts", tmp_path, **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file' is no folder"):
        search("darts", tmp_path / "file")


def test_it_says_where_it_goes_on(tmp_path: Path) -> None:
    assert crashes("darts", tmp_path, 11, checkpoint_every=1)
    text = io.StringIO()
    search("darts", tmp_path, console=Console(file=text))
    assert text.getvalue().startswith(f"going on from {tmp_path}/checkpoint-")
    assert text.getvalue().count("\n") == 1
    assert "epoch 1, batch 1" in text.getvalue()


def test_the_page_on_running_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "running.md"
    code = "".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {})
    assert (tmp_path / "runs" / "first" / "best.pt").exists()


# -- what it belongs to ----------------------------------------------------------------------------


class Other(Sizes):
    def __init__(self, change: str) -> None:
        super().__init__()
        if change == "candidate":
            self.blocks[1] = LayerChoice(
                {"c0": nn.Linear(WIDTH, WIDTH), "new": Scale(1)}, label="of2"
            )
        elif change == "shape":
            self.stem = nn.Linear(3, WIDTH, bias=False)
        elif change == "kind":
            self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=True)
            self.blocks[1] = LayerChoice(
                {"c0": nn.Linear(WIDTH, WIDTH), "c1": nn.ReLU()}, label="of2"
            )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    assert crashes("single-path", folder, 4, kind=Sizes)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("candidate", r"the space differs in of2: .*'c0', 'c1'.* in the checkpoint, .*'new'"),
        ("shape", r"the model differs in stem\.bias: .*\(4,\) in the checkpoint, not there now"),
        ("kind", r"the model differs in module blocks\.1\.c1: Scale in the checkpoint, ReLU now"),
        ("strategy", r"the strategy differs in its name: single-path in the checkpoint, random"),
        ("option", r"the strategy differs in population: 4 in the checkpoint, 6 now"),
        ("epochs", r"the search differs in epochs: 2 in the checkpoint, 3 now"),
        ("seed", r"the search differs in seed: 7 in the checkpoint, 8 now"),
        ("data", r"the search differs in train: .*'batches': 3.* in the checkpoint, .*4"),
        ("rate", r"the search differs in the optimizer of the weights: .*'lr': 0.025.*'lr': 0.1"),
    ],
)
def test_the_first_difference_is_named(change: str, message: str, stopped: Path) -> None:
    strategy = {
        "strategy": nasfx.RandomSearch(recalibrate=2),
        "option": nasfx.SinglePath(population=6, generations=2, recalibrate=2),
    }.get(change, VARIANTS["single-path"])
    net = nasfx.transform(built(lambda: Other(change)), strategy, seed=3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    options: dict[str, Any] = {"epochs": EPOCHS, "seed": 7, "clip_norm": 1.0}
    if change in ("epochs", "seed"):
        options[change] += 1
    if change == "rate":
        rates = torch.optim.SGD(net.weight_parameters(), 0.1, 0.9), net.arch_optimizer()
        options["optimizers"] = rates
    train, valid = _loaders("lists")
    if change == "data":
        train = [*train, *train[:1]]
    with pytest.raises(CheckpointError, match=rf"belongs to another search; {message}"):
        nasfx.search(net, train, valid, loss=F.mse_loss, checkpoint_dir=stopped, **options)
    if change != "seed":
        after = net.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in before.items() if "generator" not in k)


def test_only_what_can_be_read_again_is_written(tmp_path: Path) -> None:
    net = nasfx.transform(built(Chain), "darts", seed=3)
    extra = nn.Parameter(torch.ones(2, 3))
    optimizers = torch.optim.SGD([*net.weight_parameters(), extra], 0.1), net.arch_optimizer()
    train, valid = _loaders("lists")
    with pytest.raises(CheckpointError, match=r"a parameter of shape \(2, 3\) that the net does"):
        nasfx.search(
            net, train, valid, loss=F.mse_loss, epochs=1, optimizers=optimizers,
            checkpoint_dir=tmp_path,
        )  # fmt: skip
    weights = torch.optim.SGD(net.weight_parameters(), np.float64(0.1))
    weights.param_groups[0]["note"] = {1, 2}
    with pytest.raises(CheckpointError, match=r"the weights\.groups\.0\.note is a set, and"):
        nasfx.search(
            net, train, valid, loss=F.mse_loss, epochs=1, checkpoint_dir=tmp_path,
            optimizers=(weights, net.arch_optimizer()),
        )  # fmt: skip
    weights.param_groups[0].pop("note")
    nasfx.search(
        net, train, valid, loss=F.mse_loss, epochs=1, checkpoint_dir=tmp_path,
        optimizers=(weights, net.arch_optimizer()),
    )  # fmt: skip
    content = newest(tmp_path)
    assert type(content["optimizers"]["weights"]["groups"][0]["lr"]) is float


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path: Path) -> None:
    """Resident memory after 5,000 steps with sampling and validation, against that after 200.

    A process of its own, whose memory no other test has moved.
    """
    assert _run("memory", tmp_path, "", 0, 0) == 0


def _memory(folder: Path) -> None:
    seen: dict[int, int] = {}
    steps = 0
    page = os.sysconf("SC_PAGE_SIZE")

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if steps in (400, 10000):  # each step has two losses
            seen[steps] = page * int(Path("/proc/self/statm").read_text().split()[1])
        return F.mse_loss(outputs, target)

    net = nasfx.transform(built(Sizes), "proxyless", seed=3)
    train, valid = [batch(i) for i in range(50)], [batch(50 + i) for i in range(2)]
    nasfx.search(
        net, train, valid, loss=loss, epochs=102, checkpoint_dir=folder, checkpoint_every=30,
        optimizers=(torch.optim.SGD(net.weight_parameters(), 1e-3, 0.9), net.arch_optimizer()),
        console=Console(file=io.StringIO()),
    )  # fmt: skip
    assert seen[10000] < 1.02 * seen[400], seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    setattr(saving, "_SHARE", 0)  # noqa: B010
    _variant, _folder, _data, _at, _start = sys.argv[1:]
    if _variant == "memory":
        _memory(Path(_folder))
        raise SystemExit
    search(
        _variant, Path(_folder), data=_data, at=int(_at), crash=_killed, start=int(_start),
        kind=Sizes,
    )  # fmt: skip
