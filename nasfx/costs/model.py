"""What every architecture costs, exactly: amounts, each with when it counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nasfx.architecture import Architecture, SpaceChoice
from nasfx.choice import Decision
from nasfx.costs.diagrams import Diagrams, law_of
from nasfx.ops.expectation import activity, uniform_gate
from nasfx.places import Activity, Condition, Literal, Place, literal_holds

Terms = dict[frozenset[Condition], float]
"""Amounts by the conditions of which one suffices for the amount to count."""


@dataclass(frozen=True)
class CostModel:
    """The cost of every architecture of a model; calling it with one gives its cost, exactly.

    Attributes:
        places: where choices are called.
        terms: the amounts.
        choices: the decisions by label.
    """

    places: tuple[Place, ...]
    terms: Terms
    choices: Mapping[str, SpaceChoice]

    @property
    def activity(self) -> Activity:
        """When places are run."""
        return Activity(self.places)

    def __call__(self, architecture: Mapping[str, Any]) -> float:
        """What a canonical architecture costs."""
        arch = Architecture(architecture)
        decided = {label: arch.decision(label) for label in arch}
        memo: dict[int, bool | None] = {}
        activity = self.activity
        # A label without a decision is inactive: nothing that counts depends on it.
        holds: Callable[[Literal], bool] = lambda lit: bool(literal_holds(lit, decided))  # noqa: E731
        return sum(
            amount
            for conditions, amount in self.terms.items()
            if activity.truth(conditions, holds, memo)
        )

    def divided(self, unit: float) -> CostModel:
        """The same in multiples of `unit`."""
        if unit == 1:
            return self
        return CostModel(self.places, {k: v / unit for k, v in self.terms.items()}, self.choices)

    def mean(self) -> float:
        """The mean over architectures drawn by `SearchSpace.sample`: active decisions uniformly."""
        laws = {label: law_of(choice) for label, choice in self.choices.items()}
        chances = {
            label: uniform_gate(laws[label], len(choice.choosable))
            for label, choice in self.choices.items()
        }
        diagrams = Diagrams(self.activity, self.choices)
        return float(
            sum(
                amount * activity(chances, laws, diagrams.of(conditions))
                for conditions, amount in self.terms.items()
            )
        )

    def extreme(self, pick: Callable[..., Any]) -> tuple[float, dict[str, Decision]]:
        """The lowest (`pick` = min) or highest (max) cost, and decisions that have it.

        Exact: decides the choices one after the other, parts that do not depend on each other
        apart, and looks at values alike once. Decisions of inactive choices are among the result.
        """
        cost, decisions = _Extremes(self, pick).of(tuple(self.terms), {})
        rest = {c.label: next(c.values()) for c in self.choices.values()}
        return cost, rest | decisions


class _Extremes:
    def __init__(self, model: CostModel, pick: Callable[..., Any]) -> None:
        self.model, self.pick, self.activity = model, pick, model.activity
        self.literals = {c: self.activity.literals(c) for c in model.terms}
        self.memo: dict[Any, tuple[float, dict[str, Decision]]] = {}

    def of(
        self, asked: Sequence[frozenset[Condition]], decided: Mapping[str, Decision]
    ) -> tuple[float, dict[str, Decision]]:
        """The extreme of the sum of some terms under what is decided."""
        total, open_terms = 0, list[frozenset[Condition]]()
        memo: dict[int, bool | None] = {}
        for conditions in asked:
            truth = self.activity.truth(conditions, lambda l: literal_holds(l, decided), memo)
            if truth is None:
                open_terms.append(conditions)
            elif truth:
                total += self.model.terms[conditions]
        decisions: dict[str, Decision] = {}
        for component in self._components(open_terms, decided):
            cost, found = self._component(component, decided)
            total += cost
            decisions |= found
        return total, decisions

    def _component(
        self, terms: tuple[frozenset[Condition], ...], decided: Mapping[str, Decision]
    ) -> tuple[float, dict[str, Decision]]:
        literals = {lit for conditions in terms for lit in self.literals[conditions]}
        known = frozenset(
            (lit, literal_holds(lit, decided)) for lit in literals if lit[0] in decided
        )
        key = terms, known
        if key not in self.memo:
            open_labels = {label for label, _ in literals if label not in decided}
            label = next(name for name in self.model.choices if name in open_labels)
            mine = sorted((lit for lit in literals if lit[0] == label), key=str)
            alike: dict[tuple[bool | None, ...], Decision] = {}
            for value in self.model.choices[label].values():
                truth = tuple(literal_holds(lit, {label: value}) for lit in mine)
                alike.setdefault(truth, value)
            results = [
                (cost, {label: value, **below})
                for value in alike.values()
                for cost, below in [self.of(terms, {**decided, label: value})]
            ]
            self.memo[key] = self.pick(results, key=lambda result: result[0])
        return self.memo[key]

    def _components(
        self, terms: Sequence[frozenset[Condition]], decided: Mapping[str, Decision]
    ) -> list[tuple[frozenset[Condition], ...]]:
        """`terms` in groups that share no undecided label."""
        group_of: dict[str, int] = {}
        members: dict[int, list[frozenset[Condition]]] = {}
        for i, conditions in enumerate(terms):
            labels = {label for label, _ in self.literals[conditions] if label not in decided}
            joined = sorted({group_of[label] for label in labels if label in group_of})
            members[i] = [t for g in joined for t in members.pop(g)] + [conditions]
            for label, group in list(group_of.items()) if joined else ():
                if group in joined:
                    group_of[label] = i
            group_of |= dict.fromkeys(labels, i)
        order = {conditions: i for i, conditions in enumerate(terms)}
        return [tuple(sorted(group, key=order.__getitem__)) for group in members.values()]
