import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from nasfx.passes import CheapenDepthwise, FunctionalizeInplace, LowerWeightedSum
from torch import Tensor, nn

from nasfx import LayerChoice
from nasfx.rewriting.printing import format_graph
from nasfx.spaces.blocks import dilated_conv, separable_conv
from tests.passes.conftest import Lower
from tests.passes.proof import assert_same, cells

LOWERED = FunctionalizeInplace(), LowerWeightedSum()
PASSES = (CheapenDepthwise(),)


def wide(**options: object) -> nn.Conv2d:
    return nn.Conv2d(4, 4, **({"kernel_size": 5, "padding": 2, "groups": 4} | options))  # type: ignore[arg-type]


def choice(conv: nn.Module) -> nn.Module:
    return nn.Sequential(LayerChoice({"conv": conv, "skip": nn.Identity()}, label="block"))


def test_wide_and_dilated_kernels_become_functions(lower: Lower) -> None:
    gm, ctx = lower(
        nn.Sequential(choice(wide()), wide(bias=False, padding=4, dilation=2)), *LOWERED
    )
    assert_expected_inline(
        format_graph(gm),
        """\
%input_1 = placeholder[input]
%arch_block = get_attr[arch.block]
%gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
%_0_0_conv = call_module[0.0.conv](%input_1)
%_0_0 = nasfx.ops.mix(%gate_block, [%_0_0_conv, %input_1], label='block')
%_1 = call_module[1](%_0_0)
return %_1""",
    )
    assert CheapenDepthwise()(gm, ctx).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%input_1 = placeholder[input]
%arch_block = get_attr[arch.block]
%gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
%_0_0_conv_weight = get_attr[0.0.conv.weight]
%_0_0_conv_bias = get_attr[0.0.conv.bias]
%_0_0_conv = nasfx.ops.depthwise_conv(%input_1, %_0_0_conv_weight, %_0_0_conv_bias, 1, 2, 1)
%_0_0 = nasfx.ops.mix(%gate_block, [%_0_0_conv, %input_1], label='block')
%_1_weight = get_attr[1.weight]
%_1 = nasfx.ops.depthwise_conv(%_0_0, %_1_weight, None, 1, 4, 2)
return %_1""",
    )
    assert CheapenDepthwise()(gm, ctx).modified is False
    assert not ctx.skips


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, 1, 1, groups=4),
        nn.Conv2d(4, 4, 5, 1, 2, groups=2),
        nn.Conv2d(4, 8, 5, 1, 2, groups=4),
        nn.Conv2d(4, 4, 5, 1, 2),
    ],
    ids=str,
)
def test_others_stay_without_a_word(conv: nn.Module, lower: Lower) -> None:
    gm, ctx = lower(nn.Sequential(choice(nn.Tanh()), conv), *LOWERED)
    assert CheapenDepthwise()(gm, ctx).modified is False
    assert not ctx.skips


def hooked() -> nn.Module:
    conv = wide()
    conv.register_forward_hook(lambda module, inputs, output: None)
    return conv


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (hooked(), "the module has hooks"),
        (wide(padding="same"), "its padding is 'same' with zeros"),
        (wide(padding_mode="reflect"), "its padding is (2, 2) with reflect"),
        (wide(kernel_size=(5, 3)), "its height and width differ"),
        (wide(stride=(1, 2)), "its height and width differ"),
        (wide(device="meta"), "it is on meta, not on a CPU"),
    ],
    ids=["hooks", "same", "reflect", "kernel", "stride", "device"],
)
def test_it_declines(conv: nn.Module, reason: str, lower: Lower) -> None:
    gm, ctx = lower(nn.Sequential(choice(nn.Tanh()), conv), *LOWERED)
    assert CheapenDepthwise()(gm, ctx).modified is False
    assert [skip.node for skip in ctx.skips] == ["_1"]
    assert ctx.skips[0].reason.startswith(reason)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 9])
def test_the_operators_of_darts(stride: int, size: int) -> None:
    edge = {
        "sep3": separable_conv(4, 3, stride, affine=False),
        "sep5": separable_conv(4, 5, stride, affine=False),
        "dil3": dilated_conv(4, 3, stride, affine=False),
        "dil5": dilated_conv(4, 5, stride, affine=False),
    }
    x = torch.randn(2, 4, size, size, dtype=torch.float64)
    net = assert_same(nn.Sequential(LayerChoice(edge, label="edge")).double(), PASSES, x)
    assert str(net.graph).count("nasfx.ops.depthwise_conv") == 4


def test_a_module_called_twice_has_one_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = choice(wide())

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    net = assert_same(Twice().double(), PASSES)
    assert str(net.graph).count("get_attr[conv.0.conv.weight]") == 1


def test_sampled_candidates_are_rewritten_too() -> None:
    candidates = {
        "wide": nn.Sequential(wide(), nn.Tanh()),
        "nested": nn.Sequential(
            LayerChoice(
                {"dilated": nn.Sequential(wide(padding=4, dilation=2)), "b": nn.Tanh()},
                label="inner",
            ),
            wide(),
        ),
    }
    model = nn.Sequential(LayerChoice(candidates, label="block")).double()
    net = assert_same(model, PASSES, strategy="single-path")
    assert str(net.graph).count("nasfx.ops.depthwise_conv") == 3


@settings(max_examples=25)
@given(cells())
def test_random_supernets(model: nn.Module) -> None:
    assert_same(model, PASSES)
