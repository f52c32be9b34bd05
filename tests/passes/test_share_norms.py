from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from nasfx.passes import FunctionalizeInplace, LowerWeightedSum, ShareNorms, ShareSubexpressions
from torch import Tensor, nn

from nasfx import LayerChoice
from nasfx.rewriting.printing import format_graph
from tests.passes.conftest import Lower
from tests.passes.proof import assert_same, cells, pool_bn, run, transformed
from tests.passes.test_share_subexpressions import Two

LOWERED = FunctionalizeInplace(), LowerWeightedSum()
PASSES = ShareSubexpressions(), ShareNorms()


def pools() -> dict[str, nn.Module]:
    return {"max": pool_bn(nn.MaxPool2d), "id": nn.Identity()}


def test_batch_norms_of_one_value(lower: Lower) -> None:
    gm, ctx = lower(Two(pools), *LOWERED, ShareSubexpressions())
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%arch_a = get_attr[arch.a]
%gate_a = nasfx.ops.softmax_gate(%arch_a, label='a')
%arch_b = get_attr[arch.b]
%gate_b = nasfx.ops.softmax_gate(%arch_b, label='b')
%a_max_0 = call_module[a.max.0](%x)
%a_max_1 = call_module[a.max.1](%a_max_0)
%a = nasfx.ops.mix(%gate_a, [%a_max_1, %x], label='a')
%b_max_1 = call_module[b.max.1](%a_max_0)
%b = nasfx.ops.mix(%gate_b, [%b_max_1, %x], label='b')
%add = operator.add(%a, %b)
return %add""",
    )
    assert ShareNorms()(gm, ctx).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%arch_a = get_attr[arch.a]
%gate_a = nasfx.ops.softmax_gate(%arch_a, label='a')
%arch_b = get_attr[arch.b]
%gate_b = nasfx.ops.softmax_gate(%arch_b, label='b')
%a_max_0 = call_module[a.max.0](%x)
%a_max_2 = get_attr[a.max.1]
%b_max_2 = get_attr[b.max.1]
%shared_norms = nasfx.ops.shared_norms(%a_max_0, [%a_max_2, %b_max_2])
%a_max_1 = operator.getitem(%shared_norms, 0)
%b_max_1 = operator.getitem(%shared_norms, 1)
%a = nasfx.ops.mix(%gate_a, [%a_max_1, %x], label='a')
%b = nasfx.ops.mix(%gate_b, [%b_max_1, %x], label='b')
%add = operator.add(%a, %b)
return %add""",
    )
    assert ShareNorms()(gm, ctx).modified is False
    assert not ctx.skips


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
        (nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, affine=False, eps=1e-3)),
        (nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, affine=False, momentum=0.2)),
        (nn.BatchNorm2d(4, affine=False), nn.InstanceNorm2d(4)),
    ],
    ids=["gain", "eps", "momentum", "kind"],
)
def test_others_stay(first: nn.Module, second: nn.Module, lower: Lower) -> None:
    model = nn.Sequential(LayerChoice({"a": first, "b": second}, label="x"))
    gm, ctx = lower(model, *LOWERED)
    assert ShareNorms()(gm, ctx).modified is False
    assert not ctx.skips


def hooked() -> nn.Module:
    norm = nn.BatchNorm2d(4, affine=False)
    norm.register_forward_hook(lambda module, inputs, output: None)
    return norm


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (hooked, "the batch norm has hooks"),
        (
            lambda: nn.BatchNorm2d(4, momentum=None, affine=False),
            "BatchNorm2d is no plain batch norm with a momentum",
        ),
    ],
    ids=["hooks", "average"],
)
def test_it_declines(make: Callable[[], nn.Module], reason: str, lower: Lower) -> None:
    model = Two(lambda: {"a": make(), "id": nn.Identity()})
    gm, ctx = lower(model, *LOWERED)
    assert ShareNorms()(gm, ctx).modified is False
    reason = f"other batch norms read the same, but {reason}"
    assert [(s.node, s.reason) for s in ctx.skips] == [("a_a", reason), ("b_a", reason)]


def test_statistics_that_differ_stay_apart() -> None:
    torch.manual_seed(0)
    model = Two(pools).double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            nn.init.normal_(norm.running_mean)
            assert norm.running_var is not None
            nn.init.uniform_(norm.running_var, 0.5, 2)
    net = assert_same(model, PASSES)
    own = [b for name, b in net.named_buffers() if name.endswith("running_mean")]
    assert not torch.allclose(own[0], own[1])


def test_the_order_of_the_batches_of_one_module_stays(lower: Lower) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (LayerChoice(pools(), label=name) for name in ("one", "two"))

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x) + self.two(x)
            return self.one(y * 2) + self.two(y * 2) + self.one(y)

    assert_same(Again().double(), PASSES)
    gm, ctx = lower(Again(), *LOWERED, *PASSES)
    assert "shared_norms" not in format_graph(gm)
    assert all("called more than once" in skip.reason for skip in ctx.skips)


@pytest.mark.parametrize("size", [1, 2])
def test_a_single_value_per_channel_is_refused_as_ever(size: int) -> None:
    net = transformed(Two(pools).double(), PASSES)
    x = torch.randn(1, 4, 1, size, dtype=torch.float64)
    if size == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            net(x)
    else:
        run(net, x)


@settings(max_examples=25)
@given(cells())
def test_random_supernets(model: nn.Module) -> None:
    assert_same(model, PASSES)
