"""What an optimisation must keep: outputs, gradients and running statistics, in float64."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import nasfx
from nasfx import Supernet
from nasfx.rewriting.passes import Pass
from nasfx.spaces.blocks import dilated_conv, separable_conv
from tests.models import CHANNELS, RandomModel, Zero, conv, conv_bn, example, random_steps

TOLERANCE = 1e-12

Tensors = dict[str, Tensor]


def pool_bn(kind: type[nn.Module]) -> nn.Module:
    return nn.Sequential(kind(3, 1, 1), nn.BatchNorm2d(CHANNELS, affine=False))


_MAKERS: dict[str, Sequence[Callable[[], nn.Module]]] = {
    "conv": (conv, lambda: nn.Sequential(nn.ReLU(), conv(5))),
    "bn": (
        conv_bn,
        lambda: separable_conv(CHANNELS, 3, affine=False),
        lambda: dilated_conv(CHANNELS, 5, affine=False),
    ),
    "relu": (
        nn.ReLU,
        lambda: nn.MaxPool2d(3, 1, 1),
        lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        lambda: pool_bn(nn.MaxPool2d),
        lambda: pool_bn(nn.AvgPool2d),
    ),
    "id": (nn.Identity, Zero),
}  # fmt: skip


def make(kind: str, name: str) -> nn.Module:
    """An operator of a cell: the name decides which one of its kind."""
    makers = _MAKERS[kind]
    return makers[zlib.crc32(name.encode()) % len(makers)]()


@st.composite
def cells(draw: st.DrawFn) -> RandomModel:
    """Random models over the operators of DARTS cells, in float64, with seeded weights."""
    steps = draw(random_steps())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 99)))
        return RandomModel(steps, make).double()


def transformed(model: nn.Module, optimize: Any, strategy: Any = "darts") -> Supernet:
    """A net of its own weights, with alphas that are not all but equal."""
    net = nasfx.transform(model, strategy, optimize=optimize, copy=True)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for alpha in net.arch_parameters():
            alpha.copy_(torch.randn(alpha.shape, generator=generator, dtype=alpha.dtype))
    return net


def run(net: Supernet, x: Tensor) -> tuple[Tensors, Tensors, Tensors]:
    """The outputs, the gradients of inputs and parameters, and the buffers after a step."""
    x = x.clone().requires_grad_()
    outputs = [o for o in pytree.tree_leaves(net(x)) if isinstance(o, Tensor)]
    generator = torch.Generator().manual_seed(5)
    loss = torch.stack(
        [(o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs]
    ).sum()
    net.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad for name, p in net.named_parameters()} | {"x": x.grad}
    return (
        {f"{i}": o.detach() for i, o in enumerate(outputs)},
        {name: g.clone() for name, g in found.items() if g is not None},
        {name: b.detach().clone() for name, b in net.named_buffers()},
    )


def assert_near(found: Tensors, expected: Tensors, what: str) -> None:
    """Each tensor's difference, in norm, is 1e-12 of its own norm, or of all where it is zero."""
    assert found.keys() == expected.keys(), what
    norms = {name: float(t.double().norm()) for name, t in expected.items()}
    total = sum(n**2 for n in norms.values()) ** 0.5
    for name, tensor in expected.items():
        difference = float((found[name].double() - tensor.double()).norm())
        scale = norms[name] if norms[name] > TOLERANCE * total else total
        assert difference <= TOLERANCE * scale, f"{what} {name}: {difference:.2e} of {scale:.2e}"


def assert_same(
    model: nn.Module, passes: Sequence[Pass], x: Tensor | None = None, strategy: Any = "darts"
) -> Supernet:
    """The net with `passes` equals the one without, in train and in eval mode; the former."""
    x = example(3, torch.float64) if x is None else x
    plain, ours = (transformed(copy.deepcopy(model), o, strategy) for o in ("off", list(passes)))
    for training in (True, True, False):
        results = [run(net.train(training), x) for net in (ours, plain)]
        mode = "train" if training else "eval"
        for what, found, expected in zip(("output", "grad", "buffer"), *results, strict=True):
            assert_near(found, expected, f"{mode} {what}")
    return ours
