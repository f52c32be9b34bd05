"""Every strategy in bf16 mixed precision; weighted sums compile as one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

import nasfx
from nasfx import LayerChoice
from nasfx.spaces.blocks import dilated_conv, relu_conv_bn, separable_conv

C = 4


class Net(nn.Module):
    """Two choices among what the optimisations rewrite, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.one, self.two = (
            LayerChoice(
                {
                    "sep5": separable_conv(C, 5),
                    "dil3": dilated_conv(C, 3, affine=False),
                    "conv": relu_conv_bn(C, C, 3),
                    "k3": nn.Conv2d(C, C, 3, padding=1),
                    "k5": nn.Conv2d(C, C, 5, padding=2),
                    "pool": nn.AvgPool2d(3, 1, 1),
                },
                label=label,
            )
            for label in ("one", "two")
        )
        self.head = nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.stem(x))).mean((2, 3)))


STRATEGIES: dict[str, Any] = {
    "darts": nasfx.Darts(),
    "unrolled": nasfx.Darts(unrolled="finite-difference"),
    "exact": nasfx.Darts(unrolled="exact"),
    "fbnet": nasfx.FBNet(recalibrate=2),
    "proxyless": nasfx.Proxyless(),
    "two": nasfx.Proxyless(gate="two"),
    "reinforce": nasfx.Proxyless(estimator="reinforce"),
    "enas": nasfx.Enas(steps=2, aggregate=2, recalibrate=2),
    "single-path": nasfx.SinglePath(2, 2, recalibrate=2),
    "random": nasfx.RandomSearch(2, recalibrate=2),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_bf16_autocast(name: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    net = nasfx.transform(Net(), STRATEGIES[name], example_inputs=torch.zeros(1, 3, 8, 8))
    seen: set[torch.dtype] = set()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(4, 3, 8, 8, generator=generator), torch.randint(3, (4,), generator=generator))
        for _ in range(4)
    ]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    result = nasfx.search(
        net, data, data, loss=F.cross_entropy, epochs=2, seed=0, fabric=fabric, clip_norm=5.0
    )
    assert seen == {torch.bfloat16}
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert "stem.weight" in moved
    assert bool(net.arch_parameters()) == any(name.startswith("arch.") for name in moved)
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
    subnet = nasfx.finalize(net, result.architecture)
    assert bool(torch.isfinite(subnet(data[0][0])).all())


@pytest.mark.parametrize("name", ["darts", "fbnet"])
def test_weighted_sums_compile_as_one_graph(name: str) -> None:
    net = nasfx.transform(Net(), STRATEGIES[name], example_inputs=torch.zeros(1, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    with net.weight_step():
        explained = torch._dynamo.explain(net.graph_module)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
