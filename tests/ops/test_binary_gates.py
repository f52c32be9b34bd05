import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nasfx
from nasfx import InputChoice, LayerChoice, SearchError, activated
from nasfx.ops import BinaryGate, Deferred, InputBinaryGate, binary_gate, inclusion_gate

N = 4


def candidates() -> dict[str, nn.Module]:
    return {
        "conv3": nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()),
        "conv1": nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)),
        "skip": nn.Identity(),
    }


def layer_gate() -> BinaryGate:
    gate = BinaryGate("block", None, tuple(candidates()))
    for name, module in candidates().items():
        gate.add_module(name, module)
    return gate.double()


def images() -> Tensor:
    return torch.randn(5, 2, N, N, dtype=torch.float64, requires_grad=True)


def loss_of(output: Tensor) -> Tensor:
    return output.pow(3).sum() + output.mean().exp()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("active", list(candidates()))
def test_every_gate_gets_the_gradient_of_separate_forward_passes(
    active: str, training: bool
) -> None:
    module = layer_gate().train(training)
    oracle = copy.deepcopy(module)
    x = images()
    alpha = torch.randn(3, dtype=torch.float64, requires_grad=True)
    output = module(binary_gate(alpha, active, module.names, 1), (x,), {}, {})
    loss_of(output).backward()

    outputs = {name: child(x) for name, child in oracle.named_children()}
    assert torch.equal(output, outputs[active])
    (g,) = torch.autograd.grad(loss_of(outputs[active]), outputs[active], retain_graph=True)
    b = torch.stack([(o * g).sum() for o in outputs.values()]).detach()
    p = alpha.detach().softmax(0)
    torch.testing.assert_close(alpha.grad, p * (b - p @ b), rtol=1e-10, atol=1e-10)
    # The weights and the input get what they get from the active path alone.
    wanted = [x, *oracle.get_submodule(active).parameters()]
    expected = torch.autograd.grad(loss_of(outputs[active]), wanted)
    found = [x.grad, *(p.grad for p in module.get_submodule(active).parameters())]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for name, child in module.named_children():
        if name != active:
            assert all(p.grad is None for p in child.parameters()), name


@pytest.mark.parametrize("active", list(candidates()))
def test_the_buffers_of_inactive_candidates_do_not_move(active: str) -> None:
    module = layer_gate()
    before = {k: (b, b.clone(), b._version) for k, b in module.named_buffers()}
    alpha = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    output = module(binary_gate(alpha, active, module.names, 1), (images(),), {}, {})
    after_forward = {k: b.clone() for k, b in module.named_buffers()}
    loss_of(output).backward()
    for name, (buffer, value, version) in before.items():
        assert module.get_buffer(name) is buffer
        assert torch.equal(buffer, after_forward[name]), "backward moves no buffer at all"
        if not name.startswith(active):
            assert torch.equal(buffer, value), name
            assert buffer._version == version, name


@contextmanager
def saved() -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps for backward."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


def bytes_of(kept: list[Tensor]) -> int:
    """Of all distinct memory."""
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())


def test_only_the_activations_of_the_active_path_are_kept() -> None:
    torch.manual_seed(0)
    module = layer_gate()
    x = images()
    alpha = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    with saved() as plain:
        module.get_submodule("conv1")(x)
    with saved() as gated:
        module(binary_gate(alpha, "conv1", module.names, 1), (x,), {}, {})
    with saved() as mixed:
        nasfx.ops.mix(alpha.softmax(0), [child(x) for child in module.children()])
    image = x.untyped_storage().nbytes()
    # beside the path's own: its input (kept anyway), its output and what belongs to the gate
    assert bytes_of(gated) <= bytes_of(plain) + image + 1000
    assert bytes_of(mixed) > bytes_of(gated) + 2 * image


def test_while_the_gate_needs_no_gradient_nothing_is_added() -> None:
    module = layer_gate()
    x = images()
    alpha = torch.zeros(3, dtype=torch.float64)
    output = module(binary_gate(alpha, "conv1", module.names, 1), (x,), {}, {})
    assert "GateGradient" not in str(output.grad_fn)
    with torch.no_grad():
        gate = binary_gate(alpha.requires_grad_(), "conv1", module.names, 1)
        assert not module(gate, (x,), {}, {}).requires_grad


def test_a_candidate_of_another_shape_is_an_error_in_backward() -> None:
    module = BinaryGate("block", None, ("a", "b"))
    module.add_module("a", nn.Linear(4, 4))
    module.add_module("b", nn.Linear(4, 5))
    alpha = torch.zeros(2, requires_grad=True)
    output = module(binary_gate(alpha, "a", module.names, 1), (torch.randn(2, 4),), {}, {})
    with pytest.raises(SearchError, match=r"choice 'block'.*\(2, 4\), \(2, 5\)") as error:
        output.sum().backward()
    assert "the gradient of a gate" in str(error.value)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor, *, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.linear(x) * scale
        return z, {"y": y * z, "index": z.argmax(1)}


def test_several_inputs_and_structured_outputs() -> None:
    module = BinaryGate("block", None, ("a", "b"))
    module.add_module("a", Pair())
    module.add_module("b", Pair())
    module.double()
    x, y = torch.randn(2, 3, 4, dtype=torch.float64).unbind(0)
    alpha = torch.randn(2, dtype=torch.float64, requires_grad=True)
    gate = binary_gate(alpha, "b", module.names, 1)
    z, rest = module(gate, (x,), {"y": y, "scale": 2.0}, {})
    (z.sin().sum() + rest["y"].square().sum()).backward()
    outputs = [module._modules[k](x, y=y, scale=2.0) for k in "ab"]
    assert torch.equal(z, outputs[1][0])
    assert torch.equal(rest["index"], outputs[1][1]["index"])
    b = torch.stack(
        [(o * z.cos()).sum() + (r["y"] * 2 * rest["y"]).sum() for o, r in outputs]
    ).detach()
    p = alpha.detach().softmax(0)
    torch.testing.assert_close(alpha.grad, p * (b - p @ b), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("n_chosen", [1, 2, 3, None])
@pytest.mark.parametrize("deferred", [False, True], ids=["computed", "deferred"])
def test_input_gates(n_chosen: int | None, reduction: str, deferred: bool) -> None:
    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    module = InputBinaryGate("pick", reduction, n_chosen)
    sizes = range(4) if n_chosen is None else (n_chosen,)
    for subset in [s for k in sizes for s in itertools.combinations(range(3), k)]:
        alpha = torch.randn(3, dtype=torch.float64, requires_grad=True)
        given: list[Any] = [
            Deferred(nn.Identity(), (x,)) if deferred and i not in (subset or (0,)) else x
            for i, x in enumerate(inputs)
        ]
        output = module(binary_gate(alpha, subset, None, n_chosen), given)
        found = torch.autograd.grad(loss_of(output), [alpha, *inputs], allow_unused=True)

        # The reduction as a function of real-valued gates, at the drawn 0/1 gates
        g = torch.tensor([float(i in subset) for i in range(3)], dtype=torch.float64)
        g.requires_grad_()
        expected = sum(w * x for w, x in zip(g, inputs, strict=True))
        assert isinstance(expected, Tensor)
        if reduction == "mean":
            expected = expected / (g.sum() if n_chosen is None and subset else max(len(subset), 1))
        torch.testing.assert_close(output, expected, rtol=1e-14, atol=1e-14)
        b, *grads = torch.autograd.grad(loss_of(expected), [g, *inputs])
        (alpha_grad,) = torch.autograd.grad((inclusion_gate(alpha, n_chosen) * b).sum(), alpha)
        torch.testing.assert_close(found[0], alpha_grad, rtol=1e-10, atol=1e-10)
        for i, (ours, theirs) in enumerate(zip(found[1:], grads, strict=True)):
            assert (ours is None) == (i not in subset)
            assert ours is None or torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.act = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))


def test_an_inactive_candidate_with_choices_is_run_on_their_drawn_path() -> None:
    net = nn.Sequential(
        nn.Linear(4, 4), LayerChoice({"deep": Inner(), "sig": nn.Sigmoid()}, label="block")
    ).double()
    nas = nasfx.transform(net, "proxyless")
    x = torch.randn(6, 4, dtype=torch.float64)
    for act in ("relu", "tanh"):
        nas._arch.state.drawn = {"block": "sig", "act": act}
        before = net.get_buffer("1.deep.norm.running_mean").clone()
        y = nas(x)
        y.square().sum().backward()
        assert torch.equal(net.get_buffer("1.deep.norm.running_mean"), before)
        with activated(net, {"block": "deep", "act": act}):
            deep = net(x)
        net.get_buffer("1.deep.norm.running_mean").copy_(before)
        b = torch.stack([(o * 2 * y).sum() for o in (deep, y)]).detach()
        alpha = nas.get_parameter("arch.block")
        p = alpha.detach().softmax(0)
        torch.testing.assert_close(alpha.grad, p * (b - p @ b), rtol=1e-10, atol=1e-10)
        inner = nas.get_parameter("arch.act").grad
        assert inner is None or not inner.any()
        nas.zero_grad(set_to_none=True)


def test_autocast_of_forward_holds_for_the_candidates_in_backward() -> None:
    seen: list[bool] = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return x * 1

    module = BinaryGate("block", None, ("a", "b"))
    module.add_module("a", nn.Linear(4, 4))
    module.add_module("b", Watching())
    alpha = torch.zeros(2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(binary_gate(alpha, "a", module.names, 1), (torch.randn(2, 4),), {}, {})
    y.float().sum().backward()
    assert seen == [True]
    assert alpha.grad is not None
    assert alpha.grad.dtype == torch.float32


def test_an_input_that_changed_before_backward_is_noticed() -> None:
    module = layer_gate()
    x = images().detach().clone()
    alpha = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    y = module(binary_gate(alpha, "conv1", module.names, 1), (x,), {}, {})
    x.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_input_choice_is_the_oracle_of_the_switch() -> None:
    choice = InputChoice(3, 2, reduction="mean")
    inputs = list(torch.randn(3, 2, 2).unbind(0))
    choice.active = (0, 2)
    gate = binary_gate(torch.zeros(3), (0, 2), None, 2)
    assert torch.equal(InputBinaryGate("pick", "mean", 2)(gate, inputs), choice(inputs))
