from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from nasfx.passes import LowerBinaryGate
from torch import Tensor, nn

import nasfx
from nasfx import InputChoice, LayerChoice, SpaceError
from nasfx.ops import SUPERNET, BinaryGate, InputBinaryGate
from nasfx.rewriting.printing import format_graph
from nasfx.rewriting.verifier import verify
from tests.passes.conftest import Lower

X = torch.randn(3, 4, dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, reduction: str = "sum") -> None:
        super().__init__()
        inner = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")
        candidates = {"deep": nn.Sequential(nn.Linear(4, 4), inner), "lin": nn.Linear(4, 4)}
        self.block = LayerChoice(candidates, label="block")
        self.pick = InputChoice(2, reduction=reduction, label="pick")

    def forward(self, x: Tensor) -> Any:
        return self.pick([self.block(x), x * 2])


def test_golden(lower: Lower) -> None:
    gm, _ = lower(Net(), LowerBinaryGate(), strategy="proxyless")
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%drawn_block = call_module[arch]('block')
%arch_block = get_attr[arch.block]
%gate_block = nasfx.ops.binary_gate(%arch_block, %drawn_block, ('deep', 'lin'), 1, label='block')
%drawn_act = call_module[arch]('act')
%arch_act = get_attr[arch.act]
%gate_act = nasfx.ops.binary_gate(%arch_act, %drawn_act, ('relu', 'tanh'), 1, label='act')
%drawn_pick = call_module[arch]('pick')
%arch_pick = get_attr[arch.pick]
%gate_pick = nasfx.ops.binary_gate(%arch_pick, %drawn_pick, None, 1, label='pick')
%block = call_module[block](%gate_block, (%x,), {}, {'act': %gate_act})
    deep(%x, %drawn_act):
        %_0 = call_module[0](%x)
        %_1 = call_module[1](%drawn_act, (%_0,), {}, {})
            relu: ReLU
            tanh: Tanh
        return %_1
    lin: Linear
%mul = operator.mul(%x, 2)
%pick = call_module[pick](%gate_pick, [%block, %mul])
return %pick""",
    )
    verify(gm, SUPERNET)
    assert type(gm.get_submodule("block")) is BinaryGate
    assert type(gm.get_submodule("block.deep.1")) is BinaryGate
    assert type(gm.get_submodule("pick")) is InputBinaryGate


@pytest.mark.parametrize("act", ["relu", "tanh"])
@pytest.mark.parametrize("block", ["deep", "lin"])
@pytest.mark.parametrize("pick", [0, 1])
def test_gradients_of_every_gate(block: str, act: str, pick: int, lower: Lower) -> None:
    net = Net().double()
    gm, _ = lower(net, LowerBinaryGate(), strategy="proxyless")
    arch = gm.get_submodule("arch")
    arch.state.drawn = {"block": block, "act": act, "pick": (pick,)}
    with torch.no_grad():
        for alpha in arch.parameters():
            alpha.copy_(torch.randn(2, dtype=torch.float64))
    y = gm(X)
    y.pow(3).sum().backward()

    h = net.block.get_submodule("deep.0")(X)
    acts = [h.relu(), h.tanh()]
    blocks = [acts[act == "tanh"], net.block.get_submodule("lin")(X)]
    inputs = [blocks[block == "lin"], X * 2]
    assert torch.equal(y, inputs[pick])
    g = 3 * y.detach().square()
    # By label: (the candidates' outputs, whether the choice is on the path to the output)
    through = pick == 0
    gates = {
        "pick": (inputs, True),
        "block": (blocks, through),
        "act": (acts, through and block == "deep"),
    }
    for label, (outputs, active) in gates.items():
        alpha = arch.get_parameter(label)
        if not active:
            assert alpha.grad is None or not alpha.grad.any(), label
            continue
        b = torch.stack([(o.detach() * g).sum() for o in outputs])
        p = alpha.detach().softmax(0)
        torch.testing.assert_close(alpha.grad, p * (b - p @ b), rtol=1e-10, atol=1e-12, msg=label)


@pytest.mark.parametrize("reduction", ["concat", "none"])
def test_reductions_without_a_gate_gradient_are_refused(reduction: str, lower: Lower) -> None:
    line = Net.__init__.__code__.co_firstlineno + 5
    with pytest.raises(SpaceError, match=f"reduction '{reduction}' has no binary gate") as caught:
        lower(Net(reduction), LowerBinaryGate(), strategy="proxyless")
    assert f"choice pick ({__file__}:{line})" in str(caught.value)
    assert "while running pass lower-binary-gate" in caught.value.__notes__


class After(nn.Module):
    """An activation that writes to what a choice gave."""

    def __init__(self, choice: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.choice = choice
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        inputs = isinstance(self.choice, InputChoice)
        return self.relu(self.choice([h, h * -2] if inputs else h))


@pytest.mark.parametrize("inputs", [False, True], ids=["layer", "input"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_choice_may_be_followed_by_an_activation_in_place(inputs: bool, index: int) -> None:
    candidates = {"0": nn.Linear(4, 4), "1": nn.Identity()}
    choice = InputChoice(2, label="op") if inputs else LayerChoice(candidates, label="op")
    model = After(choice).double()
    net = nasfx.transform(model, "proxyless")
    h = model.stem(X)
    outputs = [h, h * -2] if inputs else [candidates["0"](h), h]
    outputs = [o.detach() for o in outputs]
    with net.arch_step():
        net._arch.state.drawn = {"op": (index,) if inputs else str(index)}
        y = net(X)
        net.objective(y.square().sum()).backward()
    assert torch.equal(y, outputs[index].relu())
    g = 2 * outputs[index].relu()
    b = torch.stack([(o * g).sum() for o in outputs])
    (alpha,) = net.arch_parameters()
    p = alpha.detach().softmax(0)
    torch.testing.assert_close(alpha.grad, p * (b - p @ b), rtol=1e-10, atol=1e-12)


def test_candidates_of_unlike_shapes_are_refused_where_shapes_are_known() -> None:
    choice = LayerChoice({"a": nn.Linear(4, 4), "b": nn.Linear(4, 5)}, label="c")
    model = nn.Sequential(nn.Linear(3, 4), choice)
    with pytest.raises(SpaceError, match=r"choice 'c' .*candidate 1 differs: \(2, 4\), \(2, 5\)"):
        nasfx.transform(model, "proxyless", example_inputs=torch.randn(2, 3))
    nasfx.transform(model, "single-path", example_inputs=torch.randn(2, 3))
