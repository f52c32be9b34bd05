"""fold-gates-into-norms: the weight of a candidate is the gain of its last batch norm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from nasfx.ops.mix import mix
from nasfx.ops.norms import mix_norms, norm_obstacle
from nasfx.ops.stages import SUPERNET
from nasfx.rewriting.editing import attribute, replace
from nasfx.rewriting.graph import provenance, set_provenance
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import Stage


@dataclass(frozen=True)
class FoldGatesIntoNorms(Pass):
    """Multiply the gain of a batch norm by the candidate's weight, in place of its output.

    Rule, for candidates that end in a batch norm that the mixture alone reads::

        %a = call_module[block.conv.bn](%conv)
        %block = nasfx.ops.mix(%gate, [%a, %x], label='block')
        ->
        %block_conv_bn = get_attr[block.conv.bn]
        %block = nasfx.ops.mix_norms(%gate, [%conv, %x], [%block_conv_bn, None], label='block')

    The weight's gradient is the sum of the gain's. The outputs of the batch norms are not kept for
    the backward. The batch norms run where the mixture does, when what they read has left the
    processor's cache, and those without a gain get one: there it takes less memory and more time.

    Declines batch norms with hooks, those that average all batches (momentum None), and those that
    are called more than once.

    Attributes:
        own_gain: fold batch norms alone that have a gain of their own, where it costs no time.
    """

    own_gain: bool = False

    name: ClassVar[str] = "fold-gates-into-norms"
    consumes: ClassVar[Stage] = SUPERNET
    produces: ClassVar[Stage] = SUPERNET
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Rewrite the mixtures of the graph."""
        changed = False
        calls = Counter(str(n.target) for n in gm.graph.find_nodes(op="call_module"))
        for node in list(gm.graph.find_nodes(op="call_function", target=mix)):
            outputs = cast("Sequence[Any]", node.args[1])
            norms = [o if self._is_folded(gm, o, node, calls, ctx) else None for o in outputs]
            if any(norms):
                self._fold(node, list(outputs), norms)
                changed = True
        return changed

    def _fold(self, node: fx.Node, outputs: list[Any], norms: Sequence[fx.Node | None]) -> None:
        modules: list[fx.Node | None] = [None] * len(norms)
        with node.graph.inserting_before(node):
            for k, norm in enumerate(norms):
                if norm is not None:
                    modules[k] = attribute(node.graph, str(norm.target))
                    set_provenance(cast("fx.Node", modules[k]), provenance(norm), made_by="")
                    outputs[k] = norm.args[0]
            new = node.graph.call_function(mix_norms, (node.args[0], outputs, modules), node.kwargs)
        set_provenance(new, provenance(node), made_by="")
        replace(node, new, take_name=True)
        for norm in norms:
            if norm is not None:
                norm.graph.erase_node(norm)

    def _is_folded(
        self,
        gm: fx.GraphModule,
        value: Any,
        mixture: fx.Node,
        calls: Counter[str],
        ctx: PassContext,
    ) -> bool:  # fmt: skip
        """Whether `value`, an operand of `mixture`, is what a batch norm gives for it alone."""
        if not isinstance(value, fx.Node) or value.op != "call_module":
            return False
        module = gm.get_submodule(str(value.target))
        if not isinstance(module, _BatchNorm) or len(value.args) != 1 or value.kwargs:
            return False
        if self.own_gain and not module.affine:
            return False
        reads = cast("Sequence[Any]", mixture.args[1]).count(value)
        if len(value.users) > 1 or reads > 1 or mixture.args[0] is value:
            return False
        if reason := norm_obstacle(module, calls[str(value.target)]):
            ctx.skip(value, reason)
            return False
        return True
