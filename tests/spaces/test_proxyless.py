"""The mobile space of ProxylessNAS: the published net, blocks against torch's functions, Zero."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nasfx
from nasfx import LayerChoice, SpaceError
from nasfx.choice import named_choices
from nasfx.spaces import proxyless
from tests.spaces.mobile import STRATEGIES, check_search, randomized


def toy() -> nn.Module:
    """Three searched blocks; the middle one may be skipped."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return proxyless.mobile(4, (4, 6, 8), head=8, classes=3, repeats=(2, 1), strides=(2, 1))


def test_the_published_net_has_its_parameters_and_macs_in_the_published_space() -> None:
    traced = nasfx.trace(proxyless.mobile(widths=proxyless.MOBILE_WIDTHS))
    space = nasfx.search_space(traced)
    assert space.size == 6**6 * 7**15
    subnet = nasfx.finalize(traced, proxyless.MOBILE)
    found = nasfx.count(subnet, torch.zeros(1, 3, 224, 224))
    assert (found.params, found.flops) == (4_080_512, 320_427_584)


def test_a_skipped_block_leaves_nothing_in_the_subnet() -> None:
    subnet = nasfx.finalize(toy(), proxyless.arch(["k3e3", "zero", "k3e3"]))
    calls = [str(node.target) for node in subnet.graph.nodes if node.op == "call_module"]
    assert not any(target.startswith("blocks.2") for target in calls)
    assert not [node for node in subnet.graph.nodes if "add" in str(node.target)]


def test_only_blocks_that_keep_size_and_channels_may_be_skipped() -> None:
    choices = [choice for _, choice in named_choices(proxyless.mobile())]
    six = ("k3e3", "k3e6", "k5e3", "k5e6", "k7e3", "k7e6")
    first = (0, 4, 8, 12, 16, 20)
    assert [choice.label for choice in choices] == [f"block{i}" for i in range(21)]
    for i, choice in enumerate(choices):
        assert choice.candidates == (six if i in first else (*six, "zero"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_searches_it(strategy: str) -> None:
    target = torch.tensor([0, 1, 2, 0])
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    net = proxyless.mobile(4, (4, 6), head=8, classes=3, repeats=(2,), strides=(2,))
    check_search(net, x, lambda out: F.cross_entropy(out, target), strategy)


# -- blocks ----------------------------------------------------------------------------------------


def bottleneck(block: nn.Module, x: Tensor, kernel: int, stride: int, ratio: int) -> Tensor:
    """An inverted bottleneck with the weights of `block`, from torch's functions."""
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    middle = x.shape[1] * ratio
    if ratio > 1:
        x = norm(F.conv2d(x, convs[0].weight), norms[0]).clamp(0, 6)
    depthwise, project = convs[-2:]
    assert len(convs) == (2 if ratio == 1 else 3)
    assert depthwise.weight.shape == (middle, 1, kernel, kernel)
    x = F.conv2d(x, depthwise.weight, None, stride, kernel // 2, groups=middle)
    x = norm(x, norms[-2]).clamp(0, 6)
    assert all(conv.bias is None for conv in convs)
    return norm(F.conv2d(x, project.weight), norms[-1])


def norm(x: Tensor, m: nn.BatchNorm2d) -> Tensor:
    assert m.running_mean is not None
    return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, eps=1e-3)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("ratio", [3, 6])
def test_a_block_is_an_inverted_bottleneck(kernel: int, ratio: int) -> None:
    net = randomized(toy().double())
    name = f"k{kernel}e{ratio}"
    fixed, down, same, wide = net.blocks
    x = 4 * torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for block, residual, stride in ((down, False, 2), (same, True, 1), (wide, False, 1)):
        block.active = name
        expected = bottleneck(block.get_submodule(name), x, kernel, stride, ratio)
        y = block(x)
        if residual:
            expected = expected + x
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        x = y
    assert x.shape == (2, 8, 4, 4)
    z = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fixed(z), bottleneck(fixed, z, 3, 1, 1), rtol=1e-12, atol=1e-12)


def test_a_skipped_block_is_its_input() -> None:
    block = toy().blocks[2]
    block.active = "zero"
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(block(x), x)


def test_activations_outside_the_blocks_end_at_six() -> None:
    net = randomized(toy())
    for layer, channels in ((net.first_conv, 3), (net.feature_mix_layer, 8)):
        y = layer(1000 * torch.randn(2, channels, 8, 8))
        assert (float(y.detach().min()), float(y.detach().max())) == (0, 6)


def test_weights_are_drawn_as_by_the_authors() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = proxyless.mobile(repeats=(1, 1, 1, 1, 1, 1))
    seen = 0
    for path, m in net.named_modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 10_000:
            fan_out = m.kernel_size[0] ** 2 * m.out_channels
            expected = math.sqrt(2 / fan_out)
            assert float(m.weight.detach().std()) == pytest.approx(expected, rel=0.05), path
            seen += 1
        elif isinstance(m, nn.BatchNorm2d):
            assert (m.eps, m.momentum) == (1e-3, 0.1)
    assert seen > 50
    weight = net.classifier.weight.detach()
    assert float(weight.abs().max()) == pytest.approx(1 / math.sqrt(1280), rel=1e-3)
    assert not net.classifier.bias.any()


# -- notations -------------------------------------------------------------------------------------


def test_a_list_of_names_is_an_architecture_of_the_blocks_in_order() -> None:
    arch = proxyless.arch(["k7e6", "zero", "k5e3"])
    assert dict(arch) == {"block0": "k7e6", "block1": "zero", "block2": "k5e3"}
    space = nasfx.search_space(toy())
    assert space.validate(arch) == arch
    assert len(proxyless.MOBILE) == 21
    for i, name in enumerate(proxyless.MOBILE.values()):
        assert (name == "zero") == (i in (2, 3))


def test_unknown_names_and_wrong_lengths_are_refused() -> None:
    with pytest.raises(SpaceError, match="block 1: 'k9e3' is none of"):
        proxyless.arch(["k3e3", "k9e3"])
    with pytest.raises(SpaceError, match="no decision for 'block2'"):
        nasfx.finalize(toy(), proxyless.arch(["k3e3", "zero"]))
    with pytest.raises(SpaceError, match="'block0' has no candidate 'zero'"):
        nasfx.finalize(toy(), proxyless.arch(["zero", "zero", "k3e3"]))


@pytest.mark.parametrize(
    ("repeats", "strides"), [((1,), (1, 1)), ((1, 1), (1,)), ((1, 0), (1, 1)), ((), ())]
)
def test_stages_that_do_not_fit_are_refused(
    repeats: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    with pytest.raises(SpaceError, match="must have one value, and each stage a block"):
        proxyless.mobile(4, (4, 6, 8), repeats=repeats, strides=strides)


def test_the_widths_are_those_of_the_first_block_and_of_every_stage() -> None:
    net = proxyless.mobile(stem=8, widths=(4, 6, 10), head=12, repeats=(1, 2), strides=(1, 2))
    widths = []
    for path, choice in named_choices(net):
        assert isinstance(choice, LayerChoice), path
        convs = [m for m in choice.get_submodule("k3e3").modules() if isinstance(m, nn.Conv2d)]
        widths.append((convs[0].in_channels, convs[-1].out_channels))
    assert widths == [(4, 6), (6, 10), (10, 10)]
    assert net(torch.zeros(1, 3, 16, 16)).shape == (1, 1000)


def test_zero_is_known_as_the_block_that_adds_nothing() -> None:
    model = proxyless.mobile(4, (4, 6), 8, 3, repeats=(2,), strides=(2,))
    assert [choice.zeros for choice in nasfx.search_space(model).choices] == [(), ("zero",)]
