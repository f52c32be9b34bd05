from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from nasfx.passes import FunctionalizeInplace, LowerWeightedSum, PropagateChannelsLast
from torch import Tensor, nn

import nasfx
from nasfx import LayerChoice
from nasfx.ops import channels_last
from nasfx.rewriting.passes import PassContext
from nasfx.rewriting.printing import format_graph
from tests.models import Block, DartsNet, conv_bn
from tests.passes.conftest import Lower
from tests.passes.proof import assert_same, cells

LOWERED = FunctionalizeInplace(), LowerWeightedSum()
PASSES = (PropagateChannelsLast(),)


class Viewed(nn.Module):
    """An input without images, a view that needs its input in rows, and images given back."""

    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice({"conv": conv_bn(), "skip": nn.Identity()}, label="op")

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        y = self.op(x) * scale
        return y, y.view(x.size(0), -1)


def test_a_node_per_input_that_reaches_a_convolution(lower: Lower) -> None:
    gm, ctx = lower(Viewed(), *LOWERED)
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%scale = placeholder[scale]
%arch_op = get_attr[arch.op]
%gate_op = nasfx.ops.softmax_gate(%arch_op, label='op')
%op_conv_0 = call_module[op.conv.0](%x)
%op_conv_1 = call_module[op.conv.1](%op_conv_0)
%op_conv_2 = call_module[op.conv.2](%op_conv_1)
%op = nasfx.ops.mix(%gate_op, [%op_conv_2, %x], label='op')
%mul = operator.mul(%op, %scale)
%size = call_method[size](%x, 0)
%view = call_method[view](%mul, %size, -1)
return (%mul, %view)""",
    )
    assert PropagateChannelsLast()(gm, ctx).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%scale = placeholder[scale]
%x_last = nasfx.ops.channels_last(%x)
%arch_op = get_attr[arch.op]
%gate_op = nasfx.ops.softmax_gate(%arch_op, label='op')
%op_conv_0 = call_module[op.conv.0](%x_last)
%op_conv_1 = call_module[op.conv.1](%op_conv_0)
%op_conv_2 = call_module[op.conv.2](%op_conv_1)
%op = nasfx.ops.mix(%gate_op, [%op_conv_2, %x_last], label='op')
%mul = operator.mul(%op, %scale)
%size = call_method[size](%x_last, 0)
%view = call_method[reshape](%mul, %size, -1)
%mul_first = call_method[contiguous](%mul)
%view_first = call_method[contiguous](%view)
return (%mul_first, %view_first)""",
    )
    first, second = gm(torch.randn(2, 4, 5, 5), torch.ones(()))
    assert first.is_contiguous()
    assert second.is_contiguous()


class Rows(nn.Module):
    """A candidate with a view that its input's rows allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).view(x.size(0), -1).view(x.shape)


SAMPLED = ["single-path", "proxyless"]


def rows() -> nn.Module:
    return nn.Sequential(LayerChoice({"rows": Rows(), "skip": nn.Identity()}, label="op"))


def test_graphs_of_candidates_are_part_of_it() -> None:
    history = nasfx.transform(rows(), "single-path", optimize=PASSES).history
    assert_expected_inline(
        history.text(len(history) - 1),
        """\
%input_1 = placeholder[input]
%input_1_last = nasfx.ops.channels_last(%input_1)
%drawn_op = call_module[arch]('op')
%_0 = call_module[0](%drawn_op, (%input_1_last,), {}, {})
    rows(%x):
        %conv = call_module[conv](%x)
        %size = call_method[size](%x, 0)
        %view = call_method[reshape](%conv, %size, -1)
        %getattr_1 = getattr(%x, 'shape')
        %view_1 = call_method[reshape](%view, %getattr_1)
        return %view_1
    skip: Identity
%_0_first = call_method[contiguous](%_0)
return %_0_first""",
    )


@pytest.mark.parametrize("strategy", SAMPLED)
def test_candidates_compute_what_they_did(strategy: str) -> None:
    net = nasfx.transform(rows(), strategy, optimize=PASSES)
    x = torch.randn(2, 4, 5, 5)
    with net.forced({"op": "rows"}):
        expected = net(x)
    for _ in range(8):  # both candidates, in all likelihood
        out = net(x)
        assert out.is_contiguous()
        torch.testing.assert_close(out, x if net.path["op"] == "skip" else expected)


@pytest.mark.parametrize("strategy", SAMPLED)
def test_it_declines_candidates_that_are_not_taken_apart(strategy: str) -> None:
    model = nn.Sequential(LayerChoice({"own": Code(torch.relu), "skip": nn.Identity()}))
    net = nasfx.transform(model, strategy, optimize=PASSES, leaf_modules=[Code])
    (skip,) = net.history.records[-1].skips
    assert skip.reason == "Code is not taken apart, so it may ask how tensors lie"
    rows = nn.Sequential(LayerChoice({"own": Code(lambda x: x * x.stride(0)), "id": nn.Identity()}))
    (skip,) = nasfx.transform(rows, strategy, optimize=PASSES).history.records[-1].skips
    assert skip.reason.startswith("stride depends on how")


@pytest.mark.parametrize("strategy", ["darts", *SAMPLED])
def test_every_value_between_lies_channels_last(strategy: str) -> None:
    net = nasfx.transform(Block(), strategy, optimize=PASSES)
    seen: list[bool] = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(
                lambda m, i, o: seen.append(o.is_contiguous(memory_format=torch.channels_last))
            )
    for _ in range(4):
        net(torch.randn(2, 4, 5, 5))
    assert len(seen) > 4
    assert all(seen)
    weights = [p for p in net.parameters() if p.dim() == 4]
    assert all(p.is_contiguous() for p in weights)


class Code(nn.Module):
    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.code = nn.Conv2d(4, 4, 1), code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self.conv(x))


def written(x: Tensor) -> Tensor:
    y = x * 2
    y.view(-1).add_(1)
    return y


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (lambda x: x.as_strided((2, 2), (1, 1)), "as_strided depends on how"),
        (lambda x: x * x.stride(0), "stride depends on how"),
        (written, "a view is written in place"),
        (lambda x: x.view(torch.int32), "a view of another type"),
    ],
)
def test_it_declines_code_that_asks_how_tensors_lie(
    code: Callable[[Tensor], Tensor], reason: str
) -> None:
    gm, ctx = nasfx.trace(Code(code)).graph_module, PassContext()
    assert PropagateChannelsLast()(gm, ctx).modified is False
    assert [reason in skip.reason for skip in ctx.skips] == [True]


def test_it_declines_modules_that_are_not_taken_apart() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Code(torch.relu))
    gm, ctx = nasfx.trace(model, leaf_modules=[Code]).graph_module, PassContext()
    assert PropagateChannelsLast()(gm, ctx).modified is False
    assert [(s.node, s.reason) for s in ctx.skips] == [
        ("_1", "Code is not taken apart, so it may ask how tensors lie")
    ]


def test_it_declines_other_devices() -> None:
    gm, ctx = (
        nasfx.trace(nn.Sequential(nn.Conv2d(4, 4, 1, device="meta"))).graph_module,
        PassContext(),
    )
    assert PropagateChannelsLast()(gm, ctx).modified is False
    assert [(s.node, s.reason) for s in ctx.skips] == [
        ("input_1", "the model is on meta, not on a CPU")
    ]


def test_without_convolutions_there_is_nothing_to_do(lower: Lower) -> None:
    model = nn.Sequential(LayerChoice({"pool": nn.AvgPool2d(2), "max": nn.MaxPool2d(2)}))
    gm, ctx = lower(model, *LOWERED, *PASSES)
    assert "channels_last" not in format_graph(gm)
    assert not ctx.skips


def test_the_function_leaves_what_is_no_image() -> None:
    for x in (torch.randn(2, 3), torch.ones(1, 2, 3, 4, dtype=torch.int64)):
        assert channels_last(x) is x
    y = channels_last(torch.randn(2, 3, 4, 4))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert channels_last(torch.empty(1, 2, 3, 4, device="meta")).is_contiguous()


def test_a_darts_net() -> None:
    assert_same(DartsNet().double(), PASSES)


@settings(max_examples=25)
@given(cells())
def test_random_supernets(model: nn.Module) -> None:
    assert_same(model, PASSES)


@pytest.mark.parametrize("strategy", SAMPLED)
@settings(max_examples=15)
@given(model=cells())
def test_random_supernets_of_sampled_paths(strategy: str, model: nn.Module) -> None:
    assert_same(model, PASSES, strategy=strategy)
