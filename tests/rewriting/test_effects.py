import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nasfx.rewriting.effects import Effects, gives_zeros, mutated

# Every method that may give a view, with arguments that make it give one.
VIEWS: dict[str, tuple[Any, ...]] = {
    "adjoint": (), "as_strided": ((8,), (1,)), "broadcast_to": ((2, 2, 2, 2),), "chunk": (2,),
    "conj": (), "contiguous": (), "cpu": (), "detach": (), "diagonal": (0, 2, 3), "double": (),
    "dsplit": (2,), "expand": ((2, 2, 2, 2),), "expand_as": (torch.zeros(2, 2, 2, 2),),
    "flatten": (1,), "hsplit": (2,), "moveaxis": (1, 2), "movedim": (1, 2), "narrow": (1, 0, 1),
    "permute": ((0, 2, 3, 1),), "positive": (), "ravel": (), "reshape": ((-1,),),
    "reshape_as": (torch.zeros(16),), "resolve_conj": (), "resolve_neg": (), "select": (1, 0),
    "split": (1, 1), "split_with_sizes": ([1, 1], 1), "squeeze": (), "swapaxes": (1, 2),
    "swapdims": (1, 2), "tensor_split": (2, 1), "to": (torch.float64,), "transpose": (1, 2),
    "type": (torch.float64,), "type_as": (torch.zeros(1, dtype=torch.float64),), "unbind": (1,),
    "unflatten": (1, (1, 2)), "unfold": (2, 1, 1), "unsafe_chunk": (2, 1), "unsafe_split": (1, 1),
    "unsqueeze": (0,), "view": (-1,), "view_as": (torch.zeros(16),), "vsplit": (2,),
    "__getitem__": (0,),
}  # fmt: skip


def memory(node: fx.Node) -> list[fx.Node]:
    """The node and, if another one made its memory, that one."""
    base = Effects(node.graph).base[node]
    return [node] if base is node else [node, base]


def always_needed(node: fx.Node) -> bool:
    return Effects(node.graph).always_needed(node)


def shares(value: Any, base: Tensor) -> bool:
    first = value[0] if isinstance(value, tuple | list) else value
    return first.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def view(kind: str, name: str) -> tuple[fx.Node, fx.Node]:
    """A node that gives a view, and the one that it is a view of."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    if kind == "method":
        return graph.call_method(name, (x, *VIEWS[name])), x
    return graph.call_function(getattr(torch, name), (x, *VIEWS[name])), x


@pytest.mark.parametrize("name", VIEWS)
def test_a_method_that_gives_a_view_is_known_to_share_memory(name: str) -> None:
    base = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    assert shares(getattr(base, name)(*VIEWS[name]), base), "the table of this test"
    node, x = view("method", name)
    assert memory(node) == [node, x]


FUNCTIONS = [n for n in VIEWS if callable(getattr(torch, n, None)) and n not in ("double",)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_gives_a_view_is_known_to_share_memory(name: str) -> None:
    base = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    assert shares(getattr(torch, name)(base, *VIEWS[name]), base), "the table of this test"
    node, x = view("function", name)
    assert memory(node) == [node, x]


@pytest.mark.parametrize("attribute", ["T", "mT", "H", "mH", "data", "real"])
def test_attributes_that_are_views(attribute: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(getattr, (x, attribute))
    assert memory(node) == [node, x]


@pytest.mark.parametrize("function", [torch.relu, torch.clone, torch.cat, operator.add, F.gelu])
def test_what_makes_memory_of_its_own(function: Any) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(function, (x, x))
    assert memory(node) == [node]
    assert mutated(node) is None


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "written"),
    [
        (F.relu, "x", {"inplace": True}, "x"),
        (F.relu, "", {"input": "x", "inplace": True}, "x"),
        (F.relu, "x", {"inplace": False}, None),
        (torch.relu_, "x", {}, "x"),
        (operator.iadd, "xy", {}, "x"),
        (operator.setitem, "xy", {}, "x"),
        (torch.add, "xy", {"out": "z"}, "z"),
        (torch.add, "xy", {}, None),
        (torch.__dict__["_foreach_add"], "x", {}, None),
    ],
)
def test_functions_that_write(
    target: Any, args: str, kwargs: dict[str, Any], written: str | None
) -> None:
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in "xyz"}
    node = graph.call_function(
        target, tuple(nodes[a] for a in args), {k: nodes.get(v, v) if isinstance(v, str) else v
                                                for k, v in kwargs.items()}
    )  # fmt: skip
    found = mutated(node)
    assert (None if found is None else found.name) == written


@pytest.mark.parametrize(
    ("name", "writes"),
    [
        ("add_", True),
        ("__setitem__", True),
        ("add", False),
        ("__getitem__", False),
        ("copy_", True),
    ],
)
def test_methods_that_write(name: str, writes: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert (mutated(graph.call_method(name, (x, 1))) is x) == writes


def test_modules_that_write() -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), nn.ReLU(), nn.Dropout(0.5, inplace=True))
    gm = fx.symbolic_trace(net)
    x, first, second, third, _ = gm.graph.nodes
    assert mutated(first) is x
    assert mutated(second) is None
    assert mutated(third) is second
    assert memory(first) == [first, x]
    assert always_needed(first), "it writes to an input"
    assert not always_needed(second)
    assert not always_needed(third), "it writes to a value of the graph's own"


@pytest.mark.parametrize("function", [torch._assert, print, setattr])
def test_what_is_seen_outside_is_always_needed(function: Any) -> None:
    graph = fx.Graph()
    assert always_needed(graph.call_function(function, (graph.placeholder("x"), "message")))


class Calls(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def written(x: Tensor) -> Tensor:
    y = x * 0
    y[:, 0].add_(1)
    return y


@pytest.mark.parametrize(
    ("function", "zeros"),
    [
        (lambda x: x * 0, True),
        (lambda x: 0.0 * x[:, :, ::2, ::2], True),
        (lambda x: x.mul_(0), True),
        (lambda x: torch.zeros_like(x) - x * 0, True),
        (lambda x: torch.cat([x * 0, x * 0], 1).sum(1), True),
        (lambda x: x * 0 + 0, True),
        (lambda x: x * 0 + 1, False),
        (lambda x: torch.sub(x * 0, other=1), False),
        (lambda x: x * 0 + x, False),
        (written, False),
        (lambda x: x * 2, False),
        (lambda x: x, False),
    ],
)
def test_what_gives_zeros_whatever_it_is_given(function: Any, zeros: bool) -> None:
    assert gives_zeros(fx.symbolic_trace(Calls(function))) is zeros
    if zeros:
        assert not function(torch.ones(1, 2, 4, 4)).any()
