"""What the annotations of a space say against counting finalized subnets: a thousand of each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nasfx
from nasfx.spaces import nasbench201, proxyless, shufflenet

SPACES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "nasbench201": (lambda: nasbench201.net(4, 1, 3), torch.zeros(1, 3, 8, 8)),
    "proxyless": (
        lambda: proxyless.mobile(4, (4, 6, 8), 8, 3, repeats=(3, 2), strides=(2, 1)),
        torch.zeros(1, 3, 16, 16),
    ),
    "shufflenet": (
        lambda: shufflenet.spos(3, stem=4, widths=(8, 16), repeats=(2, 2), head=8),
        torch.zeros(1, 3, 32, 32),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPACES)
def test_macs_and_parameters_of_a_thousand_random_subnets(name: str) -> None:
    make, x = SPACES[name]
    objectives = [nasfx.Flops(max=1e12), nasfx.Params(max=1e12)]
    net = nasfx.transform(make(), "random", example_inputs=x, objective=objectives)
    generator = torch.Generator().manual_seed(0)
    seen: set[tuple[int, int]] = set()
    for _ in range(1000):
        arch = net.space.sample(generator)
        counted = nasfx.count(nasfx.finalize(net, arch, copy=False), x)
        assert net.space.costs["flops"](arch) == counted.flops, arch
        assert net.space.costs["params"](arch) == counted.params, arch
        seen.add((counted.flops, counted.params))
    assert len(seen) > 20
