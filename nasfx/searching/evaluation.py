"""What `search` and `evolve` share: batches, checked figures, the metric of one architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nasfx.architecture import Architecture
from nasfx.errors import SearchError
from nasfx.searching.nonfinite import nonfinite_error
from nasfx.subnet import kept_modes
from nasfx.supernet import Supernet

Metric = Callable[[Any, Any], Any]
"""metric(outputs, target) -> a batch mean, higher is better."""

Batch = tuple[tuple[Any, ...], Any]
"""The arguments of forward, and the target."""


def batches(data: Iterable[Any], what: str, move: Callable[[Any], Any]) -> Iterator[Batch]:
    """One pass over `data`, each batch on the net's device.

    Args:
        data: batches (inputs, target), where inputs are a tensor or a tuple of them.
        what: its name in messages.
        move: puts a batch on the device.

    Raises:
        SearchError: a batch is no pair, or there is none. What `data` raises gets a note.
    """
    empty = True
    for batch in _noted(data, what):
        empty = False
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise SearchError(f"a batch of {what} must be (inputs, target), not {type(batch)}")
        inputs, target = move(batch)
        yield (tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)), target
    if empty:
        raise SearchError(f"{what} gave no batch; an iterator that is used up cannot be read again")


def _noted(data: Iterable[Any], what: str) -> Iterator[Any]:
    """`data`, whose errors carry a note that says which loader it was, and where."""
    taken = 0
    try:
        for batch in data:
            taken += 1
            yield batch
    except Exception as error:
        error.add_note(f"{what} raised this instead of giving batch {taken} of a pass")
        raise


def requires_grad(outputs: Any) -> bool:
    """Whether a gradient can flow back through any of the outputs."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(outputs))


def checked(net: Supernet, value: Any, inputs: tuple[Any, ...], what: str, when: str) -> float:
    """`value`, a tensor of one finite number, as a float.

    Raises:
        SearchError: it is none; where it is not finite, with the candidate that made it so.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise SearchError(f"{what} must be a tensor of one number, a batch mean, not {shape}")
    number = float(value.detach())
    if number != number or number in (float("inf"), float("-inf")):
        raise nonfinite_error(net, inputs, f"{what} became {number} {when}")
    return number


def evaluate(
    net: Supernet,
    arch: Architecture,
    data: Iterable[Batch],
    metric: Metric,
    *,
    when: str,
    run: Callable[[tuple[Any, ...]], Any] | None = None,
) -> float:
    """The mean of `metric` over the data, of one architecture in eval mode.

    Batches count by their size, so that a smaller last one does not weigh too much.

    Args:
        net: the net, whose weights are used.
        arch: the architecture.
        data: the batches, as `batches` gives them.
        metric: the metric.
        when: where the search stands, for messages.
        run: calls the net; by default `net(*inputs)`.

    Raises:
        SearchError: the metric is no number, or not finite.
    """
    mean = Mean(net, metric, when)
    with kept_modes(net), net.forced(arch), torch.no_grad():
        net.eval()
        for inputs, target in data:
            mean.add(net(*inputs) if run is None else run(inputs), inputs, target)
    return mean.value


class Mean:
    """The mean of a metric over batches, which count by their size."""

    def __init__(self, net: Supernet, metric: Metric, when: str) -> None:
        """See `evaluate`."""
        self.net, self.metric, self.when = net, metric, when
        self.total, self.count = 0.0, 0

    def add(self, outputs: Any, inputs: tuple[Any, ...], target: Any) -> None:
        """Take a batch in.

        Raises:
            SearchError: the metric is no number, or not finite.
        """
        value = self.metric(outputs, target)
        if isinstance(value, int | float):
            value = torch.tensor(float(value), dtype=torch.float64)
        first = inputs[0]
        size = len(first) if isinstance(first, Tensor) and first.dim() else 1
        self.total += size * checked(self.net, value, inputs, "the metric", self.when)
        self.count += size

    @property
    def value(self) -> float:
        """The mean so far, of at least one batch."""
        return self.total / self.count


def entropy(net: Supernet) -> float:
    """The mean over the choices of the entropy of their decisions, in nats."""
    entropies: list[float] = []
    for label, p in net.probabilities().items():
        choice = net.space[label]
        if choice.kind == "layer" or choice.n_chosen == 1:
            entropies.append(float(torch.special.entr(p).sum()))
        else:  # of every input's being chosen
            entropies.append(float((torch.special.entr(p) + torch.special.entr(1 - p)).sum()))
    return sum(entropies) / len(entropies)


def progress_bar(console: Console) -> Progress:
    """A bar with figures and times; nothing where `console` is no terminal."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console, disable=not console.is_terminal)
