"""The three stages of compilation, and which nodes are legal in each.

| stage    | choice calls | gates, mixtures, switches | other nodes of nasfx |
|----------|--------------|---------------------------|----------------------|
| CHOICE   | yes          | no                        | no                   |
| SUPERNET | no           | yes                       | no                   |
| SUBNET   | no           | no                        | no                   |
"""

from __future__ import annotations

from torch import fx

from nasfx.choice import Choice, InputChoice, LayerChoice
from nasfx.ops.arch_state import ArchState
from nasfx.ops.function import is_graph_function
from nasfx.ops.select import Demanded, InputSwitch, Switch
from nasfx.rewriting.graph import tensor_leaves
from nasfx.rewriting.verifier import Stage


def _is_ours(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_function":
        return is_graph_function(node.target)
    if node.op == "call_module":
        kinds = Switch, InputSwitch, Demanded, ArchState
        return isinstance(gm.get_submodule(str(node.target)), kinds)
    return node.op == "get_attr" and str(node.target).startswith("arch.")


def _is_choice(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), Choice)


def _no_lowered_node(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if _is_ours(gm, node):
        return "gates, mixtures and switches belong to a lowered graph"
    return None


def _no_choice(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if _is_choice(gm, node):
        return f"choice {node.target} must have been lowered"
    return None


def _choice_call_fits(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """A choice is called as its candidates' graphs expect."""
    if not _is_choice(gm, node):
        return None
    choice = gm.get_submodule(str(node.target))
    if isinstance(choice, InputChoice):
        inputs = node.args[0] if node.args else None
        if not isinstance(inputs, list | tuple) or len(inputs) != choice.n_candidates:
            return f"an InputChoice takes one list of {choice.n_candidates} inputs"
        return None
    assert isinstance(choice, LayerChoice)
    given = len(tensor_leaves(node.args, node.kwargs))
    for name, candidate in choice.named_candidates():
        if isinstance(candidate, fx.GraphModule):
            taken = len(candidate.graph.find_nodes(op="placeholder"))
            if taken != given:
                return f"candidate {name} takes {taken} tensors, but the call gives {given}"
    return None


def _switch_call_fits(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """A switch gets the draws of the choices inside its candidates."""
    switch = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(switch, Switch):
        return None
    if len(node.args) != 4:
        return "a switch takes (drawn, args, kwargs, gates)"
    given = node.args[3]
    if not isinstance(given, dict):
        return "a switch takes (drawn, args, kwargs, gates)"
    for name, labels in switch.needs.items():
        if missing := set(labels) - set(given):
            return f"candidate {name} needs the draw of {sorted(missing)[0]!r}"
    return None


CHOICE = Stage("CHOICE", (_no_lowered_node, _choice_call_fits))
SUPERNET = Stage("SUPERNET", (_no_choice, _switch_call_fits))
SUBNET = Stage("SUBNET", (_no_choice, _no_lowered_node))
