"""`search`: the ready-made loop over weight steps and arch steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice
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
from nasfx.searching.recalibration import Judge, Recalibration
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
    """Search: weight steps on training batches, arch steps on validation batches.

    The strategy says when: before every weight step (DARTS, ProxylessNAS), in a phase of their own
    after those of the epoch (FBNet, ENAS), or never, where nothing is learned about the
    architecture while training. Strategies that learn from rewards are given the metric of the
    batch, or minus the loss where there is no metric. Unrolled DARTS is given the training batch
    that follows. Every epoch ends with the
    metric, in eval mode on the validation data, of the architecture found so far (of a drawn one
    where nothing is learned); the search ends as the strategy concludes, with objectives weighed in
    and bounds kept. Where it evaluates several architectures then, batch-norm statistics are
    averaged anew for each if the strategy says so, and the net keeps those of the best.

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
        self.schedule = net.strategy.schedule

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

    def _arch_step(self, valid: Iterator[Batch], following: Batch | None) -> float:
        """An optimizer step of the architecture, over as many draws as the strategy wants.

        `following` is the batch of the next weight step, where there is one.
        """
        losses: list[float] = []
        batch: Batch | None = None
        for _ in range(self.schedule.draws):
            if batch is None or not self.schedule.same_batch:
                batch = next(valid)
            losses.append(self._arch_gradient(*batch, following))
        self.arch.step()
        self.arch.zero_grad()
        return sum(losses) / len(losses)

    def _arch_gradient(
        self, inputs: tuple[Any, ...], target: Any, following: Batch | None
    ) -> float:
        with self.net.arch_step(**self._unrolled(following)):
            outputs = self._outputs(inputs)
            value = self.loss(outputs, target)
            number = self._checked(value, inputs, "the validation loss")
            reward = None
            if self.net.strategy.rewarded and self.metric is not None:
                reward = self.metric(outputs, target)
            self.fabric.backward(self.net.objective(value, reward))
        for p in self.net.arch_parameters():
            if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                raise nonfinite_error(
                    self.net,
                    inputs,
                    f"the architecture's gradient became not finite {self.position}",
                )
        return number

    def _unrolled(self, following: Batch | None) -> dict[str, Any]:
        """What a second-order arch step is given."""
        if not self.net.strategy.second_order:
            return {}
        assert following is not None
        inputs, target = following
        inner = lambda: self.loss(self._outputs(inputs), target)  # noqa: E731
        return {"inner": inner, "weight_optimizer": self.weights.optimizer}

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

    @property
    def _metric(self) -> Metric:
        return self.metric or (lambda outputs, target: -self.loss(outputs, target))

    def evaluate(self, arch: Architecture) -> float:
        """The metric of one architecture over the validation data, in eval mode."""
        data = self._batches(self.valid, "valid")
        return evaluate(self.net, arch, data, self._metric, when=self.position, run=self._outputs)

    def _judge(self) -> Judge:
        """Evaluates the architectures among which the strategy chooses at the end."""
        n = self.schedule.recalibrate
        recalibration = Recalibration(self.train, n, one_pass=True) if n else None
        return Judge(self.net, self.valid, self._metric, recalibration, 0, self._outputs)

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
        judge = self._judge()
        metrics: dict[Architecture, float] = {}

        def scored(arch: Architecture) -> float:
            metrics[arch] = judge.evaluate(arch, f"{self.position}, for {dict(arch)}")
            return self.net.scored(metrics[arch], arch)

        best = self.net.conclude(scored)
        if best not in metrics:
            scored(best)
        judge.adopt(best)
        return SearchResult(best, tuple(records), metrics[best], metrics)

    def _epoch(
        self, epoch: int, valid: Any, progress: Progress, task: Any, records: list[dict[str, Any]]
    ) -> dict[str, Any]:
        start = time.perf_counter()
        self.net.train()
        searching = self.learns and epoch >= self.warm
        every = self.schedule.every if searching else 0
        train_losses: list[float] = []
        arch_losses: list[float] = []
        for i, batch in enumerate(self._batches(self.train, "train")):
            self.position = f"in epoch {epoch}, batch {i}"
            if every and i % every == 0:
                arch_losses.append(self._arch_step(valid, batch))
            train_losses.append(self._weight_step(*batch))
            figures = f"epoch {epoch} loss {train_losses[-1]:.4f}"
            if records:  # of the epoch before; every batch would be too often
                last = records[-1]
                figures += f" metric {last['metric']:.4f} entropy {last['entropy']:.3f}"
            progress.update(task, advance=1, figures=figures)
        if searching:
            if not every:
                arch_losses += self._phase(epoch, valid)
            self.net.end_epoch()
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

    def _phase(self, epoch: int, valid: Iterator[Batch]) -> list[float]:
        """The arch steps that follow the weight steps of an epoch."""
        losses: list[float] = []
        if (steps := self.schedule.steps) is not None:
            for i in range(steps):
                self.position = f"in epoch {epoch}, arch step {i}"
                losses.append(self._arch_step(valid, None))
            return losses
        one_pass = self._batches(self.valid, "valid")
        while True:
            self.position = f"in epoch {epoch}, arch step {len(losses)}"
            # The last step of the pass goes round what is left of it.
            left = list(islice(one_pass, 1 if self.schedule.same_batch else self.schedule.draws))
            if not left:
                return losses
            losses.append(self._arch_step(cycle(left), None))

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
