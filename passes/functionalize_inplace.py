"""functionalize-inplace: candidates must not write to the input that their siblings read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from nasfx.choice import LayerChoice
from nasfx.errors import TraceError
from nasfx.ops.stages import CHOICE
from nasfx.rewriting.effects import memory, mutated
from nasfx.rewriting.graph import (
    ModelGraph,
    graphs,
    provenance,
    set_provenance,
    tensor_leaves,
)
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import Stage

# In-place activation modules, with the function and the attributes that it takes.
_ACTIVATIONS: dict[type[nn.Module], tuple[Callable[..., Any], tuple[str, ...]]] = {
    nn.ReLU: (F.relu, ()),
    nn.ReLU6: (F.relu6, ()),
    nn.LeakyReLU: (F.leaky_relu, ("negative_slope",)),
    nn.ELU: (F.elu, ("alpha",)),
    nn.SELU: (F.selu, ()),
    nn.CELU: (F.celu, ("alpha",)),
    nn.SiLU: (F.silu, ()),
    nn.Mish: (F.mish, ()),
    nn.Hardswish: (F.hardswish, ()),
    nn.Hardsigmoid: (F.hardsigmoid, ()),
    nn.Hardtanh: (F.hardtanh, ("min_val", "max_val")),
    nn.Threshold: (F.threshold, ("threshold", "value")),
}


@dataclass(frozen=True)
class FunctionalizeInplace(Pass):
    """Let candidates write to memory of their own instead of the choice's input.

    Rules, for a node of a candidate that writes to an input of the candidate or a view of one::

        %y = call_module[relu](%x)              ->  %y = torch.nn.functional.relu(%x)
        %y = call_method[add_](%x, %b)          ->  %c = torch.clone(%x)
                                                    %y = call_method[add_](%c, %b)

    What reads the input afterwards in the same candidate reads the written value, as it did before.
    Declines writes to values that the candidate made itself: nobody else sees those. Refuses, with
    TraceError, a candidate that writes to an input which is read again elsewhere: there the eager
    model already depends on the write.
    """

    name: ClassVar[str] = "functionalize-inplace"
    consumes: ClassVar[Stage] = CHOICE
    produces: ClassVar[Stage] = CHOICE
    exactness: ClassVar[Exactness] = Exactness.BITWISE

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Rewrite candidates, inner ones first, so that outer ones see what is left."""
        changed = False
        done: set[int] = set()
        for _, inner in list(graphs(gm)):
            for node in inner.graph.find_nodes(op="call_module"):
                choice = inner.get_submodule(str(node.target))
                if isinstance(choice, LayerChoice):
                    changed |= self._choice(node, choice, ctx, done)
        return changed

    def _choice(self, call: fx.Node, choice: LayerChoice, ctx: PassContext, done: set[int]) -> bool:
        changed = False
        for name, candidate in list(choice.named_children()):
            if isinstance(candidate, LayerChoice):
                changed |= self._choice(call, candidate, ctx, done)
                continue
            if isinstance(candidate, fx.GraphModule):
                graph = candidate.graph
            elif getattr(candidate, "inplace", False) is True:
                graph = _wrapped(choice, name, call)
                changed = True
            else:
                continue
            writes = [node for node in graph.nodes if _writes_to_input(node, ctx, done)]
            for node in writes:
                _refuse_if_read_again(call, choice, name, node)
                changed = True
                _functionalize(node)
            done.add(id(choice._modules[name]))
        return changed


def _writes_to_input(node: fx.Node, ctx: PassContext, done: set[int]) -> bool:
    if mutated(node) is None:
        return False
    base = memory(node)[-1]
    if base.op == "placeholder":
        return True
    if base.op != "get_attr" and id(node.graph.owning_module) not in done:
        ctx.skip(node, "it writes to a value of its own")
    return False


def _wrapped(choice: LayerChoice, name: str, call: fx.Node) -> fx.Graph:
    """Put the leaf candidate `name` into a graph, in which it can be rewritten."""
    module = choice._modules[name]
    assert module is not None
    if module.state_dict():
        raise TraceError(
            f"{choice.described}: candidate {name!r} ({type(module).__name__}) writes to its "
            "input in "
            "place and has parameters or buffers; put it in an nn.Sequential, or set inplace=False"
        )
    graph = fx.Graph()
    count = len(tensor_leaves(call.args, call.kwargs))
    inputs = [graph.placeholder("x" if count == 1 else f"x{i}") for i in range(count)]
    root = nn.Module()
    root.add_module("layer", module)
    values = iter(inputs)
    args, kwargs = fx.map_arg((call.args, call.kwargs), lambda _: next(values))
    node = graph.create_node("call_module", "layer", args, kwargs)
    set_provenance(node, provenance(call), part=name)
    graph.output(node)
    choice._modules[name] = ModelGraph(root, graph, type(module).__name__)
    return graph


def _refuse_if_read_again(call: fx.Node, choice: LayerChoice, name: str, write: fx.Node) -> None:
    placeholders = write.graph.find_nodes(op="placeholder")
    index = placeholders.index(memory(write)[-1])
    tensors = tensor_leaves(call.args, call.kwargs)
    for alias in memory(tensors[index]):
        for user in alias.users:
            if user is not call and call < user:
                raise TraceError(
                    f"{choice.described}: candidate {name!r} writes to its input in place "
                    f"({provenance(write).site}), and the input is read again at "
                    f"{provenance(user).site}; what is read there depends on the candidate. Use an "
                    "operation that is not in place"
                )


def _functionalize(node: fx.Node) -> None:
    written = mutated(node)
    assert written is not None
    owner = node.graph.owning_module
    module = None
    if node.op == "call_module" and owner is not None:
        module = owner.get_submodule(str(node.target))
    known = _ACTIVATIONS.get(type(module)) if module is not None else None
    with node.graph.inserting_before(node):
        if known is not None:
            function, attributes = known
            values = tuple(getattr(module, attribute) for attribute in attributes)
            new = node.graph.call_function(function, (written, *values))
            set_provenance(new, provenance(node), made_by="")
            node.replace_all_uses_with(new)
            _read_instead(memory(written), node, new)
            node.graph.erase_node(node)
            return
        base = memory(written)[-1]
        if written is not base:
            raise TraceError(
                f"{provenance(node).site}: a candidate writes in place to a view of its input; "
                "other candidates would see that. Use an operation that is not in place"
            )
        clone = node.graph.call_function(torch.clone, (written,))
        set_provenance(clone, provenance(node), made_by="")
    node.replace_input_with(written, clone)
    _read_instead([written], clone, clone)


def _read_instead(aliases: list[fx.Node], after: fx.Node, value: fx.Node) -> None:
    """Let what reads the input after the write read the written value."""
    for alias in aliases[:1]:
        for user in list(alias.users):
            if after < user and user is not value:
                user.replace_input_with(alias, value)
