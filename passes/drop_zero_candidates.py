"""drop-zero-candidates: a candidate that gives zeros adds nothing to a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import fx, nn

from nasfx.ops.function import is_graph_function
from nasfx.ops.mix import mix
from nasfx.ops.stages import SUPERNET
from nasfx.rewriting.effects import Effects, gives_zeros
from nasfx.rewriting.graph import ModelGraph, graphs, provenance
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import Stage


@dataclass(frozen=True)
class DropZeroCandidates(Pass):
    """Let the number 0 stand in a mixture for a candidate whose output is zeros.

    Rule::

        %mul = operator.mul(%x, 0)
        %block = nasfx.ops.mix(%gate_block, [%mul, %block_conv], label='block')
        ->
        %block = nasfx.ops.mix(%gate_block, [0, %block_conv], label='block')

    The candidate keeps its place, so its weight still counts in the softmax and gets its gradient.
    Equal where activations are finite: infinity times 0 is not a number.

    Declines a mixture of zeros alone, zeros whose memory is written in place, and zeros made of
    values that nothing else reads: batch norms there would no longer count their batches.
    """

    name: ClassVar[str] = "drop-zero-candidates"
    consumes: ClassVar[Stage] = SUPERNET
    produces: ClassVar[Stage] = SUPERNET
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Put 0 for zeros in every mixture, and erase what made them."""
        changed = False
        for _, inner in graphs(gm):
            effects = Effects(inner.graph)
            for node in inner.graph.find_nodes(op="call_function", target=mix):
                changed |= self._drop(node, effects, ctx)
        return changed

    def _drop(self, node: fx.Node, effects: Effects, ctx: PassContext) -> bool:
        gate, outputs = node.args[0], list(cast("Sequence[Any]", node.args[1]))
        zeros: dict[int, set[fx.Node]] = {}
        for k, value in enumerate(outputs):
            within = _made_of(value) if isinstance(value, fx.Node) else set[fx.Node]()
            if not within or not _is_zero(value, within):
                continue
            if reason := _obstacle(value, within, effects):
                ctx.skip(node, f"candidate {k} gives zeros, but {reason}")
            else:
                zeros[k] = within
        if not zeros:
            return False
        if len(zeros) == len(outputs):
            ctx.skip(node, "all its candidates give zeros")
            return False
        node.args = (gate, [0 if k in zeros else value for k, value in enumerate(outputs)])
        for within in zeros.values():
            for dead in sorted(within, reverse=True):
                if not dead.users:
                    node.graph.erase_node(dead)
        return True


def _made_of(value: fx.Node) -> set[fx.Node]:
    """`value` and the functions before it that came in with the same choice."""
    label = provenance(value).label
    within: set[fx.Node] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        foreign = is_graph_function(node.target) or provenance(node).label != label
        if node not in within and node.op in ("call_function", "call_method") and not foreign:
            within.add(node)
            todo.extend(node.all_input_nodes)
    return within


def _inputs(within: set[fx.Node]) -> list[fx.Node]:
    read = dict.fromkeys(n for node in sorted(within) for n in node.all_input_nodes)
    return [n for n in read if n not in within]


def _is_zero(value: fx.Node, within: set[fx.Node]) -> bool:
    """Whether `value` is zeros by the structure of the calls `within`."""
    body = fx.Graph()
    new_of = {n: body.placeholder(n.name) for n in _inputs(within)}
    for node in sorted(within):
        new_of[node] = body.node_copy(node, new_of.__getitem__)
    body.output(new_of[value])
    return gives_zeros(ModelGraph(nn.Module(), body))


def _obstacle(value: fx.Node, within: set[fx.Node], effects: Effects) -> str:
    """Why zeros may not be dropped, or ""."""
    base = effects.base[value]
    writers = effects.writers.get(base, [])
    if writers and (base not in within or set(writers) != {value}):
        return "their memory is written in place"
    if any(within.issuperset(n.users) for n in _inputs(within) if n.op != "placeholder"):
        return "nothing else reads what they are made of"
    return ""
