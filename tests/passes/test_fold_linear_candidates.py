from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from nasfx.passes import (
    CheapenDepthwise,
    DropZeroCandidates,
    FoldLinearCandidates,
    FunctionalizeInplace,
    LowerWeightedSum,
    PropagateChannelsLast,
)
from torch import Tensor, nn

import nasfx
from nasfx import LayerChoice
from nasfx.rewriting.printing import format_graph
from tests.models import Zero
from tests.passes.conftest import Lower
from tests.passes.proof import assert_same

LOWERED = FunctionalizeInplace(), LowerWeightedSum()
PASSES = (FoldLinearCandidates(),)


def conv(k: int, d: int = 1, **options: object) -> nn.Conv2d:
    options = {"padding": d * (k // 2), "dilation": d, "bias": False, **options}
    return nn.Conv2d(4, 4, k, **options)  # type: ignore[arg-type]


def choice(**candidates: nn.Module) -> nn.Module:
    return nn.Sequential(LayerChoice(candidates, label="block"))


def test_kernels_are_summed_in_place_of_outputs(lower: Lower) -> None:
    gm, ctx = lower(choice(k3=conv(3), skip=nn.Identity(), k5=conv(5, bias=True)), *LOWERED)
    assert_expected_inline(
        format_graph(gm),
        """\
%input_1 = placeholder[input]
%arch_block = get_attr[arch.block]
%gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
%_0_k3 = call_module[0.k3](%input_1)
%_0_k5 = call_module[0.k5](%input_1)
%_0 = nasfx.ops.mix(%gate_block, [%_0_k3, %input_1, %_0_k5], label='block')
return %_0""",
    )
    assert FoldLinearCandidates()(gm, ctx).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%input_1 = placeholder[input]
%arch_block = get_attr[arch.block]
%gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
%_0_k3_weight = get_attr[0.k3.weight]
%_0_k5_weight = get_attr[0.k5.weight]
%_0_k5_bias = get_attr[0.k5.bias]
%folded_conv = nasfx.ops.folded_conv(%gate_block, [0, 2], %input_1, [%_0_k3_weight, %_0_k5_weight], [None, %_0_k5_bias], 1, 2, 1, 1)
%mix_1 = nasfx.ops.mix(%gate_block, [0, %input_1, 0], label='block')
%_0 = operator.add(%mix_1, %folded_conv)
return %_0""",  # noqa: E501
    )
    assert FoldLinearCandidates()(gm, ctx).modified is False
    assert not ctx.skips


def test_a_mixture_of_convolutions_alone_is_one(lower: Lower) -> None:
    gm, _ = lower(choice(k1=conv(1), k3=conv(3), none=Zero()), *LOWERED, DropZeroCandidates())
    assert FoldLinearCandidates()(gm, nasfx.rewriting.PassContext()).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%input_1 = placeholder[input]
%arch_block = get_attr[arch.block]
%gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
%_0_k1_weight = get_attr[0.k1.weight]
%_0_k3_weight = get_attr[0.k3.weight]
%_0 = nasfx.ops.folded_conv(%gate_block, [0, 1], %input_1, [%_0_k1_weight, %_0_k3_weight], [None, None], 1, 1, 1, 1)
return %_0""",  # noqa: E501
    )


def hooked() -> nn.Conv2d:
    made = conv(5)
    made.register_forward_hook(lambda module, inputs, output: None)
    return made


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (hooked(), "the module has hooks"),
        (conv(5, padding_mode="reflect"), "its padding is (2, 2) with reflect"),
        (nn.Conv2d(4, 4, (5, 3), padding=(2, 1)), "its height and width differ"),
        (nn.Conv2d(4, 4, 4, padding=1), "its kernel has no centre: it is 4 pixels wide"),
    ],
    ids=["hooks", "padding", "oblong", "even"],
)
def test_it_declines(other: nn.Module, reason: str, lower: Lower) -> None:
    gm, ctx = lower(choice(k3=conv(3), other=other), *LOWERED)
    before = format_graph(gm)
    assert FoldLinearCandidates()(gm, ctx).modified is False
    assert format_graph(gm) == before
    assert [(skip.node, skip.reason.startswith(reason)) for skip in ctx.skips] == [
        ("_0_other", True)
    ]


@pytest.mark.parametrize(
    "other",
    [conv(5, stride=2, padding=4), conv(5, d=2), conv(3, groups=2), conv(3, padding=0)],
    ids=["stride", "dilation", "groups", "centre"],
)
def test_convolutions_of_other_pixels_are_not_folded(other: nn.Module, lower: Lower) -> None:
    gm, ctx = lower(choice(k3=conv(3), other=other), *LOWERED)
    assert FoldLinearCandidates()(gm, ctx).modified is False
    assert not ctx.skips


def test_values_that_are_read_elsewhere_stay(lower: Lower) -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3), conv(5)
            self.op = nasfx.InputChoice(2, n_chosen=1, label="op")

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return self.op([a, b]) + b

    gm, ctx = lower(Read(), *LOWERED)
    assert "nasfx.ops.mix(" in format_graph(gm)
    assert FoldLinearCandidates()(gm, ctx).modified is False


Make = Callable[[], nn.Module]


@pytest.mark.parametrize(
    ("make", "folded"),
    [
        (lambda: choice(k3=conv(3), k5=conv(5), k7=conv(7), tanh=nn.Tanh()), 1),
        (lambda: choice(k1=conv(1, bias=True), k5=conv(5), k3=conv(3, bias=True)), 1),
        (lambda: choice(a=conv(3), b=conv(3, 2), c=conv(5, 2), d=conv(5), skip=nn.Identity()), 2),
        (lambda: choice(a=conv(3), b=conv(3, 2), c=conv(5, 2), d=conv(5)), 2),
        (lambda: choice(a=conv(3, groups=4), b=conv(5, groups=4), c=conv(1), none=Zero()), 1),
        (lambda: choice(a=conv(3, stride=2), b=conv(5, stride=2), pool=nn.MaxPool2d(2)), 1),
        (lambda: choice(a=conv(3, padding=2), b=conv(5, padding=3)), 1),
    ],
    ids=["kernels", "biases", "two", "two alone", "depthwise", "stride", "padding"],
)
@pytest.mark.parametrize("strategy", ["darts", "fbnet"])
def test_outputs_and_gradients(make: Make, folded: int, strategy: str) -> None:
    torch.manual_seed(0)
    others = DropZeroCandidates(), PropagateChannelsLast(), CheapenDepthwise()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for passes in (PASSES, (others[0], *PASSES, *others[1:])):
        net = assert_same(make().double(), passes, x, strategy)
        assert str(net.graph).count("nasfx.ops.folded_conv(") == folded


def test_it_is_among_the_passes_of_weighted_sums() -> None:
    net = nasfx.transform(choice(k3=conv(3), k5=conv(5)), "darts")
    assert "folded_conv" in str(net.graph)
    arch = nasfx.Architecture({"block": "k5"})
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(net.run_one_hot(arch, x), nasfx.finalize(net, arch)(x))
