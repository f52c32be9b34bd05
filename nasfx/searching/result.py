"""What a search returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nasfx.architecture import Architecture


@dataclass(frozen=True)
class SearchResult:
    """The found architecture and every figure of the search.

    Attributes:
        architecture: what the strategy concluded with, canonical.
        records: one dict an epoch: "epoch", "train_loss", "arch_loss" (None in epochs without arch
            steps), "metric", "entropy" (nats, mean over the choices), "lr", "seconds".
        best_metric: the metric of `architecture` on the validation data, under the shared weights.
    """

    architecture: Architecture
    records: tuple[dict[str, Any], ...]
    best_metric: float

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
        """Draw losses, metric and entropy over the epochs into an image file."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3), layout="constrained")
        FigureCanvasAgg(figure)
        epochs = [record["epoch"] for record in self.records]
        panels = ("train_loss", "arch_loss"), ("metric",), ("entropy",)
        for axes, names in zip(figure.subplots(1, 3), panels, strict=True):
            for name in names:
                axes.plot(*_known(epochs, [r[name] for r in self.records]), marker=".", label=name)
            axes.set_xlabel("epoch")
            axes.legend()
        figure.savefig(path)
        return Path(path)


def _known(x: Sequence[Any], y: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
