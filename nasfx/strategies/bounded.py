"""The most probable architecture that keeps within the bounds, as an integer program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nasfx.architecture import Architecture
from nasfx.choice import EMPTY, Decision
from nasfx.costs.model import CostModel
from nasfx.errors import SearchError
from nasfx.places import Activity, Condition, Literal, Place
from nasfx.space import SearchSpace

_TRIES = 100


@dataclass(frozen=True)
class Score:
    """What deciding a choice adds to the score of an architecture in which it is active.

    Attributes:
        values: by candidate, or index of an input, what choosing it adds.
        always: what is added whatever is chosen.
    """

    values: Mapping[Any, float]
    always: float = 0.0


def best_within_bounds(space: SearchSpace, scores: Mapping[str, Score]) -> Architecture:
    """The architecture of the highest score among those that keep within the bounds of `space`.

    The program's answer is checked with the exact costs; one that breaks a bound by rounding is
    excluded, and the next is asked for.

    Args:
        space: with bounds on costs that are `CostModel`s.
        scores: by label; a label without one adds nothing.

    Raises:
        SearchError: no architecture keeps within all bounds.
    """
    program = _Program(space)
    score = program.score(scores)
    for name, bound in space.bounds.items():
        program.bound(_model(space, name), bound)
    for _ in range(_TRIES):
        decisions = program.solve(score)
        if decisions is None:
            break
        architecture = space.validate(decisions)
        if space.fits(architecture):
            return architecture
        program.exclude(decisions)
    bounds = ", ".join(f"{name} <= {bound:g}" for name, bound in space.bounds.items())
    raise SearchError(f"no architecture keeps within the bounds {bounds}; loosen them")


def check_bounds(space: SearchSpace) -> None:
    """Refuse bounds that no architecture keeps together, though it may keep each by itself.

    Raises:
        SearchError: as said; with the least value of each cost that the other bounds leave.
    """
    if len(space.bounds) < 2:
        return
    try:
        best_within_bounds(space, {})
    except SearchError as error:
        nearest = ", ".join(f"{name} {value:g}" for name, value in _nearest(space))
        raise SearchError(
            f"{error}. The least that each can be with the others kept: {nearest or 'none'}"
        ) from error


def _nearest(space: SearchSpace) -> Iterator[tuple[str, float]]:
    """The least value of each bounded cost under the bounds of the others, where there is one."""
    for name in space.bounds:
        program = _Program(space)
        for other, bound in space.bounds.items():
            if other != name:
                program.bound(_model(space, other), bound)
        row, _ = program.cost(_model(space, name))
        decisions = program.solve({i: -amount for i, amount in row.items()})
        if decisions is not None:
            yield name, space.costs[name](space.validate(decisions))


def _model(space: SearchSpace, name: str) -> CostModel:
    model = space.costs[name]
    assert isinstance(model, CostModel)
    return model


class _Program:
    """Variables, all between 0 and 1, and rows of linear constraints on them."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.integral: list[bool] = []
        self.rows: list[tuple[Mapping[int, float], float, float]] = []
        self.chosen: dict[tuple[str, Any], int] = {}
        self.one = self._new(lowest=1)
        for choice in space.choices:
            row: dict[int, float] = {}
            for value in choice.choosable:
                self.chosen[choice.label, value] = row_index = self._new(integral=True)
                row[row_index] = 1
            if choice.n_chosen is not None:
                self.rows.append((row, choice.n_chosen, choice.n_chosen))
        self.ands: dict[tuple[int, int], int] = {}
        self.ors: dict[frozenset[int], int] = {}
        self.active: dict[tuple[tuple[Place, ...], int], int] = {}

    def _new(self, *, integral: bool = False, lowest: float = 0) -> int:
        self.integral.append(integral)
        index = len(self.integral) - 1
        if lowest:
            self.rows.append(({index: 1}, lowest, 1))
        return index

    # -- truth as variables ------------------------------------------------------------------------

    def _both(self, a: int, b: int) -> int:
        if self.one in (a, b) or a == b:
            return b if a == self.one else a
        key = min(a, b), max(a, b)
        if key not in self.ands:
            self.ands[key] = z = self._new()
            self.rows += [
                ({z: 1, a: -1}, -np.inf, 0),
                ({z: 1, b: -1}, -np.inf, 0),
                ({z: 1, a: -1, b: -1}, -1, np.inf),
            ]
        return self.ands[key]

    def _any(self, several: Iterable[int]) -> int:
        key = frozenset(several)
        if self.one in key:
            return self.one
        if len(key) == 1:
            return next(iter(key))
        if key not in self.ors:
            self.ors[key] = z = self._new()
            self.rows += [({z: 1, a: -1}, 0, np.inf) for a in key]
            self.rows.append(({z: 1} | dict.fromkeys(key, -1), -np.inf, 0))
        return self.ors[key]

    def _literal(self, literal: Literal | None) -> int:
        if literal is None:
            return self.one
        label, values = literal
        parts = [self.chosen[label, v] for v in values if (label, v) in self.chosen]
        if EMPTY in values:
            every = [self.chosen[label, v] for v in self.space[label].choosable]
            empty = self._new()
            self.rows += [({empty: 1, a: 1}, -np.inf, 1) for a in every]
            self.rows.append(({empty: 1} | dict.fromkeys(every, 1), 1, np.inf))
            parts.append(empty)
        return self._any(parts)

    def _condition(self, places: tuple[Place, ...], condition: Condition) -> int:
        truth = self.one
        if condition.container is not None:
            i, literal = condition.container
            truth = self._both(self._place(places, i), self._literal(literal))
        if condition.demands is None:
            return truth
        demanded = [
            self._both(self._place(places, i), self._literal(literal))
            for i, literal in condition.demands
        ]
        return self._both(truth, self._any(demanded))

    def _place(self, places: tuple[Place, ...], i: int) -> int:
        key = places, i
        if key not in self.active:
            self.active[key] = self._condition(places, places[i].condition)
        return self.active[key]

    # -- what is asked -----------------------------------------------------------------------------

    def score(self, scores: Mapping[str, Score]) -> dict[int, float]:
        """The linear function to maximise."""
        places = self.space.places
        total: dict[int, float] = {}
        for label, score in scores.items():
            here = (i for i, place in enumerate(places) if place.label == label)
            active = self._any(self._place(places, i) for i in here)
            total[active] = total.get(active, 0) + score.always
            for value, amount in score.values.items():
                term = self._both(active, self.chosen[label, value])
                total[term] = total.get(term, 0) + amount
        return total

    def bound(self, model: CostModel, most: float) -> None:
        """Keep a cost within its bound."""
        row, fixed = self.cost(model)
        scaled = {term: amount / most for term, amount in row.items()}
        self.rows.append((scaled, -np.inf, 1 - fixed / most))

    def cost(self, model: CostModel) -> tuple[dict[int, float], float]:
        """A cost as a linear function, and what is fixed of it."""
        row: dict[int, float] = {}
        fixed = 0.0
        for conditions, amount in model.terms.items():
            if conditions and self._never(model, conditions):
                continue
            term = self._any(self._condition(model.places, c) for c in conditions)
            if term == self.one:
                fixed += amount
            else:
                row[term] = row.get(term, 0) + amount
        return row, fixed

    def _never(self, model: CostModel, conditions: Iterable[Condition]) -> bool:
        """Whether they hold only for candidates that cannot be chosen."""
        impossible = {
            lit for lit in Activity(model.places).literals(conditions)
            if not any((lit[0], v) in self.chosen or v == EMPTY for v in lit[1])
        }  # fmt: skip
        if not impossible:
            return False
        holds = dict.fromkeys(impossible, False)
        return model.activity.truth(conditions, holds.get, {}) is False

    def exclude(self, decisions: Mapping[str, Decision]) -> None:
        """Forbid these decisions."""
        taken = {i for key, i in self.chosen.items() if key[1] in _values(decisions[key[0]])}
        row = {i: 1.0 if i in taken else -1.0 for i in self.chosen.values()}
        self.rows.append((row, -np.inf, len(taken) - 1))

    def solve(self, score: Mapping[int, float]) -> dict[str, Decision] | None:
        """The best decisions, or None where there are none."""
        # Here, since it takes long to import and few searches need it.
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array

        n = len(self.integral)
        aim = np.zeros(n)
        for i, amount in score.items():
            aim[i] = -amount
        entries = [(r, i, a) for r, (row, _, _) in enumerate(self.rows) for i, a in row.items()]
        rows, columns, values = (np.array(column) for column in zip(*entries, strict=True))
        matrix = coo_array((values, (rows, columns)), shape=(len(self.rows), n)).tocsr()
        # scipy's stubs know numbers alone here; it takes arrays.
        low: Any = np.array([low for _, low, _ in self.rows])
        high: Any = np.array([high for _, _, high in self.rows])
        found = milp(
            aim,
            integrality=np.array(self.integral, dtype=int),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, low, high),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        decisions: dict[str, Decision] = {}
        for choice in self.space.choices:
            values = [v for v in choice.choosable if found.x[self.chosen[choice.label, v]] > 0.5]
            decisions[choice.label] = values[0] if choice.kind == "layer" else tuple(values)
        return decisions


def _values(decision: Decision) -> Sequence[Any]:
    return (decision,) if isinstance(decision, str) else decision
