"""`evolve`: where architectures come from, recalibration, and that the net stays as it is."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nasfx
from nasfx import Architecture, InputChoice, LayerChoice, SearchError
from nasfx.searching.recalibration import Judge, Recalibration
from nasfx.strategies import population as populations
from nasfx.strategies.population import crossover
from tests.conftest import fingerprint
from tests.strategies.nets import (
    STRATEGIES,
    WIDTH,
    Chain,
    Nested,
    Norms,
    Skips,
    batch,
    built,
    dense,
)

X, Y = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)


class Add(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value


class Digits(nn.Module):
    """The output of an architecture is the number that its decisions are the digits of."""

    def __init__(self, length: int, base: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                LayerChoice([Add(float(k * base**i)) for k in range(base)], label=f"c{i}")
                for i in range(length)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Joint(nn.Module):
    """`inner` is active if `outer` is "holds" and `tied` is "u", each of which may be so alone."""

    def __init__(self) -> None:
        super().__init__()

        def tied(u: nn.Module) -> LayerChoice:
            return LayerChoice({"u": u, "v": Add(1.0)}, label="tied")

        inner = LayerChoice([Add(float(i)) for i in range(5)], label="inner")
        self.first = tied(Add(2.0))
        self.outer = LayerChoice(
            {"holds": tied(nn.Sequential(inner)), "plain": Add(3.0)}, label="o"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.first(x))


def value(outputs: Tensor, target: Tensor) -> float:
    return float(outputs.detach().mean())


def number(arch: Any, base: int = 4) -> int:
    return sum(int(v) * base ** int(k[1:]) for k, v in arch.items())


def net_of(kind: Callable[[], nn.Module], strategy: str = "single-path") -> nasfx.Supernet:
    return nasfx.transform(built(kind), strategy)


def digits(length: int) -> nasfx.Supernet:
    return nasfx.transform(Digits(length), "single-path")


def evolve(net: nasfx.Supernet, valid: Any = ((X, Y),), **options: Any) -> nasfx.SearchResult:
    return nasfx.evolve(net, valid, **{"metric": value, **options})


class Watch:
    """Everything that a search proposes and evaluates, in order, with its source."""

    def __init__(self, net: nasfx.Supernet, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, Architecture, tuple[Architecture, ...]]] = []
        self.met: list[tuple[str, Architecture]] = []  # by the constraint, with the source
        self.evaluated: list[float] = []
        self.rates: set[float] = set()
        space = net.space
        sample, mutate = space.sample, space.mutate

        def sampled(generator: Any) -> Architecture:
            return self._called("random", sample(generator))

        def mutated(arch: Any, p: float, generator: Any) -> Architecture:
            self.rates.add(p)
            return self._called("mutation", mutate(arch, p, generator), arch)

        def crossed(space: Any, one: Any, two: Any, generator: Any) -> Architecture:
            return self._called("crossover", crossover(space, one, two, generator), one, two)

        monkeypatch.setattr(space, "sample", sampled)
        monkeypatch.setattr(space, "mutate", mutated)
        monkeypatch.setattr(populations, "crossover", crossed)

    def _called(self, source: str, arch: Architecture, *parents: Architecture) -> Architecture:
        self.calls.append((source, arch, parents))
        return arch

    def constraint(self, arch: Architecture) -> bool:
        assert self.calls[-1][1] is arch
        self.met.append((self.calls[-1][0], arch))
        return True

    def metric(self, outputs: Tensor, target: Tensor) -> float:
        self.evaluated.append(value(outputs, target))
        return self.evaluated[-1]


# -- the algorithm --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("population", "top", "half", "generations"), [(50, 10, 25, 4), (31, 6, 15, 2)]
)
def test_the_constants_are_the_papers(
    population: int, top: int, half: int, generations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = digits(8)
    watch = Watch(net, monkeypatch)
    result = evolve(
        net, metric=watch.metric, constraints=[watch.constraint], population=population,
        generations=generations,
    )  # fmt: skip
    rest = population - 2 * half
    expected = ["random"] * population
    expected += (["mutation"] * half + ["crossover"] * half + ["random"] * rest) * (generations - 1)
    assert [source for source, _ in watch.met] == expected
    scores = [(arch, number(arch)) for _, arch in watch.met]
    assert list(result.evaluated.items()) == scores
    assert sorted(watch.evaluated) == sorted(score for _, score in scores)
    assert len(set(watch.evaluated)) == generations * population
    assert watch.rates == {0.1}
    assert [r["evaluated"] for r in result.records] == [population] * generations

    # Parents are drawn from the best so far, all of them, and both of a crossover independently.
    accepted = {arch for _, arch in watch.met}
    position = {number(arch): i for i, (_, arch) in enumerate(watch.met)}
    before = 0
    used: dict[int, set[int]] = {}
    for _, arch, parents in watch.calls:
        if parents:
            generation = before // population
            known = sorted(watch.evaluated[: generation * population], reverse=True)[:top]
            assert {number(p) for p in parents} <= set(known)
            used.setdefault(generation, set()).update(number(p) for p in parents)
        if arch in accepted and position[number(arch)] == before:
            before += 1
    assert before == generations * population
    assert all(len(u) == top for u in used.values())
    assert sorted(used) == list(range(1, generations))


def test_at_most_ten_times_as_many_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    net = digits(8)
    watch = Watch(net, monkeypatch)
    result = evolve(
        net, population=20, generations=9, constraints=[lambda a: len(watch.calls) <= 20]
    )
    # All of the first generation pass and nothing of the second, which ends the search.
    assert Counter(source for source, *_ in watch.calls) == {
        "random": 20 + 200, "mutation": 100, "crossover": 100,
    }  # fmt: skip
    assert [r["evaluated"] for r in result.records] == [20]


def test_random_ones_take_the_places_of_missing_children(monkeypatch: pytest.MonkeyPatch) -> None:
    net = digits(8)
    watch = Watch(net, monkeypatch)

    def no_children(arch: Architecture) -> bool:
        return watch.calls[-1][0] == "random"

    result = evolve(net, population=10, generations=3, constraints=[no_children])
    assert [r["evaluated"] for r in result.records] == [10, 10, 10]


def test_the_best_of_a_space_is_found() -> None:
    net = digits(6)  # 4096, of which 600 are evaluated
    result = evolve(net, population=30, generations=20)
    assert result.best_metric == 4**6 - 1
    assert result.architecture == {f"c{i}": "3" for i in range(6)}
    assert sum(r["evaluated"] for r in result.records) <= 600


def test_children_are_better_than_random_ones() -> None:
    means = [r["mean"] for r in evolve(digits(8), generations=6).records]
    assert means[-1] > means[0] * 1.5


@pytest.mark.parametrize("kind", [lambda: Digits(2), Nested, Skips, Joint])
@pytest.mark.parametrize("population", [4, 50])
def test_a_small_space_ends_when_all_of_it_is_evaluated(
    kind: Callable[[], nn.Module], population: int
) -> None:
    net = net_of(kind)
    x, y = (X, Y) if kind not in (Nested, Skips) else batch()
    met: list[Architecture] = []

    def constraint(arch: Architecture) -> bool:
        met.append(arch)
        return True

    result = evolve(net, [(x, y)], population=population, generations=30, constraints=(constraint,))
    everything = set(net.space.enumerate())
    assert len(met) == len(everything)
    assert set(met) == everything
    assert sum(r["evaluated"] for r in result.records) == len(everything)
    assert len(result.records) == -(-len(everything) // population)
    scores = {arch: value(nasfx.finalize(net, arch).eval()(x), y) for arch in everything}
    assert result.best_metric == max(scores.values())
    assert scores[result.architecture] == result.best_metric


def test_the_first_of_equals_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    net = digits(4)
    watch = Watch(net, monkeypatch)
    result = evolve(
        net, metric=lambda o, t: 0.5, constraints=[watch.constraint], population=6, generations=3
    )
    assert result.architecture == watch.met[0][1]


def test_the_metric_is_a_mean_over_the_batches() -> None:
    net = digits(2)
    valid = [(X, Y), (X + 1, Y), (X + 5, Y)]
    assert evolve(net, valid, generations=1).best_metric == 15 + 2
    valid = [(X.expand(3, 1), Y), (X + 8, Y)]  # by their size
    assert evolve(net, valid, generations=1).best_metric == 15 + 2


def test_lower_is_worse() -> None:
    result = evolve(digits(3), metric=lambda o, t: -o.mean(), population=20, generations=10)
    assert result.architecture == {"c0": "0", "c1": "0", "c2": "0"}


# -- constraints ----------------------------------------------------------------------------------


def test_what_breaks_a_constraint_is_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    net = digits(6)
    watch = Watch(net, monkeypatch)
    asked: list[Architecture] = []

    def cheap(arch: Architecture) -> bool:
        asked.append(arch)
        return sum(int(v) for v in arch.values()) <= 9

    def odd(arch: Architecture) -> bool:
        return number(arch) % 2 == 1

    result = evolve(
        net, metric=watch.metric, constraints=[cheap, odd], population=20, generations=12
    )
    assert len(asked) == len(set(asked))
    assert any(not cheap(arch) for arch in asked[:])
    for code in map(int, watch.evaluated):
        assert code % 2 == 1
        assert sum(code // 4**i % 4 for i in range(6)) <= 9
    assert len(watch.evaluated) == len(set(watch.evaluated)) > 100
    assert result.best_metric == max(watch.evaluated)


def test_constraints_that_nothing_satisfies_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    net = digits(8)
    watch = Watch(net, monkeypatch)
    with pytest.raises(SearchError, match=r"no architecture satisfies the constraints: all \d+ "):
        evolve(net, constraints=[lambda a: False])
    assert len(watch.calls) == 500
    with pytest.raises(SearchError, match=r"all 16 different ones that were drawn, of 16,"):
        evolve(digits(2), constraints=[lambda a: False])


def test_the_only_architecture_of_a_small_space_that_fits_is_found() -> None:
    only = {"c0": "2", "c1": "0", "c2": "1"}
    result = evolve(digits(3), constraints=[lambda a: a == only], population=10)
    assert result.architecture == only
    assert [r["evaluated"] for r in result.records] == [1]


def test_bounds_of_the_space_are_constraints(monkeypatch: pytest.MonkeyPatch) -> None:
    net = digits(6)
    net.space.costs["flops"] = lambda arch: float(sum(map(int, arch.values())))
    net.space.bounds["flops"] = 9
    watch = Watch(net, monkeypatch)
    result = evolve(
        net, metric=watch.metric, constraints=[watch.constraint], population=20, generations=12
    )
    costs = [net.space.costs["flops"](arch) for _, arch in watch.met]
    assert max(costs) == 9  # what breaks a bound is not even shown to the constraints
    scores = [(arch, number(arch)) for _, arch in watch.met]
    assert list(result.evaluated.items()) == scores
    assert sorted(watch.evaluated) == sorted(score for _, score in scores)
    assert any(sum(map(int, arch.values())) > 9 for _, arch, _ in watch.calls)
    assert result.best_metric == 3 * (4**5 + 4**4 + 4**3)
    net.space.bounds["flops"] = -1
    with pytest.raises(SearchError, match=r"were refused; .* \(the bounds are flops <= -1\)"):
        evolve(net)


# -- crossover and canonical form -----------------------------------------------------------------


def test_a_crossover_takes_each_decision_from_either_parent() -> None:
    space = digits(4).space
    one = Architecture({f"c{i}": "0" for i in range(4)})
    two = Architecture({"c0": "1", "c1": "2", "c2": "3", "c3": "0"})
    generator = torch.Generator().manual_seed(0)
    children = Counter(crossover(space, one, two, generator) for _ in range(4000))
    expected = {
        Architecture({"c0": a, "c1": b, "c2": c, "c3": "0"})
        for a, b, c in itertools.product("01", "02", "03")
    }
    assert set(children) == expected
    assert all(abs(n - 500) < 5 * (500 * 7 / 8) ** 0.5 for n in children.values())


def test_a_decision_that_one_parent_has_is_taken_and_one_that_neither_has_is_drawn() -> None:
    space = net_of(Joint).space
    generator = torch.Generator().manual_seed(0)
    has = Architecture({"tied": "u", "o": "holds", "inner": "3"})
    lacks = Architecture({"tied": "u", "o": "plain"})
    children = {crossover(space, has, lacks, generator) for _ in range(100)}
    assert children == {has, lacks}

    left = Architecture({"tied": "v", "o": "holds"})
    children = Counter(crossover(space, left, lacks, generator) for _ in range(2000))
    drawn = {c["inner"]: n for c, n in children.items() if "inner" in c}
    assert set(drawn) == set("01234")
    assert all(abs(n - 100) < 50 for n in drawn.values())
    assert all(space.validate(child) == child for child in children)
    assert len(children) == 5 + 3


@pytest.mark.parametrize("kind", [Nested, Skips, lambda: Skips(None), Joint])
def test_every_architecture_is_canonical(kind: Callable[[], nn.Module]) -> None:
    net = net_of(kind)
    met: list[Architecture] = []

    def constraint(arch: Architecture) -> bool:
        met.append(arch)
        return len(met) % 3 > 0

    x, y = (X, Y) if kind is Joint else batch()
    result = evolve(net, [(x, y)], population=6, generations=6, constraints=[constraint])
    assert met
    assert all(net.space.validate(arch) == arch for arch in met)
    assert list(result.architecture) == list(net.space.validate(result.architecture))


# -- the same seed --------------------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))
        self.blocks = nn.Sequential(
            *(LayerChoice([dense(norm=True) for _ in range(4)], label=f"b{i}") for i in range(3))
        )
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def test_the_same_seed_gives_the_same_search() -> None:
    """Whatever torch's global generator is at: dropout and shuffling draw from it."""
    data = TensorDataset(*batch(3, 32))
    runs = []
    for seed, other in ((0, 1), (0, 2), (1, 1)):
        net = net_of(Dropping)
        with torch.random.fork_rng():
            torch.manual_seed(other)
            before = torch.get_rng_state()
            result = evolve(
                net, [batch(9)], recalibrate=(DataLoader(data, 8, shuffle=True), 3), seed=seed,
                population=10, generations=3,
            )  # fmt: skip
            assert torch.equal(torch.get_rng_state(), before)
        records = [{k: v for k, v in r.items() if k != "seconds"} for r in result.records]
        runs.append((result.architecture, result.best_metric, records))
    assert runs[0] == runs[1]
    assert runs[0][2] != runs[2][2]


# -- recalibration --------------------------------------------------------------------------------


def by_hand(net: nasfx.Supernet, arch: Architecture, data: list[Any]) -> nn.Module:
    """The subnet with the statistics that its batch norms have on `data`."""
    subnet = nasfx.finalize(net, arch).train()
    for m in subnet.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.reset_running_stats()
            m.momentum = None
    with torch.no_grad():
        for x, _ in data:
            subnet(x)
    return subnet.eval()


def trained(kind: Callable[[], nn.Module], strategy: str = "single-path") -> nasfx.Supernet:
    """A net whose batch norms have moved."""
    net = net_of(kind, strategy)
    for i in range(4):
        with net.weight_step(), torch.no_grad():
            net(batch(70 + i)[0] * 3 + 1)
    return net


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", [Norms, Chain, Dropping])
@pytest.mark.parametrize("given", [2, 5, 7])
def test_recalibration_is_what_one_would_write_by_hand(
    strategy: str, kind: Callable[[], nn.Module], given: int
) -> None:
    net = trained(kind, strategy)
    for m in [*net.modules(), *net.traced.modules()]:
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    loader = [batch(20 + i) for i in range(5)]
    order: list[Architecture] = []
    outputs: list[Tensor] = []

    def constraint(arch: Architecture) -> bool:
        order.append(arch)
        return True

    def metric(output: Tensor, target: Tensor) -> float:
        outputs.append(output.clone())
        return value(output, target)

    x, y = batch(9)
    evolve(
        net, [(x, y)], metric=metric, recalibrate=(loader, given), constraints=[constraint],
        population=6, generations=2,
    )  # fmt: skip
    assert len(order) == len(outputs) >= 3
    data = (loader + loader)[:given]  # a shorter loader is gone through again
    stale = 0
    for arch in order:  # they may be evaluated in another order, at once
        with torch.no_grad():
            expected = by_hand(net, arch, data)(x)
            assert any(torch.equal(output, expected) for output in outputs), dict(arch)
            stale += torch.equal(expected, nasfx.finalize(net, arch).eval()(x))
    assert stale < len(order)


def test_the_statistics_are_plain_averages() -> None:
    """Of the first batches, of their means; not a moving average of momentum 0.1."""
    net = nasfx.transform(
        nn.Sequential(LayerChoice([nn.BatchNorm1d(1, affine=False)], label="n")), "single-path"
    )
    data = [(torch.tensor([[m - 1.0], [m + 1.0]]), None) for m in (1.0, 2.0, 6.0, 1000.0)]
    seen: list[float] = []
    nasfx.evolve(
        net, [(torch.zeros(1, 1), None)], recalibrate=(data, 3),
        metric=lambda o, t: seen.append(float(o)) or 0.0,
    )  # fmt: skip
    assert seen == pytest.approx([-3.0 / (2.0 + 1e-5) ** 0.5], rel=1e-6)


def test_false_uses_the_statistics_as_they_are() -> None:
    net = trained(Norms)
    x, y = batch(9)
    result = evolve(net, [(x, y)], recalibrate=False)
    net.eval()
    with net.forced(result.architecture), torch.no_grad():
        assert result.best_metric == value(net(x), y)


def test_a_batch_norm_without_a_word_on_it_is_refused() -> None:
    with pytest.raises(SearchError) as error:
        evolve(net_of(Norms), [batch()])
    message = str(error.value)
    assert "block.a.1 is a batch norm" in message
    assert "recalibrate=(train_loader, 200)" in message
    assert "recalibrate=False" in message


def test_without_batch_norm_nothing_needs_to_be_said() -> None:
    results = [
        evolve(net_of(Nested), [batch()], **options)
        for options in ({}, {"recalibrate": ([], 3)}, {"recalibrate": False})
    ]  # the loader is not read
    assert len({(r.architecture, r.best_metric) for r in results}) == 1


@pytest.mark.parametrize("afterwards", [False, True])
def test_a_batch_norm_that_does_not_move_needs_no_recalibration(afterwards: bool) -> None:
    norm = nn.BatchNorm1d(3, track_running_stats=afterwards)
    norm.track_running_stats = False
    model = nn.Sequential(LayerChoice([norm, nn.Identity()], label="n")).double()
    assert len(evolve(nasfx.transform(model, "single-path"), [batch()]).records) == 1


class Frozen(nn.Module):
    """Its first norm stays in eval mode, whatever train() says."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.norm.running_mean.fill_(5.0)
        self.block = LayerChoice([nn.BatchNorm1d(3), nn.Identity()], label="block")

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.norm(x))


def test_a_norm_that_the_model_keeps_in_eval_mode_is_left_alone() -> None:
    net = nasfx.transform(Frozen().double().train(), "single-path")
    x, y = batch(9)
    seen: list[Tensor] = []
    evolve(
        net, [(x, y)], recalibrate=([batch(1)], 1),
        metric=lambda o, t: seen.append(o.clone()) or 0.0,
    )  # fmt: skip
    plain = (x - 5) / (1 + 1e-5) ** 0.5
    assert len(seen) == 2
    assert any(torch.allclose(o, plain) for o in seen)


class Own(nn.BatchNorm1d):
    """A class of the user's, which is one opaque node."""


def test_a_norm_inside_an_opaque_module_is_recalibrated() -> None:
    model = nn.Sequential(LayerChoice([nn.Sequential(Own(3)), nn.Identity()], label="n")).double()
    net = nasfx.transform(model, "single-path")
    x, y = batch(9)
    seen: list[Tensor] = []
    evolve(
        net, [(x, y)], recalibrate=([(x, y)], 1),
        metric=lambda o, t: seen.append(o.mean(0).abs().max()) or 0.0,
    )  # fmt: skip
    assert min(seen) < 1e-12


@pytest.mark.parametrize(("batches", "one_pass"), [(2, True), (5, True), (7, True), (7, False)])
def test_a_recalibration_may_be_at_most_one_pass(batches: int, one_pass: bool) -> None:
    net = trained(Norms)
    loader = [batch(20 + i) for i in range(5)]
    outputs: list[Tensor] = []
    ran: list[tuple[Any, ...]] = []

    def metric(output: Tensor, target: Tensor) -> float:
        outputs.append(output.clone())
        return value(output, target)

    def run(inputs: tuple[Any, ...]) -> Any:
        ran.append(inputs)
        return net(*inputs)

    x, y = batch(9)
    how = Recalibration(loader, batches, one_pass)
    before = everything(net)
    expected = [*loader, *loader][: min(batches, 5) if one_pass else batches]
    for arch in net.space.enumerate():
        judge = Judge(net, [(x, y)], metric, how, 0, run)
        score = judge.evaluate(arch, "now")
        with torch.no_grad():
            by = by_hand(net, arch, expected)(x)
        assert torch.equal(outputs[-1], by)
        assert score == value(by, y)
        assert [inputs[0].tolist() for inputs in ran] == [
            a.tolist() for a, _ in (*expected, (x, y))
        ]
        ran.clear()
    assert everything(net) == before


@pytest.mark.parametrize("mode", [True, False])
def test_what_is_adopted_is_what_was_evaluated(mode: bool) -> None:
    """The net has the statistics then; other tensors, modes and generators are as they were."""
    net = trained(Dropping).train(mode)
    data = TensorDataset(*batch(3, 32))
    how = Recalibration(DataLoader(data, 8, shuffle=True), 3)
    judge = Judge(net, [batch(9)], value, how, 0)
    arch = net.space.sample()
    score = judge.evaluate(arch, "now")
    before = everything(net)
    judge.adopt(arch)
    changed = {k for k, v in everything(net).items() if before[k] != v and k.startswith("state ")}
    assert {k.rpartition(".")[2] for k in changed} == {
        "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip
    kept = [k for k in before if k in ("generator", "global", "path") or "training" in k]
    assert all(everything(net)[k] == before[k] for k in kept)
    assert net.training is mode
    assert Judge(net, [batch(9)], value, None, 0).evaluate(arch, "now") == score
    unchanged = everything(net)
    Judge(net, [batch(9)], value, None, 0).adopt(arch)
    assert everything(net) == unchanged


def test_what_runs_the_net_runs_it_in_recalibration_too() -> None:
    """As autocast would: here the inputs are doubled."""
    net = trained(Norms)
    (x, y), (a, b) = batch(9), batch(1)
    arch = next(net.space.enumerate())
    judge = Judge(net, [(x, y)], value, Recalibration([(a, b)], 1), 0, lambda i: net(i[0] * 2))
    with torch.no_grad():
        expected = value(by_hand(net, arch, [(a * 2, b)])(x * 2), y)
    assert judge.evaluate(arch, "now") == expected
    with pytest.raises(SearchError, match=r"the metric became nan here"):
        Judge(net, [(x, y)], lambda o, t: float("nan"), None, 0).evaluate(arch, "here")


@pytest.mark.parametrize(
    "given", [True, 3, ([],), ([], 0), ([], -1), ([], 2.0), ([], True), [[], 3]]
)
def test_a_recalibration_that_is_no_loader_and_number_is_refused(given: Any) -> None:
    with pytest.raises(SearchError, match=r"recalibrate must be \(loader, batches\)"):
        evolve(net_of(Norms), [batch()], recalibrate=given)


# -- the net stays as it is -----------------------------------------------------------------------


def everything(net: nasfx.Supernet) -> dict[str, Any]:
    """All that evolve must leave: modules, modes, tensors, draws, generators."""
    found: dict[str, Any] = {}
    roots = {"net": net, "traced": net.traced, "origin": net.traced.origin}
    for name, root in roots.items():
        found |= {f"{name} {k}": v for k, v in fingerprint(root).items()}
    for key, tensor in net.state_dict().items():
        found[f"state {key}"] = tensor.tolist()
    found["path"] = dict(net.path) if net.strategy.samples else None
    found["generator"] = net._arch.state.generator.get_state().tolist()
    found["global"] = torch.get_rng_state().tolist()
    return found


class Counting(nn.Module):
    """Has a buffer that moves in eval mode too, and a parameter that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.stem.weight.requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.block = LayerChoice([dense(norm=True), dense()], label="block")
        self.other = LayerChoice([dense(norm=True), dense(), nn.Dropout(0.3)], label="other")

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.other(self.block(self.stem(x)))


def _loader(fail_at: int) -> Iterator[Any]:
    for i in itertools.count():
        if i == fail_at:
            raise OSError("the disk")
        yield batch(i)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("end", ["well", "loader", "metric", "nan", "target", "interrupt"])
def test_nothing_of_the_net_changes(
    strategy: str,
    mode: bool,
    end: str,
) -> None:
    model = built(Counting)
    net = nasfx.transform(model, strategy)
    for i in range(3):
        with net.weight_step(), torch.no_grad():
            net(batch(i)[0])
    net.train(mode)
    net.get_submodule("block.0.1").train(not mode)  # a mode of the user's own
    calls: list[int] = []

    def metric(outputs: Tensor, target: Tensor) -> float:
        calls.append(1)
        if end == "interrupt" and len(calls) == 3:
            raise KeyboardInterrupt
        if end == "metric" and len(calls) == 3:
            raise ZeroDivisionError
        return float("nan") if end == "nan" and len(calls) == 3 else value(outputs, target)

    errors = {
        "loader": OSError, "metric": ZeroDivisionError, "nan": SearchError, "target": SearchError,
        "interrupt": KeyboardInterrupt,
    }  # fmt: skip
    loader: Any = [batch(30), batch(31)]
    if end == "loader":
        loader = _loader(8)
    valid = [batch(9), (batch(9)[0],)] if end == "target" else [batch(9)]
    before = everything(net) | fingerprint(model)
    options: dict[str, Any] = {"metric": metric, "recalibrate": (loader, 3), "generations": 3}
    if end == "well":
        evolve(net, valid, **options)
    else:
        with pytest.raises(errors[end]):
            evolve(net, valid, **options)
    after = everything(net) | fingerprint(model)
    changed = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
    assert not sorted(changed)
    # It still trains.
    with net.weight_step():
        net(batch(1)[0]).sum().backward()
    assert net.get_parameter("other.0.0.weight").requires_grad


def test_without_recalibration_buffers_stay_too() -> None:
    net = net_of(Counting)
    before = everything(net)
    evolve(net, [batch(9)], recalibrate=False)
    assert everything(net) == before


def test_no_gradient_is_left_and_none_is_recorded() -> None:
    net = net_of(Norms)
    kept: list[bool] = []
    evolve(
        net, [batch(9)], recalibrate=([batch(1)], 1),
        metric=lambda o, t: kept.append(o.requires_grad) or 0.0,
    )  # fmt: skip
    assert not any(kept)
    assert all(p.grad is None for p in net.parameters())


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_metric_that_is_not_finite_is_an_error(bad: float) -> None:
    with pytest.raises(SearchError, match=r"the metric became -?(nan|inf) in generation 0, for"):
        evolve(digits(2), metric=lambda o, t: bad)


def test_a_candidate_that_gives_nan_is_named() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x - 100.0)

    net = nasfx.transform(
        nn.Sequential(LayerChoice({"fine": nn.Tanh(), "broken": Log()}, label="n")), "single-path"
    )
    with pytest.raises(SearchError, match=r"the metric became nan.*candidate 'broken' of.*'n'"):
        evolve(net)


@pytest.mark.parametrize("bad", [None, "0.5", torch.zeros(2)])
def test_a_metric_is_a_number(bad: Any) -> None:
    with pytest.raises(SearchError, match=r"the metric must be"):
        evolve(digits(2), metric=lambda o, t: bad)


def test_an_integer_or_a_tensor_is_a_metric() -> None:
    assert evolve(digits(2), metric=lambda o, t: int(o)).best_metric == 15.0
    assert evolve(digits(2), metric=lambda o, t: o[0]).best_metric == 15.0


def test_data_that_gives_nothing_is_an_error() -> None:
    with pytest.raises(SearchError, match=r"valid gave no batch"):
        evolve(digits(2), iter([(X, Y)]))  # it is used up by the first architecture
    with pytest.raises(SearchError, match=r"recalibrate gave no batch"):
        evolve(net_of(Norms), [batch()], recalibrate=([], 2))
    with pytest.raises(SearchError, match=r"a batch of recalibrate must be \(inputs, target\)"):
        evolve(net_of(Norms), [batch()], recalibrate=([batch()[0]], 2))


@pytest.mark.parametrize(
    "options", [{"population": 1}, {"population": -3}, {"generations": 0}, {"constraints": [3]},
                {"constraints": lambda a: True}],
)  # fmt: skip
def test_wrong_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SearchError, match=next(iter(options))):
        evolve(digits(2), **options)


def test_only_a_net_outside_of_a_step_is_searched() -> None:
    with pytest.raises(SearchError, match=r"needs a net from nasfx.transform, not a Digits"):
        evolve(Digits(2))  # type: ignore[arg-type]
    net = digits(2)
    with net.weight_step(), pytest.raises(SearchError, match=r"inside a step"):
        evolve(net)


def test_several_inputs_are_taken() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pick = InputChoice(2, label="pick")

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.pick([a, b])

    net = nasfx.transform(Two(), "single-path")
    result = evolve(net, [((X, X + 2), Y)])
    assert (result.architecture, result.best_metric) == ({"pick": [1]}, 2.0)


# -- records --------------------------------------------------------------------------------------


def test_records_table_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = digits(6)
    watch = Watch(net, monkeypatch)
    result = evolve(net, metric=watch.metric, population=10, generations=4)
    assert len(result.records) == 4
    for i, record in enumerate(result.records):
        assert list(record) == ["generation", "best", "mean", "evaluated", "seconds"]
        new = watch.evaluated[10 * i : 10 * i + 10]
        assert record["generation"] == i
        assert record["best"] == max(watch.evaluated[: 10 * i + 10])
        assert record["mean"] == pytest.approx(sum(new) / 10)
        assert record["evaluated"] == 10
        assert record["seconds"] > 0
    assert result.best_metric == result.records[-1]["best"]
    assert result.table().row_count == 4
    text = str(result)
    assert "generation" in text
    assert f"best metric {result.best_metric:.4f} with {dict(result.architecture)}" in text
    assert result.plot(tmp_path / "evolution.png") == tmp_path / "evolution.png"
    assert (tmp_path / "evolution.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_shows_the_columns_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[tuple[str, list[str], list[list[float]]]] = []

    def savefig(figure: Figure, path: Any) -> None:
        for axes in figure.axes:
            lines = axes.get_lines()
            labels = [str(line.get_label()) for line in lines]
            drawn.append((axes.get_xlabel(), labels, [list(line.get_ydata()) for line in lines]))  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", savefig)
    result = evolve(digits(6), population=10, generations=2)
    result.plot(tmp_path / "a.png")
    columns = {name: [r[name] for r in result.records] for name in result.records[0]}
    assert drawn == [
        ("generation", ["best", "mean"], [columns["best"], columns["mean"]]),
        ("generation", ["evaluated"], [columns["evaluated"]]),
    ]
    drawn.clear()
    names = ("epoch", "train_loss", "arch_loss", "metric", "entropy", "lr", "seconds")
    records = tuple({n: None if n == "arch_loss" and i == 0 else i for n in names} for i in (0, 1))
    nasfx.SearchResult(result.architecture, records, 0.0).plot(tmp_path / "b.png")
    assert drawn == [
        ("epoch", ["train_loss", "arch_loss"], [[0, 1], [1]]),
        ("epoch", ["metric"], [[0, 1]]),
        ("epoch", ["entropy"], [[0, 1]]),
    ]


def test_progress_is_shown_on_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    evolve(digits(2))
    assert capsys.readouterr() == ("", "")
    out = io.StringIO()
    evolve(digits(2), console=Console(file=out, force_terminal=True, width=120))
    assert "evolve" in out.getvalue()
    assert "generation 0 best 15.0000" in out.getvalue()
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    evolve(digits(2), constraints=[lambda arch: number(arch) == 9], console=console)
    assert "generation 0 best 9.0000" in out.getvalue()
