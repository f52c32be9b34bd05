import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from nasfx.passes import CheapenPools, FunctionalizeInplace, LowerWeightedSum
from torch import nn

from nasfx import LayerChoice
from nasfx.rewriting.printing import format_graph
from tests.models import conv
from tests.passes.conftest import Lower
from tests.passes.proof import assert_same, cells

LOWERED = FunctionalizeInplace(), LowerWeightedSum()
PASSES = (CheapenPools(),)


def choice(pool: nn.Module) -> nn.Module:
    return nn.Sequential(LayerChoice({"pool": pool, "skip": nn.Identity()}, label="block"))


def test_average_pools_become_functions(lower: Lower) -> None:
    gm, ctx = lower(
        nn.Sequential(
            choice(nn.AvgPool2d(3, 1, 1, count_include_pad=False)), nn.AvgPool2d((2, 2), (1, 1))
        ),
        *LOWERED,
    )
    assert_expected_inline(
        format_graph(gm),
        """\
%input_1 = placeholder[input]
%arch_block = get_attr[arch.block]
%gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
%_0_0_pool = call_module[0.0.pool](%input_1)
%_0_0 = nasfx.ops.mix(%gate_block, [%_0_0_pool, %input_1], label='block')
%_1 = call_module[1](%_0_0)
return %_1""",
    )
    assert CheapenPools()(gm, ctx).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%input_1 = placeholder[input]
%arch_block = get_attr[arch.block]
%gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
%_0_0_pool = nasfx.ops.average_pool(%input_1, 3, 1, False)
%_0_0 = nasfx.ops.mix(%gate_block, [%_0_0_pool, %input_1], label='block')
%_1 = nasfx.ops.average_pool(%_0_0, 2, 0, True)
return %_1""",
    )
    assert CheapenPools()(gm, ctx).modified is False
    assert not ctx.skips


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(2), nn.MaxPool2d(3, 1, 1), nn.AvgPool1d(3, 1)],
    ids=str,
)  # fmt: skip
def test_others_stay_without_a_word(pool: nn.Module, lower: Lower) -> None:
    gm, ctx = lower(nn.Sequential(choice(nn.Tanh()), pool), *LOWERED)
    assert CheapenPools()(gm, ctx).modified is False
    assert not ctx.skips


def hooked() -> nn.Module:
    pool = nn.AvgPool2d(3, 1, 1)
    pool.register_forward_hook(lambda module, inputs, output: None)
    return pool


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (hooked(), "the module has hooks"),
        (nn.AvgPool2d(3, 1, 1, divisor_override=2), "its divisor is not the number of pixels"),
        (nn.AvgPool2d((3, 2), 1), "its height and width differ"),
        (nn.AvgPool2d(3, 1, (1, 0)), "its height and width differ"),
    ],
    ids=["hooks", "divisor", "kernel", "padding"],
)
def test_it_declines(pool: nn.Module, reason: str, lower: Lower) -> None:
    gm, ctx = lower(nn.Sequential(choice(nn.Tanh()), pool), *LOWERED)
    assert CheapenPools()(gm, ctx).modified is False
    assert [skip.node for skip in ctx.skips] == ["_1"]
    assert ctx.skips[0].reason.startswith(reason)


def test_it_declines_models_elsewhere(lower: Lower) -> None:
    model = nn.Sequential(choice(nn.AvgPool2d(3, 1, 1)), conv(1).to("meta"))
    gm, ctx = lower(model, *LOWERED)
    assert CheapenPools()(gm, ctx).modified is False
    assert [skip.reason for skip in ctx.skips] == ["the model is on meta, not on a CPU"]


@pytest.mark.parametrize("counts", [True, False])
def test_the_pool_of_darts(counts: bool) -> None:
    pool = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=counts), nn.BatchNorm2d(4))
    edge = {"pool": pool, "conv": conv(3)}
    x = torch.randn(2, 4, 8, 7, dtype=torch.float64)
    net = assert_same(nn.Sequential(LayerChoice(edge, label="edge")).double(), PASSES, x)
    assert str(net.graph).count("nasfx.ops.average_pool") == 1


def test_sampled_candidates_are_rewritten_too() -> None:
    candidates = {"pool": nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Tanh()), "conv": conv(3)}
    model = nn.Sequential(LayerChoice(candidates, label="block")).double()
    net = assert_same(model, PASSES, strategy="single-path")
    assert str(net.graph).count("nasfx.ops.average_pool") == 1


@settings(max_examples=25)
@given(cells())
def test_random_supernets(model: nn.Module) -> None:
    assert_same(model, PASSES)
