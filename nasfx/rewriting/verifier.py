"""What a graph must satisfy between passes: the rules of every graph, and those of its stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from nasfx.errors import VerifyError
from nasfx.rewriting.graph import find_module, graphs, provenance
from nasfx.rewriting.printing import format_node

Rule = Callable[[fx.GraphModule, fx.Node], str | None]
"""Says why a node is illegal, or None where it is legal."""


@dataclass(frozen=True)
class Stage:
    """A stage of compilation: its name and the rules that its nodes obey."""

    name: str
    rules: tuple[Rule, ...] = ()

    def __str__(self) -> str:
        return self.name


ANY = Stage("ANY")
"""For passes that take a graph of any stage and leave it in that stage."""


def verify(gm: fx.GraphModule, stage: Stage, after: str = "") -> None:
    """Check all graphs of `gm` against the general rules and those of `stage`.

    Args:
        gm: the graph module; graphs inside its nodes are checked as well.
        stage: whose rules apply.
        after: the pass to name in the error.

    Raises:
        VerifyError: names the node, its place in the user's code, the rule, and shows the graph
            around the node as a note.
    """
    for path, inner in graphs(gm):
        if next((node.op for node in reversed(inner.graph.nodes)), "") != "output":
            where = f"{'after ' + after + ': ' if after else ''}the graph"
            raise VerifyError(f"{where}{' of ' + path if path else ''} does not end in an output")
        for node, reason in _broken(inner, stage):
            origin = provenance(node)
            where = f" of {path}" if path else ""
            raise explained(
                VerifyError(
                    f"{'after ' + after + ': ' if after else ''}node %{node.name}{where} breaks a "
                    "rule "
                    f"of stage {stage}: {reason}" + (f" ({origin.site})" if origin.site else "")
                ),
                node,
            )


def explained(error: VerifyError, node: fx.Node) -> VerifyError:
    """`error` with the graph around `node` as a note."""
    nodes = list(node.graph.nodes)
    at = nodes.index(node) if node in nodes else 0
    around = nodes[max(0, at - 3) : at + 4]
    marked = [("--> " if n is node else "    ") + format_node(n) for n in around]
    error.add_note("\n".join(marked))
    return error


def _broken(gm: fx.GraphModule, stage: Stage) -> Iterator[tuple[fx.Node, str]]:
    seen: set[fx.Node] = set()
    names: set[str] = set()
    nodes = list(gm.graph.nodes)
    for node in nodes:
        for used in node.all_input_nodes:
            if used.graph is not gm.graph:
                yield node, f"it reads %{used.name}, a node of another graph"
            elif used not in seen:
                yield node, f"it reads %{used.name}, which is not computed before it"
        if node.name in names:
            yield node, f"its name %{node.name} is taken by an earlier node"
        if node.op == "output" and node is not nodes[-1]:
            yield node, "nodes follow the output"
        if node.op in ("call_module", "get_attr") and (missing := _missing(gm, node)):
            yield node, missing
        elif node.op == "call_function" and not callable(node.target):
            yield node, f"its target {node.target!r} cannot be called"
        else:
            for rule in stage.rules:
                if reason := rule(gm, node):
                    yield node, reason
        seen.add(node)
        names.add(node.name)


def _missing(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if node.op == "call_module":
        found = find_module(gm, str(node.target)) is not None
        return None if found else f"there is no module {node.target}"
    parent, _, name = str(node.target).rpartition(".")
    module = find_module(gm, parent)
    found = module is not None and hasattr(module, name)
    return None if found else f"{node.target} does not exist"
