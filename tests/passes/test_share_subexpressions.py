from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from hypothesis import given, settings
from nasfx.passes import FunctionalizeInplace, LowerWeightedSum, ShareSubexpressions
from torch import Tensor, nn

import nasfx
from nasfx import LayerChoice
from nasfx.rewriting.graph import ModelGraph
from nasfx.rewriting.passes import PassContext
from nasfx.rewriting.printing import format_graph
from nasfx.spaces.blocks import FactorizedReduction, relu_conv_bn
from tests.passes.conftest import Lower
from tests.passes.proof import assert_same, cells, pool_bn

LOWERED = FunctionalizeInplace(), LowerWeightedSum()
PASSES = (ShareSubexpressions(),)


class Two(nn.Module):
    """Two edges from one state."""

    def __init__(self, make: Callable[[], dict[str, nn.Module]]) -> None:
        super().__init__()
        self.a = LayerChoice(make(), label="a")
        self.b = LayerChoice(make(), label="b")

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def edge() -> dict[str, nn.Module]:
    return {
        "conv": nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)),
        "max": nn.MaxPool2d(3, 1, 1),
        "reduced": nn.Sequential(nn.ReLU(), nn.AvgPool2d(3, 1, 1)),
    }


def test_equal_calls_become_one_across_candidates_and_edges(lower: Lower) -> None:
    gm, ctx = lower(Two(edge), *LOWERED)
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%arch_a = get_attr[arch.a]
%gate_a = nasfx.ops.softmax_gate(%arch_a, label='a')
%arch_b = get_attr[arch.b]
%gate_b = nasfx.ops.softmax_gate(%arch_b, label='b')
%a_conv_0 = call_module[a.conv.0](%x)
%a_conv_1 = call_module[a.conv.1](%a_conv_0)
%a_max = call_module[a.max](%x)
%a_reduced_0 = call_module[a.reduced.0](%x)
%a_reduced_1 = call_module[a.reduced.1](%a_reduced_0)
%a = nasfx.ops.mix(%gate_a, [%a_conv_1, %a_max, %a_reduced_1], label='a')
%b_conv_0 = call_module[b.conv.0](%x)
%b_conv_1 = call_module[b.conv.1](%b_conv_0)
%b_max = call_module[b.max](%x)
%b_reduced_0 = call_module[b.reduced.0](%x)
%b_reduced_1 = call_module[b.reduced.1](%b_reduced_0)
%b = nasfx.ops.mix(%gate_b, [%b_conv_1, %b_max, %b_reduced_1], label='b')
%add = operator.add(%a, %b)
return %add""",
    )
    assert ShareSubexpressions()(gm, ctx).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%arch_a = get_attr[arch.a]
%gate_a = nasfx.ops.softmax_gate(%arch_a, label='a')
%arch_b = get_attr[arch.b]
%gate_b = nasfx.ops.softmax_gate(%arch_b, label='b')
%a_conv_0 = call_module[a.conv.0](%x)
%a_conv_1 = call_module[a.conv.1](%a_conv_0)
%a_max = call_module[a.max](%x)
%a_reduced_1 = call_module[a.reduced.1](%a_conv_0)
%a = nasfx.ops.mix(%gate_a, [%a_conv_1, %a_max, %a_reduced_1], label='a')
%b_conv_1 = call_module[b.conv.1](%a_conv_0)
%b = nasfx.ops.mix(%gate_b, [%b_conv_1, %a_max, %a_reduced_1], label='b')
%add = operator.add(%a, %b)
return %add""",
    )
    assert ShareSubexpressions()(gm, ctx).modified is False
    assert not ctx.skips


def calls(model: nn.Module, kind: type[nn.Module], lower: Lower) -> int:
    gm, _ = lower(model, *LOWERED, *PASSES)
    modules = [gm.get_submodule(str(n.target)) for n in gm.graph.find_nodes(op="call_module")]
    return sum(isinstance(module, kind) for module in modules)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1, ceil_mode=True)),
        (nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
        (nn.LeakyReLU(0), nn.LeakyReLU(False)),
        (nn.Dropout(0.5), nn.Dropout(0.5)),
        (nn.RReLU(), nn.RReLU()),
        (nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
        (nn.PReLU(), nn.PReLU()),
    ],
    ids=str,
)
def test_modules_that_differ_draw_or_have_tensors_stay(
    first: nn.Module, second: nn.Module, lower: Lower
) -> None:
    model = nn.Sequential(LayerChoice({"a": first, "b": second, "c": nn.Tanh()}, label="x"))
    assert calls(model, type(first), lower) == 2


def functions(code: Callable[[Tensor], Any]) -> tuple[ModelGraph, PassContext, bool]:
    class Code(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

        def forward(self, x: Tensor) -> Any:
            return code(x) if code.__code__.co_argcount == 1 else code(self.weight, x)

    gm = nasfx.trace(Code()).graph_module
    ctx = PassContext()
    return gm, ctx, ShareSubexpressions()(gm, ctx).modified


SHARED: list[Callable[[Tensor], Any]] = [
    lambda x: F.relu(x) - F.relu(x) * 2,
    lambda x: torch.relu(x).sum() - torch.relu(x).sum() * 2,
    lambda x: x[:, 1:].neg() + x[:, 1:].neg() * 3,
    lambda x: x.mean(1, keepdim=True).exp() + x.mean(1, keepdim=True).exp() * 3,
    lambda x: torch.cat([x, x * 2]).tanh() + torch.cat([x, x * 2]).tanh() * 3,
]


@pytest.mark.parametrize("code", SHARED)
def test_functions_and_methods_are_shared(code: Callable[[Tensor], Any]) -> None:
    gm, ctx, changed = functions(code)
    assert changed
    assert not ctx.skips
    x = torch.randn(3, 4)
    assert torch.equal(gm(x), code(x))


STAY: list[Callable[[Tensor], Any]] = [
    lambda x: (x * 2).neg() + (x * 2.0).neg(),
    lambda x: x[0] + x[1],
    lambda x: F.dropout(x, 0.5) + F.dropout(x, 0.5),
    lambda x: torch.rand_like(x) + torch.rand_like(x),
    lambda x: x.new_zeros(2) + x.new_zeros(2),
]


@pytest.mark.parametrize("code", STAY)
def test_what_differs_or_is_not_known_to_be_pure_stays(code: Callable[[Tensor], Any]) -> None:
    _, ctx, changed = functions(code)
    assert not changed
    assert not ctx.skips


def written_between(x: Tensor) -> Tensor:
    y = x * 3
    a = torch.relu(y)
    y.add_(1)
    return a - torch.relu(y) * 2


def one_is_written(x: Tensor) -> Tensor:
    a, b = torch.relu(x), torch.relu(x)
    a.view(-1).mul_(2)
    return a - b


def both_returned(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu(x), torch.relu(x).view(-1)


def of_a_parameter(weight: Tensor, x: Tensor) -> Tensor:
    return torch.relu(weight) + x * torch.relu(weight)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (written_between, "written in place"),
        (one_is_written, "written in place"),
        (both_returned, "it is returned"),
        (of_a_parameter, "reads a tensor of the model"),
    ],
)
def test_it_declines(code: Callable[..., Any], reason: str) -> None:
    gm, ctx, changed = functions(code)
    assert not changed
    assert any(reason in skip.reason for skip in ctx.skips)
    if code is not of_a_parameter:
        x = torch.randn(2, 2)
        for found, expected in zip(gm(x.clone()), code(x), strict=True):
            assert torch.equal(found, expected)


def test_a_module_with_hooks_is_called_each_time(lower: Lower) -> None:
    model = Two(edge)
    assert isinstance(model.b.max, nn.MaxPool2d)
    model.b.max.register_forward_hook(lambda module, inputs, output: None)
    gm, ctx = lower(model, *LOWERED)
    ShareSubexpressions()(gm, ctx)
    assert [(skip.node, skip.reason) for skip in ctx.skips] == [
        ("b_max", "it equals %a_max, but the module has hooks")
    ]
    assert "call_module[b.max]" in format_graph(gm)


def test_the_relu_of_a_reduction_and_its_shifted_view_are_shared() -> None:
    class Reduce(Two):
        def __init__(self) -> None:
            super().__init__(
                lambda: {"skip": FactorizedReduction(4, 4), "conv": relu_conv_bn(4, 4, 3, 2)}
            )

    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    net = assert_same(Reduce().double(), PASSES, x)
    kinds = [type(net.get_submodule(str(n.target))) for n in net.graph.find_nodes(op="call_module")]
    assert kinds.count(nn.ReLU) == 1
    assert str(net.graph).count("operator.getitem(") == 1


def test_pools_with_batch_norms() -> None:
    edges = lambda: {"a": pool_bn(nn.MaxPool2d), "b": pool_bn(nn.AvgPool2d)}  # noqa: E731
    net = assert_same(Two(edges).double(), PASSES)
    targets = [str(n.target) for n in net.graph.find_nodes(op="call_module")]
    assert sorted(targets) == ["a.a.0", "a.a.1", "a.b.0", "a.b.1", "b.a.1", "b.b.1"]


@pytest.mark.parametrize("strategy", ["darts", "fbnet"])
@settings(max_examples=25)
@given(cells())
def test_random_supernets(strategy: str, model: nn.Module) -> None:
    assert_same(model, PASSES, strategy=strategy)
