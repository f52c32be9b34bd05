"""Single path one-shot: uniform draws, nothing learned."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import nasfx
from nasfx import SearchError, SinglePath
from tests.strategies.nets import Cell, Chain, Nested, Skips, batch, built, drawn, loss_of


def test_every_way_to_decide_is_equally_likely() -> None:
    net = nasfx.transform(built(lambda: Skips(2)), "single-path", seed=1)
    n = 2400
    counts: dict[str, Counter[object]] = {"block": Counter(), "pick": Counter()}
    for _ in range(n):
        with net.weight_step():
            for label, value in drawn(net).items():
                counts[label][value] += 1
    assert set(counts["block"]) == {"lin", "deep", "skip"}
    assert set(counts["pick"]) == {(i, j) for i in range(4) for j in range(i + 1, 4)}
    for label, counter in counts.items():
        p = 1 / len(counter)
        for value, count in counter.items():
            assert abs(count / n - p) < 5 * (p * (1 - p) / n) ** 0.5, (label, value)


def test_any_subset_is_drawn_the_empty_one_too() -> None:
    net = nasfx.transform(built(lambda: Skips(None)), "single-path", seed=1)
    seen = set()
    for _ in range(400):
        with net.weight_step():
            seen.add(drawn(net)["pick"])
    assert len(seen) == 16


def test_relaxed_only_candidates_are_never_drawn() -> None:
    net = nasfx.transform(built(Cell), "single-path", seed=1)
    seen: dict[str, set[object]] = {}
    for _ in range(60):
        with net.weight_step():
            for label, value in net.path.items():
                seen.setdefault(label, set()).add(str(value))
    assert seen.pop("node1") == {"[0, 1]"}
    assert len(seen.pop("node2")) == 3
    assert all(values == {"lin", "act"} for values in seen.values())
    assert len(seen) == 5


@pytest.mark.parametrize("reduction", ["concat", "none", "mean", "sum"])
def test_every_reduction_is_accepted(reduction: str) -> None:
    model = built(lambda: Skips(2, reduction))
    net = nasfx.transform(model, "single-path")
    x, y = batch()
    for _ in range(8):
        with net.weight_step():
            loss_of(net, x, y).backward()
            with nasfx.activated(model, net.path):
                assert torch.equal(net(x), model(x))


def test_there_is_nothing_to_derive() -> None:
    net = nasfx.transform(built(Chain), "single-path")
    with pytest.raises(
        SearchError, match=r"learns no distribution.*nasfx\.search.*finalize\(net, arch\)"
    ):
        net.derive()
    with pytest.raises(SearchError, match=r"learns no distribution"):
        nasfx.finalize(net)


def test_there_are_no_alphas_and_their_optimizer_does_nothing() -> None:
    net = nasfx.transform(built(Nested), "single-path")
    assert net.arch_parameters() == []
    optimizer = net.arch_optimizer()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with net.arch_step():
        net.objective(loss_of(net, *batch())).backward()
        drawn_now = net.state_dict()
    optimizer.step()
    optimizer.zero_grad()
    for key, value in net.state_dict().items():
        if "arch.state" in key:
            assert torch.equal(value, drawn_now[key]), key
        elif "running" not in key and "num_batches" not in key:
            assert torch.equal(value, before[key]), key
    assert {id(p) for p in net.weight_parameters()} == {id(p) for p in net.parameters()}


def test_conclude_takes_the_best_of_all_in_a_small_space() -> None:
    net = nasfx.transform(built(Chain), "single-path")
    asked = []

    def evaluate(arch: nasfx.Architecture) -> float:
        asked.append(arch)
        return (arch["first"] == "deep") + 2 * (arch["second"] == "wide")

    assert net.conclude(evaluate) == {"first": "deep", "second": "wide"}
    assert len(asked) == len(set(asked)) == 9


def test_conclude_evaluates_as_many_different_ones_as_it_is_told() -> None:
    net = nasfx.transform(built(lambda: Skips(2)), SinglePath(final_samples=7))
    assert net.space.size > 7
    asked = []

    def evaluate(arch: nasfx.Architecture) -> float:
        asked.append(arch)
        return -abs(len(asked) - 5)

    assert net.conclude(evaluate) == asked[4]
    assert len(asked) == len(set(asked)) == 7


def test_the_first_of_equals_is_returned() -> None:
    net = nasfx.transform(built(Chain), "single-path")
    first = next(iter(net.space.enumerate()))
    assert net.conclude(lambda arch: 0.0) == first


def test_final_samples_must_be_positive() -> None:
    with pytest.raises(SearchError, match=r"final_samples=0"):
        SinglePath(final_samples=0)
