"""Searches on two processes: alike on both, and what one process with the whole batch gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

import nasfx
from nasfx.errors import SearchError
from nasfx.searching.distributed import Ranks, synchronised
from tests.searching import ranks as worker

Found = list[dict[str, Any]]


def run(tasks: dict[str, Any], folder: Path) -> Found:
    """What two processes ended their tasks with, by rank."""
    file = folder / "tasks.json"
    file.write_text(json.dumps(tasks))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    given |= {"OMP_NUM_THREADS": "1", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    given |= {"TORCHELASTIC_RUN_ID": "test", "NODE_RANK": "0"}
    command = [sys.executable, "-m", "tests.searching.ranks", str(file)]
    processes = [
        subprocess.Popen(
            command, env={**given, "RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(told)
    return [torch.load(folder / f"rank-{i}.pt", weights_only=False) for i in range(2)]


def assert_equal(one: Any, two: Any) -> None:
    assert one["state"].keys() == two["state"].keys()
    for name, value in one["state"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, two["state"][name]), name
    for key in ("architecture", "records", "evaluated"):
        assert one[key] == two[key], key


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    tasks: dict[str, Any] = {}
    for name in worker.STRATEGIES:
        tasks[f"{name}, plain"] = "plain", name, {"norm": False}
        tasks[f"{name}, norms"] = "plain", name, {"norm": True}
    return run(tasks, tmp_path_factory.mktemp("two"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "norms"])
@pytest.mark.parametrize("name", worker.STRATEGIES)
def test_ranks_end_alike(name: str, kind: str, found: Found) -> None:
    one, two = (ranks[f"{name}, {kind}"] for ranks in found)
    assert isinstance(one, dict), one
    assert_equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("name", worker.STRATEGIES)
def test_two_ranks_are_one_with_the_whole_batch(name: str, found: Found) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    alone, two = worker.searched(fabric, name, norm=False), found[0][f"{name}, plain"]
    start = nasfx.transform(worker.Net(norm=False).double(), worker.STRATEGIES[name], seed=0)
    moved = 0.0
    for key, value in alone["state"].items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(
                two["state"][key], value, rtol=1e-10, atol=1e-10, equal_nan=True, msg=key
            )
            moved += float((value - start.state_dict()[key]).abs().nan_to_num().sum())
    assert moved > 0.1
    assert two["architecture"] == alone["architecture"]
    for ours, theirs in zip(two["records"], alone["records"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == (value if value is None else pytest.approx(value, rel=1e-9)), key
    assert [a for a, _ in two["evaluated"]] == [a for a, _ in alone["evaluated"]]


def test_one_search_on_two_ranks(tmp_path: Path) -> None:
    """The quick one: a strategy with arch steps, loaders that Fabric divides, a fault."""
    tasks = {
        "search": ("loaders", "two", {"norm": True, "epochs": 2}),
        "nan": ("wrong", "darts", {"how": "nan"}),
        "other weights": ("wrong", "darts", {"how": "other weights"}),
    }
    one, two = run(tasks, tmp_path)
    assert isinstance(one["search"], dict), one["search"]
    assert_equal(one["search"], two["search"])
    assert "rank 1 failed" in one["nan"]
    assert "the training loss" in two["nan"]
    assert one["other weights"].startswith("SearchError: here: head.bias differs between the ranks")


def test_an_evolution_on_two_ranks_is_that_on_one(tmp_path: Path) -> None:
    alone = worker.evolved(None)
    tasks = {
        "stopped": ("evolved", "folder", {"at": 7}),
        "again": ("evolved", "folder", {"at": 0}),
        "other weights": ("evolved", "other weights", {}),
    }
    found = run(tasks, tmp_path)
    for ranks in found:
        assert ranks["stopped"].startswith("SystemExit: 143")
        assert ranks["again"] == alone
        assert "SearchError: evolve on several processes: the weights" in ranks["other weights"]
    assert len(alone[-1]) > 6


@pytest.mark.slow
def test_what_goes_wrong_on_one_rank_ends_all(tmp_path: Path) -> None:
    hows = ["nan", "short", "raises", "other paths"]
    tasks: dict[str, Any] = {how: ("wrong", "single-path", {"how": how}) for how in hows}
    tasks["valid"] = "wrong", "darts", {"how": "raises", "where": "valid"}
    one, two = run(tasks, tmp_path)
    assert "rank 1 failed" in one["nan"]
    assert "the training loss" in two["nan"]
    for found in (one, two):
        assert "has 4 batches on some ranks and more on others" in found["short"]
        assert "the ranks have drawn different paths" in found["other paths"]
    for key in ("raises", "valid"):
        assert "rank 1 failed" in one[key]
        assert "the disk is gone" in two[key]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "single-path", "enas", "finite-difference"])
def test_a_stopped_search_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = run({"whole": ("loaders", name, {"norm": True})}, tmp_path)
    stopped = run({"stopped": ("stopped", name, {"at": 13})}, tmp_path)
    for ranks in stopped:
        assert ranks["stopped"].startswith("SystemExit: 143"), ranks["stopped"]
    again = run({"again": ("loaders", name, {"norm": True, "checkpoint_dir": "stopped"})}, tmp_path)
    for before, after in zip(whole, again, strict=True):
        assert isinstance(after["again"], dict), after["again"]
        assert_equal(before["whole"], after["again"])


# -- one process -----------------------------------------------------------------------------------


def one() -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    return fabric


@pytest.mark.parametrize("name", ["darts", "two", "single-path"])
def test_accumulated_batches_are_one(name: str) -> None:
    whole = worker.batches(slice(None), 0)
    halves = [(x[i : i + 4], y[i : i + 4]) for x, y in whole for i in (0, 4)]
    big = worker.searched(one(), name, norm=False, data={"train": whole}, epochs=2)
    small = worker.searched(one(), name, norm=False, data={"train": halves}, epochs=2, accumulate=2)
    if name == "single-path":  # others look at the first batch, or draw, before a step
        assert small["architecture"] == big["architecture"]
    for key, value in big["state"].items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(small["state"][key], value, rtol=1e-10, atol=1e-10, msg=key)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SearchError, match=r"sync_batch_norm=True on cpu: torch.nn.SyncBatchNorm"):
        worker.searched(one(), "darts", norm=True, sync_batch_norm=True)
    with pytest.raises(SearchError, match="accumulate=0 must be at least 1"):
        worker.searched(one(), "darts", norm=True, accumulate=0)


def test_a_search_by_itself_in_one_of_many_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    net = nasfx.transform(worker.Net(norm=True).double(), "darts")
    data = worker.batches(slice(None), 0)
    with pytest.raises(SearchError, match=r"one of 4 processes .* given no Fabric"):
        nasfx.search(net, data, data, loss=nn.functional.cross_entropy, epochs=1)


def test_batch_norms_are_synchronised_within_a_block_alone() -> None:
    net = worker.Net(norm=True)
    net.norm.running_mean.fill_(2)  # type: ignore[union-attr, operator]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with synchronised(net):
        assert type(net.norm) is nn.SyncBatchNorm
    assert type(net.norm) is nn.BatchNorm2d
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.eval()(torch.zeros(1, 2, 5, 5))


def test_only_running_statistics_are_averaged() -> None:
    class Two(Ranks):
        """As if another rank had zeros."""

        def __init__(self) -> None:
            super().__init__(one())
            self.count = 2

        def _mean(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor / 2

    sent: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "broadcast", lambda tensor, rank: sent.append(tensor))
        net = nasfx.transform(worker.Net(norm=True), "darts")
        net.register_buffer("mask", torch.full((2,), torch.finfo(torch.float32).min))
        mean = net.get_buffer("norm.running_mean").fill_(3.0)
        Two().synchronise_buffers(net)
    assert mean.tolist() == [1.5] * 4
    assert any(tensor is net.get_buffer("mask") for tensor in sent)
    assert not any(tensor is mean for tensor in sent)
