import importlib
import pickle
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import nasfx
from nasfx import LayerChoice, ops
from nasfx.ops import (
    binary_gate,
    demanded,
    graph_function,
    inclusion_gate,
    mix,
    pair_gate,
    softmax_gate,
)
from nasfx.rewriting.printing import function_name

FUNCTIONS = [binary_gate, demanded, inclusion_gate, mix, pair_gate, softmax_gate]


class _Tripled(torch.autograd.Function):
    """A backward that is not the derivative of forward, so that losing it shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0]


@graph_function
def tripled(x: Tensor, label: str = "") -> Tensor:
    return _Tripled.apply(x)


class Uses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return tripled(x * 2, label="here")


def test_a_function_stays_one_node_under_a_foreign_tracer_and_keeps_its_gradient() -> None:
    gm = fx.symbolic_trace(Uses())
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"][1:] == [tripled]
    again = fx.symbolic_trace(gm)  # what unpickling a GraphModule does
    for module in (Uses(), gm, again):
        x = torch.ones(2, requires_grad=True)
        module(x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [6, 6]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_functions_print_and_pickle_by_their_public_name(function: Callable[..., Any]) -> None:
    assert function_name(function) == f"nasfx.ops.{function.__name__}"
    assert pickle.loads(pickle.dumps(function)) is function
    assert getattr(nasfx.ops, function.__name__) is function


@pytest.mark.parametrize(
    "code",
    [
        lambda x: softmax_gate(x, label="a"),
        lambda x: pair_gate(x, (0, 2), label="a"),
        lambda x: inclusion_gate(x, 2, label="a"),
        lambda x: inclusion_gate(alpha=x, n_chosen=None, mean=True),
        lambda x: mix(torch.ones(2), [x, x], label="a"),
        lambda x: mix(torch.ones(2), [{"deep": (x,)}, {"deep": (x,)}]),
        lambda x: binary_gate(x, "b", ("a", "b", "c"), 1, label="a"),
        lambda x: demanded([x], [[(0, (0,))]]),
    ],
)
def test_every_function_is_one_node_wherever_the_proxy_stands(code: Callable[..., Any]) -> None:
    graph = fx.symbolic_trace(code).graph
    (node,) = [n for n in graph.nodes if n.op == "call_function"]
    assert node.target in FUNCTIONS


def test_a_lowered_weighted_sum_may_be_traced_again_with_its_gradients() -> None:
    net = nasfx.transform(
        nn.Sequential(LayerChoice({"lin": nn.Linear(3, 3), "tanh": nn.Tanh()}, label="op")), "darts"
    )
    gm = net.graph_module
    x = torch.randn(2, 3)
    gm(x).square().sum().backward()
    (alpha,) = net.arch_parameters()
    assert alpha.grad is not None
    expected = alpha.grad.clone()
    traced = fx.symbolic_trace(gm)
    targets = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert targets == [softmax_gate, mix]
    alpha.grad = None
    traced(x).square().sum().backward()
    assert torch.equal(alpha.grad, expected)


def test_a_lowered_graph_may_be_traced_before_its_first_call() -> None:
    net = nasfx.transform(
        nn.Sequential(LayerChoice({"lin": nn.Linear(3, 3), "tanh": nn.Tanh()}, label="op")), "darts"
    )
    x = torch.randn(2, 3)
    assert torch.equal(fx.symbolic_trace(net.graph_module)(x), net(x))


def test_every_graph_function_can_be_pickled_by_its_public_name() -> None:
    names = [m.name for m in pkgutil.iter_modules(ops.__path__)]
    found = {
        name
        for module in (importlib.import_module(f"nasfx.ops.{n}") for n in names)
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == "nasfx.ops" and hasattr(value, "__wrapped__")
    }
    assert {"mix", "softmax_gate", "expected_cost"} <= found
    assert [name for name in sorted(found) if not hasattr(ops, name)] == []
