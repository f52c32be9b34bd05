"""Decision diagrams: under which decisions something is run, one decision after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from nasfx.architecture import SpaceChoice
from nasfx.ops.expectation import Diagram, Law
from nasfx.places import Activity, Condition, Literal


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
        named = {lit for c in (*asked, *still) for lit in _own_literals(c)}
        key = (
            frozenset(places.items()),
            frozenset((lit, known[lit]) for lit in named if lit in known),
        )
        if key not in made:
            label = next(name for name, lits in by_label.items() if lits[0] not in known)
            cases = [
                (case, below)
                for case, held in self._cases(label, by_label[label])
                if (below := self._build(asked, {**known, **held}, by_label, made)) is not False
            ]
            made[key] = self._joined(label, cases)
        return made[key]

    def _cases(
        self, label: str, literals: tuple[Literal, ...]
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
        for held in itertools.product((True, False), repeat=len(literals)):
            pairs = list(zip(literals, held, strict=True))
            met, missed = (
                tuple(tuple(sorted(values)) for (_, values), h in pairs if h is wanted)
                for wanted in (True, False)
            )
            yield (met, missed), dict(pairs)

    def _joined(self, label: str, cases: list[tuple[Any, Diagram]]) -> Diagram:
        """The diagram of `cases`, those of a law of one that go on alike as one."""
        if isinstance(law_of(self.choices[label]), tuple):
            values: dict[int, list[Any]] = {}
            below: dict[int, Diagram] = {}
            for case, diagram in cases:
                values.setdefault(id(diagram), []).extend(case)
                below[id(diagram)] = diagram
            cases = [(tuple(v), below[k]) for k, v in values.items()]
        return label, tuple(cases)


def _own_literals(condition: Condition) -> list[Literal]:
    container = () if condition.container is None else (condition.container,)
    return [lit for _, lit in (*container, *(condition.demands or ())) if lit is not None]
