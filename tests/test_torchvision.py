import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import nasfx

TOO_LARGE = {"regnet_y_128gf": 645, "vit_h_14": 633}  # millions of parameters: 2.6 GB each
# The smallest input that a model takes in train mode at batch 2; 32 where it is not here.
SIZES = {"alexnet": 63, "inception_v3": 299, "maxvit_t": 224}
NAMES = torchvision.models.list_models(module=torchvision.models)


def build(name: str) -> tuple[nn.Module, Tensor]:
    size = SIZES.get(name, 32)
    options: dict[str, Any] = {}
    if name.startswith("vit"):
        options["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **options)
    return model, torch.randn(2, 3, size, size)


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def run(model: nn.Module, x: Tensor) -> tuple[list[Any], Any]:
    torch.manual_seed(1)
    with torch.no_grad():
        return pytree.tree_flatten(model(x))


def assert_same(found: tuple[list[Any], Any], expected: tuple[list[Any], Any]) -> None:
    assert found[1] == expected[1]  # the same structure: a namedtuple stays one
    assert all(torch.isfinite(e).all() for e in expected[0])
    for f, e in zip(found[0], expected[0], strict=True):
        assert torch.equal(f, e)


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """Graphs and their nodes refer to each other, and hold the weights until they are collected."""
    yield
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_traced_model_computes_bit_for_bit_what_the_model_computes(name: str) -> None:
    if name in TOO_LARGE:
        pytest.skip(f"{name} has {TOO_LARGE[name]} million parameters, which take 2.6 GB")
    model, x = build(name)
    modes = {path: module.training for path, module in model.named_modules()}
    versions = {key: (id(p), p._version) for key, p in model.named_parameters()}
    fresh = buffers_of(model)
    random = torch.get_rng_state()
    traced = nasfx.trace(model, x)

    assert torch.equal(torch.get_rng_state(), random)
    assert {path: module.training for path, module in model.named_modules()} == modes
    assert {key: (id(p), p._version) for key, p in model.named_parameters()} == versions
    assert all(torch.equal(b, fresh[key]) for key, b in model.named_buffers())
    assert list(traced.state_dict()) == list(model.state_dict())

    # The two share their buffers: each train run starts from the same ones.
    expected = run(model.train(), x)
    moved = buffers_of(model)
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            buffer.copy_(fresh[key])
    found = run(traced.train(), x)
    assert_same(found, expected)
    assert all(torch.equal(b, moved[key]) for key, b in model.named_buffers())

    assert_same(run(traced.eval(), x), run(model.eval(), x))
