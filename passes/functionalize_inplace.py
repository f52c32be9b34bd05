"""functionalize-inplace: candidates must not write to the input that their siblings read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from nasfx.choice import Choice, InputChoice, LayerChoice
from nasfx.errors import TraceError
from nasfx.ops.stages import CHOICE
from nasfx.rewriting.effects import VIEW_MODULES, Effects, mutated
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
    """Let nothing write to what a choice reads or gives: others read it as well.

    Rules, for a node that writes to an input of its candidate, to a choice's output, or to a view
    of one; what reads the written value afterwards reads the new node::

        %y = call_module[relu](%x)              ->  %y = torch.nn.functional.relu(%x)
        %y = F.hardtanh(%x, inplace=True)       ->  %y = F.hardtanh(%x, inplace=False)
        %y = call_method[add_](%x, %b)          ->  %c = torch.clone(%x)
                                                    %y = call_method[add_](%c, %b)

    Declines writes to values that the candidate made itself: nobody else sees those. Refuses, with
    TraceError, a write to a value that is read again elsewhere: there the eager model depends on
    the write, and so on the candidate.
    """

    name: ClassVar[str] = "functionalize-inplace"
    consumes: ClassVar[Stage] = CHOICE
    produces: ClassVar[Stage] = CHOICE
    exactness: ClassVar[Exactness] = Exactness.BITWISE

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Check all choices as they were written, then rewrite every graph."""
        calls = list(_calls(gm))
        changed = False
        for _, call, choice in calls:
            changed |= _wrap_leaves(call, choice)
        for _, call, choice in calls:
            _refuse_if_input_is_read_again(call, choice)
        for path, inner in list(graphs(gm)):
            for node in list(inner.graph.nodes):
                written = mutated(node)
                if written is None:
                    continue
                effects = Effects(inner.graph)
                base = effects.base[written]
                choice = _choice(base)
                if choice is not None:
                    _refuse_if_output_is_an_input_read_again(node, base, choice, effects)
                elif base.op != "placeholder" or not path:
                    if path and base.op != "get_attr":
                        ctx.skip(node, "it writes to a value of its own")
                    continue
                _functionalize(node, written, effects)
                changed = True
        return changed


def _choice(node: fx.Node) -> Choice | None:
    """The choice that `node` calls, if it calls one."""
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return None
    module = owner.get_submodule(str(node.target))
    return module if isinstance(module, Choice) else None


def _candidates(choice: Choice) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(choice, LayerChoice):
        yield from choice.named_candidates()


def _calls(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, fx.Node, Choice]]:
    for _, inner in graphs(gm):
        for node in inner.graph.find_nodes(op="call_module"):
            if (choice := _choice(node)) is not None:
                yield inner, node, choice


def _wrap_leaves(call: fx.Node, choice: Choice) -> bool:
    """Put leaf candidates that write in place into graphs, in which they can be rewritten."""
    changed = False
    for name, module in list(_candidates(choice)):
        if isinstance(module, LayerChoice):
            changed |= _wrap_leaves(call, module)
        elif not isinstance(module, fx.GraphModule) and getattr(module, "inplace", False) is True:
            if module.state_dict():
                raise TraceError(
                    f"{choice.described}: candidate {name!r} ({type(module).__name__}) writes to "
                    "its input in place and has parameters or buffers; put it in an nn.Sequential, "
                    "or set inplace=False"
                )
            choice._modules[name] = _wrapped(call, name, module)
            changed = True
    return changed


def _wrapped(call: fx.Node, name: str, module: nn.Module) -> ModelGraph:
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
    return ModelGraph(root, graph, type(module).__name__)


def _writes(choice: Choice) -> dict[int, tuple[str, str]]:
    """By the position of the tensor, the candidate that writes to it, and where."""
    found: dict[int, tuple[str, str]] = {}
    for name, candidate in _candidates(choice):
        if isinstance(candidate, LayerChoice):
            found |= _writes(candidate)
        elif isinstance(candidate, fx.GraphModule):
            placeholders = candidate.graph.find_nodes(op="placeholder")
            effects = Effects(candidate.graph)
            for node in candidate.graph.nodes:
                targets = [(mutated(node), provenance(node).site)]
                if (inner := _choice(node)) is not None:
                    tensors = tensor_leaves(node.args, node.kwargs)
                    targets = [(tensors[i], site) for i, (_, site) in _writes(inner).items()]
                for written, site in targets:
                    base = None if written is None else effects.base[written]
                    if base in placeholders:
                        found[placeholders.index(base)] = name, site
    return found


def _refuse_if_input_is_read_again(call: fx.Node, choice: Choice) -> None:
    writes = _writes(choice)
    if not writes:
        return
    effects = Effects(call.graph)
    tensors = tensor_leaves(call.args, call.kwargs)
    for index, (name, site) in writes.items():
        for user in effects.readers_after(call, tensors[index]):
            raise TraceError(
                f"{choice.described}: candidate {name!r} writes to its input in place ({site}), "
                f"and the input is read again at {provenance(user).site}; what is read there "
                "depends on the candidate. Use an operation that is not in place"
            )


def _refuse_if_output_is_an_input_read_again(
    write: fx.Node, call: fx.Node, choice: Choice, effects: Effects
) -> None:
    if not _may_pass_its_input_on(choice):
        return
    for tensor in tensor_leaves(call.args, call.kwargs):
        for user in effects.readers_after(write, tensor):
            raise TraceError(
                f"{provenance(write).site}: the output of {choice.described} is written in place. "
                "It may be the choice's input itself, which is read again at "
                f"{provenance(user).site}; what is read there depends on the candidate. Use an "
                "operation that is not in place"
            )


def _may_pass_its_input_on(choice: Choice) -> bool:
    if isinstance(choice, InputChoice):
        return choice.reduction in ("sum", "mean", "none")
    for _, candidate in choice.named_candidates():
        if isinstance(candidate, LayerChoice):
            if _may_pass_its_input_on(candidate):
                return True
        elif isinstance(candidate, fx.GraphModule):
            outputs = tensor_leaves(candidate.graph.output_node().args, {})
            base = Effects(candidate.graph).base
            if any(base[value].op == "placeholder" for value in outputs):
                return True
        elif isinstance(candidate, VIEW_MODULES):
            return True
    return False


def _functionalize(node: fx.Node, written: fx.Node, effects: Effects) -> None:
    for alias in effects.sharing[effects.base[written]]:
        if alias < node and alias is not written:
            for user in alias.users:
                if node < user:
                    raise TraceError(
                        f"{provenance(node).site}: what a choice reads or gives is written in "
                        f"place, and read through another view of it at {provenance(user).site}. "
                        "Use an operation that is not in place"
                    )
    owner = node.graph.owning_module
    module = None
    if node.op == "call_module" and owner is not None:
        module = owner.get_submodule(str(node.target))
    later = [user for user in written.users if node < user]
    if node.kwargs.get("inplace") is True:
        node.kwargs = {**node.kwargs, "inplace": False}
        value = node
    elif module is not None and type(module) in _ACTIVATIONS:
        function, attributes = _ACTIVATIONS[type(module)]
        with node.graph.inserting_before(node):
            options = tuple(getattr(module, attribute) for attribute in attributes)
            value = node.graph.call_function(function, (written, *options))
        set_provenance(value, provenance(node), made_by="")
        node.replace_all_uses_with(value)
        node.graph.erase_node(node)
    else:
        with node.graph.inserting_before(node):
            value = node.graph.call_function(torch.clone, (written,))
        set_provenance(value, provenance(node), made_by="")
        node.replace_input_with(written, value)
    for user in later:
        user.replace_input_with(written, value)
