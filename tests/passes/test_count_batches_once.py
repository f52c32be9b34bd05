import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from nasfx.passes import (
    CountBatchesOnce,
    FoldGatesIntoNorms,
    FunctionalizeInplace,
    LowerWeightedSum,
    RemoveDeadCode,
    ShareNorms,
    ShareSubexpressions,
)
from torch import nn

import nasfx
from nasfx import LayerChoice
from nasfx.rewriting.passes import Pass
from nasfx.rewriting.printing import format_graph
from tests.models import conv
from tests.passes.conftest import Lower
from tests.passes.proof import assert_same, cells, pool_bn

LOWERED = FunctionalizeInplace(), LowerWeightedSum()
SHARED = ShareSubexpressions(), ShareNorms(), FoldGatesIntoNorms(own_gain=True)


def model() -> nn.Module:
    candidates = {
        "a": pool_bn(nn.MaxPool2d),
        "b": pool_bn(nn.MaxPool2d),
        "conv": nn.Sequential(conv(1), nn.BatchNorm2d(4)),
    }
    return nn.Sequential(LayerChoice(candidates, label="block"), nn.BatchNorm2d(4))


def test_one_call_counts_for_all(lower: Lower) -> None:
    gm, ctx = lower(model(), *LOWERED, *SHARED)
    assert CountBatchesOnce()(gm, ctx).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%input_1 = placeholder[input]
%arch_block = get_attr[arch.block]
%gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
%_0_a_0 = call_module[0.a.0](%input_1)
%_0_a_2 = get_attr[0.a.1]
%_0_b_2 = get_attr[0.b.1]
%shared_norms = nasfx.ops.shared_norms(%_0_a_0, [%_0_a_2, %_0_b_2], counted=False)
%_0_a_1 = operator.getitem(%shared_norms, 0)
%_0_b_1 = operator.getitem(%shared_norms, 1)
%_0_conv_0 = call_module[0.conv.0](%input_1)
%_0_conv_2 = get_attr[0.conv.1]
%_0 = nasfx.ops.mix_norms(%gate_block, [%_0_a_1, %_0_b_1, %_0_conv_0], [None, None, %_0_conv_2], label='block', counted=False)
%_1_4 = get_attr[1]
%_1 = nasfx.ops.uncounted_norm(%_0, %_1_4)
%count_batches_ = nasfx.ops.count_batches_(%_1_4, %_0_a_2, %_0_b_2, %_0_conv_2)
return %_1""",  # noqa: E501
    )
    assert CountBatchesOnce()(gm, ctx).modified is False
    assert not ctx.skips
    before = format_graph(gm)
    assert RemoveDeadCode()(gm, ctx).modified is False
    assert format_graph(gm) == before


@pytest.mark.parametrize("others", [(), SHARED], ids=["alone", "with-shared-norms"])
def test_the_bits_and_the_counts_are_the_same(others: tuple[Pass, ...]) -> None:
    assert_same(model().double(), (*others, CountBatchesOnce()))
    net = nasfx.transform(model(), "darts", optimize=[*others, CountBatchesOnce()])
    x = torch.randn(2, 4, 5, 5)
    for training in (True, False, True):
        net.train(training)(x)
    counts = [v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")]
    assert [int(count) for count in counts] == [2, 2, 2, 2]


def hooked() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.register_forward_hook(lambda module, inputs, output: None)
    return norm


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (hooked(), "the batch norm has hooks"),
        (nn.BatchNorm2d(4, momentum=None), "BatchNorm2d is no plain batch norm with a momentum"),
    ],
    ids=["hooks", "momentum"],
)
def test_it_declines(norm: nn.Module, reason: str, lower: Lower) -> None:
    choice = LayerChoice({"tanh": nn.Tanh(), "skip": nn.Identity()}, label="block")
    gm, ctx = lower(nn.Sequential(choice, norm), *LOWERED)
    assert CountBatchesOnce()(gm, ctx).modified is False
    assert [(skip.node, skip.reason) for skip in ctx.skips] == [("_1", reason)]


@settings(max_examples=25)
@given(cells())
def test_random_supernets(model: nn.Module) -> None:
    assert_same(model, (*SHARED, CountBatchesOnce()))
