"""Graphs as text: stable between torch versions, with the graphs inside a node beneath it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from nasfx.rewriting.graph import is_region, provenance, region_children


@dataclass(frozen=True)
class Line:
    """One line of a printed graph, with the label of the construct that its node belongs to."""

    text: str
    label: str


def format_graph(gm: fx.GraphModule, *, sites: bool = False) -> str:
    """The graph of `gm` as text; with `sites`, every node's file, module and pass beside it."""
    return "\n".join(line.text for line in lines(gm, sites=sites))


def lines(gm: fx.GraphModule, *, sites: bool = False, indent: str = "") -> Iterator[Line]:
    """The lines of `format_graph`, one node each."""
    for node in gm.graph.nodes:
        origin = provenance(node)
        comment = ""
        if sites and node.op not in ("placeholder", "output"):
            choice = f" {origin.label}/{origin.part}" if origin.label else ""
            comment = f"  # {origin.site or '?'}{choice} [{origin.made_by or 'trace'}]"
        yield Line(indent + format_node(node) + comment, origin.label)
        if node.op != "call_module":
            continue
        module = gm.get_submodule(str(node.target))
        if is_region(module):
            yield from _inside(module, indent + "    ", origin.label, sites)


def _inside(region: Any, indent: str, label: str, sites: bool) -> Iterator[Line]:
    for name, child in region_children(region).items():
        if isinstance(child, fx.GraphModule):
            inputs = ", ".join(f"%{n.name}" for n in child.graph.find_nodes(op="placeholder"))
            yield Line(f"{indent}{name}({inputs}):", label)
            for line in lines(child, sites=sites, indent=indent + "    "):
                if " = placeholder" not in line.text:
                    yield Line(line.text, line.label or label)
        elif is_region(child):
            yield Line(f"{indent}{name}: {type(child).__name__}", label)
            yield from _inside(child, indent + "    ", label, sites)
        else:
            yield Line(f"{indent}{name}: {type(child).__name__}", label)


def format_node(node: fx.Node) -> str:
    """One node: `%name = target(arguments)`."""
    arguments = [format_value(a) for a in node.args]
    arguments += [f"{key}={format_value(value)}" for key, value in node.kwargs.items()]
    call = f"({', '.join(arguments)})"
    if node.op == "output":
        return f"return {format_value(node.args[0])}"
    if node.op == "placeholder":
        default = f" = {format_value(node.args[0])}" if node.args else ""
        return f"%{node.name} = placeholder[{node.target}]{default}"
    if node.op == "get_attr":
        return f"%{node.name} = get_attr[{node.target}]"
    if node.op == "call_module":
        return f"%{node.name} = call_module[{node.target}]{call}"
    if node.op == "call_method":
        return f"%{node.name} = call_method[{node.target}]{call}"
    return f"%{node.name} = {function_name(node.target)}{call}"


def function_name(function: Any) -> str:
    """The public name of a function: `torch.nn.functional.relu`, `operator.add`."""
    module = str(getattr(function, "__module__", None) or "torch")
    name = str(getattr(function, "__name__", function))
    module = {"_operator": "operator", "torch._C._nn": "torch.nn.functional"}.get(module, module)
    if module.startswith("torch._C"):
        module = "torch"
    return name if module == "builtins" else f"{module}.{name}"


def format_value(value: Any) -> str:
    """An argument: nodes as `%name`, containers and constants as Python writes them."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, tuple):
        items = [format_value(v) for v in cast("tuple[Any, ...]", value)]
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    if isinstance(value, list):
        return f"[{', '.join(format_value(v) for v in cast('list[Any]', value))}]"
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        return "{" + ", ".join(f"{k!r}: {format_value(v)}" for k, v in pairs) + "}"
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return f"slice({', '.join(format_value(v) for v in parts)})"
    return repr(value)
