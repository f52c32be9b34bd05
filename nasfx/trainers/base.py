"""What the trainers share: data, device, optimizers, figures, progress, and the found result."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.apply_func import move_data_to_device
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from nasfx.costs.objectives import Objective
from nasfx.errors import SearchError
from nasfx.searching.loop import search
from nasfx.searching.result import SearchResult
from nasfx.strategies import Strategy
from nasfx.transforming import transform

Loaders = tuple[DataLoader[Any], DataLoader[Any]]
"""(of the weights, of the architecture)."""


class BaseOneShotTrainer(ABC):
    """Searches a model with choices by training all its architectures at once.

    Everything that a search needs is given to the constructor; then `fit`, then `export`.
    """

    @abstractmethod
    def fit(self) -> None:
        """Search."""

    @abstractmethod
    def export(self, file: str | Path | None = None) -> dict[str, Any]:
        """The found architecture, which is also written to `file` if there is one."""

    def train(self) -> None:
        """The same as `fit`."""
        self.fit()


class SearchTrainer(BaseOneShotTrainer):
    """A trainer that transforms its model for a strategy and calls `nasfx.search`.

    The model stays as it is but for its weights, which the net shares: an optimizer of the model's
    parameters trains the net. What is drawn at random follows `torch.initial_seed()`, so
    `torch.manual_seed` before the constructor repeats a search, or gives another one.

    Attributes:
        net: the supernet.
        result: what `nasfx.search` returned; None before `fit`.
        train_loader: the batches that train the weights.
        valid_loader: the batches that train the architecture, and that figures are taken on.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy,
        *,
        loss: Callable[[Any, Any], Tensor],
        metrics: Callable[[Any, Any], Mapping[str, Any]] | None,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        loaders: Loaders,
        device: torch.device | str | None,
        log_frequency: int | None = None,
        clip_norm: float = 0,
        warmup: int = 0,
        arch: Mapping[str, Any] | None = None,
        objective: Objective | None = None,
        example_inputs: Any = None,
    ) -> None:
        """Transform the model.

        Args:
            model: the model, with choices.
            strategy: how it is searched.
            loss: loss(logits, target) -> 0-d tensor, a batch mean.
            metrics: metrics(logits, target) -> a dict of batch means; the first one, higher is
                better, is the metric of the search. None for minus the loss.
            optimizer: of the model's parameters.
            epochs: how often the training data is gone through.
            loaders: (of the weights, of the architecture).
            device: None for a GPU where there is one, else the CPU.
            log_frequency: batches between lines with the training loss; None for no lines.
            clip_norm: of the weights' gradients; 0 for no clipping.
            warmup: epochs in which only weights are trained.
            arch: options of the optimizer of the architecture, `Supernet.arch_optimizer`.
            objective: what the architecture should cost.
            example_inputs: the arguments of forward that costs are counted with.

        Raises:
            SearchError: an argument that cannot be used.
        """
        if log_frequency is not None and log_frequency < 1:
            raise SearchError(f"log_frequency={log_frequency} must be at least 1, or None")
        if clip_norm < 0:
            raise SearchError(f"grad_clip={clip_norm} must be positive, or 0 for no clipping")
        _check_optimizer(optimizer, model)
        self.loss, self.metrics, self.epochs, self.warmup = loss, metrics, epochs, warmup
        self.train_loader, self.valid_loader = loaders
        self.fabric = fabric_for(device)
        self.log_frequency, self.clip_norm = log_frequency, clip_norm or None
        self.net = transform(
            model,
            strategy,
            example_inputs=example_inputs,
            objective=objective,
            seed=torch.initial_seed(),
        )
        self.optimizers = optimizer, self.net.arch_optimizer(**(arch or {}))
        self.console = Console(stderr=True)
        self.result: SearchResult | None = None
        self._steps = 0
        self._figures: list[tuple[int, dict[str, float]]] = []

    def fit(self) -> None:
        """Search; a second call goes on from the weights and probabilities of the first.

        Raises:
            SearchError: what `nasfx.search` raises; `metrics` returns no dict of numbers.
        """
        self._steps, self._figures = 0, []
        self.result = search(
            self.net,
            self.train_loader,
            self.valid_loader,
            loss=self._loss,
            epochs=self.epochs,
            metric=None if self.metrics is None else self._metric,
            optimizers=self.optimizers,
            warmup=self.warmup,
            clip_norm=self.clip_norm,
            fabric=self.fabric,
            console=self.console,
        )

    def export(self, file: str | Path | None = None) -> dict[str, Any]:
        """The found architecture: a candidate's name, or a list of input indices, by label.

        Args:
            file: where it is also written, as JSON, for `nasfx.Architecture.from_json`.

        Raises:
            SearchError: before `fit`.
        """
        found = dict(self._found().architecture)
        if file is not None:
            Path(file).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return found

    @property
    def records(self) -> tuple[dict[str, Any], ...]:
        """The records of the result, each with "metrics": the means of all figures, by name.

        Raises:
            SearchError: before `fit`.
        """
        n = len(self.valid_loader)
        return tuple(
            {**record, "metrics": _means(self._figures[i * n : (i + 1) * n])}
            for i, record in enumerate(self._found().records)
        )

    def _found(self) -> SearchResult:
        if self.result is None:
            raise SearchError(
                f"{type(self).__name__} has found nothing yet: call fit() before export()"
            )
        return self.result

    # -- what the search calls ---------------------------------------------------------------------

    def _metric(self, outputs: Any, target: Any) -> Any:
        """The first of the metrics; all are kept for the records."""
        return next(iter(self._kept_metrics(outputs, target).values()))

    def _kept_metrics(self, outputs: Any, target: Any) -> Mapping[str, Any]:
        assert self.metrics is not None
        found = self.metrics(outputs, target)
        if not isinstance(found, Mapping) or not found:
            raise SearchError(
                "metrics(logits, target) must return a dict of figures, the first one the metric "
                f"of the search, such as {{'accuracy': 0.9}}, not {found!r}"
            )
        # The evaluation of an epoch is one pass over the data; those of the conclusion follow.
        if len(self._figures) < self.epochs * len(self.valid_loader):
            size = len(target) if isinstance(target, Tensor) and target.dim() else 1
            figures = {name: _number(name, value) for name, value in found.items()}
            self._figures.append((size, figures))
        return found

    def _loss(self, outputs: Any, target: Any) -> Tensor:
        value = self.loss(outputs, target)
        if self.net.step_kind == "weight":
            self._steps += 1
            if self.log_frequency is not None and self._steps % self.log_frequency == 0:
                epoch, batch = divmod(self._steps - 1, len(self.train_loader))
                number = _number("loss", value)
                self._log(f"epoch {epoch} batch {batch} training loss {number:.4f}")
        return value

    def _log(self, line: str) -> None:
        self.console.print(line, highlight=False)


def halves(dataset: Dataset[Any], batch_size: int, workers: int) -> Loaders:
    """Loaders of the first half of `dataset`, for weights, and of the second; both shuffled.

    Raises:
        SearchError: the dataset has no length, or less than two samples.
    """
    n = len(dataset) if hasattr(dataset, "__len__") else 0  # type: ignore[arg-type]
    if n < 2:
        raise SearchError(
            "dataset must have a length of at least 2: its first half trains the weights and its "
            "second half the architecture"
        )
    first, second = (Subset(dataset, range(*part)) for part in ((n // 2,), (n // 2, n)))
    return loader(first, batch_size, workers), loader(second, batch_size, workers)


def loader(
    dataset: Dataset[Any], batch_size: int, workers: int, *, shuffle: bool = True
) -> DataLoader[Any]:
    """A loader whose order follows `torch.initial_seed()`."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    return DataLoader(
        dataset, batch_size, shuffle=shuffle, num_workers=workers, generator=generator
    )


def fabric_for(device: torch.device | str | None) -> Fabric:
    """A launched Fabric of one process on `device`."""
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    devices = [found.index] if ":" in str(found) and found.type != "cpu" else 1
    fabric = Fabric(accelerator=found.type, devices=devices)
    fabric.launch()
    return fabric


def first_inputs(batches: DataLoader[Any], model: nn.Module) -> Any:
    """The inputs of the first batch, on the model's device.

    Raises:
        SearchError: a batch is no pair.
    """
    batch = next(iter(batches))
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise SearchError(f"a batch must be (inputs, target), not {type(batch).__name__}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs: Any = batch[0]
    moved = move_data_to_device(inputs, device)
    return tuple(moved) if isinstance(moved, list) else moved


def _check_optimizer(optimizer: Any, model: nn.Module) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SearchError(
            f"optimizer must be a torch.optim.Optimizer of the model's parameters, not "
            f"{type(optimizer).__name__}"
        )
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise SearchError(
            f"the optimizer holds no parameter of {type(model).__name__}: make it of "
            "model.parameters(), after the model is on its device"
        )


def _number(name: str, value: Any) -> float:
    """A figure as a float."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.detach())
    if isinstance(value, int | float):
        return float(value)
    raise SearchError(f"{name} must be a number, or a tensor of one, not {type(value).__name__}")


def _means(figures: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The means of figures by name, batches by their size."""
    total = sum(size for size, _ in figures)
    names = dict.fromkeys(name for _, found in figures for name in found)
    return {name: sum(size * found[name] for size, found in figures) / total for name in names}
