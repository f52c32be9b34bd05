"""What every space is put through with every strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nasfx
from nasfx.choice import activated
from tests.strategies.nets import STRATEGIES

CLASSES = 10
FEWER_STRATEGIES = [
    pytest.param(name, marks=pytest.mark.slow) if name in ("fbnet", "random") else name
    for name in STRATEGIES
]
"""For the spaces that take long: those that lower the choices as another one does are slow."""


def images(size: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)


def check_strategy(model: nn.Module, strategy: str, x: Tensor) -> None:
    """One weight step, one arch step, then the subnet equals the eager model bit for bit.

    `model` and `x` are float64.
    """
    net = nasfx.transform(model, strategy, seed=1)
    weights, alphas = list(net.weight_parameters()), list(net.arch_parameters())
    target = torch.arange(len(x)) % CLASSES
    optimizer = torch.optim.SGD(weights, 0.01)
    with net.weight_step():
        F.cross_entropy(net(x), target).backward()
    assert all(a.grad is None for a in alphas)
    assert any(w.grad is not None and bool(w.grad.any()) for w in weights)
    optimizer.step()
    if alphas:
        arch_optimizer = net.arch_optimizer()
        with net.arch_step():
            net.objective(F.cross_entropy(net(x), target)).backward()
        assert any(a.grad is not None and bool(a.grad.any()) for a in alphas)
        arch_optimizer.step()
    arch = net.derive() if alphas else net.sample()
    check_subnet(model, net, arch, x)


def check_subnet(
    model: nn.Module, net: nn.Module, arch: Mapping[str, Any], x: Tensor
) -> torch.fx.GraphModule:
    """The subnet of `net`, a model's supernet or the model itself, once it equals the model."""
    subnet = nasfx.finalize(net, arch, example_inputs=x)
    certificate = subnet.certificate
    assert [certificate[k] for k in ("structure", "tensors", "outputs")] == ["passed"] * 3
    if net is not model:
        assert certificate["supernet_difference"] < 1e-11
    was = model.training
    model.eval()
    subnet.eval()
    with torch.no_grad(), activated(model, arch):
        assert torch.equal(model(x), subnet(x))
    model.train(was)
    return subnet


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
