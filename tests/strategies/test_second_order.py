"""Unrolled DARTS through the public API."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nasfx
from nasfx import Darts, LayerChoice, SearchError
from tests.strategies.nets import Norms, batch, built, loss_of


class Quadratic(nn.Module):
    """w * (p_0 a + p_1 b) x: the training loss is quadratic in w."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
        self.block = LayerChoice({"twice": Times(2.0), "minus": Times(-1.0)}, label="block")

    def forward(self, x: Tensor) -> Tensor:
        return self.w * self.block(x)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


LR = 0.1


def closed_form(net: nasfx.Supernet, x: Tensor, y: Tensor, xv: Tensor, yv: Tensor) -> Tensor:
    """d L_val(w - lr dL_trn/dw, alpha) / d alpha, by autograd through the written-out step."""
    alpha = net.get_parameter("arch.block").detach().clone().requires_grad_()
    w = net.get_parameter("w").detach()
    c = torch.softmax(alpha, 0) @ torch.tensor([2.0, -1.0], dtype=torch.float64)
    gradient = (2 * (w * c * x - y) * c * x).mean()
    moved = w - LR * gradient
    (found,) = torch.autograd.grad((moved * c * xv - yv).square().mean(), alpha)
    return found


@pytest.mark.parametrize(("method", "tolerance"), [("exact", 1e-10), ("finite-difference", 1e-4)])
def test_the_gradient_is_that_of_the_unrolled_step(method: str, tolerance: float) -> None:
    net = nasfx.transform(Quadratic(), Darts(unrolled=method))
    first = nasfx.transform(Quadratic(), "darts")
    x, y, xv, yv = torch.randn(
        4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    w = torch.optim.SGD(net.weight_parameters(), LR)
    before = copy.deepcopy(net.state_dict())
    with net.arch_step(inner=lambda: F.mse_loss(net(x), y), weight_optimizer=w):
        net.objective(F.mse_loss(net(xv), yv)).backward()
    with first.arch_step():
        first.objective(F.mse_loss(first(xv), yv)).backward()
    found, plain = net.get_parameter("arch.block").grad, first.get_parameter("arch.block").grad
    assert found is not None
    assert plain is not None
    expected = closed_form(net, x, y, xv, yv)
    assert float((found - expected).norm() / expected.norm()) <= tolerance
    assert float((plain - expected).norm() / expected.norm()) > 0.01
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.get_parameter("w").grad is None
    assert net.get_parameter("w").requires_grad


def test_batch_norms_momentum_and_gradients_are_as_they_were() -> None:
    net = nasfx.transform(built(Norms), Darts(unrolled="finite-difference"))
    x, y = batch()
    w = torch.optim.SGD(net.weight_parameters(), 0.05, 0.9)
    for _ in range(2):
        with net.weight_step():
            loss_of(net, x, y).backward()
        w.step()
    before, momentum = copy.deepcopy(net.state_dict()), copy.deepcopy(w.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in net.weight_parameters()]
    with net.arch_step(inner=lambda: loss_of(net, x, y), weight_optimizer=w):
        net.objective(loss_of(net, x, y)).backward()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for old, new in zip(grads, (p.grad for p in net.weight_parameters()), strict=True):
        assert (old is None and new is None) or torch.equal(old, new)  # type: ignore[arg-type]
    for key, state in w.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], momentum["state"][key]["momentum_buffer"])
    assert all(p.grad is not None for p in net.arch_parameters())


def test_what_is_missing_is_an_error_that_shows_the_line() -> None:
    net = nasfx.transform(Quadratic(), Darts(unrolled="exact"))
    with pytest.raises(SearchError, match=r"arch_step\(inner=lambda: .*weight_optimizer=w\)"):
        net.arch_step().__enter__()
    assert not net.in_step
    with pytest.raises(SearchError, match=r"Darts\(unrolled='third'\)"):
        Darts(unrolled="third")
    plain = nasfx.transform(Quadratic(), "darts")
    with pytest.raises(SearchError, match=r"first order"):
        plain.arch_step(inner=lambda: torch.zeros(())).__enter__()


def test_search_gives_it_the_batch_that_follows() -> None:
    net = nasfx.transform(Quadratic(), Darts(unrolled="exact"))
    data = [(torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64))] * 3
    result = nasfx.search(net, data, data, loss=F.mse_loss, epochs=2)
    assert result.records[-1]["arch_loss"] is not None
