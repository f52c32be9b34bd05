from collections.abc import Callable

import pytest
from expecttest import assert_expected_inline
from hypothesis import given, settings
from nasfx.passes import (
    DropZeroCandidates,
    FoldGatesIntoNorms,
    FunctionalizeInplace,
    LowerWeightedSum,
    PropagateChannelsLast,
)
from torch import Tensor, nn

from nasfx import LayerChoice
from nasfx.rewriting.printing import format_graph
from tests.models import Zero, conv
from tests.passes.conftest import Lower
from tests.passes.proof import assert_same, cells

LOWERED = FunctionalizeInplace(), LowerWeightedSum()
PASSES = (FoldGatesIntoNorms(),)
Make = Callable[[], nn.Module]


def bn(**options: bool) -> nn.Module:
    return nn.Sequential(conv(1), nn.BatchNorm2d(4, **options))  # type: ignore[arg-type]


def choice(**candidates: nn.Module) -> nn.Module:
    return nn.Sequential(LayerChoice(candidates, label="block"))


def test_batch_norms_become_operands_of_the_mixture(lower: Lower) -> None:
    model = choice(conv=bn(), skip=nn.Identity())
    gm, ctx = lower(model, *LOWERED)
    assert_expected_inline(
        format_graph(gm),
        """\
%input_1 = placeholder[input]
%arch_block = get_attr[arch.block]
%gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
%_0_conv_0 = call_module[0.conv.0](%input_1)
%_0_conv_1 = call_module[0.conv.1](%_0_conv_0)
%_0 = nasfx.ops.mix(%gate_block, [%_0_conv_1, %input_1], label='block')
return %_0""",
    )
    assert FoldGatesIntoNorms()(gm, ctx).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%input_1 = placeholder[input]
%arch_block = get_attr[arch.block]
%gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
%_0_conv_0 = call_module[0.conv.0](%input_1)
%_0_conv_2 = get_attr[0.conv.1]
%_0 = nasfx.ops.mix_norms(%gate_block, [%_0_conv_0, %input_1], [%_0_conv_2, None], label='block')
return %_0""",
    )
    assert FoldGatesIntoNorms()(gm, ctx).modified is False
    assert not ctx.skips


def hooked() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.register_forward_hook(lambda module, inputs, output: None)
    return norm


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (hooked(), "the batch norm has hooks"),
        (nn.BatchNorm2d(4, momentum=None), "BatchNorm2d is no plain batch norm with a momentum"),
        (nn.SyncBatchNorm(4), "SyncBatchNorm is no plain batch norm with a momentum"),
    ],
    ids=["hooks", "momentum", "kind"],
)
def test_it_declines(norm: nn.Module, reason: str, lower: Lower) -> None:
    gm, ctx = lower(choice(norm=norm, tanh=nn.Tanh()), *LOWERED)
    assert FoldGatesIntoNorms()(gm, ctx).modified is False
    assert [(skip.node, skip.reason) for skip in ctx.skips] == [("_0_norm", reason)]


def test_a_batch_norm_that_is_read_elsewhere_stays() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.op = LayerChoice({"skip": nn.Identity(), "conv": conv()}, label="op")

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.op(y) + y

    net = assert_same(Read().double(), PASSES)
    assert "mix_norms" not in str(net.graph)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bn(),
        lambda: bn(bias=False),
        lambda: bn(affine=False),
        lambda: bn(track_running_stats=False),
        lambda: bn(affine=False, track_running_stats=False),
    ],
    ids=["affine", "gain", "plain", "untracked", "plain untracked"],
)
@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels-last"])
@pytest.mark.parametrize("strategy", ["darts", "fbnet"])
def test_every_form_of_batch_norm(make: Make, last: bool, strategy: str) -> None:
    model = choice(none=Zero(), a=make(), b=make(), pool=nn.AvgPool2d(3, 1, 1)).double()
    for p in model.parameters():
        nn.init.normal_(p)
    layout = (PropagateChannelsLast(),) if last else ()
    net = assert_same(model, (DropZeroCandidates(), *PASSES, *layout), strategy=strategy)
    assert "mix_norms" in str(net.graph)


def test_of_own_gains_alone(lower: Lower) -> None:
    gm, ctx = lower(choice(own=bn(), plain=bn(affine=False)), *LOWERED)
    assert FoldGatesIntoNorms(own_gain=True)(gm, ctx).modified is True
    folded = "mix_norms(%gate_block, [%_0_own_0, %_0_plain_1], [%_0_own_2, None]"
    assert folded in format_graph(gm)
    assert not ctx.skips


def test_the_order_of_the_batches_of_one_module_stays(lower: Lower) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = LayerChoice({"bn": bn(), "skip": nn.Identity()}, label="op")

        def forward(self, x: Tensor) -> Tensor:
            return self.op(self.op(x))

    assert_same(Again().double(), PASSES)
    gm, ctx = lower(Again(), *LOWERED, *PASSES)
    assert "mix_norms" not in format_graph(gm)
    assert all("called more than once" in skip.reason for skip in ctx.skips)


@settings(max_examples=25)
@given(cells())
def test_random_supernets(model: nn.Module) -> None:
    assert_same(model, PASSES)
