"""Random search: single path's training, and the best of uniformly drawn architectures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import nasfx
from nasfx import Architecture, LayerChoice, SearchError
from nasfx.strategies.random_search import RandomSearch, best_of
from tests.strategies.nets import Chain, Nested, Skips, batch, built, drawn, loss_of, with_gradient


def wide() -> nn.Module:
    """4**6 subnets."""
    return nn.Sequential(
        *(LayerChoice([nn.Identity() for _ in range(4)], label=f"c{i}") for i in range(6))
    )


def number(arch: Architecture) -> float:
    return float(sum(int(v) * 4 ** int(k[1:]) for k, v in arch.items()))


def net_of(kind: Callable[[], nn.Module], seed: int = 0, **options: Any) -> nasfx.Supernet:
    return nasfx.transform(built(kind), RandomSearch(**options), seed=seed)


def test_training_is_that_of_single_path() -> None:
    x, y = batch()
    random, single = net_of(Nested, 3), nasfx.transform(built(Nested), "single-path", seed=3)
    assert str(random.graph) == str(single.graph)
    for _ in range(20):
        found = []
        for net in (random, single):
            with net.weight_step():
                loss = loss_of(net, x, y)
                loss.backward()
            found.append((drawn(net), loss.item(), with_gradient(net)))
            net.zero_grad(set_to_none=True)
        assert found[0] == found[1]
    assert random.arch_parameters() == []
    assert random.probabilities().keys() == single.probabilities().keys()


def test_there_is_nothing_to_derive() -> None:
    with pytest.raises(SearchError, match=r"^random learns no distribution.*nasfx\.search"):
        net_of(Chain).derive()


@pytest.mark.parametrize("kind", [Chain, Nested, lambda: Skips(2)])
def test_the_best_of_a_small_space_is_found(kind: Callable[[], nn.Module]) -> None:
    """All are evaluated, each once."""
    net = net_of(kind)
    x, y = batch()
    asked: list[Architecture] = []

    def evaluate(arch: Architecture) -> float:
        asked.append(arch)
        with net.forced(arch), torch.no_grad():
            return -float(loss_of(net, x, y))

    net.eval()
    best = net.conclude(evaluate)
    assert len(asked) == net.space.size <= 50
    assert set(asked) == set(net.space.enumerate())
    scores = [evaluate(arch) for arch in net.space.enumerate()]
    assert evaluate(best) == max(scores)
    assert len(set(scores)) > 1


def test_as_many_different_ones_are_evaluated_as_it_is_told() -> None:
    net = net_of(lambda: Skips(2), final_samples=7)
    assert net.space.size > 7
    asked: list[Architecture] = []

    def evaluate(arch: Architecture) -> float:
        asked.append(arch)
        return -abs(len(asked) - 5)

    assert net.conclude(evaluate) == asked[4]
    assert len(asked) == len(set(asked)) == 7
    asked.clear()
    net_of(wide).conclude(evaluate)
    assert len(set(asked)) == 50
    first = net_of(Chain)
    assert first.conclude(lambda arch: 0.0) == next(iter(first.space.enumerate()))


def test_the_draws_are_uniform_and_the_net_draws_as_before() -> None:
    net = net_of(wide, seed=1, final_samples=600)
    before = net._arch.state.generator.get_state()
    asked: list[list[Architecture]] = [[], []]
    for each in asked:
        net.conclude(lambda arch, each=each: each.append(arch) or 0.0)
    assert asked[0] == asked[1]
    assert torch.equal(net._arch.state.generator.get_state(), before)
    for label in (f"c{i}" for i in range(6)):
        counts = Counter(arch[label] for arch in asked[0])
        assert all(abs(counts[v] - 150) < 5 * (600 * 3 / 16) ** 0.5 for v in "0123")


# -- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [5, 20, 5000])
def test_only_what_keeps_within_the_bounds_is_evaluated(n: int) -> None:
    """Where all are gone through, and where they are drawn."""
    space = nasfx.search_space(wide())
    space.costs = {"flops": number, "params": lambda arch: int(arch["c0"])}
    space.bounds = {"flops": 1000.0, "params": 2.0}
    asked: list[Architecture] = []
    best = best_of(
        space,
        torch.Generator().manual_seed(0),
        n,
        lambda arch: asked.append(arch) or number(arch),
    )
    assert len(asked) == len(set(asked)) == min(n, 751)
    assert all(number(arch) <= 1000 and arch["c0"] != "3" for arch in asked)
    assert number(best) == max(map(number, asked))
    if n == 5000:
        assert number(best) == 1000


def test_bounds_that_nothing_drawn_keeps_are_an_error() -> None:
    net = net_of(wide, final_samples=3)
    net.space.costs, net.space.bounds = {"flops": number}, {"flops": -1.0}
    asked: list[Architecture] = []
    match = (
        r"no architecture satisfies the constraints: all 2\d\d different ones that were drawn, of "
        r"4,096, were refused; .*\(the bounds are flops <= -1\), .*with a larger final_samples"
    )
    with pytest.raises(SearchError, match=match):
        net.conclude(lambda arch: asked.append(arch) or 0.0)
    assert not asked
    net = net_of(Chain)
    net.space.costs, net.space.bounds = {"flops": len}, {"flops": 1}
    with pytest.raises(SearchError, match=r"all 9 different ones that were drawn, of 9"):
        net.conclude(lambda arch: 0.0)


# -- options --------------------------------------------------------------------------------------


def test_options_are_checked() -> None:
    assert (RandomSearch().final_samples, RandomSearch().recalibrate) == (50, 200)
    assert RandomSearch(8, recalibrate=0) == RandomSearch(recalibrate=0, final_samples=8)
    with pytest.raises(SearchError, match=r"final_samples=0\): it must be a whole number"):
        RandomSearch(final_samples=0)
    with pytest.raises(SearchError, match=r"recalibrate=-2\): it must be a whole number"):
        RandomSearch(recalibrate=-2)
