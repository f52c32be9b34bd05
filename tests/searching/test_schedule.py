"""When `search` takes arch steps, and what it gives them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nasfx
from nasfx import Enas, FBNet, LayerChoice, Proxyless


def toy() -> nn.Module:
    torch.manual_seed(0)
    choice = LayerChoice({"lin": nn.Linear(3, 3), "tanh": nn.Tanh()}, label="block")
    return nn.Sequential(nn.Linear(3, 3), choice, nn.Linear(3, 1))


def data(n: int) -> list[Any]:
    return [(torch.full((2, 3), float(i)), torch.zeros(2, 1)) for i in range(n)]


@contextmanager
def logged(net: nasfx.Supernet, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    steps: list[str] = []
    for kind in ("weight", "arch"):
        entered = getattr(nasfx.Supernet, f"{kind}_step")

        def step(self: nasfx.Supernet, *args: Any, entered=entered, kind=kind, **kw: Any) -> Any:
            steps.append(kind[0])
            return entered(self, *args, **kw)

        monkeypatch.setattr(nasfx.Supernet, f"{kind}_step", step)
    yield steps


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("darts", "awawawaw" * 2),
        (Proxyless(arch_every=3), "awwwaw" * 2),
        (Proxyless(estimator="reinforce", draws=3, arch_every=4), "aaawwww" * 2),
        ("fbnet", "wwwwaaa" * 2),
        (Enas(aggregate=2, steps=3), "wwwwaaaaaa" * 2),
        (Enas(aggregate=2), "wwwwaaaa" * 2),  # three batches: one step of two, one of the third
        ("single-path", "wwww" * 2),
        ("random", "wwww" * 2),
    ],
)
def test_steps(strategy: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nasfx.transform(toy(), strategy)
    with logged(net, monkeypatch) as steps:
        nasfx.search(net, data(4), data(3), loss=F.mse_loss, epochs=2)
    assert "".join(steps) == expected


def test_warmup_has_no_arch_steps_and_anneals_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nasfx.transform(toy(), FBNet(temperature=4.0, anneal=0.5))
    with logged(net, monkeypatch) as steps:
        nasfx.search(net, data(2), data(1), loss=F.mse_loss, epochs=3, warmup=1)
    assert "".join(steps) == "ww" + "wwa" * 2
    assert net.state_dict()["arch.state.temperature"] == 1.0


def test_rewards_are_the_metric_or_minus_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    for metric in (None, lambda outputs, target: 0.25):
        net = nasfx.transform(toy(), Enas(aggregate=1, steps=1))
        rewards: list[Any] = []
        objective = nasfx.Supernet.objective

        def spied(self: Any, loss: Any, reward: Any = None, objective=objective, r=rewards) -> Any:
            r.append(reward)
            return objective(self, loss, reward)

        with monkeypatch.context() as patch:
            patch.setattr(nasfx.Supernet, "objective", spied)
            nasfx.search(net, data(1), data(1), loss=F.mse_loss, epochs=1, metric=metric)
        assert rewards == [None if metric is None else 0.25]


def test_one_batch_for_all_draws_or_one_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for strategy, expected in (
        (Proxyless(estimator="reinforce", draws=2), [0, 0, 1, 1]),
        (Enas(aggregate=2, steps=2), [0, 1, 0, 1]),
    ):
        net = nasfx.transform(toy(), strategy)
        seen: list[int] = []

        def loss(outputs: Any, target: Any, net=net, seen=seen) -> Any:
            if net.step_kind == "arch":
                seen.append(int(target[0, 0]))
            return outputs.square().mean()

        valid = [(torch.zeros(2, 3), torch.full((2, 1), float(i))) for i in range(2)]
        nasfx.search(net, data(2), valid, loss=loss, epochs=1)
        assert seen == expected


def test_what_was_evaluated_is_in_the_result_and_the_best_is_kept() -> None:
    net = nasfx.transform(toy(), "random")
    result = nasfx.search(net, data(2), data(1), loss=F.mse_loss, epochs=1)
    assert set(result.evaluated) == set(net.space.enumerate())
    assert result.evaluated[result.architecture] == result.best_metric
    assert result.best_metric == max(result.evaluated.values())


def test_objectives_are_weighed_in_at_the_end_and_bounds_kept() -> None:
    def found(objective: nasfx.Objective | None) -> Any:
        net = nasfx.transform(
            toy(), "single-path", example_inputs=torch.zeros(1, 3), objective=objective
        )
        large = lambda outputs, target: outputs.abs().mean()  # noqa: E731
        run = nasfx.search(net, data(2), data(3), loss=F.mse_loss, epochs=1, metric=large)
        return run.architecture["block"]

    costly, cheap = "lin", "tanh"
    assert found(None) == costly, "by the metric alone"
    assert found(nasfx.Params(1, lambda_=1e6)) == cheap
    assert found(nasfx.Params(max=17)) == cheap
