"""`Latency`: the latency of an architecture as an objective and as a constraint."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import fx

from nasfx.architecture import SpaceChoice
from nasfx.costs.model import CostModel, Terms
from nasfx.costs.objectives import Objective
from nasfx.costs.parts import Part, parts_of
from nasfx.costs.sources import FunctionSource, LatencySource, NnMeter
from nasfx.errors import SearchError
from nasfx.places import places_and_uses


@dataclass(frozen=True, init=False)
class Latency(Objective):
    """The latency on one sample, in milliseconds if no other unit is said; see `Objective`.

    It is the sum over the parts that an architecture runs: of every chosen candidate, and of what
    is fixed between choices, each as a network of its own. So a runtime's fusions inside a part are
    counted, one across the border of a choice is not.

    Attributes:
        source: where the latencies come from.

    Args:
        hardware: a name of `nasfx.known_hardware()`, the folder of a predictor, a source of
            `nasfx.costs` (`LatencyTable`, `Measured`, `NnMeter`), or a function that is given every
            part (`nasfx.costs.Part`) and returns milliseconds.
        target: the latency to aim at, in `unit`.
        max: what the derived architecture may take at most, in `unit`.
        loss: see `Objective`, like `lambda_`, `alpha` and `beta`.
        unit: "s", "ms" or "us".

    Raises:
        SearchError: an option that is out of range; when a model is transformed, a latency that is
            no finite number of zero or more.
        ProfileError: when a model is transformed, a latency that the source does not know.

    Example:
        >>> Latency(lambda part: 0.5, 30).name
        'latency:custom'
    """

    source: LatencySource

    quantity: ClassVar[str] = "latency"
    units: ClassVar[Mapping[str, float]] = {"s": 1e3, "ms": 1.0, "us": 1e-3}

    def __init__(
        self,
        hardware: str | os.PathLike[str] | LatencySource | Callable[[Part], float],
        target: float | None = None,
        *,
        max: float | None = None,
        loss: str | None = None,
        unit: str = "ms",
        lambda_: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
    ) -> None:
        given = {
            "target": target, "max": max, "loss": loss, "unit": unit, "lambda_": lambda_,
            "alpha": alpha, "beta": beta, "source": source_of(hardware),
        }  # fmt: skip
        for name, value in given.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    @property
    def name(self) -> str:
        """The key of `expected_cost()`: "latency:" and the name of the device."""
        return f"latency:{self.source.name}"

    def model(
        self, gm: fx.GraphModule, choices: tuple[SpaceChoice, ...], example_inputs: tuple[Any, ...]
    ) -> CostModel:
        """What architectures take, in `unit`."""
        placed = parts_of(gm, example_inputs)
        terms: Terms = {}
        for p, latency in zip(placed, self._latencies([p.part for p in placed]), strict=True):
            key = frozenset((p.condition,))
            terms[key] = terms.get(key, 0) + p.times * latency
        places, _ = places_and_uses(gm)
        terms = {key: amount for key, amount in terms.items() if amount}
        by_label = {choice.label: choice for choice in choices}
        return CostModel(tuple(places), terms, by_label).divided(self.units[self.unit])

    def _latencies(self, parts: Sequence[Part]) -> list[float]:
        """The milliseconds of every part."""
        values = self.source.milliseconds(parts)
        if len(values) != len(parts):
            raise SearchError(
                f"{self.name}: the source was asked for {len(parts)} parts and gave {len(values)}"
            )
        for part, value in zip(parts, values, strict=True):
            if not isinstance(value, Real) or not 0 <= value < math.inf:
                raise SearchError(
                    f"{self.name}: {part} takes {value!r} ms; a latency is a finite number of zero "
                    "or more"
                )
        return [float(value) for value in values]


def source_of(hardware: Any) -> LatencySource:
    """The source that `hardware` means; see `Latency`.

    Raises:
        SearchError: it means none.
    """
    if isinstance(hardware, str | os.PathLike):
        return NnMeter(str(Path(hardware)) if isinstance(hardware, os.PathLike) else hardware)
    if isinstance(hardware, LatencySource):
        return hardware
    if callable(hardware):
        return FunctionSource(cast("Callable[[Part], float]", hardware))
    raise SearchError(
        f"Latency({hardware!r}): give a name of nasfx.known_hardware(), the folder of a predictor, "
        "a source such as nasfx.costs.Measured('onnxruntime'), or a function of a part"
    )
