"""What a search returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nasfx.architecture import Architecture

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
