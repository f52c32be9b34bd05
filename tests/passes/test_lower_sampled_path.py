import itertools
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from nasfx.passes import LowerSampledPath
from torch import Tensor, nn

from nasfx import InputChoice, LayerChoice, activated
from nasfx.errors import VerifyError
from nasfx.ops import CHOICE, SUPERNET, InputSwitch, Switch
from nasfx.rewriting.printing import format_graph
from nasfx.rewriting.verifier import verify
from tests.passes.conftest import Lower


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")
        self.linear, self.inner = nn.Linear(4, 4), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.linear(x)) + self.inner(x)


class Net(nn.Module):
    def __init__(self, reduction: str = "sum") -> None:
        super().__init__()
        direct = LayerChoice({"sig": nn.Sigmoid(), "deep": Deep()}, label="direct")
        candidates = {"deep": Deep(), "direct": direct, "skip": nn.Identity()}
        self.block = LayerChoice(candidates, label="block")
        self.pick = InputChoice(2, reduction=reduction, label="pick")

    def forward(self, x: Tensor) -> Any:
        return self.pick([self.block(x), x * 2])


def test_golden(lower: Lower) -> None:
    net = nn.Sequential(LayerChoice({"lin": nn.Linear(4, 4), "skip": nn.Identity()}, label="op"))
    gm, _ = lower(net, LowerSampledPath(), strategy="single-path")
    assert_expected_inline(
        format_graph(gm),
        """\
%input_1 = placeholder[input]
%drawn_op = call_module[arch]('op')
%_0 = call_module[0](%drawn_op, (%input_1,), {}, {})
    lin: Linear
    skip: Identity
return %_0""",
    )
    verify(gm, SUPERNET)


def test_golden_of_nested_choices(lower: Lower) -> None:
    gm, _ = lower(Net(), LowerSampledPath(), strategy="single-path")
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%drawn_block = call_module[arch]('block')
%drawn_act = call_module[arch]('act')
%drawn_direct = call_module[arch]('direct')
%drawn_pick = call_module[arch]('pick')
%block = call_module[block](%drawn_block, (%x,), {}, {'act': %drawn_act, 'direct': %drawn_direct})
    deep(%x, %drawn_act):
        %linear = call_module[linear](%x)
        %inner = call_module[inner](%drawn_act, (%linear,), {}, {})
            relu: ReLU
            tanh: Tanh
        %inner_1 = call_module[inner](%drawn_act, (%x,), {}, {})
            relu: ReLU
            tanh: Tanh
        %add = operator.add(%inner, %inner_1)
        return %add
    direct: Switch
        sig: Sigmoid
        deep(%x, %drawn_act):
            %linear = call_module[linear](%x)
            %inner = call_module[inner](%drawn_act, (%linear,), {}, {})
                relu: ReLU
                tanh: Tanh
            %inner_1 = call_module[inner](%drawn_act, (%x,), {}, {})
                relu: ReLU
                tanh: Tanh
            %add = operator.add(%inner, %inner_1)
            return %add
    skip: Identity
%mul = operator.mul(%x, 2)
%pick = call_module[pick](%drawn_pick, [%block, %mul])
return %pick""",
    )
    verify(gm, SUPERNET)
    with pytest.raises(VerifyError, match="belong to a lowered graph"):
        verify(gm, CHOICE)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "concat", "none"])
def test_every_path_and_its_gradients_are_the_eager_ones(
    reduction: str, training: bool, lower: Lower
) -> None:
    net = Net(reduction).double().train(training)
    gm, _ = lower(net, LowerSampledPath(), strategy="single-path")
    gm.train(training)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for block, direct, act, i in itertools.product(
        ("deep", "direct", "skip"), ("sig", "deep"), ("relu", "tanh"), range(2)
    ):
        decided = {"block": block, "direct": direct, "act": act, "pick": (i,)}
        gm.get_submodule("arch").state.drawn = decided
        results = []
        for model in (gm, net):
            with activated(net, decided):
                y = model(x)
            assert isinstance(y, list) == (reduction == "none")
            y = y[0] if isinstance(y, list) else y
            names = dict(net.named_parameters())
            grads = torch.autograd.grad(y.square().sum(), [x, *names.values()], allow_unused=True)
            results.append([y, *grads])
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def test_draws_reach_choices_two_choices_deep(lower: Lower) -> None:
    inner = LayerChoice({"deep": Deep(), "sig": nn.Sigmoid()}, label="inner")
    net = nn.Sequential(LayerChoice({"inner": inner, "tanh": nn.Tanh()}, label="outer"))
    gm, _ = lower(net, LowerSampledPath(), strategy="single-path")
    verify(gm, SUPERNET)
    x = torch.randn(3, 4)
    for act in ("relu", "tanh"):
        decided = {"outer": "inner", "inner": "deep", "act": act}
        gm.get_submodule("arch").state.drawn = decided
        with activated(net, decided):
            assert torch.equal(gm(x), net(x))


def test_only_the_drawn_candidate_is_called(lower: Lower) -> None:
    called: list[str] = []
    candidates = {k: nn.Linear(4, 4) for k in "abc"}
    for name, module in candidates.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    gm, _ = lower(
        nn.Sequential(LayerChoice(candidates, label="op")),
        LowerSampledPath(),
        strategy="single-path",
    )
    gm.get_submodule("arch").state.drawn = {"op": "b"}
    gm(torch.randn(2, 4))
    assert called == ["b"]


def test_switches_stand_under_the_users_names_and_know_what_may_be_drawn(lower: Lower) -> None:
    choice = LayerChoice(
        {"none": nn.Tanh(), "lin": nn.Linear(4, 4)}, label="op", relaxed_only=["none"]
    )
    net = nn.Sequential(choice)
    gm, _ = lower(net, LowerSampledPath(), strategy="single-path")
    switch = gm.get_submodule("0")
    assert isinstance(switch, Switch)
    assert (switch.label, switch.names) == ("op", ("lin",))
    assert list(dict(switch.named_children())) == ["none", "lin"]
    assert gm.get_parameter("0.lin.weight") is net.get_parameter("0.lin.weight")
    gm, _ = lower(Net("concat"), LowerSampledPath(), strategy="single-path")
    pick = gm.get_submodule("pick")
    assert isinstance(pick, InputSwitch)
    assert (pick.label, pick.reduction, pick.n_chosen) == ("pick", "concat", 1)


def test_without_a_choice_there_is_nothing_to_do(lower: Lower) -> None:
    gm, ctx = lower(nn.Linear(2, 2), strategy="single-path")
    assert LowerSampledPath()(gm, ctx).modified is False
