"""lower-gumbel-sum: every choice becomes the mixture of its candidates under a Gumbel sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from nasfx.passes.lower_weighted_sum import LowerWeightedSum
from torch import fx

from nasfx.ops.gates import gumbel_logits
from nasfx.rewriting.editing import attribute, gate_node, identifier


@dataclass(frozen=True)
class LowerGumbelSum(LowerWeightedSum):
    """As lower-weighted-sum, with weights that are a sample of the Gumbel-softmax distribution.

    Rule::

        %block = call_module[block](%x)
        ->
        %arch_block = get_attr[arch.block]
        %arch_state_noise_block = get_attr[arch.state.noise.block]
        %arch_state_temperature = get_attr[arch.state.temperature]
        %logits_block = nasfx.ops.gumbel_logits(%arch_block, ..., ...)
        %gate_block = nasfx.ops.softmax_gate(%logits_block, label='block')
        %block_conv3 = call_module[block.conv3](%x)
        %block_conv5 = call_module[block.conv5](%x)
        %block = nasfx.ops.mix(%gate_block, [%block_conv3, %block_conv5, %x], label='block')

    Source: FBNet (arXiv 1812.03443), equations 5 and 6.

    Attributes:
        hard: weights of 0 and 1 with the gradient of the soft ones (straight-through).
    """

    hard: bool = False

    name: ClassVar[str] = "lower-gumbel-sum"

    def gate(self, graph: fx.Graph, label: str, function: Any, *args: Any) -> fx.Node:
        """The weights of a label."""
        gate = gate_node(graph, function, noisy_logits(graph, label), label, *args)
        if self.hard:
            gate.kwargs = {"hard": True, **gate.kwargs}
        return gate


def noisy_logits(graph: fx.Graph, label: str) -> fx.Node:
    """The logits of the step's sample, at the insertion point."""
    alpha, noise, temperature = (
        attribute(graph, f"arch.{name}")
        for name in (label, f"state.noise.{label}", "state.temperature")
    )
    return graph.create_node(
        "call_function", gumbel_logits, (alpha, noise, temperature),
        name=f"logits_{identifier(label)}",
    )  # fmt: skip
