from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from nasfx.passes import Canonicalize
from torch import Tensor, fx, nn

import nasfx
from nasfx import LayerChoice
from nasfx.rewriting.graph import ModelGraph
from nasfx.rewriting.passes import PassContext
from nasfx.rewriting.printing import format_graph


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.drop = nn.Identity()
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(self.conv(x)))


def two_reads() -> ModelGraph:
    root = nn.Module()
    root.register_parameter("w", nn.Parameter(torch.randn(3)))
    graph = fx.Graph()
    x = graph.placeholder("x")
    a, b = graph.get_attr("w"), graph.get_attr("w")
    graph.output(graph.call_function(torch.add, (graph.call_function(torch.mul, (x, a)), b)))
    return ModelGraph(root, graph)


def test_an_identity_is_dropped() -> None:
    gm = nasfx.trace(Net()).graph_module
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%conv = call_module[conv](%x)
%drop = call_module[drop](%conv)
%norm = call_module[norm](%drop)
return %norm""",
    )
    assert Canonicalize()(gm, PassContext()).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%conv = call_module[conv](%x)
%norm = call_module[norm](%conv)
return %norm""",
    )
    assert Canonicalize()(gm, PassContext()).modified is False


def test_a_tensor_is_read_once() -> None:
    gm = two_reads()
    x = torch.randn(3)
    before = gm(x)
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%w = get_attr[w]
%w_1 = get_attr[w]
%mul = torch.mul(%x, %w)
%add = torch.add(%mul, %w_1)
return %add""",
    )
    assert Canonicalize()(gm, PassContext()).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%w = get_attr[w]
%mul = torch.mul(%x, %w)
%add = torch.add(%mul, %w)
return %add""",
    )
    assert torch.equal(gm(x), before)


def test_the_graphs_of_candidates_are_rewritten_too() -> None:
    candidates = {"a": nn.Sequential(nn.ReLU(), nn.Identity()), "skip": nn.Identity()}
    gm = nasfx.trace(nn.Sequential(LayerChoice(candidates, label="block"))).graph_module
    assert Canonicalize()(gm, PassContext()).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%input_1 = placeholder[input]
%_0 = call_module[0](%input_1)
    a(%x):
        %_0 = call_module[0](%x)
        return %_0
    skip: Identity
return %_0""",
    )


Hook = Callable[[nn.Module, Callable[..., Any]], Any]


@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
    ],
)
def test_an_identity_with_hooks_is_left_and_history_says_so(register: Hook) -> None:
    net = Net()
    calls: list[int] = []
    register(net.drop, lambda *_: calls.append(1))
    gm = nasfx.trace(net).graph_module
    ctx = PassContext()
    assert Canonicalize()(gm, ctx).modified is False
    assert [(s.node, s.reason) for s in ctx.skips] == [("drop", "the identity has hooks")]
    assert f"{__file__}:" in ctx.skips[0].site
    gm(torch.randn(2, 2, 3, 3)).sum().backward()
    assert calls == [1]


class Subclassed(nn.Identity):
    def forward(self, input: Tensor) -> Tensor:
        return input + 1


def test_a_subclass_of_identity_is_no_identity() -> None:
    net = Net()
    net.drop = Subclassed()
    gm = nasfx.trace(net, leaf_modules=[Subclassed]).graph_module
    assert Canonicalize()(gm, PassContext()).modified is False


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_bitwise_equal(training: bool) -> None:
    gm = nasfx.trace(Net()).graph_module.train(training)
    x = torch.randn(4, 2, 3, 3, requires_grad=True)

    def values() -> list[Tensor]:
        y = gm(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *gm.parameters()])]

    before = values()
    Canonicalize()(gm, PassContext())
    assert all(torch.equal(a, b) for a, b in zip(before, values(), strict=True))
