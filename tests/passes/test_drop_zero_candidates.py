from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from nasfx.passes import DropZeroCandidates, FunctionalizeInplace, LowerWeightedSum
from torch import Tensor, nn

from nasfx import LayerChoice, SearchError
from nasfx.ops import mix
from nasfx.rewriting.printing import format_graph
from nasfx.spaces import blocks
from tests.models import DartsNet, Zero
from tests.passes.conftest import Lower
from tests.passes.proof import assert_same, cells, run, transformed

PASSES = (DropZeroCandidates(),)


class Written(nn.Module):
    """Zeros with one added: no zeros, though the product is one with 0."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 0
        y.add_(1)
        return y


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * 0


def choice(**candidates: nn.Module) -> nn.Module:
    return nn.Sequential(LayerChoice(candidates, label="block"))


def test_the_number_0_stands_for_zeros(lower: Lower) -> None:
    model = choice(none=Zero(), pool=nn.AvgPool2d(3, 1, 1), conv=nn.Conv2d(4, 4, 1))
    lowered = FunctionalizeInplace(), LowerWeightedSum()
    gm, ctx = lower(model, *lowered)
    assert_expected_inline(
        format_graph(gm),
        """\
%input_1 = placeholder[input]
%arch_block = get_attr[arch.block]
%gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
%mul = operator.mul(%input_1, 0)
%_0_pool = call_module[0.pool](%input_1)
%_0_conv = call_module[0.conv](%input_1)
%_0 = nasfx.ops.mix(%gate_block, [%mul, %_0_pool, %_0_conv], label='block')
return %_0""",
    )
    assert DropZeroCandidates()(gm, ctx).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%input_1 = placeholder[input]
%arch_block = get_attr[arch.block]
%gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
%_0_pool = call_module[0.pool](%input_1)
%_0_conv = call_module[0.conv](%input_1)
%_0 = nasfx.ops.mix(%gate_block, [0, %_0_pool, %_0_conv], label='block')
return %_0""",
    )
    assert DropZeroCandidates()(gm, ctx).modified is False
    assert not ctx.skips


class MadeInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0)


@pytest.mark.parametrize("zero", [Zero, MadeInPlace, lambda: blocks.Zero(1)])
def test_every_way_to_write_zeros(zero: Callable[[], nn.Module], lower: Lower) -> None:
    model = choice(none=zero(), tanh=nn.Tanh())
    gm, _ = lower(model, FunctionalizeInplace(), LowerWeightedSum(), DropZeroCandidates())
    assert "[0, %" in format_graph(gm)
    assert "mul" not in format_graph(gm)
    assert "clone" not in format_graph(gm)


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [
        ({"one": Zero(), "two": Zero()}, "all its candidates give zeros"),
        ({"tanh": nn.Tanh(), "w": Written()}, "written in place"),
        ({"tanh": nn.Tanh(), "c": Counted()}, "nothing else reads what they are made of"),
    ],
)
def test_it_declines(candidates: dict[str, nn.Module], reason: str, lower: Lower) -> None:
    model = choice(**candidates)
    gm, ctx = lower(model, FunctionalizeInplace(), LowerWeightedSum())
    assert DropZeroCandidates()(gm, ctx).modified is False
    assert [skip.node for skip in ctx.skips] == ["_0"]
    assert reason in ctx.skips[0].reason
    assert_same(model.double(), PASSES)


def test_the_weight_of_zeros_counts_and_learns() -> None:
    linear = nn.Linear(5, 5).double()
    net = transformed(choice(none=Zero(), linear=linear), PASSES)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    weight = net.arch_parameters()[0].softmax(0)[1].item()
    outputs, grads, _ = run(net, x)
    torch.testing.assert_close(outputs["0"], weight * linear(x).detach(), rtol=1e-13, atol=1e-13)
    none, other = grads["arch.block"].tolist()
    assert abs(none) > 1e-3
    assert none == pytest.approx(-other, rel=1e-12)


def test_the_number_0_is_a_whole_output_and_no_item_of_one() -> None:
    gate, x = torch.tensor([0.25, 0.75]), torch.ones(2)
    assert mix(gate, [0, x]).tolist() == [0.75, 0.75]
    with pytest.raises(SearchError, match="needs outputs of one shape"):
        mix(gate, [(x, x), (x, 0)])


def test_a_darts_net() -> None:
    net = assert_same(DartsNet().double(), PASSES)
    assert "mul" not in str(net.graph)


@settings(max_examples=40)
@given(cells())
def test_random_supernets(model: nn.Module) -> None:
    assert_same(model, PASSES)
