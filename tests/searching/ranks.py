"""Searches on several processes: run by test_distributed.py, one process for each rank."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nasfx
from nasfx import LayerChoice
from nasfx.searching.distributed import Ranks

STRATEGIES: dict[str, Any] = {
    "darts": nasfx.Darts(),
    "finite-difference": nasfx.Darts(unrolled="finite-difference"),
    "exact": nasfx.Darts(unrolled="exact"),
    "fbnet": nasfx.FBNet(final_samples=3, recalibrate=0),
    "proxyless": nasfx.Proxyless(gate="full_v2"),
    "two": nasfx.Proxyless(gate="two"),
    "reinforce": nasfx.Proxyless(estimator="reinforce", draws=2),
    "enas": nasfx.Enas(steps=3, aggregate=2, final_samples=3, recalibrate=0),
    "single-path": nasfx.SinglePath(population=4, generations=2, recalibrate=0),
    "random": nasfx.RandomSearch(final_samples=5, recalibrate=0),
}
STEPS, BATCH = 10, 8  # of an epoch, of which there are three


class Net(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()

        def candidates(n: int) -> dict[str, nn.Module]:
            convs = {f"k{k}": nn.Conv2d(4, 4, k, padding=k // 2) for k in (1, 3, 5)}
            return dict(list({**convs, "skip": nn.Identity(), "tanh": nn.Tanh()}.items())[-n:])

        self.one = LayerChoice(candidates(5), label="one")
        self.two = LayerChoice(candidates(3), label="two")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(torch.tanh(self.one(self.norm(self.stem(x))))).mean((2, 3)))


def batches(share: slice, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(STEPS):
        x = torch.randn(BATCH, 2, 5, 5, generator=generator, dtype=torch.float64)
        y = (x.mean((1, 2, 3)) * 20).long().clamp(-1, 1) + 1
        found.append((x[share], y[share]))
    return found


def accuracy(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs.argmax(1) == target).double().mean()


def state_of(net: nasfx.Supernet, result: nasfx.SearchResult) -> dict[str, Any]:
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in result.records]
    return {
        "state": net.state_dict(), "architecture": dict(result.architecture), "records": records,
        "evaluated": [[dict(arch), score] for arch, score in result.evaluated.items()],
    }  # fmt: skip


def searched(
    fabric: Fabric, name: str, norm: bool, share: slice = slice(None), **options: Any
) -> dict[str, Any]:
    """What a search of a strategy ends with, on batches of which this process has a share."""
    net = nasfx.transform(Net(norm).double(), STRATEGIES[name])
    data = {"train": batches(share, 0), "valid": batches(share, 1), **options.pop("data", {})}
    optimizers = torch.optim.SGD(net.weight_parameters(), 0.05, 0.9), net.arch_optimizer()
    options = {"seed": 5, "epochs": 3, "clip_norm": 0.5, "optimizers": optimizers, **options}
    result = nasfx.search(
        net, data["train"], data["valid"], loss=F.cross_entropy, metric=accuracy, fabric=fabric,
        **options,
    )  # fmt: skip
    return state_of(net, result)


def loaders(fabric: Fabric, batch: int) -> dict[str, Any]:
    """Shuffled loaders over all samples, which Fabric divides."""
    x, y = (torch.cat(part) for part in zip(*batches(slice(None), 0), strict=True))
    dataset = TensorDataset(x, y)
    train = DataLoader(dataset, batch, shuffle=True, generator=torch.Generator().manual_seed(0))
    return {"train": train, "valid": DataLoader(dataset, batch)}


def evolved(
    fabric: Fabric | None, folder: Path | None = None, at: int = 0, bias: float = 0.0
) -> list[Any]:
    """What an evolution found; a signal asks it to stop at the metric of number `at`."""
    net = nasfx.transform(Net(norm=True).double(), "single-path")
    with torch.no_grad():
        net.get_parameter("head.bias").add_(bias)
    data = batches(slice(None), 0)
    seen = 0

    def metric(outputs: Tensor, target: Tensor) -> float:
        nonlocal seen
        seen += 1
        if seen == at:
            signal.raise_signal(signal.SIGTERM)
        return accuracy(outputs, target) - float(outputs.std())

    result = nasfx.evolve(
        net, data[:3], metric=metric, recalibrate=(data, 4), population=4, generations=3, seed=2,
        checkpoint_dir=folder, checkpoint_every=1, fabric=fabric, console=Console(quiet=True),
    )  # fmt: skip
    scores = [(dict(arch), score) for arch, score in result.evaluated.items()]
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in result.records]
    return [dict(result.architecture), result.best_metric, records, scores]


def main() -> None:
    """Run the tasks of a JSON file, and save what each ended with, or its error."""
    task = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(sys.argv[1]).parent
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp")
    fabric.launch()
    rank, count = fabric.global_rank, fabric.world_size
    found: dict[str, Any] = {}
    for key, (what, name, options) in task.items():
        share = slice(rank, None, count)
        try:
            found[key] = TASKS[what](fabric, name, share, options, folder)
        except (Exception, SystemExit) as error:
            found[key] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"rank-{rank}.pt")


# -- tasks: (fabric, strategy, share, options, folder) ---------------------------------------------


def _plain(fabric: Fabric, name: str, share: slice, options: Any, folder: Path) -> Any:
    return searched(fabric, name, share=share, **options)


def _loaders(fabric: Fabric, name: str, share: slice, options: Any, folder: Path) -> Any:
    if "checkpoint_dir" in options:
        options = {**options, "checkpoint_dir": folder / options["checkpoint_dir"]}
    return searched(fabric, name, data=loaders(fabric, 4), **options)


def _stopped(fabric: Fabric, name: str, share: slice, options: Any, folder: Path) -> Any:
    """A search that one rank alone is asked to stop, in its 13th step."""
    seen = 0

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if seen == options["at"] and fabric.global_rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return F.cross_entropy(outputs, target)

    net = nasfx.transform(Net(norm=True).double(), STRATEGIES[name])
    optimizers = torch.optim.SGD(net.weight_parameters(), 0.05, 0.9), net.arch_optimizer()
    data = loaders(fabric, 4)
    nasfx.search(
        net, data["train"], data["valid"], loss=loss, metric=accuracy, fabric=fabric, seed=5,
        epochs=3, clip_norm=0.5, optimizers=optimizers, checkpoint_dir=folder / "stopped",
    )  # fmt: skip


def _wrong(fabric: Fabric, name: str, share: slice, options: Any, folder: Path) -> Any:
    """Something goes wrong on rank 1 alone."""
    train = batches(share, 0)
    if fabric.global_rank == 1:
        if options["how"] == "nan":
            train[4][0][0] = float("nan")
        elif options["how"] == "short":
            del train[4:]
        elif options["how"] == "raises":

            class Broken(list[Any]):
                def __iter__(self) -> Any:
                    yield train[0]
                    raise OSError("the disk is gone")

            where = options.get("where", "train")
            return searched(fabric, name, False, share, data={where: Broken(train)})
    if options["how"] == "other weights":
        net = nasfx.transform(Net(norm=False).double(), STRATEGIES[name])
        ranks = Ranks(fabric)
        ranks.begin(net)
        if fabric.global_rank == 1:
            with torch.no_grad():
                net.get_parameter("head.bias").add_(1e-9)
        ranks.check_alike(net, "here")
        return None
    if options["how"] == "other paths":
        net = nasfx.transform(Net(norm=False).double(), STRATEGIES[name])
        ranks = Ranks(fabric)
        return ranks.together(lambda: 0.0, lambda _: f"path {fabric.global_rank}")
    return searched(fabric, name, False, share, data={"train": train})


def _evolved(fabric: Fabric, name: str, share: slice, options: Any, folder: Path) -> Any:
    """An evolution; the second one goes on where a signal to one rank has stopped the first."""
    if name == "other weights":
        return evolved(fabric, bias=1e-9 * fabric.global_rank)
    return evolved(fabric, folder / name, at=options["at"] if fabric.global_rank == 1 else 0)


TASKS = {
    "plain": _plain, "loaders": _loaders, "stopped": _stopped, "wrong": _wrong, "evolved": _evolved
}  # fmt: skip

if __name__ == "__main__":
    main()
