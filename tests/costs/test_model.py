"""`CostModel` against counting the finalized subnets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import prod

import pytest
import torch
from hypothesis import given, settings
from nasfx.passes import AnnotateCost, Canonicalize
from torch import Tensor, nn

import nasfx
from nasfx import Architecture, InputChoice, LayerChoice, SearchSpace
from nasfx.costs.calls import cost_model
from nasfx.costs.model import CostModel
from nasfx.rewriting.passes import PassContext
from nasfx.space import space_of
from tests.models import CHANNELS, MODELS, Block, RandomModel, conv, example, random_models

FIELDS = ("flops", "params", "activation_bytes")
SMALL = 70  # spaces up to this size are counted as a whole
SAMPLES = 40

Models = Mapping[str, CostModel]


def cost_models(model: nn.Module) -> tuple[SearchSpace, dict[str, CostModel]]:
    traced = nasfx.trace(model, example())
    space = space_of(traced)
    gm = traced.graph_modules.get("eval", traced.graph_modules["train"])
    for step in (Canonicalize(), AnnotateCost()):
        step(gm, PassContext((example(),)))
    return space, {field: cost_model(gm, space.choices, field) for field in FIELDS}


def some_architectures(space: SearchSpace, n: int) -> list[Architecture]:
    if space.size <= SMALL:
        return list(space.enumerate())
    generator = torch.Generator().manual_seed(0)
    return [space.sample(generator) for _ in range(n)]


def check_counts(model: nn.Module, space: SearchSpace, models: Models, n: int = SAMPLES) -> None:
    net = nasfx.transform(model, "single-path")
    for arch in some_architectures(space, n):
        counted = nasfx.count(nasfx.finalize(net, arch), example())
        assert {f: models[f](arch) for f in FIELDS} == asdict(counted), arch


def uniform_weight(space: SearchSpace, arch: Architecture) -> float:
    """p(arch) where each active decision is uniform, and independent of the others."""
    return prod(1 / len(list(space[label].values())) for label in arch)


def check_summaries(space: SearchSpace, models: Models) -> None:
    architectures = list(space.enumerate())
    weights = [uniform_weight(space, arch) for arch in architectures]
    assert sum(weights) == pytest.approx(1, rel=1e-12)
    for model in models.values():
        costs = [model(arch) for arch in architectures]
        for pick in (min, max):
            value, decisions = model.extreme(pick)
            assert value == pick(costs)
            assert model(space.validate(decisions)) == value
        mean = sum(w * cost for w, cost in zip(weights, costs, strict=True))
        assert model.mean() == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_costs_are_those_of_the_subnets(name: str) -> None:
    model = MODELS[name]()
    check_counts(model, *cost_models(model))


@pytest.mark.parametrize("name", MODELS)
def test_extremes_and_means(name: str) -> None:
    check_summaries(*cost_models(MODELS[name]()))


@settings(derandomize=True, deadline=None, max_examples=20, database=None)
@given(random_models())
def test_random_models(model: RandomModel) -> None:
    space, models = cost_models(model)
    check_counts(model, space, models, n=5)
    if space.size <= 500:
        check_summaries(space, models)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=150, database=None)
@given(random_models(max_steps=7))
def test_many_random_models(model: RandomModel) -> None:
    space, models = cost_models(model)
    check_counts(model, space, models, n=10)
    if space.size <= 2000:
        check_summaries(space, models)


# -- what is not a sum over choices ----------------------------------------------------------------


class Shares(nn.Module):
    """Two candidates, and the stem where `stem`, hold one module."""

    def __init__(self, stem: bool = False) -> None:
        super().__init__()
        shared = conv()
        self.stem = shared if stem else nn.Identity()
        self.one = LayerChoice({"shared": shared, "relu": nn.ReLU()}, label="one")
        self.two = LayerChoice(
            {"deep": nn.Sequential(shared, nn.Tanh()), "own": conv(1)}, label="two"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.stem(x)))


def test_a_shared_module_has_its_parameters_once() -> None:
    space, models = cost_models(Shares())
    found = {tuple(a.values()): models["params"](a) for a in space.enumerate()}
    assert found == {
        ("shared", "deep"): 148,
        ("shared", "own"): 148 + 20,
        ("relu", "deep"): 148,
        ("relu", "own"): 20,
    }
    assert models["flops"](Architecture({"one": "shared", "two": "deep"})) == 7200
    # 148, 168, 148, 20; each a quarter.
    assert models["params"].mean() == pytest.approx(121, rel=1e-12)
    check_counts(Shares(), space, models)
    check_summaries(space, models)


def test_a_module_that_is_always_run_has_its_parameters_always() -> None:
    space, models = cost_models(Shares(stem=True))
    assert {models["params"](a) for a in space.enumerate()} == {148, 168}
    check_counts(Shares(stem=True), space, models)
    check_summaries(space, models)


class Subsets(nn.Module):
    """Producers of an input choice; the first one feeds all but the last, which feeds two."""

    def __init__(self, n_chosen: int | None, reduction: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            LayerChoice({"c": conv(k), "r": nn.ReLU()}, label=f"p{k}") for k in (1, 3, 5)
        )
        self.pick = InputChoice(4, n_chosen, reduction=reduction, label="pick")
        self.join = nn.AdaptiveAvgPool3d((CHANNELS, 5, 5))  # whatever the channels

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.parts[0](x), self.parts[2](x)
        middle = self.parts[1](first)
        return self.join(self.pick([first, middle, last, last + 1])).relu()


@pytest.mark.parametrize(
    ("n_chosen", "reduction"),
    [(n, r) for n in (1, 2, 3, 4) for r in ("sum", "mean", "concat")]
    + [(None, "sum"), (None, "mean")],
)
def test_reductions_of_inputs(n_chosen: int | None, reduction: str) -> None:
    model = Subsets(n_chosen, reduction)
    space, models = cost_models(model)
    check_counts(model, space, models, n=12)
    check_summaries(space, models)


def test_of_many_decisions_nothing_is_enumerated() -> None:
    layers = [
        LayerChoice({"a": conv(1), "b": conv(3), "c": nn.ReLU()}, label=f"l{i}") for i in range(40)
    ]
    model = nn.Sequential(*layers)
    space, models = cost_models(model)
    assert space.size == 3**40
    assert models["flops"].extreme(min) == (0, {f"l{i}": "c" for i in range(40)})
    assert models["flops"].extreme(max) == (40 * 3600, {f"l{i}": "b" for i in range(40)})
    assert models["flops"].mean() == pytest.approx(40 * 4000 / 3, rel=1e-12)


def test_units() -> None:
    space, models = cost_models(Block())
    arch = next(space.enumerate())
    assert models["flops"].divided(1e3)(arch) == pytest.approx(models["flops"](arch) / 1e3)
    assert models["flops"].divided(1) is models["flops"]


def test_what_the_net_knows_is_the_same_model() -> None:
    model = MODELS["inputs"]()
    _, models = cost_models(model)
    net = nasfx.transform(
        model, "single-path", example_inputs=example(), objective=nasfx.Params(10, unit="k")
    )
    for arch in net.space.enumerate():
        assert net.space.costs["params"](arch) == pytest.approx(models["params"](arch) / 1e3)
