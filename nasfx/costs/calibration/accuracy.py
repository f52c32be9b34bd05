"""How well latencies are predicted, and the report of a calibration."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from nasfx.costs.profiling import as_text


@dataclass(frozen=True)
class Accuracy:
    """How well one estimate of latency agrees with measurements of whole nets.

    Attributes:
        nets: What the nets are.
        estimate: What is compared with the measurement.
        count: The number of nets.
        spearman: The rank correlation, from -1 to 1.
        mape: The mean of the relative errors, from 0.
        within_10_percent: The share of the nets, from 0 to 1, that are within 10 %.
    """

    nets: str
    estimate: str
    count: int
    spearman: float
    mape: float
    within_10_percent: float


def accuracy(
    nets: str, estimate: str, estimated: Sequence[float], measured: Sequence[float]
) -> Accuracy:
    """Compare estimated with measured milliseconds, net by net; at least two nets."""
    from scipy.stats import spearmanr

    x, y = np.asarray(estimated, np.float64), np.asarray(measured, np.float64)
    errors = np.abs(x / y - 1)
    # Of equal values there is no rank.
    ranked = np.ptp(x) > 0 and np.ptp(y) > 0
    result: Any = spearmanr(x, y) if ranked else None
    rank = float(result.statistic) if ranked else 0.0
    return Accuracy(
        nets, estimate, len(x), rank, float(errors.mean()), float((errors <= 0.1).mean())
    )


def scale_to(estimated: Sequence[float], measured: Sequence[float]) -> float:
    """The factor by which the estimates agree best: the median of the ratios."""
    return float(np.median(np.asarray(measured, np.float64) / np.asarray(estimated, np.float64)))


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` has made and how good it is; printing it shows the table.

    Attributes:
        runtime: "onnxruntime" or "mnn".
        name: The name of the hardware in meta.yaml.
        folder: The folder of the predictors; `profile` takes it as its hardware.
        kernels: How many measured kernels each predictor was fitted on.
        scale: What all predictions are multiplied by, fitted on half of the given subnets; 1
            without any.
        accuracies: Of the predictions, of MACs times a constant fitted on the same nets, and of the
            measurement itself, repeated: on random nets of four families, none of which was
            fitted, and on the other half of the given subnets.
        seconds: How long the calibration took.
    """

    runtime: str
    name: str
    folder: Path
    kernels: dict[str, int]
    scale: float
    accuracies: tuple[Accuracy, ...]
    seconds: float

    def table(self) -> Table:
        """A rich table with one row per accuracy."""
        total = sum(self.kernels.values())
        table = Table(
            title=f"Predictors of {self.runtime} on this machine, one thread: {self.folder}",
            caption=f"Fitted on {total:,} measured kernels of {len(self.kernels)} types in "
            f"{self.seconds:.0f} s; scale {self.scale:.3f}",
        )
        table.add_column("nets", overflow="fold")
        table.add_column("estimate", overflow="fold")
        for name in ("Spearman", "MAPE", "within 10 %"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.accuracies:
            table.add_row(
                f"{row.count} {row.nets}",
                row.estimate,
                f"{row.spearman:.3f}",
                f"{100 * row.mape:.1f} %",
                f"{100 * row.within_10_percent:.0f} %",
            )
        return table

    def __str__(self) -> str:
        """The table as plain text, 100 columns wide."""
        return as_text(self.table())
