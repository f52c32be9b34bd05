"""`cost`: what a model or a net costs as it stands, and over its whole search space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.table import Table
from torch import Tensor, nn

from nasfx.choice import named_choices
from nasfx.costs.calls import cost_model
from nasfx.costs.count import Count, count
from nasfx.costs.latency import source_of
from nasfx.costs.model import CostModel
from nasfx.costs.parts import Part, parts_of
from nasfx.costs.sources import LatencySource
from nasfx.costs.tables import LatencyTable
from nasfx.passes import AnnotateCost, Canonicalize
from nasfx.rewriting.graph import ModelGraph, copy_graph_module
from nasfx.rewriting.passes import PassContext
from nasfx.space import SearchSpace, space_of
from nasfx.supernet import Supernet
from nasfx.tracing import as_tuple, trace

_FIELDS = ("flops", "params", "activation_bytes")


class CostRange(NamedTuple):
    """What architectures cost: the lowest, the highest and the mean."""

    min: float
    max: float
    mean: float


class MeanCost(NamedTuple):
    """Means of what architectures cost on one sample; the fields of `Count`."""

    flops: float
    params: float
    activation_bytes: float


@dataclass(frozen=True)
class Cost:
    """What a net costs on one sample; see `cost`.

    Attributes:
        flops: multiply-accumulates (MACs) of the net as it stands.
        params: its parameters.
        activation_bytes: bytes of the outputs of its calls.
        min: the lowest values over the space, each by itself.
        max: the highest.
        mean: the means over architectures drawn by `SearchSpace.sample`.
        objectives: the same of the net's other objectives, such as latencies, by name, in their
            units.
    """

    flops: int
    params: int
    activation_bytes: int
    min: Count
    max: Count
    mean: MeanCost
    objectives: Mapping[str, CostRange]
    _models: Mapping[str, CostModel] = field(repr=False)

    def table(self) -> Table:
        """What every candidate costs where its choice is run, and what is fixed.

        Choices inside a candidate have rows of their own. What is run under several decisions
        together, as the producer of an input that may not be chosen, or parameters that candidates
        share, is summed up in the last row, at its highest.
        """
        rows: dict[tuple[str, str], dict[str, float]] = {("fixed", ""): {}}
        for name, model in self._models.items():
            for conditions, amount in model.terms.items():
                key = _row(model, conditions)
                row = rows.setdefault(key, {})
                row[name] = row.get(name, 0) + amount
        table = Table(title="cost on one sample")
        for title in ("choice", "candidate"):
            table.add_column(title)
        for title in ("MACs", "parameters", "activation bytes", *self.objectives):
            table.add_column(title, justify="right")
        last = rows.pop(_SEVERAL, None)
        for (label, candidate), row in (*rows.items(), *(((_SEVERAL, last),) if last else ())):
            counts = (f"{row.get(name, 0):,}" for name in _FIELDS)
            others = (f"{row.get(name, 0):,.4g}" for name in self.objectives)
            table.add_row(label, candidate, *counts, *others)
        return table


_SEVERAL = "several", ""


def _row(model: CostModel, conditions: frozenset[Any]) -> tuple[str, str]:
    """The row of a term: its choice and candidate, "fixed", or "several"."""
    if model.activity.truth(conditions, lambda _: None, {}):
        return "fixed", ""
    if len(conditions) == 1:
        (condition,) = conditions
        if condition.demands is None and condition.container is not None:
            label, values = condition.container[1]
            if len(values) == 1:
                return label, str(next(iter(values)))
    return _SEVERAL


def cost(net_or_model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> Cost:
    """What a module costs as it stands, and the exact lowest, highest and mean over its space.

    As it stands, a model runs its active candidates, a sampled net its current path, and a net that
    mixes all candidates the whole mixture. Counts are those of `nasfx.count`: MACs of convolutions,
    linear layers and matrix products, on one sample.

    Args:
        net_or_model: a model with choices or without, in any mode, or what `transform` made.
        example_inputs: what its `forward` takes, a tensor or a tuple, with a batch of one or more.

    Raises:
        NasfxError: the module does not run on the inputs, something costs no whole number per
            sample, or candidates differ in the shape of what they give.
        TraceError: a model with choices cannot be traced.

    Example:
        >>> import torch
        >>> from nasfx import LayerChoice
        >>> choice = LayerChoice({"lin": nn.Linear(4, 4), "act": nn.ReLU()}, label="block")
        >>> found = cost(nn.Sequential(choice), torch.zeros(1, 4))
        >>> found.flops, found.min.flops, found.max.params, found.mean.flops
        (16, 0, 20, 8.0)
    """
    now = count(net_or_model, example_inputs)
    counts = now.flops, now.params, now.activation_bytes
    if not isinstance(net_or_model, Supernet) and not any(named_choices(net_or_model)):
        return Cost(*counts, now, now, MeanCost(*map(float, counts)), {}, {})
    gm, space = _choice_graph(net_or_model, as_tuple(example_inputs))
    models = {name: cost_model(gm, space.choices, name) for name in _FIELDS}
    lowest, highest = (
        Count(*(int(model.extreme(pick)[0]) for model in models.values())) for pick in (min, max)
    )
    mean = MeanCost(*(model.mean() for model in models.values()))
    others = {
        name: model
        for name, model in space.costs.items()
        if name not in models and isinstance(model, CostModel)
    }
    ranges = {
        name: CostRange(model.extreme(min)[0], model.extreme(max)[0], model.mean())
        for name, model in others.items()
    }
    return Cost(*counts, lowest, highest, mean, ranges, models | others)


def latency_table(
    net_or_model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    hardware: str | LatencySource | Callable[[Part], float],
) -> LatencyTable:
    """The latencies of all that a model with choices can run, to keep in a file.

    Args:
        net_or_model: a model with choices, or what `transform` made.
        example_inputs: what its `forward` takes, a tensor or a tuple; one sample is taken.
        hardware: where the latencies come from; see `Latency`.

    Returns:
        A table, which `save` writes, and which is a source itself: `Latency(table, target=...)`.

    Raises:
        ProfileError: a latency that the source does not know.
        TraceError: the model cannot be traced, or does not run on the inputs.

    Example:
        >>> import torch
        >>> from nasfx import LayerChoice
        >>> model = nn.Sequential(LayerChoice([nn.ReLU(), nn.Tanh()], label="act"))
        >>> f = lambda part: 0.5
        >>> for key, milliseconds in latency_table(model, torch.zeros(1, 4), f).rows.items():
        ...     print(key, milliseconds)
        x0: float32[1, 4] -> %y2 = ReLU()(%x0) 0.5
        x0: float32[1, 4] -> %y2 = Tanh()(%x0) 0.5
    """
    inputs = as_tuple(example_inputs)
    gm, _ = _choice_graph(net_or_model, inputs)
    return LatencyTable.measure([p.part for p in parts_of(gm, inputs)], source_of(hardware))


def _choice_graph(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[ModelGraph, SearchSpace]:
    """A copy of the annotated choice graph of eval mode, and the space."""
    ctx = PassContext(inputs, training=False)
    if isinstance(module, Supernet):
        gm, space = copy_graph_module(module.choice_graph("eval")), module.space
    else:
        traced = trace(module, inputs)
        graphs = traced.graph_modules
        gm, space = graphs.get("eval", graphs["train"]), space_of(traced)
    Canonicalize()(gm, ctx)
    AnnotateCost()(gm, ctx)
    return gm, space
