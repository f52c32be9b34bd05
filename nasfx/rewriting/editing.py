"""Edits that several passes share: inlining a graph, putting a node in another's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.fx.proxy import GraphAppendingTracer

from nasfx.rewriting.graph import join, provenance, set_provenance


def inline(
    graph: fx.Graph,
    inner: fx.Graph,
    prefix: str,
    inputs: Sequence[Any],
) -> tuple[Any, dict[fx.Node, fx.Node]]:
    """Copy the nodes of `inner` to the insertion point of `graph`.

    Args:
        graph: where to.
        inner: what; its targets are relative to `prefix`.
        prefix: the path of the module that `inner` belongs to.
        inputs: the values for the placeholders of `inner`.

    Returns:
        The value of `inner`'s output in `graph`, and the map from old to new nodes.
    """
    new_of: dict[fx.Node, Any] = dict(zip(inner.find_nodes(op="placeholder"), inputs, strict=True))
    made: dict[fx.Node, fx.Node] = {}

    def mapped(node: fx.Node) -> Any:
        return new_of[node]

    result: Any = None
    for node in inner.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            result = fx.map_arg(node.args[0], mapped)
            continue
        new = graph.node_copy(node, mapped)
        if node.op in ("call_module", "get_attr"):
            new.target = join(prefix, str(node.target))
            new._rename(identifier(str(new.target)))
        new_of[node] = made[node] = new
    return result, made


def identifier(target: str) -> str:
    """`target` with "_" for what no name may hold."""
    return "".join(c if c.isalnum() else "_" for c in target)


def replace(node: fx.Node, value: Any, *, take_name: bool = False) -> None:
    """Let the users of `node` read `value` (a node, or a structure of nodes) and erase `node`.

    With `take_name`, `value` gets the name of `node`; fx itself would add a number to it.
    """
    if isinstance(value, fx.Node):
        node.replace_all_uses_with(value)
    else:
        for user in list(node.users):
            user.args = _substituted(user.args, node, value)
            user.kwargs = _substituted(user.kwargs, node, value)
    node.graph.erase_node(node)
    if take_name:
        value.name = node.name


def _substituted(arg: Any, node: fx.Node, value: Any) -> Any:
    return fx.map_arg(arg, lambda n: value if n is node else n)


def attribute(graph: fx.Graph, target: str) -> fx.Node:
    """A get_attr node for `target` at the insertion point."""
    return graph.create_node("get_attr", target, name=identifier(target))


def gate_node(graph: fx.Graph, function: Any, value: fx.Node, label: str, *args: Any) -> fx.Node:
    """A call of a gate function at the insertion point."""
    return graph.create_node(
        "call_function", function, (value, *args), {"label": label},
        name=f"gate_{identifier(label)}",
    )  # fmt: skip


def compute(
    node: fx.Node, function: Callable[[list[fx.Proxy]], Any], inputs: Sequence[fx.Node]
) -> Any:
    """Record `function(inputs)` as nodes before `node`, with its provenance; their value."""
    tracer = GraphAppendingTracer(node.graph)
    before = node.prev
    with node.graph.inserting_before(node):
        result = function([fx.Proxy(n, tracer) for n in inputs])
    while (before := before.next) is not node:
        set_provenance(before, provenance(node), made_by="")
    to_node: Any = lambda v: v.node if isinstance(v, fx.Proxy) else v  # noqa: E731
    return map_aggregate(result, to_node)


def is_identity(module: nn.Module) -> bool:
    """Whether `module` returns its input as it is in both modes."""
    return type(module) is nn.Identity
