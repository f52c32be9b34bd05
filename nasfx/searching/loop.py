"""`search`: the ready-made loop over weight steps and arch steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader

from nasfx.architecture import Architecture
from nasfx.errors import SearchError
from nasfx.searching.evaluation import (
    Batch,
    Metric,
    batches,
    checked,
    evaluate,
    progress_bar,
)
from nasfx.searching.nonfinite import nonfinite_error
from nasfx.searching.result import SearchResult
from nasfx.subnet import kept_modes
from nasfx.supernet import Supernet

Loss = Callable[[Any, Any], Tensor]


def search(
    net: Supernet,
    train: Iterable[Any],
    valid: Iterable[Any],
    *,
    loss: Loss,
    epochs: int,
    metric: Metric | None = None,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    warmup: int | float = 0,
    clip_norm: float | None = None,
    seed: int | None = None,
    fabric: Fabric | None = None,
    console: Console | None = None,
) -> SearchResult:
    """Search: for every training batch an arch step on a validation batch, then a weight step.

    Strategies without architecture parameters take weight steps only. Every epoch ends with the
    metric, in eval mode on the validation data, of the architecture found so far (of a drawn one
    where nothing is learned); the search ends as the strategy concludes.

    Args:
        net: what `transform` made. It is moved to the fabric's device and trained.
        train: batches (inputs, target), a DataLoader or any iterable that can be gone through
            again; inputs are a tensor or a tuple of them.
        valid: likewise; for arch steps it is gone through as often as needed.
        loss: loss(outputs, target) -> 0-d tensor, a batch mean.
        epochs: how often the training data is gone through.
        metric: metric(outputs, target) -> a batch mean, higher is better; by default minus the
            loss.
        optimizers: (of the weights, of the architecture); by default SGD(0.025, momentum 0.9) with
            a cosine schedule over the epochs, and the paper's.
        warmup: epochs, or a fraction of them if below 1, in which only weights are trained.
        clip_norm: clip the weights' gradients to this norm.
        seed: for the drawn paths; without it the net goes on with its own generator. Data order and
            dropout follow torch's global generator and the loaders.
        fabric: a launched Lightning Fabric, for devices and mixed precision; by default one CPU
            process.
        console: where progress goes; by default the terminal, and nowhere if there is none.

    Raises:
        SearchError: wrong arguments, an empty loader, or a loss, gradient or metric that is not
            finite: it names the choice, the candidate and the line of the model that produced it.

    Example:
        >>> # result = search(net, train, valid, loss=F.cross_entropy, epochs=20)
        >>> # print(result); result.plot("search.png")
    """
    if not isinstance(net, Supernet):
        raise SearchError(f"search needs a net from nasfx.transform, not a {type(net).__name__}")
    if epochs < 1:
        raise SearchError(f"epochs={epochs} must be at least 1")
    warm = round(warmup * epochs) if 0 < warmup < 1 else int(warmup)
    if warmup < 0 or warm >= epochs:
        raise SearchError(
            f"warmup={warmup!r} must leave some of the {epochs} epochs for the search"
        )
    if fabric is None:
        fabric = Fabric(accelerator="cpu", devices=1)
        fabric.launch()
    if seed is not None:
        net.seed(seed)
    run = _Run(net, train, valid, loss, metric, epochs, warm, clip_norm, optimizers, fabric)
    return run.run(console or Console(stderr=True))


class _Run:
    def __init__(
        self, net: Supernet, train: Any, valid: Any, loss: Loss, metric: Metric | None, epochs: int,
        warm: int, clip_norm: float | None, optimizers: Any, fabric: Fabric,
    ) -> None:  # fmt: skip
        self.net, self.loss, self.metric, self.fabric = net, loss, metric, fabric
        self.epochs, self.warm, self.clip_norm = epochs, warm, clip_norm
        fabric.to_device(net)
        self.train, self.valid = (self._loader(data) for data in (train, valid))
        self.scheduler = None
        if optimizers is None:
            weights: torch.optim.Optimizer = torch.optim.SGD(net.weight_parameters(), 0.025, 0.9)
            self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(weights, epochs)
            arch = net.arch_optimizer()
        elif len(optimizers) == 2:
            weights, arch = optimizers
        else:
            raise SearchError("optimizers must be two: (of the weights, of the architecture)")
        both: Any = fabric.setup_optimizers(weights, arch)
        self.weights, self.arch = both
        self.learns = bool(net.arch_parameters())

    def _loader(self, data: Any) -> Any:
        return self.fabric.setup_dataloaders(data) if isinstance(data, DataLoader) else data

    # -- steps -------------------------------------------------------------------------------------

    def _batches(self, data: Any, what: str) -> Iterator[Batch]:
        return batches(data, what, self.fabric.to_device)

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self._batches(self.valid, "valid")

    def _outputs(self, inputs: tuple[Any, ...]) -> Any:
        with self.fabric.autocast():
            return self.net(*inputs)

    def _checked(self, value: Any, inputs: tuple[Any, ...], what: str) -> float:
        return checked(self.net, value, inputs, what, self.position)

    def _arch_step(self, inputs: tuple[Any, ...], target: Any) -> float:
        with self.net.arch_step():
            value = self.loss(self._outputs(inputs), target)
            number = self._checked(value, inputs, "the validation loss")
            self.fabric.backward(self.net.objective(value))
        for p in self.net.arch_parameters():
            if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                raise nonfinite_error(
                    self.net,
                    inputs,
                    f"the architecture's gradient became not finite {self.position}",
                )
        self.arch.step()
        self.arch.zero_grad()
        return number

    def _weight_step(self, inputs: tuple[Any, ...], target: Any) -> float:
        with self.net.weight_step():
            value = self.loss(self._outputs(inputs), target)
            number = self._checked(value, inputs, "the training loss")
            self.fabric.backward(value)
        if self.clip_norm is not None:
            with_grad = [p for p in self.net.weight_parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(with_grad, self.clip_norm)
        self.weights.step()
        self.weights.zero_grad()
        return number

    def evaluate(self, arch: Architecture) -> float:
        """The metric of one architecture over the validation data, in eval mode."""
        data = self._batches(self.valid, "valid")
        metric = self.metric or (lambda outputs, target: -self.loss(outputs, target))
        return evaluate(self.net, arch, data, metric, when=self.position, run=self._outputs)

    # -- the loop ----------------------------------------------------------------------------------

    def run(self, console: Console) -> SearchResult:
        """All epochs, then the strategy's conclusion."""
        records: list[dict[str, Any]] = []
        valid = self._endless()
        with kept_modes(self.net), progress_bar(console) as progress:
            try:
                total = len(self.train) * self.epochs
            except TypeError:
                total = None
            task = progress.add_task("search", total=total, figures="")
            for epoch in range(self.epochs):
                records.append(self._epoch(epoch, valid, progress, task, records))
        self.position = "after the last epoch"
        scores: dict[Architecture, float] = {}

        def scored(arch: Architecture) -> float:
            scores[arch] = self.evaluate(arch)
            return scores[arch]

        best = self.net.conclude(scored)
        if best not in scores:
            scored(best)
        return SearchResult(best, tuple(records), scores[best])

    def _epoch(
        self, epoch: int, valid: Any, progress: Progress, task: Any, records: list[dict[str, Any]]
    ) -> dict[str, Any]:
        start = time.perf_counter()
        self.net.train()
        searching = self.learns and epoch >= self.warm
        train_losses: list[float] = []
        arch_losses: list[float] = []
        for i, (inputs, target) in enumerate(self._batches(self.train, "train")):
            self.position = f"in epoch {epoch}, batch {i}"
            if searching:
                arch_losses.append(self._arch_step(*next(valid)))
            train_losses.append(self._weight_step(inputs, target))
            metric = f" metric {records[-1]['metric']:.4f}" if records else ""
            figures = (
                f"epoch {epoch} loss {train_losses[-1]:.4f}{metric} entropy {self._entropy():.3f}"
            )
            progress.update(task, advance=1, figures=figures)
        lr = self.weights.param_groups[0]["lr"]
        if self.scheduler is not None:
            self.scheduler.step()
        arch = self.net.derive() if self.learns else self.net.sample()
        return {
            "epoch": epoch,
            "train_loss": sum(train_losses) / len(train_losses),
            "arch_loss": sum(arch_losses) / len(arch_losses) if arch_losses else None,
            "metric": self.evaluate(arch),
            "entropy": self._entropy(),
            "lr": lr,
            "seconds": time.perf_counter() - start,
        }

    def _entropy(self) -> float:
        """The mean over the choices of the entropy of their decisions, in nats."""
        entropies: list[float] = []
        for label, p in self.net.probabilities().items():
            choice = self.net.space[label]
            if choice.kind == "layer" or choice.n_chosen == 1:
                entropies.append(float(torch.special.entr(p).sum()))
            else:  # of every input's being chosen
                entropies.append(float((torch.special.entr(p) + torch.special.entr(1 - p)).sum()))
        return sum(entropies) / len(entropies)
