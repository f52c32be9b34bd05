"""What the tests of the mobile spaces share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import nasfx

STRATEGIES = ("darts", "fbnet", "proxyless", "enas", "single-path", "random")
LEARNING = ("darts", "fbnet", "proxyless", "enas")


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in eval mode, with batch norms of which every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            tensors = [module.running_mean, module.running_var, *module.parameters()]
            for tensor in tensors:
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def check_search(model: nn.Module, x: Tensor, loss: Callable[[Any], Tensor], strategy: str) -> None:
    """An arch step and a weight step move what they should; subnets equal the eager model."""
    net = nasfx.transform(model, strategy, example_inputs=x, seed=3)
    weights = torch.optim.SGD(net.weight_parameters(), 0.01)
    alphas = net.arch_optimizer()
    before = _copies(net)
    with net.arch_step():
        net.objective(loss(net(x))).backward()
    alphas.step()
    alphas.zero_grad()
    after_arch = _copies(net)
    moved = {name for name, value in after_arch.items() if not torch.equal(value, before[name])}
    assert bool(moved) == (strategy in LEARNING)
    assert all(name.startswith("arch.") for name in moved)
    with net.weight_step():
        loss(net(x)).backward()
    weights.step()
    after = _copies(net)
    moved = {name for name, value in after.items() if not torch.equal(value, after_arch[name])}
    assert moved
    assert not any(name.startswith("arch.") for name in moved)
    arch = net.derive() if strategy in LEARNING else net.space.sample(torch.Generator())
    subnet: Any = nasfx.finalize(net, arch).eval()
    with nasfx.activated(model.eval(), arch), torch.no_grad():
        expected, outputs = model(x), subnet(x)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    assert subnet.certificate["outputs"] == "passed"


def _copies(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}
