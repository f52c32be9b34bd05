"""`Latency`, and the parts of a model that it is summed over."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import nasfx
from nasfx import InputChoice, Latency, LayerChoice, SearchError, SpaceError
from nasfx.costs import FunctionSource, LatencySource, Measured, NnMeter, Part
from nasfx.costs.parts import parts_of
from nasfx.costs.sources import unlike
from tests.costs.test_model import FIELDS, some_architectures
from tests.models import MODELS, Block, RandomModel, Repeated, conv, example, random_models
from tests.strategies.nets import STRATEGIES, Chain, batch, built, loss_of, spread

X, Y = batch()


def field_of(name: str) -> LatencySource:
    """As a latency, what a part costs by `nasfx.count`, which knows nothing of parts."""

    def counted(part: Part) -> float:
        return getattr(nasfx.count(part.module, part.example_inputs()), name)

    return FunctionSource(counted, name)


def check_parts(model: nn.Module, n: int) -> None:
    objectives = [Latency(field_of(name), max=1e12) for name in FIELDS if name != "params"]
    net = nasfx.transform(model, "single-path", example_inputs=example(), objective=objectives)
    for arch in some_architectures(net.space, n):
        counted = nasfx.count(nasfx.finalize(net, arch), example())
        for name, cost in net.space.costs.items():
            assert cost(arch) == getattr(counted, name.removeprefix("latency:")), (name, arch)


@pytest.mark.parametrize("name", MODELS)
def test_parts_are_all_that_a_subnet_runs(name: str) -> None:
    check_parts(MODELS[name](), 30)


@settings(derandomize=True, deadline=None, max_examples=12, database=None)
@given(random_models())
def test_parts_of_random_models(model: RandomModel) -> None:
    check_parts(model, 4)


class Side(nn.Module):
    """A call that is run only where it is chosen reads one that is always run."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.side = conv(), conv(1)
        self.pick = InputChoice(2, 1, label="pick")

    def forward(self, x: Tensor) -> Tensor:
        base = self.base(x)
        return base + self.pick([x, self.side(base)])


def test_a_part_is_run_under_one_condition() -> None:
    check_parts(Side(), 2)


def parts(model: nn.Module, x: Tensor | None = None) -> list[Part]:
    seen: list[Part] = []

    def note(part: Part) -> float:
        seen.append(part)
        return 1.0

    nasfx.transform(
        model,
        "random",
        example_inputs=example() if x is None else x,
        objective=Latency(note, max=1e12),
    )
    return seen


def test_what_no_choice_divides_is_one_part() -> None:
    found = parts(Block())
    paths = [part.paths for part in found]
    assert paths == [
        ("stem.0", "stem.1", "stem.2"),
        ("head",),
        ("block.conv3.0", "block.conv3.1", "block.conv3.2"),
        ("block.conv5.0", "block.conv5.1", "block.conv5.2"),
    ]  # the identity is nothing to run
    assert [(part.label, part.candidate) for part in found[1:3]] == [("", ""), ("block", "conv3")]
    assert all("models.py:" in part.site for part in found)
    assert "candidate 'conv5' of choice 'block'" in str(found[3])
    stem, conv3 = found[0], found[2]
    assert stem.inputs == conv3.inputs == ((torch.Size([1, 4, 5, 5]), torch.float32),)
    assert stem.key == conv3.key
    assert found[1].module(*found[1].example_inputs())[0].shape == (1, 3)


def test_parts_that_compute_alike_have_one_key() -> None:
    model = nn.Sequential(
        LayerChoice({"a": conv(), "b": nn.ReLU()}, label="first"),
        LayerChoice({"a": conv(), "b": nn.Tanh()}, label="second"),
    )
    found = parts(model)
    assert [part.paths for part in found] == [("0.a",), ("0.b",), ("1.a",), ("1.b",)]
    assert [part.paths for part in unlike(found)] == [("0.a",), ("0.b",), ("1.b",)]


def test_a_batch_is_no_part_of_a_latency() -> None:
    keys = [part.key for part in parts(Block(), example())]
    assert keys == [part.key for part in parts(Block(), example()[:1])]


class Scaled(nn.Module):
    """A module of the user's own, kept as one node, whose text does not say what it does."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


def test_modules_that_may_differ_are_not_taken_for_alike() -> None:
    model = nn.Sequential(LayerChoice({"a": Scaled(2.0), "b": Scaled(3.0)}, label="x"))
    seen: list[str] = []

    def note(part: Part) -> float:
        seen.append(part.key)
        return 1.0

    nasfx.transform(
        model,
        "random",
        example_inputs=example(),
        objective=Latency(note, max=9),
        leaf_modules=[Scaled],
    )
    assert len(seen) == 2


# -- the objective ---------------------------------------------------------------------------------


def by_module(part: Part) -> float:
    return 0.5 + len(part.paths) + 0.25 * sum(map(len, part.paths))


def test_the_latency_of_every_architecture_by_hand() -> None:
    net = nasfx.transform(
        Repeated(), "darts", example_inputs=example(), objective=Latency(lambda p: len(p.key), 5.0)
    )
    add, convolved, tanh = (len(part.key) for part in unlike(parts(Repeated())))
    cost = net.space.costs["latency:custom"]
    assert cost({"block": "conv"}) == 3 * convolved + add
    assert cost({"block": "tanh"}) == 3 * tanh + add
    for p in net.arch_parameters():
        p.data.zero_()
    assert float(net.expected_cost()["latency:custom"].detach()) == pytest.approx(
        1.5 * convolved + 1.5 * tanh + add
    )


@pytest.mark.parametrize(("unit", "size"), [("s", 1e-3), ("ms", 1.0), ("us", 1e3)])
def test_units(unit: str, size: float) -> None:
    net = nasfx.transform(
        Block(), "darts", example_inputs=example(), objective=Latency(by_module, 5, unit=unit)
    )
    reference = nasfx.transform(
        Block(), "darts", example_inputs=example(), objective=Latency(by_module, 5)
    )
    for arch in net.space.enumerate():
        expected = reference.space.costs["latency:custom"](arch) * size
        assert net.space.costs["latency:custom"](arch) == pytest.approx(expected, rel=1e-12)


LOSSES = [
    Latency(by_module, 30.0, lambda_=0.7),
    Latency(by_module, 30.0, loss="mul#log"),
    Latency(by_module, 30.0, loss="mul#power"),
    Latency(by_module, loss="fbnet-mul"),
    Latency(by_module, loss="fbnet-add"),
]


@pytest.mark.parametrize("strategy", ["darts", "fbnet", "proxyless"])
@pytest.mark.parametrize("objective", LOSSES, ids=[o.loss_name for o in LOSSES])
def test_the_gradient_of_every_loss(objective: Latency, strategy: str) -> None:
    """Against central differences of the loss that its value gives, with the step's own noise."""
    net = nasfx.transform(built(Chain), strategy, example_inputs=X, objective=objective)
    spread(net, 3)
    task = torch.tensor(1.3, dtype=torch.float64)
    h = 1e-5
    with net.arch_step():
        net.objective(task).backward()
        for p in net.arch_parameters():
            assert p.grad is not None
            numeric = torch.zeros_like(p)
            for i in range(len(p)):
                values: list[float] = []
                for step in (h, -2 * h):
                    p.data[i] += step
                    values.append(float(net.objective(task).detach()))
                p.data[i] += h
                numeric[i] = (values[0] - values[1]) / (2 * h)
            assert float((p.grad - numeric).norm() / p.grad.norm()) <= 1e-6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_a_target_no_gradient_changes(strategy: str) -> None:
    model = built(Chain)
    grads: list[list[Tensor]] = []
    for objective in (None, Latency(by_module, max=1e6)):
        net = nasfx.transform(
            copy.deepcopy(model), strategy, example_inputs=X, objective=objective, seed=5
        )
        with net.arch_step():
            net.objective(loss_of(net, X, Y)).backward()
        with net.weight_step():
            loss_of(net, X, Y).backward()
        grads.append([torch.zeros(0) if p.grad is None else p.grad for p in net.parameters()])
    assert sum(len(g) > 0 for g in grads[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_several_at_once() -> None:
    slow = Latency(FunctionSource(by_module, "slow"), 100.0)
    fast = Latency(FunctionSource(lambda part: 0.1, "fast"), max=1.0)
    net = nasfx.transform(
        Block(), "proxyless", example_inputs=example(), objective=[slow, fast, nasfx.Flops(max=1e6)]
    )
    assert set(net.expected_cost()) == {"latency:slow", "latency:fast", "flops"}
    found = nasfx.cost(net, example())
    assert tuple(found.objectives["latency:fast"]) == pytest.approx((0.2, 0.3, 0.8 / 3))
    assert found.objectives["latency:slow"].max > found.objectives["latency:slow"].min
    columns = [str(column.header) for column in found.table().columns]
    assert columns[-2:] == ["latency:slow", "latency:fast"]


def test_a_bound_is_kept_by_what_is_derived() -> None:
    net = nasfx.transform(
        Block(), "darts", example_inputs=example(), objective=Latency(lambda p: 1.0, max=2.0)
    )
    for p in net.arch_parameters():
        p.data = torch.tensor([3.0, 2.0, -5.0])
    assert net.derive() == {"block": "skip"}


def test_bounds_that_cannot_be_kept_together() -> None:
    """Each can be kept by itself: one candidate is quick, another small."""
    model = nn.Sequential(
        LayerChoice({"quick": conv(3), "small": nn.Sequential(conv(1), conv(1))}, label="x")
    )
    objectives = [Latency(lambda p: float(len(p.paths)), max=1.5), nasfx.Params(max=50)]
    with pytest.raises(SearchError) as caught:
        nasfx.transform(model, "random", example_inputs=example(), objective=objectives)
    assert "no architecture keeps within the bounds latency:custom <= 1.5, params <= 50" in str(
        caught.value
    )
    assert "with the others kept: latency:custom 2, params 148" in str(caught.value)


# -- what is refused -------------------------------------------------------------------------------


def latency_of(source: Any, **options: Any) -> Any:
    return nasfx.transform(
        Block(), "darts", example_inputs=example(), objective=Latency(source, **options)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, None, "1 ms"])
def test_latencies_that_are_none(value: Any) -> None:
    with pytest.raises(SearchError, match=r"stem\.0 and 2 more \(fixed, .*models\.py:\d+\) takes"):
        latency_of(lambda part: value, max=3.0)


def test_a_bound_below_the_quickest() -> None:
    with pytest.raises(SearchError, match="max=1ms; the cheapest one costs 2ms"):
        latency_of(lambda part: 1.0, max=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": -3.0}, "target=-3.0"),
        ({"max": -3.0}, "max=-3.0"),
        ({"max": 0}, "max=0"),
        ({"unit": "M"}, "one of"),
        ({"target": 0.5, "loss": "mul#log"}, "logarithm"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        latency_of(lambda part: 1.0, **options)


def test_what_is_no_source() -> None:
    with pytest.raises(SearchError, match=r"give a name of nasfx\.known_hardware"):
        Latency(3.0, target=4.0)  # type: ignore[arg-type]
    with pytest.raises(SearchError, match="'onnxruntime', 'mnn' or 'torch'"):
        Measured("tensorrt")
    with pytest.raises(SearchError, match="fraction from 0 to 1"):
        NnMeter("cortexA76cpu_tflite21", minimum_coverage=90)


class Short:
    name = "short"

    def milliseconds(self, parts: Sequence[Part]) -> list[float]:
        return [1.0]


def test_a_source_that_answers_too_little() -> None:
    with pytest.raises(SearchError, match="asked for 4 parts and gave 1"):
        latency_of(Short(), max=3.0)


def test_candidates_of_unlike_shapes() -> None:
    model = nn.Sequential(
        LayerChoice({"a": nn.Conv2d(4, 4, 3), "b": nn.Conv2d(4, 4, 5)}, label="x"),
        nn.Conv2d(4, 4, 1),
    )
    for objective in (nasfx.Flops(max=1e9), Latency(by_module, max=1e9)):
        with pytest.raises(
            SpaceError, match=r"candidate 'a' gives \[2, 4, 3, 3\] and candidate 'b' gives"
        ):
            nasfx.transform(model, "random", example_inputs=example(), objective=objective)
    with pytest.raises(SpaceError, match="costs do not add up"):
        nasfx.cost(model, example())
    nasfx.transform(model, "random", example_inputs=example())


def test_inputs_of_unlike_shapes_of_which_some_are_joined() -> None:
    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pick = InputChoice(3, 2, reduction="concat", label="pick")
            self.wide = nn.Conv2d(4, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.pick([x, x + 1, self.wide(x)]).mean(1)

    with pytest.raises(SpaceError, match="do not add up"):
        nasfx.transform(
            Join(), "random", example_inputs=example(), objective=Latency(by_module, max=1e9)
        )


# -- the sources -----------------------------------------------------------------------------------


def test_torch_is_measured() -> None:
    net = latency_of(Measured("torch", repeats=3), max=1e6)
    cost = net.space.costs["latency:torch"]
    assert 0 < cost({"block": "skip"}) < cost({"block": "conv3"})


def test_a_table_gives_what_it_was_made_of() -> None:
    table = nasfx.latency_table(Block(), example(), lambda part: float(len(part.key)))
    assert set(table.rows) == {part.key for part in parts(Block())}
    net, reference = latency_of(table, max=1e6), latency_of(lambda p: len(p.key), max=1e6)
    for arch in net.space.enumerate():
        assert net.space.costs["latency:custom"](arch) == reference.space.costs["latency:custom"](
            arch
        )


def test_parts_of_a_graph_give_what_they_read_elsewhere() -> None:
    traced = nasfx.trace(MODELS["arguments"](), example())
    for placed in parts_of(traced.graph_modules["train"], (example(),)):
        part = placed.part
        given = part.module(*part.example_inputs())
        assert len(given) == part.outputs
