"""The space of SPOS: the published net, its blocks against torch's functions, authors' names."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nasfx
from nasfx import CheckpointError, LayerChoice, SpaceError
from nasfx.spaces import shufflenet
from tests.spaces.mobile import STRATEGIES, check_search, randomized


def toy(*, evaluation: bool = False) -> nn.Module:
    """Two searched blocks, of stride 2 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shufflenet.spos(3, evaluation, stem=4, widths=(8,), repeats=(2,), head=8)


def test_the_published_net_has_its_parameters_and_macs_in_a_space_of_4_to_the_20() -> None:
    traced = nasfx.trace(shufflenet.spos(evaluation=True))
    assert nasfx.search_space(traced).size == 4**20
    subnet = nasfx.finalize(traced, shufflenet.SPOS_BEST)
    found = nasfx.count(subnet, torch.zeros(1, 3, 224, 224))
    assert (found.params, found.flops) == (3_558_464, 322_918_720)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_searches_it(strategy: str) -> None:
    target = torch.tensor([0, 1, 2, 0])
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    check_search(toy(), x, lambda out: F.cross_entropy(out, target), strategy)


# -- blocks ----------------------------------------------------------------------------------------


def layers(branch: nn.Module, x: Tensor, plan: str, kernel: int, stride: int) -> Tensor:
    """The convolutions of a branch, from torch's functions: p 1x1 with ReLU, d depthwise."""
    convs = [m for m in branch.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in branch.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(convs) == len(norms) == len(plan)
    for kind, conv, norm in zip(plan, convs, norms, strict=True):
        assert conv.bias is None
        if kind == "d":
            k, stride_now, stride = kernel, stride, 1
            assert conv.weight.shape == (x.shape[1], 1, k, k)
            x = F.conv2d(x, conv.weight, None, stride_now, k // 2, groups=x.shape[1])
        else:
            x = F.conv2d(x, conv.weight)
        assert norm.running_mean is not None
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        x = x.relu() if kind == "p" else x
    return x


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize(
    ("name", "kernel", "plan"),
    [
        ("shuffle3", 3, "pdp"),
        ("shuffle5", 5, "pdp"),
        ("shuffle7", 7, "pdp"),
        ("xception", 3, "dpdpdp"),
    ],
)
def test_a_block_is_what_the_paper_draws(
    name: str, kernel: int, plan: str, evaluation: bool
) -> None:
    blocks = randomized(toy(evaluation=evaluation).double()).features
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    down, same = blocks[0].get_submodule(name), blocks[1].get_submodule(name)

    main = layers(down.branch_main, x, plan, kernel, 2)
    projected = layers(down.branch_proj, x, "dp", kernel, 2)
    y = down(x)
    torch.testing.assert_close(y, torch.cat((projected, main), 1), rtol=1e-12, atol=1e-12)
    assert y.shape == (2, 8, 3, 3)
    assert projected.shape[1] == main.shape[1] == 4

    even, odd = y[:, [0, 2, 4, 6]], y[:, [1, 3, 5, 7]]
    z = same(y)
    assert torch.equal(z[:, :4], even)
    main = layers(same.branch_main, odd, plan, kernel, 1)
    torch.testing.assert_close(z[:, 4:], main, rtol=1e-12, atol=1e-12)


def test_batch_norms_learn_only_in_the_form_for_retraining() -> None:
    for evaluation in (False, True):
        norms = [m for m in toy(evaluation=evaluation).modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 40
        assert all(m.affine is evaluation for m in norms)
    assert nasfx.search_space(toy()).choices == nasfx.search_space(toy(evaluation=True)).choices


def test_the_dropout_comes_before_the_classifier_which_has_no_bias() -> None:
    net = toy()
    assert net.classifier[0].bias is None
    net.dropout.p = 1.0
    assert not net.train()(torch.randn(2, 3, 16, 16)).any()


def deviation(weight: Tensor) -> float:
    return float(weight.detach().std())


def test_weights_are_drawn_as_by_the_authors() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = shufflenet.spos(evaluation=True)
    seen = 0
    for path, m in net.named_modules():
        if isinstance(m, nn.Conv2d | nn.Linear) and m.weight.numel() > 10_000:
            inputs = m.weight.shape[1]
            expected = 0.01 if path.startswith(("first", "classifier")) else 1 / inputs
            assert deviation(m.weight) == pytest.approx(expected, rel=0.05), path
            seen += 1
        elif isinstance(m, nn.BatchNorm2d):
            assert bool((m.weight == 1).all())
            assert bool((m.bias == 1e-4).all())
    assert seen > 100
    assert deviation(net.first_conv[0].weight) == pytest.approx(0.01, rel=0.2)
    depthwise = net.features[16].shuffle7.branch_proj[0].weight
    assert deviation(depthwise) == pytest.approx(1, rel=0.05)


# -- notations -------------------------------------------------------------------------------------


def test_a_list_of_numbers_names_the_choices_in_the_authors_order() -> None:
    arch = shufflenet.arch([0, 1, 2, 3])
    assert dict(arch) == {
        "block0": "shuffle3",
        "block1": "shuffle5",
        "block2": "shuffle7",
        "block3": "xception",
    }
    for wrong in (4, -1):
        with pytest.raises(SpaceError, match=f"block 1: choice {wrong} is none of 0 to 3"):
            shufflenet.arch([0, wrong])


def test_a_list_that_is_too_short_is_refused_by_the_space() -> None:
    with pytest.raises(SpaceError, match="no decision for 'block1'"):
        nasfx.finalize(toy(), shufflenet.arch([0]))


@pytest.mark.parametrize(
    ("widths", "repeats", "message"),
    [
        ((8, 12), (1,), "one value for every stage"),
        ((), (), "one value for every stage"),
        ((8, 8), (1, 1), "from 8 to 8 channels"),
        ((8, 13), (1, 1), "from 8 to 13 channels"),
        ((8, 12), (1, 0), "a stage of 0 blocks"),
    ],
)
def test_widths_that_no_block_has_are_refused(
    widths: tuple[int, ...], repeats: tuple[int, ...], message: str
) -> None:
    with pytest.raises(SpaceError, match=message):
        shufflenet.spos(stem=4, widths=widths, repeats=repeats)


def authors_names() -> set[str]:
    """The names of the authors' supernet, written out from its layout."""
    tensors = ("running_mean", "running_var", "num_batches_tracked")

    def sequence(path: str, kinds: str) -> set[str]:
        """c a convolution, b a batch norm without weights, r a ReLU, l a linear layer."""
        return {
            f"{path}.{i}.{tensor}"
            for i, kind in enumerate(kinds)
            for tensor in {"c": ("weight",), "l": ("weight",), "b": tensors, "r": ()}[kind]
        }

    names = sequence("first_conv", "cbr") | sequence("conv_last", "cbr")
    names |= sequence("classifier", "l")
    for block in range(20):
        for choice in range(4):
            path = f"features.{block}.{choice}"
            main = "cbrcbcbr" if choice < 3 else "cbcbr" * 3
            names |= sequence(f"{path}.branch_main", main)
            if block in (0, 4, 8, 16):
                names |= sequence(f"{path}.branch_proj", "cbcbr")
    return names


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_authors_checkpoint_loads_under_our_names(prefix: str) -> None:
    net = shufflenet.spos()
    ours = net.state_dict()
    theirs = {prefix + name: torch.zeros(()) for name in authors_names()}
    renamed = shufflenet.from_authors(theirs)
    assert set(renamed) == set(ours)
    value = torch.randn(ours["features.7.shuffle7.branch_main.5.weight"].shape)
    full = {
        prefix + re.sub(r"shuffle3|shuffle5|shuffle7|xception", _number, name): tensor
        for name, tensor in ours.items()
    }
    full[f"{prefix}features.7.2.branch_main.5.weight"] = value
    net.load_state_dict(shufflenet.from_authors(full))
    block = net.features[7]
    assert isinstance(block, LayerChoice)
    assert torch.equal(block.get_submodule("shuffle7").branch_main[5].weight, value)


def _number(match: re.Match[str]) -> str:
    return str(shufflenet.CHOICES.index(match[0]))


@pytest.mark.parametrize(
    "name", ["features.0.branch_main.0.weight", "features.0.4.branch_main.0.weight", "fc.weight"]
)
def test_another_checkpoint_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"'{name}' is no name of the authors'")):
        shufflenet.from_authors({name: torch.zeros(())})
