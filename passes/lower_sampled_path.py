"""lower-sampled-path: every choice becomes a switch that runs the drawn candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import fx

from nasfx.choice import Choice, InputChoice, LayerChoice, named_choices
from nasfx.ops.select import InputSwitch, Switch
from nasfx.ops.stages import CHOICE, SUPERNET
from nasfx.rewriting.editing import identifier, replace
from nasfx.rewriting.graph import Provenance, graphs, provenance, set_module, set_provenance
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import Stage


@dataclass(frozen=True)
class LowerSampledPath(Pass):
    """Call a switch under the choice's own path with the decision that is drawn for its label.

    Rule::

        %block = call_module[block](%x)
        ->
        %drawn_block = call_module[arch]('block')
        %block = call_module[block](%drawn_block, (%x,), {}, {})
            conv3: Conv2d
            conv5: Conv2d

    The draws of choices inside candidates are handed in by label, and on to the candidate's graph
    as further placeholders. Takes every choice.

    Source: SPOS (arXiv 1904.00420), section 3.2; one path is a subnet with the supernet's weights.
    """

    name: ClassVar[str] = "lower-sampled-path"
    consumes: ClassVar[Stage] = CHOICE
    produces: ClassVar[Stage] = SUPERNET
    exactness: ClassVar[Exactness] = Exactness.LOWERS

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Lower the choices of the graph and, within their candidates, the inner ones first."""
        lowering = _Lowering(self, gm)
        lowering.graph(gm, top=True)
        return bool(lowering.choice_of)

    # What a pass with gates of its own replaces:

    def check(self, node: fx.Node, choice: Choice) -> None:
        """Refuse a call of a choice for which there is no rule."""

    def switch(self, choice: LayerChoice) -> Switch:
        """The module that takes a LayerChoice's place."""
        return Switch(str(choice.label), choice.structure, choice.choosable)

    def input_switch(self, choice: InputChoice) -> InputSwitch:
        """The module that takes an InputChoice's place."""
        return InputSwitch(str(choice.label), choice.reduction, choice.n_chosen)

    def gate(self, graph: fx.Graph, choice: Choice, drawn: fx.Node) -> fx.Node:
        """The value that the switches of a label read, made from the drawn decision."""
        return drawn


class _Lowering:
    """One run of the pass: what has been lowered, by identity, since modules are shared."""

    def __init__(self, rules: LowerSampledPath, gm: fx.GraphModule) -> None:
        self.rules = rules
        self.choice_of: dict[fx.Node, Choice] = {}
        self.by_label: dict[str, Choice] = {}
        self.modules: dict[int, Switch | InputSwitch] = {}
        self.labels_of: dict[int, tuple[str, ...]] = {}
        for _, inner in graphs(gm):
            for node in inner.graph.find_nodes(op="call_module"):
                choice = inner.get_submodule(str(node.target))
                if isinstance(choice, Choice):
                    self.choice_of[node] = choice
        for _, choice in named_choices(gm):
            self.by_label.setdefault(str(choice.label), choice)

    def graph(self, gm: fx.GraphModule, *, top: bool = False) -> tuple[str, ...]:
        """Lower one graph; the labels that it reads, below the top its last placeholders."""
        if id(gm) in self.labels_of:
            return self.labels_of[id(gm)]
        draws: dict[str, fx.Node] = {}
        for node in list(gm.graph.find_nodes(op="call_module")):
            choice = self.choice_of.get(node)
            if choice is None:
                continue
            self.rules.check(node, choice)
            module = self.module(choice)
            set_module(gm, str(node.target), module)
            drawn = self.draw(gm, str(choice.label), draws, top)
            if isinstance(module, Switch):
                inner = dict.fromkeys(label for needs in module.needs.values() for label in needs)
                gates = {label: self.draw(gm, label, draws, top) for label in inner}
                args: tuple[Any, ...] = (drawn, tuple(node.args), dict(node.kwargs), gates)
            else:
                args = (drawn, list(cast("Sequence[Any]", node.args[0])))
            with gm.graph.inserting_before(node):
                new = gm.graph.call_module(str(node.target), args)
            set_provenance(new, provenance(node), made_by="")
            replace(node, new, take_name=True)
        self.labels_of[id(gm)] = tuple(draws)
        return self.labels_of[id(gm)]

    def module(self, choice: Choice) -> Switch | InputSwitch:
        """The switch for a choice, its candidates lowered."""
        if id(choice) in self.modules:
            return self.modules[id(choice)]
        if isinstance(choice, InputChoice):
            return self.modules.setdefault(id(choice), self.rules.input_switch(choice))
        switch = self.rules.switch(choice)
        for name, child in choice.named_candidates():
            needs: tuple[str, ...] = ()
            if isinstance(child, fx.GraphModule):
                needs = self.graph(child)
            elif isinstance(child, LayerChoice):
                inner = self.module(child)
                assert isinstance(inner, Switch)
                below = [label for labels in inner.needs.values() for label in labels]
                needs, child = tuple(dict.fromkeys([inner.label, *below])), inner
            switch._modules[name] = child
            if needs:
                switch.needs[name] = needs
        return self.modules.setdefault(id(choice), switch)

    def draw(self, gm: fx.GraphModule, label: str, draws: dict[str, fx.Node], top: bool) -> fx.Node:
        """The node of the graph that holds the draw, or the gate, of `label`."""
        if label in draws:
            return draws[label]
        last = list(draws.values())[-1] if draws else gm.graph.find_nodes(op="placeholder")[-1]
        name = f"drawn_{identifier(label)}"
        with gm.graph.inserting_before(last.next):
            if top:
                drawn = gm.graph.create_node("call_module", "arch", (label,), name=name)
                set_provenance(drawn, Provenance(label=label))
                draws[label] = self.rules.gate(gm.graph, self.by_label[label], drawn)
            else:
                draws[label] = gm.graph.create_node("placeholder", name, name=name)
        set_provenance(draws[label], Provenance(label=label))
        return draws[label]
