"""share-norms: batch norms without gain that read one value normalise it once."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from nasfx.passes.share_subexpressions import sharing_obstacle
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from nasfx.ops.norms import norm_obstacle, shared_norms
from nasfx.ops.stages import SUPERNET
from nasfx.rewriting.editing import attribute, replace
from nasfx.rewriting.effects import Effects
from nasfx.rewriting.graph import provenance, set_provenance
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import Stage


@dataclass(frozen=True)
class ShareNorms(Pass):
    """Compute equal batch norms of one value once; each keeps its own running statistics.

    Rule, for batch norms without gain and of equal settings; it finds more after
    share-subexpressions, which lets pools of one input be one::

        %a = call_module[edge.0.pool.bn](%pool)
        %b = call_module[edge.1.pool.bn](%pool)
        ->
        %edge_0_pool_bn = get_attr[edge.0.pool.bn]
        %edge_1_pool_bn = get_attr[edge.1.pool.bn]
        %norms = nasfx.ops.shared_norms(%pool, [%edge_0_pool_bn, %edge_1_pool_bn])
        %a = operator.getitem(%norms, 0)
        %b = operator.getitem(%norms, 1)

    In eval mode each is called with its own statistics.

    Declines batch norms with hooks or without momentum, those that are called more than once,
    memory that is written in place, and values that are returned.
    """

    name: ClassVar[str] = "share-norms"
    consumes: ClassVar[Stage] = SUPERNET
    produces: ClassVar[Stage] = SUPERNET
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Group the batch norms by what they read, and replace groups of two and more."""
        groups: dict[Hashable, list[fx.Node]] = {}
        for node in gm.graph.find_nodes(op="call_module"):
            if (key := _key(gm, node)) is not None:
                groups.setdefault(key, []).append(node)
        effects = Effects(gm.graph)
        calls = Counter(str(n.target) for n in gm.graph.find_nodes(op="call_module"))
        found: list[list[fx.Node]] = []
        for nodes in (nodes for nodes in groups.values() if len(nodes) > 1):
            reasons = {
                node: norm_obstacle(gm.get_submodule(str(node.target)), calls[str(node.target)])
                or sharing_obstacle(gm, node, effects)
                for node in nodes
            }
            for node, reason in reasons.items():
                if reason:
                    ctx.skip(node, f"other batch norms read the same, but {reason}")
            found.append([node for node in nodes if not reasons[node]])
        found = [nodes for nodes in found if len(nodes) > 1]
        for nodes in found:
            self._share(gm.graph, nodes)
        return bool(found)

    def _share(self, graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
        first = nodes[0]
        with graph.inserting_before(first):
            norms = [attribute(graph, str(node.target)) for node in nodes]
            shared = graph.call_function(shared_norms, (first.args[0], norms))
            items = [graph.call_function(operator.getitem, (shared, i)) for i in range(len(nodes))]
        set_provenance(shared, provenance(first), made_by="")
        for node, norm, item in zip(nodes, norms, items, strict=True):
            for new in (norm, item):
                set_provenance(new, provenance(node), made_by="")
            replace(node, item, take_name=True)


def _key(gm: fx.GraphModule, node: fx.Node) -> Hashable:
    """What equal batch norms of one value have in common; None for other calls."""
    norm = gm.get_submodule(str(node.target))
    if not isinstance(norm, _BatchNorm) or norm.affine or len(node.args) != 1 or node.kwargs:
        return None
    settings = norm.num_features, norm.eps, norm.momentum, norm.track_running_stats
    return node.args[0], type(norm), settings
