"""`search`: the ready-made loop over weight steps and arch steps."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import DataLoader

from nasfx.architecture import Architecture
from nasfx.errors import SearchError
from nasfx.searching.data_order import Randomness, Reader
from nasfx.searching.distributed import (
    Ranks,
    check_synchronised,
    is_whole,
    refuse_unlaunched,
    synchronised,
)
from nasfx.searching.evaluation import (
    Metric,
    batches,
    entropy,
    evaluate,
    progress_bar,
)
from nasfx.searching.recalibration import Judge, Recalibration
from nasfx.searching.result import RunState, SearchResult
from nasfx.searching.resuming import Resumable, length
from nasfx.searching.saving import Resume, Saving
from nasfx.searching.steps import Loss, Steps
from nasfx.subnet import kept_modes
from nasfx.supernet import Supernet

_GROUP = 10  # architectures that are evaluated together at the end, and then saved


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
    accumulate: int = 1,
    seed: int | None = None,
    fabric: Fabric | None = None,
    console: Console | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: Resume = "auto",
    checkpoint_every: int | None = None,
    keep: int = 2,
    sync_batch_norm: bool = False,
) -> SearchResult:
    """Search: weight steps on training batches, arch steps on validation batches.

    The strategy says when: before every weight step (DARTS, ProxylessNAS), in a phase of their own
    after those of the epoch (FBNet, ENAS), or never, where nothing is learned about the
    architecture while training. Strategies that learn from rewards are given the metric of the
    batch, or minus the loss where there is no metric. Unrolled DARTS is given the training batch
    that follows. Every epoch ends with the metric, in eval mode on the validation data, of the
    architecture found so far (of a drawn one where nothing is learned); the search ends as the
    strategy concludes, with objectives weighed in and bounds kept. Where it evaluates several
    architectures then, batch-norm statistics are averaged anew for each if the strategy says so,
    and the net keeps those of the best.

    With a `checkpoint_dir` the search may be stopped at any time: called again with the same
    arguments it goes on, and ends with the very bits of a run that was not stopped (on one machine
    with as many threads, on the CPU; docs/running.md says under which conditions). A search that is
    finished returns its result. SIGTERM and Ctrl-C let the batch finish, save, and end the process
    with SystemExit(143) or KeyboardInterrupt.

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
        accumulate: training batches in a weight step; all are run by the step's path, and their
            gradients averaged.
        seed: for the drawn paths; without it the net goes on with its own generator. Data order and
            dropout follow torch's global generator and the loaders.
        fabric: a launched Lightning Fabric, for devices, mixed precision and several processes
            (docs/running.md); by default one CPU process.
        console: where progress goes; by default the terminal, and nowhere if there is none.
        checkpoint_dir: the folder of the checkpoints of this search alone; None for none.
        resume: "auto": go on from the newest whole checkpoint there, or start if there is none.
            True: it is an error if there is none. False: start, which is an error if there is one.
            A path: go on from this file.
        checkpoint_every: steps between checkpoints; each epoch ends with one anyway, and with None
            there are no others.
        keep: how many of the last checkpoints are kept, beside `best.pt`, that of the epoch with
            the highest metric.
        sync_batch_norm: on several GPUs, let batch norms normalise by the batches of all of them.

    Raises:
        SearchError: wrong arguments, an empty loader, or a loss, gradient or metric that is not
            finite: it names the choice, the candidate and the line of the model that produced it.
        CheckpointError: a checkpoint cannot be read or written, or belongs to another search.

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
        refuse_unlaunched("search")
        fabric = Fabric(accelerator="cpu", devices=1)
        fabric.launch()
    if accumulate < 1:
        raise SearchError(f"accumulate={accumulate} must be at least 1")
    ranks = Ranks(fabric)
    if sync_batch_norm:
        check_synchronised(net, fabric)
    if seed is not None:
        net.seed(seed)
    console = (console or Console(stderr=True)) if ranks.first else Console(quiet=True)
    saving = Saving(checkpoint_dir, resume, checkpoint_every, keep, console, ranks)
    run = _Run(
        net, train, valid, loss, metric, epochs, warm, clip_norm, accumulate, optimizers, ranks,
        saving, sync_batch_norm,
    )  # fmt: skip
    saving.open(run.resumable(seed))
    return run.run(console)


class _Run:
    def __init__(
        self, net: Supernet, train: Any, valid: Any, loss: Loss, metric: Metric | None, epochs: int,
        warm: int, clip_norm: float | None, accumulate: int, optimizers: Any, ranks: Ranks,
        saving: Saving, sync: bool,
    ) -> None:  # fmt: skip
        self.net, self.loss, self.metric = net, loss, metric
        fabric = ranks.fabric
        self.fabric, self.ranks, self.saving = fabric, ranks, saving
        self.epochs, self.warm, self.clip_norm = epochs, warm, clip_norm
        self.accumulate, self.sync = accumulate, sync
        fabric.to_device(net)
        ranks.begin(net)
        self.whole = train, valid  # not divided among the ranks
        self.train, self.valid = map(self._loader, self.whole)
        self.randomness = Randomness(self.train, self.valid)
        self.readers = {
            "train": self._reader(self.train, "train"),
            "valid": self._reader(self.valid, "valid"),  # for arch steps among weight steps
            "phase": self._reader(self.valid, "valid"),  # for those after them
        }
        self.state = RunState()
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
        self.steps = Steps(net, loss, metric, clip_norm, both, ranks, saving.check_evaluation)
        self.learns = bool(net.arch_parameters())
        self.schedule = net.strategy.schedule
        self.endless = self.readers["valid"].endless()

    def _loader(self, data: Any) -> Any:
        return self.fabric.setup_dataloaders(data) if isinstance(data, DataLoader) else data

    def _reader(self, data: Any, what: str) -> Reader:
        return Reader(data, what, self.fabric.to_device, self.randomness)

    def resumable(self, seed: int | None) -> Resumable:
        """Everything that the search goes on from."""
        optimizers = {"weights": self.weights.optimizer, "architecture": self.arch.optimizer}
        options = {
            "epochs": self.epochs, "warmup": self.warm, "clip_norm": self.clip_norm,
            "metric": "minus the loss" if self.metric is None else "given", "seed": seed,
            "accumulate": self.accumulate, "processes": self.ranks.count,
        }  # fmt: skip
        precision = self.fabric.strategy.precision
        return Resumable(
            self.net, optimizers, self.scheduler, precision, self.state, self.readers,
            self.randomness, options, self.ranks,
        )  # fmt: skip

    # -- evaluation --------------------------------------------------------------------------------

    @property
    def _metric(self) -> Metric:
        return self.metric or (lambda outputs, target: -self.loss(outputs, target))

    def evaluate(self, arch: Architecture) -> float:
        """The metric of one architecture over the validation data, in eval mode."""
        data = batches(self.valid, "valid", self.fabric.to_device)
        with self.saving.evaluating():
            own = self.ranks.together(
                lambda: evaluate(
                    self.net,
                    arch,
                    data,
                    self._metric,
                    when=self.steps.position,
                    run=self.steps.outputs,
                )
            )
        return self.ranks.mean(own)

    def _judge(self) -> Judge:
        """Evaluates the architectures among which the strategy chooses at the end."""
        n = self.schedule.recalibrate
        train, valid = self.whole
        recalibration = Recalibration(train, n, one_pass=True) if n else None
        return Judge(self.net, valid, self._metric, recalibration, 0, around=self._interruptible)

    @contextmanager
    def _interruptible(self) -> Generator[None, None, None]:
        self.saving.check_evaluation()
        with self.fabric.autocast():
            yield

    # -- the loop ----------------------------------------------------------------------------------

    def run(self, console: Console) -> SearchResult:
        """All epochs, then the strategy's conclusion; from where the state stands."""
        if self.state.part == "finished":
            return self.state.result()
        with kept_modes(self.net), progress_bar(console) as progress, self.saving.watching():
            self._show(progress)
            with synchronised(self.net) if self.sync else nullcontext():
                while self.state.epoch < self.epochs:
                    self._epoch()
            self._conclude()
        return self.state.result()

    def _show(self, progress: Progress) -> None:
        n = length(self.train)
        done = 0 if n is None else self.state.epoch * n
        if self.state.part == "weights":
            done += self.state.step * self.accumulate
        total = None if n is None else n * self.epochs
        self.progress = progress
        self.task = progress.add_task("search", total=total, completed=done, figures="")

    def _epoch(self) -> None:
        state = self.state
        self.started = time.perf_counter() - state.seconds
        self.net.train()
        searching = self.learns and state.epoch >= self.warm
        if state.part == "weights":
            self._weights(self.schedule.every if searching else 0)
        if state.part == "arch":
            if searching and not self.schedule.every:
                self._phase()
            if searching:
                self.net.end_epoch()
            state.arch = self.net.derive() if self.learns else self.net.sample()
            state.enter("evaluation")
        self._end_epoch()

    def _weights(self, every: int) -> None:
        """The weight steps of an epoch, with an arch step before every so many."""
        state, reader, n = self.state, self.readers["train"], self.accumulate
        taken = self.ranks.in_step(reader.rest(), "the training data")
        while together := list(islice(taken, n)):
            self.steps.position = f"in epoch {state.epoch}, batch {state.step * n}"
            if every and state.step % every == 0:
                state.arch_losses.append(self.steps.arch_step(self.endless, together))
            state.train_losses.append(self.steps.weight_step(together))
            figures = f"epoch {state.epoch} loss {state.train_losses[-1]:.4f}"
            if state.records:  # of the epoch before; every batch would be too often
                last = state.records[-1]
                figures += f" metric {last['metric']:.4f} entropy {last['entropy']:.3f}"
            self.progress.update(self.task, advance=len(together), figures=figures)
            self._stepped()
        reader.close()
        state.enter("arch")

    def _phase(self) -> None:
        """The arch steps that follow the weight steps of an epoch."""
        state, steps, reader = self.state, self.schedule.steps, self.readers["phase"]
        one_pass = self.ranks.in_step(reader.rest(), "the validation data")
        while steps is None or state.step < steps:
            self.steps.position = f"in epoch {state.epoch}, arch step {state.step}"
            source = self.endless
            if steps is None:
                # The last step of the pass goes round what is left of it.
                n = 1 if self.schedule.same_batch else self.schedule.draws
                left = list(islice(one_pass, n))
                if not left:
                    break
                source = cycle(left)
            state.arch_losses.append(self.steps.arch_step(source, ()))
            self._stepped()
        reader.close()

    def _stepped(self) -> None:
        self.state.step += 1
        self.state.steps += 1
        self.state.seconds = time.perf_counter() - self.started
        self.saving.after_step()

    def _end_epoch(self) -> None:
        """Evaluate what has been found, and write the record."""
        state = self.state
        assert state.arch is not None
        lr, nats = self.weights.param_groups[0]["lr"], entropy(self.net)
        self.steps.position = f"at the end of epoch {state.epoch}"
        self.ranks.synchronise_buffers(self.net)
        self.ranks.check_alike(self.net, self.steps.position)
        metric = self.evaluate(state.arch)
        if self.scheduler is not None:
            self.scheduler.step()
        train, arch = state.train_losses, state.arch_losses
        record = {
            "epoch": state.epoch,
            "train_loss": self.ranks.mean(sum(train) / len(train)),
            "arch_loss": self.ranks.mean(sum(arch) / len(arch)) if arch else None,
            "metric": metric,
            "entropy": nats,
            "lr": lr,
            "seconds": time.perf_counter() - self.started,
        }
        state.end_epoch(record)
        state.steps += 1
        self.saving.after_epoch()

    def _conclude(self) -> None:
        """Let the strategy choose; what it has evaluated before is not evaluated again."""
        state = self.state
        self.steps.position = "after the last epoch"
        generator = self.net._arch.state.generator
        if state.draws is None:
            state.enter("conclusion")
            state.draws = generator.get_state()
        generator.set_state(state.draws)
        judge = self._judge()
        scores = _Scores(self, judge)
        best = self.net.conclude(scores)
        scores(best)
        self.ranks.together(lambda: judge.adopt(best))
        self.ranks.synchronise_buffers(self.net)
        state.architecture = best
        state.enter("finished")
        state.steps += 1
        self.saving.after_end()


class _Scores:
    """What a strategy asks for at the end; what was evaluated before is not evaluated again."""

    def __init__(self, run: _Run, judge: Judge) -> None:
        self.run, self.judge = run, judge

    def __call__(self, arch: Architecture) -> float:
        """The metric of an architecture, with what it costs weighed in."""
        self.expect([arch])
        return self.run.net.scored(self.run.state.evaluated[arch], arch)

    def expect(self, archs: Sequence[Architecture]) -> None:
        """Evaluate architectures in groups, divided among the ranks."""
        run, metrics = self.run, self.run.state.evaluated
        left = [arch for arch in dict.fromkeys(archs) if arch not in metrics]
        n, train = run.ranks.count, run.whole[:1]
        data = (run.whole[1], *(train if run.schedule.recalibrate else ()))
        for group in self.judge.groups(left, _GROUP * n, n):
            with run.saving.evaluating():
                found = run.ranks.divided(
                    group,
                    lambda own: self.judge.evaluate_all(own, run.steps.position),
                    shared=all(map(is_whole, data)),
                )
            metrics.update(zip(group, found, strict=True))
            run.state.steps += len(group)
            run.saving.after_evaluation()
