"""Decision diagrams: under which decisions something is run, one decision after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from nasfx.architecture import SpaceChoice
from nasfx.ops.expectation import Diagram, Law
from nasfx.places import Activity, Condition, Literal, links


def law_of(choice: SpaceChoice) -> Law:
    """What a chance vector of `choice` means, over the candidates that may be chosen."""
    if choice.kind == "layer" or choice.n_chosen == 1:
        return choice.choosable
    return choice.n_chosen


class Diagrams:
    """Decision diagrams of conditions.

    Args:
        activity: the places that conditions refer to.
        choices: the decisions by label, in the order in which diagrams ask them.
        always: labels of input choices all of whose inputs count as chosen.
    """

    def __init__(
        self,
        activity: Activity,
        choices: Mapping[str, SpaceChoice],
        always: Iterable[str] = (),
    ) -> None:
        self.activity, self.choices, self.always = activity, choices, frozenset(always)

    def of(self, conditions: Iterable[Condition]) -> Diagram:
        """The diagram that is True where any of `conditions` holds."""
        asked = tuple(conditions)
        literals = self.activity.literals(asked)
        known = {lit: True for lit in literals if lit[0] in self.always}
        order = {label: i for i, label in enumerate(self.choices)}

        def position(lit: Literal) -> tuple[int, list[str]]:
            return order[lit[0]], sorted(map(str, lit[1]))

        rest = sorted(literals - known.keys(), key=position)
        by_label = {
            label: tuple(group) for label, group in itertools.groupby(rest, key=lambda lit: lit[0])
        }
        return self._build(asked, known, by_label, {})

    def _build(
        self,
        asked: tuple[Condition, ...],
        known: Mapping[Literal, bool],
        by_label: Mapping[str, tuple[Literal, ...]],
        made: dict[Any, Diagram],
    ) -> Diagram:
        places: dict[int, bool | None] = {}
        truth = self.activity.truth(asked, known.get, places)
        if truth is not None:
            return truth
        # What is left of the question: what is known of the places, and of those still open, the
        # truth of the literals that they name.
        still = [self.activity.places[i].condition for i, t in places.items() if t is None]
        named = {lit for c in (*asked, *still) for _, lit in links(c) if lit is not None}
        key = (
            frozenset(places.items()),
            frozenset((lit, known[lit]) for lit in named if lit in known),
        )
        if key not in made:
            label = next(name for name, lits in by_label.items() if lits[0] not in known)
            cases = [
                (case, self._build(asked, {**known, **held}, by_label, made))
                for case, held in self._cases(asked, known, label, by_label[label])
            ]
            made[key] = self._joined(label, cases)
        return made[key]

    def _cases(
        self,
        asked: tuple[Condition, ...],
        known: Mapping[Literal, bool],
        label: str,
        literals: tuple[Literal, ...],
    ) -> Iterable[tuple[Any, dict[Literal, bool]]]:
        choice = self.choices[label]
        if isinstance(law_of(choice), tuple):
            alike: dict[tuple[bool, ...], list[Any]] = {}
            for value in choice.candidates:
                held = tuple(value in values for _, values in literals)
                alike.setdefault(held, []).append(value)
            for held, values in alike.items():
                yield tuple(values), dict(zip(literals, held, strict=True))
            return
        # One literal after the other, until the answer is known: of "any of n inputs" that makes
        # n + 1 cases and not 2^n.
        todo: list[dict[Literal, bool]] = [{}]
        while todo:
            held = todo.pop()
            answered = self.activity.truth(asked, {**known, **held}.get, {}) is not None
            if len(held) < len(literals) and not answered:
                following = literals[len(held)]
                todo += [{**held, following: False}, {**held, following: True}]
                continue
            met, missed = (
                tuple(tuple(sorted(values)) for (_, values), h in held.items() if h is wanted)
                for wanted in (True, False)
            )
            yield (met, missed), held

    def _joined(self, label: str, cases: list[tuple[Any, Diagram]]) -> Diagram:
        """The diagram of `cases`: what they have in common, else those that are not False.

        Cases of a law of one that go on alike are one.
        """
        if all(below == cases[0][1] for _, below in cases):
            return cases[0][1]
        cases = [(case, below) for case, below in cases if below is not False]
        if isinstance(law_of(self.choices[label]), tuple):
            joined: dict[Diagram, tuple[Any, ...]] = {}
            for case, below in cases:
                joined[below] = (*joined.get(below, ()), *case)
            cases = [(case, below) for below, case in joined.items()]
        return label, tuple(cases)
