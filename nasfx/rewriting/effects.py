"""What a node changes besides computing its value: one table for every pass that moves or deletes.

`fx.Graph.eliminate_dead_code` deletes in-place operations whose result nobody reads, and with them
updates of buffers. Here a node that writes is needed as long as somebody sees the write.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx, nn

_INPLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul,
    operator.setitem,
}  # fmt: skip
_VIEW_METHODS = {
    "view", "view_as", "reshape", "reshape_as", "t", "transpose", "permute", "expand", "expand_as",
    "squeeze", "unsqueeze", "flatten", "unflatten", "contiguous", "chunk", "split", "narrow",
    "select", "detach", "unbind", "unfold", "movedim", "swapaxes", "to", "type_as", "float",
    "double", "half", "diagonal", "__getitem__",
}  # fmt: skip
_VIEW_FUNCTIONS = {
    operator.getitem, getattr, torch.flatten, torch.reshape, torch.transpose, torch.permute,
    torch.squeeze, torch.unsqueeze, torch.chunk, torch.split, torch.narrow, torch.select,
    torch.unbind, torch.movedim, torch.t, torch.detach, torch.tensor_split,
}  # fmt: skip
_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
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
    shares = (
        (node.op == "call_method" and node.target in _VIEW_METHODS)
        or (node.op == "call_function" and node.target in _VIEW_FUNCTIONS)
        or (node.op == "call_module" and isinstance(_module(node), _VIEW_MODULES))
    )
    return first if shares else None


def memory(node: fx.Node) -> list[fx.Node]:
    """`node` and the values it may share memory with, up to the one that made the memory."""
    chain = [node]
    while (base := aliased(chain[-1])) is not None:
        chain.append(base)
    return chain


def always_needed(node: fx.Node) -> bool:
    """Whether `node` has an effect that is seen outside of the graph."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_function" and node.target in _SEEN_OUTSIDE:
        return True
    written = mutated(node)
    return written is not None and memory(written)[-1].op in ("get_attr", "placeholder")


def observers(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that see what `node` does: its users, and later readers of what it writes to."""
    yield from node.users
    if (written := mutated(node)) is not None:
        for alias in memory(written):
            yield from (user for user in alias.users if node < user)


def _module(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    return None if owner is None else owner.get_submodule(str(node.target))
