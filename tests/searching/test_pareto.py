"""`pareto` against fronts by enumeration, what it may not evaluate, and what `Front` shows."""

from __future__ import annotations

import io
import json
import random
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import nasfx
from nasfx import Architecture, CustomCost, Flops, Params, SearchError
from nasfx.searching.pareto_front import Front, Point, pareto
from tests.searching.test_evolution import Digits, Joint, X, Y, everything, number, value
from tests.strategies.nets import STRATEGIES, Chain, Nested, Norms, Skips, batch, built

DATA = batch()


def error(outputs: Tensor, target: Tensor) -> float:
    return -float(((outputs - target) ** 2).detach().mean())


def net_of(
    kind: Callable[[], nn.Module], *objectives: Any, strategy: str = "single-path"
) -> nasfx.Supernet:
    chosen = list(objectives) or [Flops(), Params()]
    return nasfx.transform(built(kind), strategy, example_inputs=DATA[0], objective=chosen)


def digits(length: int, price: Callable[[int, int], float], **bounds: Any) -> nasfx.Supernet:
    """The metric of an architecture is its number; digit k at place i costs price(i, k)."""
    table = {f"c{i}": {str(k): float(price(i, k)) for k in range(4)} for i in range(length)}
    objective = CustomCost(costs=table, title="price", **bounds)
    return nasfx.transform(Digits(length), "single-path", example_inputs=X, objective=objective)


def found(net: nasfx.Supernet, valid: Any = ((X, Y),), **options: Any) -> Front:
    return pareto(net, valid, **{"metric": value, **options})


def beats(one: Sequence[float], two: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, two, strict=True)) and tuple(one) != tuple(two)


def unbeaten(figures: dict[Architecture, tuple[float, ...]]) -> dict[Architecture, Any]:
    """By pairs: the first figure is better if higher, the others if lower."""
    small = {arch: (-f[0], *f[1:]) for arch, f in figures.items()}
    return {
        arch: figures[arch]
        for arch, mine in small.items()
        if not any(beats(other, mine) for other in small.values())
    }


def as_figures(points: Sequence[Point]) -> dict[Architecture, tuple[float, ...]]:
    return {p.architecture: (p.metric, *p.costs.values()) for p in points}


@cache
def by_subnets(kind: Callable[[], nn.Module]) -> dict[Architecture, tuple[float, ...]]:
    """The figures of every architecture, from its own subnet."""
    net, (x, y) = net_of(kind), DATA
    figures: dict[Architecture, tuple[float, ...]] = {}
    for arch in net.space.enumerate():
        subnet = nasfx.finalize(net, arch).eval()
        spent = nasfx.cost(subnet, x)
        figures[arch] = (error(subnet(x), y), float(spent.flops), float(spent.params))
    return figures


# -- the front ------------------------------------------------------------------------------------


def any_skips() -> nn.Module:
    return Skips(None)


KINDS = [Chain, Nested, Skips, any_skips, Norms]


@pytest.mark.parametrize("population", [4, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_the_front_of_a_small_space_is_the_exact_one(
    kind: Callable[[], nn.Module], population: int
) -> None:
    net = net_of(kind)
    front = found(
        net, [DATA], metric=error, recalibrate=False, population=population, generations=40
    )
    figures = by_subnets(kind)
    assert as_figures(front.evaluated) == figures
    assert len(front.evaluated) == len(figures) == net.space.size
    assert as_figures(front.points) == unbeaten(figures)
    costs = [tuple(p.costs.values()) for p in front.points]
    assert costs == sorted(costs)
    assert 0 < len(front.points) < net.space.size
    assert front.costs == ("flops", "params")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nets_of_all_strategies_are_searched(strategy: str) -> None:
    net = net_of(Nested, strategy=strategy)
    front = found(net, [DATA], metric=error)
    assert as_figures(front.points) == unbeaten(by_subnets(Nested))


def test_a_choice_that_two_conditions_activate() -> None:
    table = {"tied": {"u": 1.0, "v": 4.0}, "o": {"holds": 0.0, "plain": 2.0},
             "inner": {str(i): 5.0 - i for i in range(5)}}  # fmt: skip
    objective = CustomCost(costs=table, title="price")
    net = nasfx.transform(Joint(), "single-path", example_inputs=X, objective=objective)
    front = found(net, population=3, generations=20)
    assert {p.architecture for p in front.evaluated} == set(net.space.enumerate())
    assert all(net.space.validate(p.architecture) == p.architecture for p in front.evaluated)
    assert as_figures(front.points) == unbeaten(as_figures(front.evaluated))


def test_costs_are_chosen_by_name() -> None:
    net = net_of(Skips)
    figures = by_subnets(Skips)
    front = found(net, [DATA], metric=error, costs=["params"])
    assert front.costs == ("params",)
    assert as_figures(front.points) == unbeaten({a: (f[0], f[2]) for a, f in figures.items()})
    assert found(net, [DATA], metric=error, costs="params") == front
    front = found(net, [DATA], metric=error, costs=("params", "flops"))
    assert [list(p.costs) for p in front.points] == [["params", "flops"]] * len(front.points)


def test_the_front_is_of_all_that_was_evaluated_not_of_the_last_population() -> None:
    # Everything lies on the front, which is larger than a population.
    net = digits(3, lambda i, k: k * 4**i)
    front = found(net, population=4, generations=6)
    assert len(front.evaluated) == 24
    assert set(as_figures(front.points)) == set(as_figures(front.evaluated))
    assert [p.metric for p in front.points] == sorted(p.metric for p in front.evaluated)


def test_equal_architectures_are_all_kept() -> None:
    net = digits(2, lambda i, k: 1)
    front = found(net, metric=lambda o, t: 0.5)
    assert len(front.points) == 16
    assert front.best() == front.points[0]


def test_the_search_finds_more_of_a_front_than_chance() -> None:
    def price(i: int, k: int) -> float:
        return (k * 7 + i * 3) % 5 + k * (i + 1)

    net = digits(5, price)  # 1024, of which 200 are evaluated
    exact = unbeaten(_figures_of_digits(5, price))
    front = found(net, population=20, generations=10)
    assert len(front.evaluated) == 200
    got = len(exact.keys() & as_figures(front.points).keys())
    assert got > 2 * len(exact) * 200 / 1024


def _figures_of_digits(
    length: int, price: Callable[[int, int], float]
) -> dict[Architecture, tuple[float, ...]]:
    figures: dict[Architecture, tuple[float, ...]] = {}
    for n in range(4**length):
        places = [n // 4**i % 4 for i in range(length)]
        arch = Architecture({f"c{i}": str(k) for i, k in enumerate(places)})
        figures[arch] = (float(n), float(sum(price(i, k) for i, k in enumerate(places))))
    return figures


def test_children_come_from_the_operators_of_the_space(monkeypatch: pytest.MonkeyPatch) -> None:
    net = digits(6, lambda i, k: k)
    space = net.space
    sampled, rates, crossed, evaluated = [0], list[float](), list[Architecture](), list[float]()
    sample, mutate = space.sample, space.mutate
    module = sys.modules["nasfx.searching.pareto_front"]
    crossover = module.crossover

    def counted(generator: Any) -> Architecture:
        sampled[0] += 1
        assert len(evaluated) < 30
        return sample(generator)

    def watched(arch: Any, p: float, generator: Any) -> Architecture:
        rates.append(p)
        return mutate(arch, p, generator)

    def mixed(space: Any, one: Any, two: Any, generator: Any) -> Architecture:
        assert {number(one), number(two)} <= set(evaluated)
        crossed.append(crossover(space, one, two, generator))
        return crossed[-1]

    def metric(outputs: Tensor, target: Tensor) -> float:
        evaluated.append(value(outputs, target))
        return evaluated[-1]

    monkeypatch.setattr(space, "sample", counted)
    monkeypatch.setattr(space, "mutate", watched)
    monkeypatch.setattr(module, "crossover", mixed)
    front = found(net, metric=metric, population=30, generations=3)
    assert [p.metric for p in front.evaluated] == evaluated
    assert len(set(evaluated)) == len(evaluated) == 90
    assert sampled[0] >= 30
    assert set(rates) == {1 / 6}
    assert len(crossed) >= 60


# -- what may be evaluated ------------------------------------------------------------------------


def test_nothing_is_evaluated_twice() -> None:
    calls: list[float] = []

    def metric(outputs: Tensor, target: Tensor) -> float:
        calls.append(float(outputs))
        return calls[-1]

    front = found(digits(3, lambda i, k: k), metric=metric, population=8, generations=30)
    assert len(calls) == len(set(calls)) == len(front.evaluated)
    assert len(calls) == 64  # fewer than there are generations for: it ended by itself


@pytest.mark.parametrize("population", [4, 20])
def test_what_is_never_drawn_is_taken_from_a_list(
    population: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = digits(2, lambda i, k: k)
    only = Architecture({"c0": "1", "c1": "2"})
    monkeypatch.setattr(net.space, "sample", lambda generator: only)
    front = found(net, population=population, generations=1)
    assert len(set(as_figures(front.evaluated))) == len(front.evaluated) == min(population, 16)
    assert front.evaluated[0].architecture == only


def test_what_breaks_a_bound_is_not_evaluated() -> None:
    table = {f"c{i}": {str(k): float(k) for k in range(4)} for i in range(3)}
    other = {f"c{i}": {str(k): float((k + i) % 4) for k in range(4)} for i in range(3)}
    net = nasfx.transform(
        Digits(3), "single-path", example_inputs=X,
        objective=[
            CustomCost(costs=table, title="price"),
            CustomCost(costs=other, title="other", max=4),
        ],
    )  # fmt: skip
    calls: list[int] = []

    def metric(outputs: Tensor, target: Tensor) -> float:
        calls.append(int(outputs))
        return value(outputs, target)

    # The bound holds also where its cost is none of those that are searched over.
    front = found(net, metric=metric, costs=["price"], population=8, generations=40)
    fitting = [arch for arch in net.space.enumerate() if net.space.costs["other"](arch) <= 4]
    assert 8 < len(fitting) < 56
    assert sorted(calls) == sorted(map(number, fitting))
    exact = unbeaten({a: (float(number(a)), net.space.costs["price"](a)) for a in fitting})
    assert as_figures(front.points) == exact


def test_a_single_architecture_that_fits_is_the_front() -> None:
    net = digits(3, lambda i, k: k, max=0.5)
    front = found(net, population=10)
    assert [dict(p.architecture) for p in front.points] == [{"c0": "0", "c1": "0", "c2": "0"}]
    assert front.points == front.evaluated


def test_bounds_that_nothing_drawn_keeps_are_an_error() -> None:
    net = digits(2, lambda i, k: k, max=0.5)
    net.space.bounds["price"] = -1.0
    with pytest.raises(SearchError, match=r"no architecture .* of 16, .* bounds are price <= -1"):
        found(net)


# -- seeds, and what stays as it is ---------------------------------------------------------------


def test_the_same_seed_gives_the_same_front() -> None:
    def run(seed: int) -> Front:
        net = digits(4, lambda i, k: (k * 7 + i) % 5)
        return found(net, population=8, generations=5, seed=seed)

    fronts = []
    for other in (1, 2):
        np.random.seed(other)
        random.seed(other)
        with torch.random.fork_rng():
            torch.manual_seed(other)
            fronts.append(run(3))
    assert fronts[0] == fronts[1]
    assert run(4).evaluated != fronts[0].evaluated
    assert run(-1) == run(-1)


def test_global_generators_are_not_touched() -> None:
    def states() -> list[Any]:
        name, keys, *rest = np.random.get_state()
        return [name, keys.tolist(), rest, random.getstate(), torch.get_rng_state().tolist()]  # type: ignore[union-attr]

    before = states()
    found(digits(5, lambda i, k: k), population=12, generations=5)
    assert states() == before


@pytest.mark.parametrize("strategy", ["darts", "single-path"])
@pytest.mark.parametrize("end", ["well", "nan"])
def test_nothing_of_the_net_changes(strategy: str, end: str) -> None:
    net = net_of(Norms, strategy=strategy)
    for i in range(3):
        with net.weight_step(), torch.no_grad():
            net(batch(i)[0])
    calls: list[int] = []

    def metric(outputs: Tensor, target: Tensor) -> float:
        calls.append(1)
        return float("nan") if end == "nan" and len(calls) == 2 else error(outputs, target)

    before = everything(net)
    options: dict[str, Any] = {"metric": metric, "recalibrate": ([batch(7), batch(8)], 2)}
    if end == "well":
        found(net, [DATA], **options)
    else:
        with pytest.raises(SearchError, match=r"the metric became nan in generation 0, for the"):
            found(net, [DATA], **options)
    assert everything(net) == before


def test_statistics_are_those_of_evolve() -> None:
    net = net_of(Norms)
    options: dict[str, Any] = {"metric": error, "recalibrate": ([batch(7), batch(8)], 2)}
    scores = {
        arch: nasfx.evolve(
            net, [DATA], constraints=[lambda met, arch=arch: met == arch], **options
        ).best_metric
        for arch in net.space.enumerate()
    }  # fmt: skip
    front = found(net, [DATA], **options)
    assert {p.architecture: p.metric for p in front.evaluated} == scores
    without = found(net, [DATA], metric=error, recalibrate=False)
    assert {p.architecture: p.metric for p in without.evaluated} != scores
    with pytest.raises(SearchError, match=r"is a batch norm, .* give recalibrate="):
        found(net, [DATA], metric=error)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_metric_that_is_not_finite_is_an_error(bad: float) -> None:
    with pytest.raises(SearchError, match=r"the metric became -?(nan|inf) in generation 0, for"):
        found(digits(2, lambda i, k: k), metric=lambda o, t: bad)


def test_the_generation_is_named() -> None:
    calls: list[int] = []

    def metric(outputs: Tensor, target: Tensor) -> float:
        calls.append(1)
        return float("nan") if len(calls) == 11 else 0.0

    with pytest.raises(SearchError, match=r"became nan in generation 2, for the architecture {'c0"):
        found(digits(4, lambda i, k: k), metric=metric, population=5)


def test_a_net_without_objectives_is_refused() -> None:
    net = nasfx.transform(Digits(2), "single-path")
    with pytest.raises(SearchError, match=r"needs a cost .* objective=nasfx\.Flops\(\)"):
        found(net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"costs": ["flop"]}, r"no objective 'flop'; it has price"),
        ({"costs": []}, r"must name at least one"),
        ({"costs": ["price", "price"]}, r"each of them once"),
        ({"costs": 3}, r"costs=3 must be a list of names, of price"),
        ({"population": 1}, r"population=1 must be at least 2"),
        ({"generations": 0}, r"generations=0 at least 1"),
        ({"recalibrate": 3}, r"recalibrate must be \(loader, batches\)"),
        ({"valid": []}, r"valid gave no batch"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        found(digits(2, lambda i, k: k), **options)


def test_only_a_net_outside_of_a_step_is_searched() -> None:
    with pytest.raises(SearchError, match=r"needs a net from nasfx.transform, not a Digits"):
        found(Digits(2))  # type: ignore[arg-type]
    net = digits(2, lambda i, k: k)
    with net.weight_step(), pytest.raises(SearchError, match=r"inside a step"):
        found(net)


def test_without_pymoo_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymoo.algorithms.moo.nsga2", None)
    with pytest.raises(SearchError, match=r"pip install nasfx\[pareto\]"):
        found(digits(2, lambda i, k: k))


# -- the result -----------------------------------------------------------------------------------


def points(*figures: tuple[float, ...]) -> list[Point]:
    """Points of a metric and costs a, b, ... each."""
    return [
        Point(Architecture({"n": str(i), "s": [0, i]}), m, dict(zip("abc", costs, strict=False)))
        for i, (m, *costs) in enumerate(figures)
    ]


def test_best_keeps_within_bounds() -> None:
    given = points((0.5, 1, 9), (0.9, 5, 5), (0.7, 3, 2), (0.9, 4, 6), (0.1, 8, 8))
    front = Front.of(given)
    assert front.points == (given[0], given[2], given[3], given[1])
    assert front.evaluated == tuple(given)
    assert front.best() == front.best(max={}) == given[3]  # the cheaper one of equals
    assert front.best(max={"b": 5}) == given[1]
    assert front.best(max={"a": 4.5, "b": 5}) == given[2]
    assert front.best(max={"a": 1}) == given[0]
    with pytest.raises(SearchError, match=r"within max={'a': 2, 'b': 2}.* are a 1, b 2: loosen"):
        front.best(max={"a": 2, "b": 2})
    with pytest.raises(SearchError, match=r"no cost 'flops'; it has a, b"):
        front.best(max={"flops": 2})
    for bad in ("3", float("nan")):
        with pytest.raises(SearchError, match=r"the bound of 'a' must be a number"):
            front.best(max={"a": bad})  # type: ignore[dict-item]


def test_a_front_is_made_of_points_with_the_same_costs() -> None:
    with pytest.raises(SearchError, match=r"at least one, which have the same costs"):
        Front.of([])
    with pytest.raises(SearchError, match=r"the same costs"):
        Front.of([*points((1.0, 2)), *points((1.0, 2, 3))])


def test_the_table_and_the_file(tmp_path: Path) -> None:
    front = Front.of(points((0.25, 1234567.0, 0.5), (0.5, 2e6, 12.3456), (0.125, 3e6, 20)))
    table = front.table()
    assert [column.header for column in table.columns] == ["a", "b", "metric", "architecture"]
    assert table.row_count == 2
    text = str(front)
    for shown in ("front of 3 evaluated", "1,234,567", "0.5", "12.35", "0.2500", "n: 1, s: [0, 1]"):
        assert shown in text
    front.to_json(tmp_path / "front.json")
    data = json.loads((tmp_path / "front.json").read_text())
    assert data["points"][0] == {
        "architecture": {"n": "0", "s": [0, 0]}, "metric": 0.25,
        "costs": {"a": 1234567.0, "b": 0.5},
    }  # fmt: skip
    read = {
        name: tuple(Point(Architecture(p["architecture"]), p["metric"], p["costs"]) for p in rows)
        for name, rows in data.items()
    }
    assert Front(**read) == front


def test_the_plot_has_a_panel_for_each_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[tuple[str, list[tuple[list[float], list[float], str]]]] = []
    save = Figure.savefig

    def savefig(figure: Figure, path: Any) -> None:
        for axes in figure.axes:
            lines: list[Any] = list(axes.get_lines())
            shown = [(list(n.get_xdata()), list(n.get_ydata()), n.get_drawstyle()) for n in lines]
            drawn.append((axes.get_xlabel(), shown))
        save(figure, path)

    monkeypatch.setattr(Figure, "savefig", savefig)
    front = Front.of(points((1, 1, 9), (3, 5, 5), (2, 3, 2), (0, 7, 8)))
    assert front.plot(tmp_path / "front.png") == tmp_path / "front.png"
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert drawn == [
        ("a", [
            ([1, 5, 3, 7], [1, 3, 2, 0], "default"), ([1, 3, 5], [1, 2, 3], "default"),
            ([1, 3, 5], [1, 2, 3], "steps-post"),
        ]),
        ("b", [
            ([9, 5, 2, 8], [1, 3, 2, 0], "default"), ([2, 5, 9], [2, 3, 1], "default"),
            ([2, 5, 9], [2, 3, 3], "steps-post"),
        ]),
    ]  # fmt: skip


def test_progress_is_shown_on_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    found(digits(2, lambda i, k: k))
    assert capsys.readouterr() == ("", "")
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    found(digits(2, lambda i, k: k), console=console)
    assert "pareto" in out.getvalue()
    assert "generation 0 best 15.0000" in out.getvalue()
