"""collapse-choices: one architecture's subnet, with no trace of the choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import fx

from nasfx.choice import Choice, Decision, InputChoice, reduce_inputs
from nasfx.ops.stages import CHOICE, SUBNET
from nasfx.rewriting.editing import compute, inline, replace
from nasfx.rewriting.graph import provenance, set_provenance, tensor_leaves
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import Stage


@dataclass(frozen=True)
class CollapseChoices(Pass):
    """Put the chosen candidate's nodes, or the reduction of the chosen inputs, in a choice's place.

    Rules::

        %y = call_module[block](%x)           ->  the nodes of block.conv3, or
        call_module[block.conv3](%x) %y = call_module[skips]([%a, %b, %c]) ->  %y = operator.add(%a,
        %c)

    A choice that the architecture does not decide is inactive: nothing that is read depends on it.
    Its first candidate stands for it until remove-dead-code takes it away.

    Attributes:
        architecture: (label, decision) pairs of a canonical architecture.
    """

    architecture: tuple[tuple[str, Decision], ...]

    @classmethod
    def of(cls, architecture: Mapping[str, Any]) -> CollapseChoices:
        """The pass for a canonical architecture."""
        return cls(
            tuple(
                (label, value if isinstance(value, str) else tuple(value))
                for label, value in architecture.items()
            )
        )

    name: ClassVar[str] = "collapse-choices"
    consumes: ClassVar[Stage] = CHOICE
    produces: ClassVar[Stage] = SUBNET
    exactness: ClassVar[Exactness] = Exactness.LOWERS

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Collapse choices until none is left: a candidate's nodes may hold further ones."""
        decided = dict(self.architecture)
        todo = list(gm.graph.find_nodes(op="call_module"))
        changed = False
        while todo:
            node = todo.pop()
            choice = gm.get_submodule(str(node.target))
            if isinstance(choice, Choice):
                todo.extend(self._collapse(gm, node, choice, decided))
                changed = True
        return changed

    def _collapse(
        self, gm: fx.GraphModule, node: fx.Node, choice: Choice, decided: Mapping[str, Decision]
    ) -> list[fx.Node]:
        """Replace `node`; the call_module nodes that came in its place."""
        decision = decided.get(str(choice.label), choice.active)
        with gm.graph.inserting_before(node):
            if isinstance(choice, InputChoice):
                return self._reduce(node, choice, cast("Sequence[int]", decision))
            name = str(decision)
            candidate = choice._modules[name]
            target = f"{node.target}.{name}"
            if isinstance(candidate, fx.GraphModule):
                tensors = tensor_leaves(node.args, node.kwargs)
                value, made = inline(gm.graph, candidate.graph, target, tensors)
                new = list(made.values())
            else:
                value = gm.graph.call_module(target, node.args, node.kwargs)
                set_provenance(value, provenance(node), label=str(choice.label), part=name)
                new = [value]
        replace(node, value)
        return [n for n in new if n.op == "call_module"]

    def _reduce(self, node: fx.Node, choice: InputChoice, chosen: Sequence[int]) -> list[fx.Node]:
        inputs = cast("Sequence[fx.Node]", node.args[0])
        replace(node, compute(node, lambda xs: reduce_inputs(xs, chosen, choice.reduction), inputs))
        return []
