from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from nasfx.passes import LowerGumbelSum
from torch import Tensor, nn

from nasfx import InputChoice, LayerChoice, SpaceError
from nasfx.ops import SUPERNET
from nasfx.ops.gates import inclusion_probabilities
from nasfx.rewriting.graph import ModelGraph
from nasfx.rewriting.printing import format_graph
from nasfx.rewriting.verifier import verify
from tests.passes.conftest import Lower

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")
        candidates = {
            "seq": nn.Sequential(nn.Linear(4, 4), inner),
            "linear": nn.Linear(4, 4),
            "skip": nn.Identity(),
        }
        self.block = LayerChoice(candidates, label="op")
        self.pick = InputChoice(3, 2, label="ins", reduction="mean")

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return self.pick([x, y, x * 2])


def test_golden(lower: Lower) -> None:
    gm, _ = lower(Net(), LowerGumbelSum(), strategy="fbnet")
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%arch_op = get_attr[arch.op]
%arch_state_noise_op = get_attr[arch.state.noise.op]
%arch_state_temperature = get_attr[arch.state.temperature]
%logits_op = nasfx.ops.gumbel_logits(%arch_op, %arch_state_noise_op, %arch_state_temperature)
%gate_op = nasfx.ops.softmax_gate(%logits_op, label='op')
%arch_ins = get_attr[arch.ins]
%arch_state_noise_ins = get_attr[arch.state.noise.ins]
%arch_state_temperature_1 = get_attr[arch.state.temperature]
%logits_ins = nasfx.ops.gumbel_logits(%arch_ins, %arch_state_noise_ins, %arch_state_temperature_1)
%gate_ins = nasfx.ops.inclusion_gate(%logits_ins, 2, True, label='ins')
%arch_act = get_attr[arch.act]
%arch_state_noise_act = get_attr[arch.state.noise.act]
%arch_state_temperature_2 = get_attr[arch.state.temperature]
%logits_act = nasfx.ops.gumbel_logits(%arch_act, %arch_state_noise_act, %arch_state_temperature_2)
%gate_act = nasfx.ops.softmax_gate(%logits_act, label='act')
%block_seq_0 = call_module[block.seq.0](%x)
%block_seq_1_relu = call_module[block.seq.1.relu](%block_seq_0)
%block_seq_1_tanh = call_module[block.seq.1.tanh](%block_seq_0)
%block_seq_1 = nasfx.ops.mix(%gate_act, [%block_seq_1_relu, %block_seq_1_tanh], label='act')
%block_linear = call_module[block.linear](%x)
%block = nasfx.ops.mix(%gate_op, [%block_seq_1, %block_linear, %x], label='op')
%mul = operator.mul(%x, 2)
%pick = nasfx.ops.mix(%gate_ins, [%x, %block, %mul], label='ins')
return %pick""",
    )
    verify(gm, SUPERNET)


def test_golden_of_hard_weights(lower: Lower) -> None:
    model = nn.Sequential(LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act"))
    gm, _ = lower(model, LowerGumbelSum(hard=True), strategy="fbnet")
    assert_expected_inline(
        format_graph(gm),
        """\
%input_1 = placeholder[input]
%arch_act = get_attr[arch.act]
%arch_state_noise_act = get_attr[arch.state.noise.act]
%arch_state_temperature = get_attr[arch.state.temperature]
%logits_act = nasfx.ops.gumbel_logits(%arch_act, %arch_state_noise_act, %arch_state_temperature)
%gate_act = nasfx.ops.softmax_gate(%logits_act, hard=True, label='act')
%_0_relu = call_module[0.relu](%input_1)
%_0_tanh = call_module[0.tanh](%input_1)
%_0 = nasfx.ops.mix(%gate_act, [%_0_relu, %_0_tanh], label='act')
return %_0""",
    )
    verify(gm, SUPERNET)


def _disturbed(gm: ModelGraph, temperature: float) -> dict[str, Tensor]:
    """Set alphas, noise and the temperature; the noisy logits by label."""
    generator = torch.Generator().manual_seed(1)
    state = gm.get_submodule("arch.state")
    state.get_buffer("temperature").fill_(temperature)
    logits: dict[str, Tensor] = {}
    with torch.no_grad():
        for label, alpha in gm.get_submodule("arch").named_parameters():
            noise = state.get_submodule("noise").get_buffer(label)
            for values in (alpha, noise):
                values.copy_(torch.randn(len(alpha), generator=generator, dtype=torch.float64))
            logits[label] = (alpha + noise) / temperature
    return logits


@pytest.mark.parametrize("temperature", [0.3, 5.0])
def test_the_sum_is_weighted_by_the_sample(temperature: float, lower: Lower) -> None:
    net = Net().double()
    gm, _ = lower(net, LowerGumbelSum(), strategy="fbnet")
    logits = _disturbed(gm, temperature)
    block, act = logits["op"].softmax(0), logits["act"].softmax(0)
    pick = inclusion_probabilities(logits["ins"], 2) / 2
    h = net.block.get_submodule("seq.0")(X)
    h = act[0] * h.relu() + act[1] * h.tanh()
    y = block[0] * h + block[1] * net.block.get_submodule("linear")(X) + block[2] * X
    expected = pick[0] * X + pick[1] * y + pick[2] * X * 2
    torch.testing.assert_close(gm(X), expected, rtol=1e-12, atol=1e-12)


def test_hard_weights_pick_the_largest(lower: Lower) -> None:
    net = Net().double()
    gm, _ = lower(net, LowerGumbelSum(hard=True), strategy="fbnet")
    logits = _disturbed(gm, 2.0)
    h = net.block.get_submodule("seq.0")(X)
    h = [h.relu(), h.tanh()][int(logits["act"].argmax())]
    y = [h, net.block.get_submodule("linear")(X), X][int(logits["op"].argmax())]
    first, second = logits["ins"].topk(2).indices.tolist()
    inputs = [X, y, X * 2]
    torch.testing.assert_close(gm(X), (inputs[first] + inputs[second]) / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["concat", "none"])
def test_reductions_without_a_weighted_form_are_refused(reduction: str, lower: Lower) -> None:
    class Inputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pick = InputChoice(2, label="pick", reduction=reduction)

        def forward(self, x: Tensor) -> Tensor:
            return self.pick([x, x])

    match = f"reduction '{reduction}' has no weighted sum"
    with pytest.raises(SpaceError, match=match) as caught:
        lower(Inputs(), LowerGumbelSum(), strategy="fbnet")
    assert "while running pass lower-gumbel-sum" in caught.value.__notes__
