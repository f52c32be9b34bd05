"""count-batches-once: all batch norms of a graph count their batch in one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from nasfx.ops.norms import (
    count_batches_,
    mix_norms,
    norm_obstacle,
    shared_norms,
    uncounted_norm,
)
from nasfx.ops.stages import SUPERNET
from nasfx.rewriting.editing import attribute, replace
from nasfx.rewriting.graph import provenance, set_provenance
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import Stage


@dataclass(frozen=True)
class CountBatchesOnce(Pass):
    """Let one call count the batch for all batch norms, in place of an addition in each.

    Rule; where there are shared or folded batch norms, it goes after the passes that make them::

        %a = call_module[block.bn](%conv)
        %b = nasfx.ops.shared_norms(%pool, [%edge_0_bn, %edge_1_bn])
        ->
        %block_bn = get_attr[block.bn]
        %a = nasfx.ops.uncounted_norm(%conv, %block_bn)
        %b = nasfx.ops.shared_norms(%pool, [%edge_0_bn, %edge_1_bn], counted=False)
        %count_batches_ = nasfx.ops.count_batches_(%block_bn, %edge_0_bn, %edge_1_bn)

    Each batch norm keeps its own number. On a GPU that is one kernel in place of hundreds; on a CPU
    the gain is too small to measure, so this is not on by default.

    Declines batch norms with hooks, those that average all batches (momentum None) and so read
    their number, and those that are called more than once.
    """

    name: ClassVar[str] = "count-batches-once"
    consumes: ClassVar[Stage] = SUPERNET
    produces: ClassVar[Stage] = SUPERNET
    exactness: ClassVar[Exactness] = Exactness.BITWISE

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Rewrite all calls, then count before the output."""
        counted = [*self._called(gm, ctx), *_in_functions(gm.graph)]
        if not counted:
            return False
        with gm.graph.inserting_before(gm.graph.output_node()):
            gm.graph.call_function(count_batches_, tuple(counted))
        return True

    def _called(self, gm: fx.GraphModule, ctx: PassContext) -> Iterator[fx.Node]:
        """The batch norms that the graph calls as modules, which it no longer does."""
        nodes = list(gm.graph.find_nodes(op="call_module"))
        calls = Counter(str(node.target) for node in nodes)
        for node in nodes:
            module = gm.get_submodule(str(node.target))
            if not isinstance(module, _BatchNorm) or len(node.args) != 1 or node.kwargs:
                continue
            if reason := norm_obstacle(module, calls[str(node.target)]):
                ctx.skip(node, reason)
                continue
            with gm.graph.inserting_before(node):
                norm = attribute(gm.graph, str(node.target))
                new = gm.graph.call_function(uncounted_norm, (node.args[0], norm))
            for made in (norm, new):
                set_provenance(made, provenance(node), made_by="")
            replace(node, new, take_name=True)
            yield norm


def _in_functions(graph: fx.Graph) -> Iterator[fx.Node]:
    """The batch norms that functions call; they no longer count."""
    for function, where in ((shared_norms, 1), (mix_norms, 2)):
        for node in graph.find_nodes(op="call_function", target=function):
            if node.kwargs.get("counted", True):
                node.kwargs = {**node.kwargs, "counted": False}
                norms = cast("Sequence[fx.Node | None]", node.args[where])
                yield from (norm for norm in norms if norm is not None)
