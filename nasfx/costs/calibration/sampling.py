"""Measured kernels: rows of nn-Meter's features, with milliseconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nasfx.costs import nnmeter
from nasfx.costs.calibration.chains import PRODUCER, build_chains, draw_chains
from nasfx.costs.calibration.timing import Runtime, nodes_of_models
from nasfx.costs.kernels import OWN

# Chains in one graph, in turns: small nets find their weights in the nearest cache, large ones do
# not, and a predictor cannot know.
_CHAINS = (4, 6, 8, 12)
_KERNELS = 5.5  # of a chain, on average


@dataclass
class Samples:
    """The features of the measured kernels of one type, row by row, and their milliseconds."""

    rows: list[tuple[float, ...]] = field(default_factory=list[tuple[float, ...]])
    milliseconds: list[float] = field(default_factory=list[float])


def sample_kernels(
    runtime: Runtime, rules: Path, *, kernels: int, repeats: int, seconds: float, seed: int
) -> dict[str, Samples]:
    """Measure about `kernels` random kernels in context; samples by the name of the predictor.

    Args:
        runtime: Where they run.
        rules: The runtime's fusion_rules.json, by which graphs are split into kernels.
        kernels: About how many; every kind of chain is there three times in any case.
        repeats: Timed runs of each, fewer if they would take more than `seconds`.
        seconds: The time to measure for; building and converting graphs is not in it.
        seed: Which kernels.
    """
    chains = draw_chains(seed, round(kernels / _KERNELS))
    models: list[Any] = []
    while chains:
        size = _CHAINS[len(models) % len(_CHAINS)]
        models.append(build_chains(seed * 100_003 + len(models), chains[:size]))
        chains = chains[size:]
    times = nodes_of_models(models, runtime, repeats=repeats, seconds=seconds)
    return collect(models, times, rules)


def collect(
    models: Sequence[Any], times: Sequence[Mapping[str, float]], rules: Path
) -> dict[str, Samples]:
    """Split measured graphs into kernels; those that only feed a chain are left out."""
    samples: dict[str, Samples] = {}
    for model, took in zip(models, times, strict=True):
        own = {f"{OWN}{node.op_type.lower()}" for node in model.graph.node}
        for kernel, predictor in nnmeter.split(model, {}, rules, own | {f"{OWN}gconv"}):
            if predictor and not kernel.nodes[0].startswith(PRODUCER):
                into = samples.setdefault(predictor, Samples())
                into.rows.append(kernel.features)
                into.milliseconds.append(sum(took[name] for name in kernel.nodes))
    return samples
