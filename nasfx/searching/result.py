"""What a search returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from nasfx.architecture import Architecture
from nasfx.errors import CheckpointError
from nasfx.space import SearchSpace

_TIMES = ("epoch", "generation")
# By panel, what is drawn; columns that the records do not have are left out.
_PANELS = (
    ("train_loss", "arch_loss"), ("metric",), ("entropy",), ("best", "mean"), ("evaluated",),
)  # fmt: skip


@dataclass(frozen=True)
class SearchResult:
    """The found architecture and every figure of the search.

    Attributes:
        architecture: what was found, canonical.
        records: of `search`, one dict an epoch: "epoch", "train_loss", "arch_loss" (None in epochs
            without arch steps), "metric", "entropy" (nats, mean over the choices), "lr",
            "seconds". Of `evolve`, one dict a generation: "generation", "best" (the best metric so
            far), "mean" (of this generation's metrics), "evaluated" (how many architectures this
            generation has), "seconds".
        best_metric: the metric of `architecture` on the validation data, under the shared weights.
        evaluated: the metric of every architecture among which it was chosen, in order.
    """

    architecture: Architecture
    records: tuple[dict[str, Any], ...]
    best_metric: float
    evaluated: Mapping[Architecture, float] = field(default_factory=dict[Architecture, float])

    def table(self) -> Table:
        """The records as a rich table."""
        table = Table(title="search")
        names = list(self.records[0])
        for name in names:
            table.add_column(name, justify="right")
        for record in self.records:
            table.add_row(*(_cell(record[name]) for name in names))
        return table

    def __str__(self) -> str:
        console = Console(width=100, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return f"{capture.get()}best metric {self.best_metric:.4f} with {dict(self.architecture)}"

    def plot(self, path: str | Path) -> Path:
        """Draw losses, metrics and entropy over the epochs or generations into an image file."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        columns = self.records[0]
        time = next(name for name in _TIMES if name in columns)
        panels = [shown for panel in _PANELS if (shown := [n for n in panel if n in columns])]
        figure = Figure(figsize=(3 * len(panels), 3), layout="constrained")
        FigureCanvasAgg(figure)
        x = [record[time] for record in self.records]
        every_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, names in zip(every_axes, panels, strict=True):
            for name in names:
                axes.plot(*_known(x, [r[name] for r in self.records]), marker=".", label=name)
            axes.set_xlabel(time)
            axes.legend()
        figure.savefig(path)
        return Path(path)


def _known(x: Sequence[Any], y: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


PARTS = ("weights", "arch", "evaluation", "conclusion", "finished")
"""The parts of a search: the first three are those of an epoch."""


@dataclass
class RunState:
    """Where a search stands, and what it has found so far.

    Attributes:
        epoch: finished epochs.
        part: one of `PARTS`, the one that is going on.
        step: steps taken in the part.
        steps: steps and evaluations of the whole search.
        seconds: since the epoch began.
        train_losses: of the epoch, by weight step.
        arch_losses: of the epoch, by arch step.
        arch: the architecture that is evaluated at the end of the epoch.
        records: of the finished epochs.
        draws: the state of the net's generator when the conclusion began.
        evaluated: the metrics of the conclusion, in order.
        architecture: what was found, at the end.
    """

    epoch: int = 0
    part: str = "weights"
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    train_losses: list[float] = field(default_factory=list[float])
    arch_losses: list[float] = field(default_factory=list[float])
    arch: Architecture | None = None
    records: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    draws: Tensor | None = None
    evaluated: dict[Architecture, float] = field(default_factory=dict[Architecture, float])
    architecture: Architecture | None = None

    def enter(self, part: str) -> None:
        """The part before is over."""
        self.part, self.step = part, 0

    def end_epoch(self, record: dict[str, Any]) -> None:
        """The epoch is over."""
        self.records.append(record)
        self.epoch += 1
        self.enter("weights")
        self.seconds, self.train_losses, self.arch_losses, self.arch = 0.0, [], [], None

    @property
    def best_is_last(self) -> bool:
        """Whether no epoch had a higher metric than the last one."""
        metrics = [record["metric"] for record in self.records]
        return bool(metrics) and metrics.index(max(metrics)) == len(metrics) - 1

    def __str__(self) -> str:
        if self.part == "finished":
            return "the end"
        where = {"arch": f", arch step {self.step}", "evaluation": ", its evaluation"}
        if self.part == "conclusion":
            return f"the conclusion, with {len(self.evaluated)} architectures evaluated"
        return f"epoch {self.epoch}{where.get(self.part, f', batch {self.step}')}"

    def result(self) -> SearchResult:
        """What a finished search returns."""
        assert self.architecture is not None
        return SearchResult(
            self.architecture,
            tuple(self.records),
            self.evaluated[self.architecture],
            dict(self.evaluated),
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain data, and one tensor."""
        return {
            **vars(self),
            "arch": None if self.arch is None else dict(self.arch),
            "evaluated": [[dict(arch), metric] for arch, metric in self.evaluated.items()],
            "architecture": None if self.architecture is None else dict(self.architecture),
        }

    def load_state_dict(self, state: Mapping[str, Any], space: SearchSpace) -> None:
        """Become what gave `state`.

        Raises:
            CheckpointError: it has other entries.
            SpaceError: an architecture is not of the space.
        """
        if set(state) != set(vars(self)) or state["part"] not in PARTS:
            raise CheckpointError(f"the state of a search has other entries than {sorted(state)}")

        def known(decisions: Mapping[str, Any] | None) -> Architecture | None:
            return None if decisions is None else space.validate(decisions)

        loaded = {**state, "arch": known(state["arch"])}
        loaded["architecture"] = known(state["architecture"])
        loaded["evaluated"] = {space.validate(arch): float(m) for arch, m in state["evaluated"]}
        for name in ("train_losses", "arch_losses", "records"):
            loaded[name] = list(state[name])
        vars(self).update(loaded)
