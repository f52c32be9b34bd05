"""The metric of one architecture, with batch-norm statistics of its own under shared weights."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nasfx.architecture import Architecture
from nasfx.errors import SearchError
from nasfx.ops.select import unmoved_buffers
from nasfx.rewriting.graph import ModelGraph, has_hooks
from nasfx.searching import prefixes, repeatable
from nasfx.searching.evaluation import Batch, Mean, Metric, batches, evaluate
from nasfx.searching.prefixes import (
    Blocks,
    Runner,
    Statistics,
    blocks,
    moving,
    tree_of,
    until_norms,
)
from nasfx.subnet import kept_modes
from nasfx.supernet import Supernet


@dataclass(frozen=True)
class Recalibration:
    """What the batch norms of an architecture are given before it is evaluated.

    Their running statistics become the plain average over so many batches in train mode, since
    those of a supernet are averages over all paths (arXiv 1904.00420, section 3.4). A batch norm
    that the model's own `train()` keeps in eval mode is left alone.

    Attributes:
        loader: batches (inputs, target); it is read again for each architecture.
        batches: how many are averaged, at least 1.
        one_pass: go through the loader at most once; else a shorter one is gone through again.
    """

    loader: Iterable[Any]
    batches: int
    one_pass: bool = False


class Judge:
    """Evaluates architectures under the shared weights and leaves the net as it is.

    Buffers that move are copies, and modes and torch's global generators are restored, also after
    an error.
    """

    def __init__(
        self,
        net: Supernet,
        valid: Iterable[Any],
        metric: Metric,
        recalibration: Recalibration | None,
        seed: int,
        run: Callable[[tuple[Any, ...]], Any] | None = None,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """What all evaluations share.

        Args:
            net: the net, with trained weights.
            valid: batches (inputs, target), read again for each architecture.
            metric: metric(outputs, target) -> a batch mean, higher is better; in eval mode.
            recalibration: None uses the statistics as they are.
            seed: torch's global generators are seeded with it before each evaluation, so that
                dropout, and loaders without a generator of their own, are the same for all.
            run: calls the net; by default `net(*inputs)` within `around()`. With another, every
                architecture is evaluated alone.
            around: the context that the net runs in, such as autocast, entered for every call.
        """
        self.net, self.valid, self.metric = net, valid, metric
        self.recalibration, self.seed = recalibration, seed
        self.own_run, self.around = run, around
        self._paths: dict[tuple[Architecture, ModelGraph], Blocks] = {}
        devices = {tensor.device for tensor in (*net.parameters(), *net.buffers())}
        self.device = next(iter(devices), torch.device("cpu"))
        self.cuda = [device for device in devices if device.type == "cuda"]

    def run(self, inputs: tuple[Any, ...]) -> Any:
        """Call the net."""
        if self.own_run is not None:
            return self.own_run(inputs)
        with self.around():
            return self.net(*inputs)

    def _move(self, batch: Any) -> Any:
        return move_data_to_device(batch, self.device)

    def evaluate(self, arch: Architecture, when: str) -> float:
        """The metric of `arch` on the validation data, with statistics of its own if asked for.

        Args:
            arch: an architecture of the net's space.
            when: where the search stands, for messages.

        Raises:
            SearchError: a loader gives nothing, or what is no (inputs, target); the metric is no
                number, or not finite.
        """
        net = self.net
        graphs = net.choice_graph("train"), net.choice_graph("eval")
        with unmoved_buffers(net, *graphs), torch.random.fork_rng(self.cuda):
            torch.manual_seed(self.seed)
            if self.recalibration is not None:
                self._recalibrate(arch, self.recalibration)
            data = batches(self.valid, "valid", self._move)
            return evaluate(net, arch, data, self.metric, when=when, run=self.run)

    def groups(
        self, archs: Sequence[Architecture], at_most: int | None = None, processes: int = 1
    ) -> list[list[Architecture]]:
        """The architectures in groups, for each of which `evaluate_all` evaluates all at once.

        Where `obstacle` names a reason not to, each is alone, in the order given; on several
        processes as many are a group.

        Args:
            archs: different architectures of the net's space.
            at_most: how many may be in a group; None for no limit.
            processes: how many share a group; it is never smaller.
        """
        n = max(at_most or len(archs), processes)
        if at_most == 1 or len(archs) < 2 or self.obstacle(archs):
            return [list(archs[i : i + processes]) for i in range(0, len(archs), processes)]
        labels = [choice.label for choice in self.net.space.choices]
        # Those that begin alike stand together.
        ordered = sorted(archs, key=lambda arch: [str(arch.get(label)) for label in labels])
        return [ordered[i : i + n] for i in range(0, len(ordered), n)]

    def evaluate_all(self, archs: Sequence[Architecture], when: str) -> list[float]:
        """The metrics of several architectures, in their order: the bits that `evaluate` gives.

        Where nothing is in the way (see `obstacle`), every batch is read once and goes through all
        of them, and what their subnets begin with in common is computed once, in recalibration as
        in evaluation. The metric must depend on its arguments alone.

        Args:
            archs: different architectures of the net's space.
            when: where the search stands, for messages, which name the architecture, too.

        Raises:
            SearchError: see `evaluate`.
        """
        try:
            if len(archs) > 1 and not self.obstacle(archs):
                # What is wrong is found again, and told, when they are evaluated one by one.
                with suppress(SearchError):
                    return self._evaluate_at_once(archs, when)
            named = [f"{when}, for the architecture {dict(arch)}" for arch in archs]
            return [self.evaluate(arch, name) for arch, name in zip(archs, named, strict=True)]
        finally:
            self._forget(archs)

    def obstacle(self, archs: Sequence[Architecture]) -> str:
        """Why the architectures cannot be evaluated at once with the same result, or "".

        It is decided by what the loaders are and what the subnets call: batches that may differ
        from pass to pass, random numbers, code that is not known.
        """
        net, how = self.net, self.recalibration
        if self.own_run is not None:
            return "the net is run by a function of the caller's"
        if any(map(has_hooks, net.modules())):
            return "the net has hooks"
        if reason := repeatable.loader_obstacle(self.valid):
            return f"valid: {reason}"
        if how is not None:
            taken = 1 if how.one_pass else how.batches
            if reason := repeatable.loader_obstacle(how.loader, taken):
                return f"recalibrate: {reason}"
        with kept_modes(net):
            for mode in (True, False) if how is not None else (False,):
                net.train(mode)
                for path in map(self._steps, archs):
                    steps = chain.from_iterable(until_norms(path) if mode else path)
                    if reason := repeatable.obstacle(steps):
                        return reason
        return ""

    def _steps(self, arch: Architecture) -> Blocks:
        """The steps of a subnet in the net's mode; found once."""
        key = arch, self.net.choice_graph("train" if self.net.training else "eval")
        if key not in self._paths:
            self._paths[key] = blocks(self.net.subnet_graph(arch))
        return self._paths[key]

    def _forget(self, archs: Sequence[Architecture]) -> None:
        for key in [key for key in self._paths if key[0] in archs]:
            del self._paths[key]

    def _evaluate_at_once(self, archs: Sequence[Architecture], when: str) -> list[float]:
        net = self.net
        graphs = net.choice_graph("train"), net.choice_graph("eval")
        means = [Mean(net, self.metric, when) for _ in archs]
        with (
            unmoved_buffers(net, *graphs), torch.random.fork_rng(self.cuda), torch.no_grad(),
            kept_modes(net),
        ):  # fmt: skip
            torch.manual_seed(self.seed)
            found = self._statistics(archs)
            net.eval()
            paths = list(map(self._steps, archs))
            for path, statistics in zip(paths, found, strict=True):
                for step in chain.from_iterable(path):
                    step.statistics = None if step.module is None else statistics.get(step.module)
            batch: Batch = (), None
            runner = Runner(
                tree_of(paths), graphs[1], prefixes.KEPT_BYTES, self.around,
                lambda i, outputs: means[i].add(outputs, *batch),
            )  # fmt: skip
            for batch in batches(self.valid, "valid", self._move):
                runner.run(batch[0])
        return [mean.value for mean in means]

    def _statistics(self, archs: Sequence[Architecture]) -> list[dict[nn.Module, Statistics]]:
        """What the batch norms of every architecture are evaluated with."""
        own: dict[nn.Module, Statistics] = {
            m: prefixes.copied(m) for m in self.net.modules() if has_statistics(m)
        }
        how = self.recalibration
        if how is None:
            return [own for _ in archs]
        self.net.train()
        paths = [until_norms(self._steps(arch)) for arch in archs]
        modules = (step.module for path in paths for step in chain.from_iterable(path))
        norms = [m for m in dict.fromkeys(modules) if isinstance(m, _BatchNorm) and moving(m)]
        with _averaging(norms):
            tree = tree_of(paths)
            found = prefixes.give_statistics(tree)
            graph = self.net.choice_graph("train")
            runner = Runner(tree, graph, prefixes.KEPT_BYTES, self.around)
            for inputs in self._read(how) if norms else ():
                runner.run(inputs)
        return [{**own, **found[i]} for i in range(len(archs))]

    def adopt(self, arch: Architecture) -> None:
        """Leave the net with statistics for `arch`, as those under which it was evaluated.

        They are the very same where the loader draws its order from torch's global generator, or
        has a fixed one.
        """
        if self.recalibration is not None:
            with torch.random.fork_rng(self.cuda):
                torch.manual_seed(self.seed)
                self._recalibrate(arch, self.recalibration)

    def _recalibrate(self, arch: Architecture, how: Recalibration) -> None:
        """Give the batch norms of `arch` their average statistics."""
        net = self.net
        with kept_modes(net), net.forced(arch), torch.no_grad():
            net.train()
            norms = _running_norms(net.subnet_graph(arch))
            with _averaging(norms):
                for inputs in self._read(how) if norms else ():
                    self.run(inputs)

    def _read(self, how: Recalibration) -> Iterator[tuple[Any, ...]]:
        """The inputs of the batches that the statistics are taken from."""
        left = how.batches
        while left:
            for inputs, _ in islice(batches(how.loader, "recalibrate", self._move), left):
                yield inputs
                left -= 1
            if how.one_pass:
                break


@contextmanager
def _averaging(norms: Sequence[_BatchNorm]) -> Generator[None, None, None]:
    """Within the block the statistics become the average over all batches since its start."""
    momenta = {norm: norm.momentum for norm in norms}
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the cumulative average
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum


def has_statistics(module: nn.Module) -> bool:
    """Whether `module` is a batch norm that keeps running statistics."""
    return (
        isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
    )


def _running_norms(graph: Any) -> list[_BatchNorm]:
    """The batch norms that `graph` calls and that train mode moves, each once."""
    called = dict.fromkeys(str(n.target) for n in graph.graph.find_nodes(op="call_module"))
    modules = (m for path in called for m in graph.get_submodule(path).modules())
    return [m for m in dict.fromkeys(modules) if has_statistics(m) and m.training]


def checked_recalibration(net: Supernet, given: Any) -> Recalibration | None:
    """What the argument `recalibrate` of a search asks for; None for no recalibration.

    Raises:
        SearchError: it asks for nothing that there is, or for nothing on a net with batch norms.
    """
    if given is False:
        return None
    if given is None:
        if name := next((n for n, m in net.named_modules() if has_statistics(m)), None):
            raise SearchError(
                f"{name} is a batch norm, whose running statistics are an average over all paths "
                "that were trained and fit no single one: give recalibrate=(train_loader, 200), "
                "or refuse it on purpose with recalibrate=False"
            )
        return None
    pair: Sequence[Any] = given if isinstance(given, tuple) else ()
    if len(pair) != 2 or not isinstance(pair[1], int) or isinstance(pair[1], bool) or pair[1] < 1:
        raise SearchError(
            "recalibrate must be (loader, batches) with batches >= 1, or False for none, not "
            f"{pair or type(given).__name__}"
        )
    return Recalibration(pair[0], pair[1])
