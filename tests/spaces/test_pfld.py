"""The landmark space: the published net, its operations against torch's functions, its wiring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nasfx
from nasfx import SpaceError
from nasfx.choice import named_choices
from nasfx.spaces import pfld
from tests.spaces.mobile import STRATEGIES, check_search, randomized

FEW = (
    ("mb_k3_res", "sep_k3"),
    ("gh_k5", "mb_k3_res_d3"),
    ("mb_k5_res_se", "gh_k3"),
    ("mb_k3_e2_res_se", "sep_k5"),
    ("mb_k3_res",),
)


def toy(candidates: Any = FEW) -> nn.Module:
    """Of size 32, so that the maps have sides 4 and 2; ten outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pfld.net(5, size=32, stem=4, widths=(4, 8), candidates=candidates)


def test_the_published_net_has_its_parameters_and_macs_in_a_space_of_9_to_the_5() -> None:
    traced = nasfx.trace(pfld.net())
    assert nasfx.search_space(traced).size == 9**5
    subnet = nasfx.finalize(traced, pfld.arch(["mb_k3_e2_res"] * 5)).eval()
    x = torch.zeros(1, 3, 112, 112)
    found = nasfx.count(subnet, x)
    assert (found.params, found.flops) == (149_572, 9_384_880)
    landmarks, feature = subnet(x)
    assert (landmarks.shape, feature.shape) == ((1, 212, 1, 1), (1, 16, 28, 28))
    auxiliary = pfld.auxiliary().eval()
    assert sum(p.numel() for p in auxiliary.parameters()) == 167_491
    assert auxiliary(feature).shape == (1, 3)


def test_the_candidates_are_those_of_the_example() -> None:
    choices = [choice for _, choice in named_choices(pfld.net())]
    assert [choice.label for choice in choices] == [f"layer{i}" for i in range(5)]
    assert [choice.candidates for choice in choices] == list(pfld.LAYERS)


def squares(outputs: tuple[Tensor, Tensor]) -> Tensor:
    return sum((output**2).mean() for output in outputs) + torch.zeros(())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_searches_it(strategy: str) -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    check_search(toy(), x, squares, strategy)


@pytest.mark.slow
def test_the_whole_space_equals_the_eager_model_after_a_step() -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    check_search(toy(pfld.LAYERS), x, squares, "darts")


# -- operations ------------------------------------------------------------------------------------


def operation(block: nn.Module, x: Tensor, stride: int, name: str) -> Tensor:
    """What NNI's operation of this name computes, from torch's functions."""
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    kernel = int(name.split("_")[1][1:])

    def norm(y: Tensor, i: int) -> Tensor:
        m = norms[i]
        assert m.running_mean is not None
        return F.batch_norm(y, m.running_mean, m.running_var, m.weight, m.bias)

    def depthwise(y: Tensor, conv: nn.Conv2d, stride: int, dilation: int = 1) -> Tensor:
        assert conv.weight.shape == (y.shape[1], 1, kernel, kernel)
        pad = kernel // 2 + dilation - 1
        return F.conv2d(y, conv.weight, None, stride, pad, dilation, y.shape[1])

    if name.startswith("sep"):
        y = norm(depthwise(x, convs[0], stride), 0).relu()
        return norm(F.conv2d(y, convs[1].weight), 1).relu()
    if name.startswith("gh"):
        y = norm(F.conv2d(x, convs[0].weight, None, stride), 0).relu()
        return torch.cat((y, norm(depthwise(y, convs[1], 1), 1).relu()), 1)
    dilation = 3 if "_d3" in name else 1
    ratio = {"_e2": 2, "_e4": 4, "_d3": 2}
    middle = x.shape[1] * next((n for flag, n in ratio.items() if flag in name), 1)
    y = norm(F.conv2d(x, convs[0].weight), 0).relu()
    assert y.shape[1] == middle
    y = norm(depthwise(y, convs[1], stride, dilation), 1)
    if "_se" in name:
        _, _, average, fc, _ = convs
        assert average.weight.shape == (middle, 1, *y.shape[2:])
        assert average.bias is None
        z = F.conv2d(y, average.weight, None, groups=middle)
        z = torch.einsum("nchw,oc->nohw", z, fc.weight[:, :, 0, 0]) + fc.bias[:, None, None]
        y = y * ((z + 3).clamp(0, 6) / 6)
    y = norm(F.conv2d(y.relu(), convs[-1].weight), 2)
    return x + y if "_res" in name and stride == 1 else y


@pytest.mark.parametrize("layer", range(5))
def test_the_candidates_compute_what_their_names_say(layer: int) -> None:
    net = randomized(toy(pfld.LAYERS).double())
    c_in, side, stride = [(4, 4, 1), (4, 4, 1), (4, 4, 2), (8, 2, 1), (8, 2, 1)][layer]
    x = torch.randn(2, c_in, side, side, dtype=torch.float64)
    choice = net.layers[layer]
    for name in choice.candidates:
        block = choice.get_submodule(name)
        expected = operation(block, x, stride, name)
        torch.testing.assert_close(block(x), expected, rtol=1e-11, atol=1e-11, msg=name)
        assert expected.shape == (2, 4 if layer < 2 else 8, side // stride, side // stride)


def test_names_beyond_the_default_candidates_work_too() -> None:
    names = ("mb_k3", "mb_k3_e4", "mb_k3_e4_res_se", "mb_k5_e2", "gh_k3")
    net = randomized(toy([names] * 5).double())
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    for name in names:
        block = net.layers[0].get_submodule(name)
        expected = operation(block, x, 1, name)
        torch.testing.assert_close(block(x), expected, rtol=1e-11, atol=1e-11, msg=name)


# -- wiring ----------------------------------------------------------------------------------------


def test_the_head_joins_features_of_three_scales() -> None:
    net = randomized(toy())
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for path in ("stem.first", "layers.1", "layers.4", "average1", "average2", "join", "fc"):

        def keep(_: nn.Module, args: Any, output: Tensor, path: str = path) -> None:
            seen[path] = (args[0], output)

        net.get_submodule(path).register_forward_hook(keep)
    with torch.no_grad():
        landmarks, feature = net(torch.randn(2, 3, 32, 32))
        stem, _ = net.stem(seen["stem.first"][0])
    assert torch.equal(feature, stem)
    assert torch.equal(landmarks, seen["fc"][1])
    assert torch.equal(seen["average1"][0], seen["stem.first"][1])
    assert torch.equal(seen["average2"][0], seen["layers.1"][1])
    parts = [seen[path][1] for path in ("layers.4", "average2", "average1")]
    assert torch.equal(seen["join"][0], torch.cat(parts, 1))
    assert seen["stem.first"][1].shape == (2, 4, 16, 16)


def test_only_the_last_convolution_and_those_of_the_attention_have_a_bias() -> None:
    net = toy(pfld.LAYERS)
    biased = {n.rpartition(".")[2] for n, m in net.named_modules() if _has_bias(m)}
    assert biased == {"fc"}
    assert not any(m.bias.any() for m in net.modules() if _has_bias(m))
    bare = [net.average1, net.average2, net.join, net.average3]
    assert all(type(m) is nn.Conv2d for m in bare)


def _has_bias(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.bias is not None


def test_weights_are_drawn_by_the_fan_out() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = pfld.net()
    for path, m in net.named_modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 8000:
            fan_out = m.weight.shape[0] * m.weight[0, 0].numel()
            deviation = float(m.weight.detach().std())
            assert deviation == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), path


def test_the_auxiliary_net_is_trained_through_the_feature() -> None:
    net, auxiliary = pfld.net(size=112, candidates=FEW), pfld.auxiliary()
    _, feature = net(torch.randn(2, 3, 112, 112))
    (1 - auxiliary(feature).cos()).sum().backward()
    assert all(p.grad is not None for p in auxiliary.parameters())
    stem = {name for name, p in net.named_parameters() if p.grad is not None}
    assert stem == {f"stem.{name}" for name, _ in net.stem.named_parameters()}


# -- notations -------------------------------------------------------------------------------------


def test_a_list_of_names_is_an_architecture() -> None:
    arch = pfld.arch(["mb_k3_res", "gh_k5", "gh_k3", "sep_k5", "mb_k3_res"])
    assert dict(arch) == dict(
        zip(
            [f"layer{i}" for i in range(5)],
            ["mb_k3_res", "gh_k5", "gh_k3", "sep_k5", "mb_k3_res"],
            strict=True,
        )
    )
    assert nasfx.search_space(toy()).validate(arch) == arch


@pytest.mark.parametrize("name", ["mb_k7", "mb_k3_res_e2", "sep", "gh_k3_res", "conv"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(SpaceError, match=f"layer 0: '{name}' is no operation"):
        pfld.arch([name] * 5)
    with pytest.raises(SpaceError, match=f"layer 0: '{name}' is no operation"):
        toy([[name]] * 5)


def test_wrong_numbers_of_layers_sizes_and_widths_are_refused() -> None:
    with pytest.raises(SpaceError, match="5 searched layers, not 4"):
        pfld.arch(["mb_k3_res"] * 4)
    with pytest.raises(SpaceError, match="size=100 must be a multiple of 16"):
        pfld.net(size=100)
    with pytest.raises(SpaceError, match="two even numbers"):
        pfld.net(widths=(32, 63))
