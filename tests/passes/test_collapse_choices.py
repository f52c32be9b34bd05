import itertools
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from nasfx.passes import Canonicalize, CollapseChoices, RemoveDeadCode
from torch import Tensor, nn

import nasfx
from nasfx import InputChoice, LayerChoice, activated
from nasfx.errors import VerifyError
from nasfx.ops import CHOICE, SUBNET
from nasfx.rewriting.graph import provenance
from nasfx.rewriting.passes import PassContext
from nasfx.rewriting.printing import format_graph
from nasfx.rewriting.verifier import verify
from tests.passes.conftest import Lower


class Net(nn.Module):
    def __init__(self, reduction: str = "sum", n_chosen: int | None = 2) -> None:
        super().__init__()
        inner = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")
        candidates = {
            "seq": nn.Sequential(nn.Linear(4, 4), inner),
            "linear": nn.Linear(4, 4),
            "skip": nn.Identity(),
        }
        self.block = LayerChoice(candidates, label="block")
        self.side = nn.Linear(4, 4)
        self.pick = InputChoice(3, n_chosen, reduction=reduction, label="pick")

    def forward(self, x: Tensor) -> Any:
        y = self.block(x)
        return self.pick([x, y, self.side(y)])


def test_golden(lower: Lower) -> None:
    gm, ctx = lower(Net())
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%block = call_module[block](%x)
    seq(%x):
        %_0 = call_module[0](%x)
        %_1 = call_module[1](%_0)
            relu: ReLU
            tanh: Tanh
        return %_1
    linear: Linear
    skip: Identity
%side = call_module[side](%block)
%pick = call_module[pick]([%x, %block, %side])
return %pick""",
    )
    rewrite = CollapseChoices.of({"block": "seq", "act": "tanh", "pick": [1, 2]})
    assert rewrite(gm, ctx).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%block_seq_0 = call_module[block.seq.0](%x)
%block_seq_1_tanh = call_module[block.seq.1.tanh](%block_seq_0)
%side = call_module[side](%block_seq_1_tanh)
%add = operator.add(%block_seq_1_tanh, %side)
return %add""",
    )
    verify(gm, SUBNET)


def test_a_candidate_that_is_one_module_and_a_single_input(lower: Lower) -> None:
    gm, _ = lower(
        Net(n_chosen=1),
        CollapseChoices.of({"block": "linear", "pick": [1]}),
        Canonicalize(),
        RemoveDeadCode(),
    )
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%block_linear = call_module[block.linear](%x)
return %block_linear""",
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("reduction", "n_chosen"),
    [("sum", 1), ("sum", 2), ("mean", 3), ("concat", 2), ("none", 2), ("none", 1), ("sum", None),
     ("mean", None), ("none", None)],
)  # fmt: skip
def test_every_architecture_is_bitwise_the_eager_model(
    reduction: str, n_chosen: int | None, training: bool, lower: Lower
) -> None:
    net = Net(reduction, n_chosen).train(training)
    x = torch.randn(3, 4)
    sizes = range(4) if n_chosen is None else (n_chosen,)
    subsets = [s for k in sizes for s in itertools.combinations(range(3), k)]
    for block, act, pick in itertools.product(("seq", "linear", "skip"), ("relu", "tanh"), subsets):
        decided = {"block": block, "act": act, "pick": pick}
        gm, ctx = lower(net, CollapseChoices.of(decided))
        del gm._modules["arch"]
        with activated(net, decided):
            expected = net(x)
        found = gm.train(training)(x)
        for a, b in zip(_list(found), _list(expected), strict=True):
            assert torch.equal(a, b)
        assert isinstance(found, list) == isinstance(expected, list)
        for tidy in (Canonicalize(), RemoveDeadCode()):
            tidy(gm, ctx)
            assert all(
                torch.equal(a, b) for a, b in zip(_list(gm(x)), _list(expected), strict=True)
            )


def _list(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value]


def test_gradients_are_those_of_the_eager_model(lower: Lower) -> None:
    net = Net().double()
    decided = {"block": "seq", "act": "tanh", "pick": [1, 2]}
    x = torch.randn(3, 4, dtype=torch.float64)
    with activated(net, decided):
        net(x).square().sum().backward()
    expected = {k: p.grad for k, p in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    gm, _ = lower(net, CollapseChoices.of(decided))
    gm(x).square().sum().backward()
    for name, p in net.named_parameters():
        want = expected[name]
        assert (p.grad is None) == (want is None), name
        assert want is None or torch.equal(p.grad, want)


def test_an_undecided_choice_is_stood_for_by_its_first_candidate_until_it_is_dropped(
    lower: Lower,
) -> None:
    architecture = {"block": "skip", "pick": [0, 1]}
    gm, ctx = lower(Net(), CollapseChoices.of(architecture))
    assert "side" in format_graph(gm)
    Canonicalize()(gm, ctx)
    RemoveDeadCode()(gm, ctx)
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%add = operator.add(%x, %x)
return %add""",
    )


def test_the_names_and_tensors_of_the_user_are_kept(lower: Lower) -> None:
    net = Net()
    gm, _ = lower(net, CollapseChoices.of({"block": "seq", "act": "relu", "pick": [0, 1]}))
    assert gm.get_submodule("block.seq.0").weight is net.block.get_submodule("seq.0").weight
    made = {node.name: provenance(node) for node in gm.graph.nodes}
    add = made["add"]
    assert (add.label, add.made_by) == ("pick", "collapse-choices")
    assert add.site.startswith(f"{__file__}:")
    assert (made["block_seq_0"].label, made["block_seq_0"].part) == ("block", "seq")


def test_the_choice_graph_is_legal_before_and_not_after(lower: Lower) -> None:
    gm, ctx = lower(Net())
    verify(gm, CHOICE)
    with pytest.raises(VerifyError, match="choice 1 must have been lowered"):
        verify(gm, SUBNET)
    CollapseChoices.of({"block": "skip", "pick": [0, 1]})(gm, ctx)
    verify(gm, SUBNET)


def test_a_choice_called_twice_is_collapsed_in_both_places(lower: Lower) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(x) - 1)

    gm, _ = lower(Twice(), CollapseChoices.of({"act": "tanh"}))
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%act_tanh_1 = call_module[act.tanh](%x)
%sub = operator.sub(%act_tanh_1, 1)
%act_tanh = call_module[act.tanh](%sub)
return %act_tanh""",
    )


def test_options_are_shown() -> None:
    assert CollapseChoices.of({"b": "x", "i": [0]}) == CollapseChoices((("b", "x"), ("i", (0,))))
    ctx = PassContext()
    gm = nasfx.trace(nn.Linear(2, 2)).graph_module
    assert CollapseChoices.of({})(gm, ctx).modified is False
