import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import nasfx
from nasfx import InputChoice, LayerChoice, TraceError
from nasfx.choice import EMPTY
from nasfx.ops import Deferred, Demanded, Gate, InputSwitch, Switch, demanded
from nasfx.ops.select import forced, unmoved_buffers
from nasfx.rewriting.graph import ModelGraph
from tests.strategies.nets import STRATEGIES

GATE = Gate(torch.tensor([0.0, 1.0]), "b")


@pytest.mark.parametrize(
    ("drawn", "clauses", "expected"),
    [
        (["a"], [[(0, ("a", "c"))]], True),
        (["b"], [[(0, ("a", "c"))]], False),
        ([GATE], [[(0, ("b",))]], True),
        ([(0, 2)], [[(0, (2,))]], True),
        ([(0, 2)], [[(0, (1,))]], False),
        ([()], [[(0, (0, 1))]], False),
        ([()], [[(0, (EMPTY, 0))]], True),
        ([(1,)], [[(0, (EMPTY, 0))]], False),
        (["a", (1,)], [[(0, ("a",)), (1, (1,))]], True),
        (["a", (1,)], [[(0, ("a",)), (1, (0,))]], False),
        (["a", (1,)], [[(0, ("b",))], [(1, (1,))]], True),
        (["a"], [], False),
        (["a"], [[]], True),
    ],
)
def test_demanded_is_a_disjunction_of_conjunctions(
    drawn: list[Any], clauses: list[Any], expected: bool
) -> None:
    assert demanded(drawn, clauses) is expected


def switch() -> Switch:
    module = Switch("block", None, ("a", "b"))
    module.add_module("a", nn.Linear(3, 3))
    module.add_module("b", nn.Tanh())
    return module


@pytest.mark.parametrize("drawn", ["b", GATE], ids=["name", "gate"])
def test_a_switch_runs_the_drawn_candidate(drawn: Any) -> None:
    x = torch.randn(2, 3)
    assert torch.equal(switch()(drawn, (x,), {}, {}), x.tanh())
    assert torch.equal(switch()(drawn, (), {"input": x}, {}), x.tanh())


@pytest.mark.parametrize("reduction", ["sum", "mean", "concat", "none"])
@pytest.mark.parametrize("chosen", [(0,), (1,), (0, 1)])
def test_an_input_switch_reduces_as_the_choice_does(
    chosen: tuple[int, ...], reduction: str
) -> None:
    inputs = [torch.randn(2, 3), torch.randn(2, 3)]
    choice = InputChoice(2, len(chosen), reduction=reduction)
    choice.active = chosen
    found = InputSwitch("pick", reduction, len(chosen))(chosen, inputs)
    expected = choice(inputs)
    assert isinstance(found, list) == isinstance(expected, list)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def demanded_module() -> tuple[Demanded, Body]:
    body = Body()
    return Demanded(ModelGraph(body, fx.symbolic_trace(body).graph)), body


def test_a_producer_that_is_not_needed_waits_until_it_is_forced() -> None:
    module, body = demanded_module()
    x = torch.randn(5, 3, requires_grad=True)
    mean = body.norm.running_mean
    assert mean is not None
    deferred = module(False, x)
    assert isinstance(deferred, Deferred)
    assert not mean.any()
    value = forced(deferred)
    torch.testing.assert_close(value, (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt())
    assert not value.requires_grad
    assert body.norm.running_mean is mean
    assert not mean.any()
    assert module(True, x).requires_grad
    assert mean.any()
    assert forced(x) is x


def test_a_chain_of_deferred_producers_is_forced_together() -> None:
    first, _ = demanded_module()
    second, _ = demanded_module()
    x = torch.randn(5, 3)
    chained = second(False, first(False, x))
    torch.testing.assert_close(forced(chained), second(True, first(True, x)))


def test_an_empty_subset_takes_its_shape_from_a_deferred_input() -> None:
    module, _ = demanded_module()
    found = InputSwitch("pick", "sum", None)((), [module(False, torch.randn(5, 3)), None])
    assert torch.equal(found, torch.zeros(5, 3))


def test_unmoved_buffers_returns_the_very_tensors_also_after_an_error() -> None:
    norm = nn.BatchNorm1d(3)
    buffers = dict(norm.named_buffers())
    versions = {k: b._version for k, b in buffers.items()}
    bytes_before = {k: b.clone() for k, b in buffers.items()}

    def moves_and_fails() -> None:
        with unmoved_buffers(norm):
            norm(torch.randn(4, 3))
            assert norm.running_mean is not buffers["running_mean"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        moves_and_fails()
    for name, buffer in buffers.items():
        assert norm.get_buffer(name) is buffer
        assert torch.equal(buffer, bytes_before[name])
        assert buffer._version == versions[name]


def inputs_of(kind: str) -> Any:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3)
            if kind == "layer":
                self.pick = LayerChoice({"a": nn.Linear(3, 3), "b": nn.Tanh()}, label="pick")
            else:
                self.pick = InputChoice(2, label="pick")

        def forward(self, x: Tensor) -> Tensor:
            return self.pick(x) if kind == "layer" else self.pick([x, self.lin(x)])

    return Net()


class Whole(fx.Tracer):
    """A tracer that goes into everything but torch's own modules, as torch's does."""


@pytest.mark.parametrize("strategy", ["proxyless", "single-path"])
@pytest.mark.parametrize("kind", ["layer", "input"])
def test_a_foreign_tracer_is_refused(kind: str, strategy: str) -> None:
    net = nasfx.transform(inputs_of(kind), strategy)
    gm = net.graph_module
    gm(torch.randn(2, 3))
    with pytest.raises(TraceError, match="must not be traced through"):
        Whole().trace(gm)


@pytest.mark.parametrize("strategy", ["proxyless", "single-path"])
def test_a_foreign_tracer_may_take_switches_as_leaves(strategy: str) -> None:
    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            ours = type(m).__module__.startswith("nasfx.ops")
            return ours or super().is_leaf_module(m, module_qualified_name)

    net = nasfx.transform(inputs_of("layer"), strategy)
    x = torch.randn(2, 3)
    expected = net(x)
    traced = fx.GraphModule(net.graph_module, Leaves().trace(net.graph_module))
    assert torch.equal(traced(x), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["layer", "input"])
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_nets_are_copied_with_everything(how: str, kind: str, strategy: str) -> None:
    net = nasfx.transform(Picklable() if kind == "layer" else PicklableInputs(), strategy)
    again = pickle.loads(pickle.dumps(net)) if how == "pickle" else copy.deepcopy(net)
    x = torch.randn(2, 3)
    assert str(again.graph) == str(net.graph)
    assert list(again.state_dict()) == list(net.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
        next(iter(again.parameters())).add_(1)
        assert not torch.equal(again(x), net(x))
    if net.strategy.samples:
        for _ in range(8):
            with net.weight_step(), again.weight_step():
                assert net.path == again.path
                if again.weight_parameters():
                    again(x).sum().backward()


class Picklable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        inner = LayerChoice({"a": nn.Linear(3, 3), "b": nn.Tanh()}, label="inner")
        self.op = LayerChoice({"deep": nn.Sequential(inner, nn.Tanh()), "c": nn.Tanh()}, label="op")

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.lin(x))


class PicklableInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.pick = InputChoice(2, label="pick")

    def forward(self, x: Tensor) -> Tensor:
        x = self.lin(x)
        return self.pick([x.tanh(), self.other(x).relu()])
