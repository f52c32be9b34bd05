"""What a node changes besides computing its value: one table for every pass that moves or deletes.

`fx.Graph.eliminate_dead_code` deletes in-place operations whose result nobody reads, and with them
updates of buffers. Here a node that writes is needed as long as somebody sees the write.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

_INPLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul,
    operator.setitem,
}  # fmt: skip
# fmt: off
_VIEWS = {
    "adjoint", "as_strided", "bfloat16", "broadcast_to", "chunk", "conj", "contiguous", "cpu",
    "cuda", "detach", "diagonal", "double", "dsplit", "expand", "expand_as", "flatten", "float",
    "getattr", "getitem", "half", "hsplit", "imag", "moveaxis", "movedim", "narrow", "permute",
    "positive", "ravel", "real", "reshape", "reshape_as", "resolve_conj", "resolve_neg",
    "select", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t",
    "tensor_split", "to", "transpose", "type", "type_as", "unbind", "unflatten", "unfold",
    "unsafe_chunk", "unsafe_split", "unsqueeze", "view", "view_as", "view_as_complex",
    "view_as_real", "vsplit", "__getitem__",
}
# fmt: on
"""Methods, and functions of torch and operator, that may give a view of their first argument."""
VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
_SEEN_OUTSIDE = {torch._assert, print, setattr}


def mutated(node: fx.Node) -> fx.Node | None:
    """The input that `node` writes to, or None where it writes to none."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    if node.op == "call_method":
        name = str(node.target)
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        writes = (
            node.target in _INPLACE_OPERATORS
            or node.kwargs.get("inplace") is True
            or (name.endswith("_") and not name.endswith("__"))
        )
        if isinstance(node.kwargs.get("out"), fx.Node):
            first, writes = node.kwargs["out"], True
    elif node.op == "call_module":
        writes = getattr(_module(node), "inplace", False) is True
    else:
        writes = False
    return first if writes and isinstance(first, fx.Node) else None


def aliased(node: fx.Node) -> fx.Node | None:
    """The input whose memory the value of `node` may share, or None."""
    if (written := mutated(node)) is not None:
        return written
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    if node.op == "call_module":
        shares = isinstance(_module(node), VIEW_MODULES)
    else:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        shares = name in _VIEWS
    return first if shares else None


class Effects:
    """Who shares memory with whom in a graph, and who sees what is written to it.

    Valid until the graph changes.

    Attributes:
        base: for every node, the node that made the memory of its value.
        sharing: for every such node, all nodes whose values may share its memory, in order.
        writers: for every such node, the nodes that write to its memory, in order.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.base: dict[fx.Node, fx.Node] = {}
        self.sharing: dict[fx.Node, list[fx.Node]] = {}
        self.writers: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            of = aliased(node)
            base = self.base[node] = node if of is None else self.base[of]
            self.sharing.setdefault(base, []).append(node)
            if mutated(node) is not None:
                self.writers.setdefault(base, []).append(node)

    def always_needed(self, node: fx.Node) -> bool:
        """Whether `node` has an effect that is seen outside of the graph."""
        if node.op in ("placeholder", "output"):
            return True
        if node.op == "call_function" and node.target in _SEEN_OUTSIDE:
            return True
        return mutated(node) is not None and self.base[node].op in ("get_attr", "placeholder")

    def observers(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes that see what `node` does: its users, and later readers of what it wrote."""
        yield from node.users
        if mutated(node) is not None:
            yield from self.readers_after(node, node)

    def readers_after(self, node: fx.Node, value: fx.Node) -> Iterator[fx.Node]:
        """The nodes after `node` that read the memory of `value`."""
        for alias in self.sharing[self.base[value]]:
            yield from (user for user in alias.users if node < user)


def needed_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose value or effect reaches the outside of the graph."""
    effects = Effects(graph)
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if effects.always_needed(node) or any(user in needed for user in effects.observers(node)):
            needed.add(node)
    return needed


def inputs_read(graph: fx.Graph) -> list[bool]:
    """For every placeholder, whether a node that is needed reads it."""
    needed = needed_nodes(graph)
    placeholders = graph.find_nodes(op="placeholder")
    return [any(user in needed for user in node.users) for node in placeholders]


def _module(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    return None if owner is None else owner.get_submodule(str(node.target))


_PASS_ZEROS = _VIEWS | {"cat", "clone", "mean", "neg", "stack", "sum"}
_MAKE_ZEROS = {"zeros_like", "new_zeros", "zeros", "zero_"}


def gives_zeros(module: nn.Module | None) -> bool:
    """Whether a graph module returns zeros whatever it is given, by its structure.

    Recognises a product with the number 0, functions that make zeros, and views, sums and
    concatenations of these, into whose memory nothing else is written. A module without a graph is
    not looked into.
    """
    if not isinstance(module, fx.GraphModule):
        return False
    zeros: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op in ("call_function", "call_method") and _is_zero(node, zeros):
            zeros.add(node)
    given = module.graph.output_node().all_input_nodes
    if not given or not zeros.issuperset(given):
        return False
    effects = Effects(module.graph)
    return all(zeros.issuperset(effects.writers.get(effects.base[node], ())) for node in given)


def _is_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Whether a call gives zeros where `zeros` are."""

    def zero(value: Any) -> bool:
        return (
            value in zeros
            if isinstance(value, fx.Node)
            else isinstance(value, int | float) and value == 0
        )

    name = str(getattr(node.target, "__name__", node.target))
    if name in ("mul", "imul", "mul_"):
        return any(map(zero, node.args))
    if name in ("add", "sub"):
        return all(map(zero, node.args)) and node.kwargs.keys() <= {"alpha"}
    inputs = node.all_input_nodes
    return name in _MAKE_ZEROS or (
        name in _PASS_ZEROS and bool(inputs) and zeros.issuperset(inputs)
    )


def adds_to_input(module: nn.Module | None) -> bool:
    """Whether a graph module returns its first input plus something else, by its structure."""
    if not isinstance(module, fx.GraphModule):
        return False
    result = module.graph.output_node().args[0]
    first = module.graph.find_nodes(op="placeholder")[0]
    if not isinstance(result, fx.Node) or result.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(result.target, "__name__", result.target))
    return name in ("add", "iadd", "add_") and first in result.all_input_nodes
