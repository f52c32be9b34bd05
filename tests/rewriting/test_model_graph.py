import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import nasfx
from nasfx import LayerChoice
from nasfx.rewriting.graph import (
    ModelGraph,
    clone_tree,
    copy_graph_module,
    dump_graph,
    free_name,
    graphs,
    load_graph,
    provenance,
)
from nasfx.rewriting.printing import format_graph, format_value, function_name


class Net(nn.Module):
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.op = LayerChoice(
            {"a": nn.Sequential(nn.Linear(3, 3), nn.Tanh()), "b": nn.Identity()}, label="op"
        )
        self.register_buffer("table", torch.randn(3))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(self.norm(self.lin(x)), (3,), eps=1e-4)
        return (self.op(x) + self.table[:, None].flatten()) * self.scratch


class Plain(nn.Module):
    """Reads a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.full((3,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.plain


X = torch.randn(4, 3)


def graph() -> ModelGraph:
    return nasfx.trace(Net()).graph_module


def through_pickle(gm: ModelGraph) -> ModelGraph:
    return pickle.loads(pickle.dumps(gm))


COPIES: list[Callable[[ModelGraph], ModelGraph]] = [copy.deepcopy, through_pickle]


@pytest.mark.parametrize("again", COPIES)
@pytest.mark.parametrize("training", [True, False])
def test_a_copy_computes_and_prints_the_same(
    again: Callable[[ModelGraph], ModelGraph], training: bool
) -> None:
    gm = graph().train(training)
    copied = again(gm)
    assert format_graph(copied, sites=True) == format_graph(gm, sites=True)
    assert str(copied.graph) == str(gm.graph) == format_graph(gm)
    assert copied.training == training
    assert copied.state_dict().keys() == gm.state_dict().keys()
    assert torch.equal(copied(X), gm(X))


@pytest.mark.parametrize("again", [*COPIES, copy_graph_module, clone_tree])
def test_plain_tensor_attributes_survive(again: Callable[[ModelGraph], ModelGraph]) -> None:
    copied = again(nasfx.trace(Plain()).graph_module)
    assert torch.equal(copied(X), X * 2)


@pytest.mark.parametrize("again", COPIES)
def test_a_copy_has_tensors_of_its_own_and_a_graph_of_its_own(
    again: Callable[[ModelGraph], ModelGraph],
) -> None:
    gm = graph()
    copied = again(gm)
    for name, p in copied.named_parameters():
        assert p is not gm.get_parameter(name)
    before = format_graph(gm)
    copied.graph.erase_node(copied.graph.output_node())
    assert format_graph(gm) == before


@pytest.mark.parametrize("again", COPIES)
def test_graphs_over_one_tree_stay_over_one_tree(
    again: Callable[[Any], Any],
) -> None:
    gm = graph()
    second = ModelGraph(gm, copy.deepcopy(gm.graph), "Second")
    first, second = again({"first": gm, "second": second}).values()
    assert first._parameters is second._parameters
    assert first._modules is second._modules


def test_dictionaries_are_those_of_the_root() -> None:
    net = Net()
    gm = ModelGraph(net, fx.Tracer().trace(nn.ReLU()))
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        assert gm.__dict__[name] is net.__dict__[name]
    assert gm.state_dict().keys() == net.state_dict().keys()
    net.double()
    assert next(gm.parameters()).dtype == torch.float64


def test_tracing_shares_tensors_and_nothing_else() -> None:
    net = Net()
    gm = nasfx.trace(net).graph_module
    assert gm.get_submodule("lin") is not net.lin
    assert gm.get_submodule("lin")._parameters is net.lin._parameters
    gm.eval()
    assert net.norm.training
    net.lin.weight = nn.Parameter(torch.zeros(3, 3))
    assert gm.get_parameter("lin.weight") is net.lin.weight


def test_a_working_copy_has_graphs_of_its_own_over_the_same_leaves() -> None:
    gm = graph()
    working = copy_graph_module(gm)
    before = format_graph(gm)
    assert working.get_submodule("lin") is gm.get_submodule("lin")
    for (path, a), (other, b) in zip(graphs(gm), graphs(working), strict=True):
        assert path == other
        assert a is not b
        assert a.graph is not b.graph
    for _, inner in graphs(working):
        inner.graph.output_node().args = (next(iter(inner.graph.nodes)),)
        inner.recompile()
    working._modules["new"] = nn.ReLU()
    assert format_graph(gm) == before
    assert "new" not in gm._modules
    assert torch.equal(working(X), X)
    assert not torch.equal(gm(X), X)


def test_code_is_generated_anew_after_a_change() -> None:
    gm = graph()
    gm(X)
    code = gm.code
    assert "layer_norm" in code
    gm.graph.output_node().args = (next(iter(gm.graph.nodes)),)
    gm.recompile()
    assert torch.equal(gm(X), X)
    assert gm.code != code


def test_two_graphs_of_one_class_do_not_share_their_code() -> None:
    first, second = graph(), graph()
    first(X)
    second.graph.output_node().args = (next(iter(second.graph.nodes)),)
    second.recompile()
    assert torch.equal(second(X), X)
    assert not torch.equal(first(X), X)


def test_dump_and_load_keep_names_arguments_and_provenance() -> None:
    original = fx.Graph()
    x = original.placeholder("x")
    y = original.call_method("narrow", (x, 0), {"start": 1, "length": 2})
    z = original.call_function(torch.stack, ([x, y],), {"dim": 0})
    w = original.create_node("call_function", torch.relu, (z,), name="relu_7")
    original.output({"all": (x, [y, z, w]), "slice": slice(x, None, 2)})
    loaded = load_graph(pickle.loads(pickle.dumps(dump_graph(original))))
    assert str(loaded) == str(original)
    assert [n.name for n in loaded.nodes] == ["x", "narrow", "stack", "relu_7", "output"]
    gm = graph()
    loaded = load_graph(dump_graph(gm.graph))
    assert [provenance(n) for n in loaded.nodes] == [provenance(n) for n in gm.graph.nodes]


def test_graphs_lists_inner_ones_first_and_each_once() -> None:
    shared = LayerChoice({"a": nn.Sequential(nn.ReLU()), "b": nn.Tanh()}, label="in")
    net = nn.Sequential(shared, LayerChoice({"c": nn.Sequential(shared), "d": nn.Tanh()}), shared)
    found = [path for path, _ in graphs(nasfx.trace(net).graph_module)]
    assert found[-1] == ""
    assert len(found) == len(set(found)) == 3
    assert found.index("0.a") < found.index("1.c")


def test_free_name() -> None:
    module = nn.Module()
    module.add_module("_deferred", nn.ReLU())
    module.register_buffer("_deferred_1", torch.zeros(1))
    assert free_name(module, "_deferred") == "_deferred_2"
    assert free_name(module, "other") == "other"


# -- printing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((1,), "(1,)"),
        ((1, "a"), "(1, 'a')"),
        ([1.5, None], "[1.5, None]"),
        ({"k": (2,)}, "{'k': (2,)}"),
        (slice(None, 3), "slice(None, 3, None)"),
        (torch.float32, "torch.float32"),
        (torch.device("cpu"), "device(type='cpu')"),
        (fx.immutable_collections.immutable_list([1]), "[1]"),
        (fx.immutable_collections.immutable_dict({"a": 1}), "{'a': 1}"),
        (float("inf"), "inf"),
    ],
)
def test_values_print_as_python(value: Any, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.relu, "torch.relu"),
        (F.relu, "torch.nn.functional.relu"),
        (F.gelu, "torch.nn.functional.gelu"),
        (torch.add, "torch.add"),
        (torch.linalg.norm, "torch.linalg_norm"),
        (getattr, "getattr"),
        (nasfx.ops.mix, "nasfx.ops.mix"),
    ],
)
def test_functions_print_by_their_public_name(function: Any, name: str) -> None:
    assert function_name(function) == name


def test_printing_is_stable() -> None:
    texts = {format_graph(nasfx.transform(Printed(), s).graph_module) for s in ["proxyless"] * 5}
    assert len(texts) == 1
    assert "0x" not in texts.pop()


class Printed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice({"a": nn.Linear(3, 3), "b": nn.Tanh()}, label="op")

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x[..., 1:].to(torch.float32)) + torch.ones(1, device=x.device)


def test_sites_name_the_users_line_the_choice_and_the_pass() -> None:
    text = format_graph(nasfx.transform(Printed(), "darts").graph_module, sites=True)
    line = Printed.forward.__code__.co_firstlineno + 1
    assert f"%op_a = call_module[op.a](%to)  # {__file__}:{line} op/a [lower-weighted-sum]" in text
    assert f"  # {__file__}:{line} [trace]" in text
