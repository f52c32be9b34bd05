"""The expected cost as a graph of its own, over the parameters and gates of a lowered one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from nasfx.architecture import SpaceChoice
from nasfx.costs.diagrams import Diagrams
from nasfx.costs.model import CostModel
from nasfx.ops.expectation import Diagram, Law, activity, expected_cost, scaled, total_cost
from nasfx.places import Condition, Literal
from nasfx.rewriting.editing import identifier
from nasfx.rewriting.graph import ModelGraph, TextGraph


@dataclass(frozen=True)
class Chance:
    """The node that holds a choice's probabilities, and what they mean."""

    node: fx.Node
    law: Law


ChanceOf = Callable[[fx.Graph, SpaceChoice], Chance | None]
"""Makes the chance node of a choice; None for one whose inputs all count as chosen."""


def expected_cost_graph(
    root: nn.Module, models: Mapping[str, CostModel], chance_of: ChanceOf
) -> ModelGraph:
    """The graph that computes the expectation of every cost, differentiably; by name.

    What always counts is a constant. What depends on one candidate of a choice is summed up by
    candidate, times the probability that the choice is run where that is not certain. What depends
    on several decisions otherwise has a term of its own, weighted by its exact probability::

        %gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
        %flops_block = nasfx.ops.expected_cost(%gate_block, (1800.0, 0.0), None, label='block')
        %flops = nasfx.ops.total_cost(600.0, [%flops_block])

    Args:
        root: the lowered graph module, whose tree the graph reads.
        models: the costs by name.
        chance_of: makes the node of a choice's probabilities.
    """
    graph = TextGraph()
    builder = _Builder(graph, chance_of)
    totals = {name: builder.total(name, model) for name, model in models.items()}
    graph.output(totals)
    graph.lint()
    return ModelGraph(root, graph, "ExpectedCost")


class _Builder:
    def __init__(self, graph: fx.Graph, chance_of: ChanceOf) -> None:
        self.graph, self.chance_of = graph, chance_of
        self.chances: dict[str, Chance | None] = {}
        self.active: dict[Diagram, fx.Node] = {}

    def total(self, name: str, model: CostModel) -> fx.Node:
        """The node of one cost."""
        for label, choice in model.choices.items():
            if label not in self.chances:
                self.chances[label] = self.chance_of(self.graph, choice)
        always = [label for label, chance in self.chances.items() if chance is None]
        diagrams = Diagrams(model.activity, model.choices, always)
        fixed = 0.0
        tables: dict[tuple[str, Diagram], dict[frozenset[object], float]] = {}
        terms: list[tuple[Diagram, float]] = []
        for conditions, amount in model.terms.items():
            diagram = diagrams.of(conditions)
            literal = _own_choice(conditions)
            if isinstance(diagram, bool):
                fixed += amount * diagram
            elif literal and self._one_of(literal[0]):
                (condition,) = conditions
                assert condition.container is not None
                around = diagrams.of([model.places[condition.container[0]].condition])
                if literal[0] in _labels(around):
                    terms.append((diagram, amount))
                else:
                    table = tables.setdefault((literal[0], around), {})
                    table[literal[1]] = table.get(literal[1], 0) + amount
            else:
                terms.append((diagram, amount))
        parts = [
            self._table(f"{name}_{label}", label, around, table)
            for (label, around), table in tables.items()
        ]
        merged: dict[Diagram, float] = {}
        for diagram, amount in terms:
            merged[diagram] = merged.get(diagram, 0) + amount
        parts += [
            self.graph.call_function(scaled, (self._active(diagram), amount))
            for diagram, amount in merged.items()
        ]
        return self._node(name, total_cost, (fixed, parts))

    def _one_of(self, label: str) -> bool:
        chance = self.chances[label]
        return chance is not None and isinstance(chance.law, tuple)

    def _table(
        self, name: str, label: str, around: Diagram, table: Mapping[frozenset[object], float]
    ) -> fx.Node:
        chance = self.chances[label]
        assert chance is not None and isinstance(chance.law, tuple)  # noqa: PT018
        costs = tuple(
            float(sum(amount for values, amount in table.items() if value in values))
            for value in chance.law
        )
        active = None if around is True else self._active(around)
        return self._node(name, expected_cost, (chance.node, costs, active), {"label": label})

    def _active(self, diagram: Diagram) -> fx.Node:
        if diagram not in self.active:
            found = {label: self.chances[label] for label in _labels(diagram)}
            chances = {label: c.node for label, c in found.items() if c is not None}
            laws = {label: c.law for label, c in found.items() if c is not None}
            self.active[diagram] = self._node("active", activity, (chances, laws, diagram))
        return self.active[diagram]

    def _node(self, name: str, function: Any, args: Any, kwargs: Any = None) -> fx.Node:
        target = identifier(name)
        return self.graph.create_node("call_function", function, args, kwargs, name=target)


def _own_choice(conditions: frozenset[Condition]) -> Literal | None:
    """The literal of what counts exactly where one choice is run with some candidate."""
    if len(conditions) != 1:
        return None
    (condition,) = conditions
    if condition.demands is not None or condition.container is None:
        return None
    return condition.container[1]


def _labels(diagram: Diagram) -> dict[str, None]:
    """The labels that a diagram asks, in order."""
    if isinstance(diagram, bool):
        return {}
    label, cases = diagram
    return {label: None} | {k: None for _, below in cases for k in _labels(below)}
