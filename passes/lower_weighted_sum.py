"""lower-weighted-sum: every choice becomes the explicit mixture of its candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import fx

from nasfx.choice import Choice, InputChoice, LayerChoice, reduce_inputs
from nasfx.errors import SpaceError
from nasfx.ops.gates import inclusion_gate, softmax_gate
from nasfx.ops.mix import mix, unlike_shapes
from nasfx.ops.stages import CHOICE, SUPERNET
from nasfx.rewriting.editing import (
    attribute,
    compute,
    gate_node,
    inline,
    is_identity,
    replace,
)
from nasfx.rewriting.graph import (
    Provenance,
    has_hooks,
    provenance,
    set_module,
    set_provenance,
    shallow_container,
    tensor_leaves,
)
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import Stage


@dataclass(frozen=True)
class LowerWeightedSum(Pass):
    """Inline all candidates and sum their outputs, weighted by the gate of the label.

    Rule::

        %block = call_module[block](%x)
        ->
        %arch_block = get_attr[arch.block]
        %gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
        %block_conv3 = call_module[block.conv3](%x)
        %block_conv5 = call_module[block.conv5](%x)
        %block = nasfx.ops.mix(%gate_block, [%block_conv3, %block_conv5, %x], label='block')

    An InputChoice is mixed by the probabilities that its inputs are chosen. One in `summed` (its
    edges have their own weights) adds all its inputs up. Refuses "concat" and "none", which have no
    weighted form, and, where shapes are known, candidates of different output shapes.

    Source: DARTS (arXiv 1806.09055), equation 2.

    Attributes:
        summed: labels of input choices without weights of their own.
    """

    summed: tuple[str, ...] = ()

    name: ClassVar[str] = "lower-weighted-sum"
    consumes: ClassVar[Stage] = CHOICE
    produces: ClassVar[Stage] = SUPERNET
    exactness: ClassVar[Exactness] = Exactness.LOWERS

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Lower the choices of the graph, then those that came in with their candidates."""
        gates: dict[str, fx.Node] = {}
        todo = list(gm.graph.find_nodes(op="call_module"))
        shells: dict[str, LayerChoice] = {}
        changed = False
        while todo:
            node = todo.pop(0)
            choice = gm.get_submodule(str(node.target))
            if not isinstance(choice, Choice):
                continue
            changed = True
            if isinstance(choice, InputChoice):
                self._mix_inputs(gm, node, choice, gates)
            else:
                shells[str(node.target)] = choice
                todo.extend(self._mix_candidates(gm, node, choice, gates))
        for path, choice in sorted(shells.items()):
            shell = shallow_container(choice)
            for name, child in choice.named_candidates():
                if isinstance(child, fx.GraphModule):
                    shell._modules[name] = shallow_container(child)
            set_module(gm, path, shell)
        return changed

    def gate(self, graph: fx.Graph, label: str, function: Any, *args: Any) -> fx.Node:
        """The weights of a label, made at the insertion point; a pass with others replaces it."""
        return gate_node(graph, function, attribute(graph, f"arch.{label}"), label, *args)

    def _gate(
        self, gm: fx.GraphModule, label: str, gates: dict[str, fx.Node], function: Any, *args: Any
    ) -> fx.Node:
        if label not in gates:
            last = list(gates.values())[-1] if gates else gm.graph.find_nodes(op="placeholder")[-1]
            with gm.graph.inserting_before(last.next):
                gate = self.gate(gm.graph, label, function, *args)
            node = last
            while node is not gate:
                node = set_provenance(node.next, Provenance(label=label))
            gates[label] = gate
        return gates[label]

    def _mix_candidates(
        self, gm: fx.GraphModule, node: fx.Node, choice: LayerChoice, gates: dict[str, fx.Node]
    ) -> list[fx.Node]:
        label = str(choice.label)
        origin = provenance(node)
        refuse_unlike(node, label)
        outputs: list[Any] = []
        new: list[fx.Node] = []
        with gm.graph.inserting_before(node):
            for name, candidate in choice.named_candidates():
                target = f"{node.target}.{name}"
                if isinstance(candidate, fx.GraphModule):
                    tensors = tensor_leaves(node.args, node.kwargs)
                    value, made = inline(gm.graph, candidate.graph, target, tensors)
                    new += made.values()
                elif is_identity(candidate) and not has_hooks(candidate):
                    (value,) = tensor_leaves(node.args, node.kwargs)
                else:
                    value = gm.graph.call_module(target, node.args, node.kwargs)
                    set_provenance(value, origin, part=name)
                    new.append(value)
                outputs.append(value)
        gate = self._gate(gm, label, gates, softmax_gate)
        self._mix(node, gate, outputs, label)
        return [n for n in new if n.op == "call_module"]

    def _mix_inputs(
        self, gm: fx.GraphModule, node: fx.Node, choice: InputChoice, gates: dict[str, fx.Node]
    ) -> None:
        label = str(choice.label)
        if choice.reduction in ("concat", "none"):
            raise SpaceError(
                f"{choice.described}: reduction {choice.reduction!r} has no weighted sum: the "
                "mixture of "
                "all inputs is one tensor. Use reduction='sum' or 'mean', or a strategy that "
                "samples one path"
            )
        inputs = cast("Sequence[fx.Node]", node.args[0])
        mean = choice.reduction == "mean"
        if label not in self.summed:
            gate = self._gate(gm, label, gates, inclusion_gate, choice.n_chosen, mean)
            self._mix(node, gate, list(inputs), label)
            return
        every = range(len(inputs))
        replace(node, compute(node, lambda xs: reduce_inputs(xs, every, choice.reduction), inputs))

    def _mix(self, node: fx.Node, gate: fx.Node, outputs: list[Any], label: str) -> None:
        with node.graph.inserting_before(node):
            mixed = node.graph.call_function(mix, (gate, outputs), {"label": label})
        set_provenance(mixed, provenance(node), made_by="")
        replace(node, mixed, take_name=True)


def refuse_unlike(node: fx.Node, label: str) -> None:
    """Raise SpaceError where the candidates called by `node` are known to differ in shape."""
    known = list(node.meta.get("candidate_shapes", {}).values())
    for k, shape in enumerate(known):
        if shape != known[0]:
            raise SpaceError(unlike_shapes(label, known, k, f" ({provenance(node).site})"))
