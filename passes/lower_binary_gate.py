"""lower-binary-gate: every choice becomes a switch whose gates receive ProxylessNAS's gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nasfx.passes.lower_sampled_path import LowerSampledPath
from nasfx.passes.lower_weighted_sum import refuse_unlike
from torch import fx

from nasfx.choice import Choice, InputChoice, LayerChoice
from nasfx.errors import SpaceError
from nasfx.ops.binary import BinaryGate, InputBinaryGate
from nasfx.ops.gates import binary_gate
from nasfx.rewriting.editing import attribute, gate_node, identifier
from nasfx.rewriting.graph import Provenance, set_provenance


@dataclass(frozen=True)
class LowerBinaryGate(LowerSampledPath):
    """As lower-sampled-path, with a gate between the draw and the switch.

    Rule::

        %block = call_module[block](%x)
        ->
        %drawn_block = call_module[arch]('block')
        %arch_block = get_attr[arch.block]
        %gate_block = nasfx.ops.binary_gate(%arch_block, %drawn_block, ('conv3', 'conv5'), 1, ...)
        %block = call_module[block](%gate_block, (%x,), {}, {})
            conv3: Conv2d
            conv5: Conv2d

    Refuses candidates whose outputs differ in shape, and input choices that concatenate or list
    their inputs: the gradient of a gate needs an output that the gate could have multiplied.

    Source: ProxylessNAS (arXiv 1812.00332), equations 1 to 4.

    Attributes:
        mode: what arch steps compute. "full_v2": the gradient of every gate, the candidates off the
            path running in backward, one after the other; "full": the same, these running in
            forward; "two": only of the two that are drawn, which refuses input choices that choose
            another number than one.
    """

    mode: str = "full_v2"

    name: ClassVar[str] = "lower-binary-gate"

    def check(self, node: fx.Node, choice: Choice) -> None:
        """Refuse candidates whose outputs differ in shape, where shapes are known."""
        refuse_unlike(node, str(choice.label))

    def switch(self, choice: LayerChoice) -> BinaryGate:
        """The module that takes a LayerChoice's place."""
        label, eager = str(choice.label), self.mode == "full"
        return BinaryGate(label, choice.structure, choice.choosable, eager)

    def input_switch(self, choice: InputChoice) -> InputBinaryGate:
        """The module that takes an InputChoice's place."""
        if choice.reduction in ("concat", "none"):
            raise SpaceError(
                f"{choice.described}: reduction {choice.reduction!r} has no binary gate: an input "
                "that is "
                "left out has no place in the output, so its gate has no gradient. Use "
                "reduction='sum' or 'mean', or a strategy that samples paths without gradients"
            )
        if self.mode == "two" and choice.n_chosen != 1:
            raise SpaceError(
                f"{choice.described}: two paths are drawn where one is chosen, and here "
                f"n_chosen={choice.n_chosen}. Use Proxyless(gate='full_v2')"
            )
        return InputBinaryGate(str(choice.label), choice.reduction, choice.n_chosen)

    def gate(self, graph: fx.Graph, choice: Choice, drawn: fx.Node) -> fx.Node:
        """The binary gate of a label."""
        label = str(choice.label)
        names = choice.choosable if isinstance(choice, LayerChoice) else None
        alpha = attribute(graph, f"arch.{label}")
        args: tuple[object, ...] = (drawn, names, choice.n_chosen)
        if self.mode == "two":
            pair = graph.create_node(
                "call_module", "arch", (label, "pair"), name=f"pair_{identifier(label)}"
            )
            set_provenance(pair, Provenance(label=label))
            args = *args, pair
        set_provenance(alpha, Provenance(label=label))
        return gate_node(graph, binary_gate, alpha, label, *args)
