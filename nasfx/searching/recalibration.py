"""The metric of one architecture, with batch-norm statistics of its own under shared weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nasfx.architecture import Architecture
from nasfx.errors import SearchError
from nasfx.ops.select import unmoved_buffers
from nasfx.searching.evaluation import Metric, batches, evaluate
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
    ) -> None:
        """What all evaluations share.

        Args:
            net: the net, with trained weights.
            valid: batches (inputs, target), read again for each architecture.
            metric: metric(outputs, target) -> a batch mean, higher is better; in eval mode.
            recalibration: None uses the statistics as they are.
            seed: torch's global generators are seeded with it before each evaluation, so that
                dropout, and loaders without a generator of their own, are the same for all.
            run: calls the net; by default `net(*inputs)`.
        """
        self.net, self.valid, self.metric = net, valid, metric
        self.recalibration, self.seed = recalibration, seed
        self.run = (lambda inputs: net(*inputs)) if run is None else run
        devices = {tensor.device for tensor in (*net.parameters(), *net.buffers())}
        self.device = next(iter(devices), torch.device("cpu"))
        self.cuda = [device for device in devices if device.type == "cuda"]

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
            if not norms:
                return
            momenta = {norm: norm.momentum for norm in norms}
            try:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # the cumulative average
                left = how.batches
                while left:
                    for inputs, _ in islice(batches(how.loader, "recalibrate", self._move), left):
                        self.run(inputs)
                        left -= 1
                    if how.one_pass:
                        break
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
