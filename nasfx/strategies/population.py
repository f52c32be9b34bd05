"""SPOS's evolution: which architectures are evaluated, and how the next are made from the best."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from nasfx.architecture import Architecture, SpaceChoice
from nasfx.choice import Decision
from nasfx.errors import CheckpointError, SearchError, SpaceError
from nasfx.space import SearchSpace
from nasfx.strategies.base import Evaluate, expect

Constraint = Callable[[Architecture], bool]
"""Whether an architecture may be evaluated."""

_MUTATION = 0.1  # the probability that a gene is drawn anew
_TRIES = 10  # proposals for each architecture that is wanted
_STATE = {"size", "seen", "scores", "current", "records", "generator"}


class Population:
    """All architectures that an evolution has met, their scores, and the next generations.

    Source: arXiv 1904.00420, section 3.4, with the constants of the authors' code.

    Attributes:
        size: architectures in a generation.
        seen: what was met, in order; also what may not be evaluated.
        scores: what was evaluated, in order, higher is better.
        current: the generation that is being evaluated; None between generations, and empty at the
            end, when nothing new is found.
        records: a record for each finished generation, see `run`.
    """

    def __init__(
        self,
        space: SearchSpace,
        constraints: Sequence[Constraint],
        size: int,
        generator: torch.Generator,
    ) -> None:
        """A population that has met nothing.

        Args:
            space: where architectures come from. What does not keep within its bounds is never
                evaluated.
            constraints: further ones, each called at most once for an architecture.
            size: at least 2.
            generator: for all draws.
        """
        self.space, self.constraints = space, (space.fits, *constraints)
        self.size, self.generator = size, generator
        self.seen: dict[Architecture, None] = {}
        self.scores: dict[Architecture, float] = {}
        self.current: list[Architecture] | None = None
        self.records: list[dict[str, Any]] = []

    # -- evaluating --------------------------------------------------------------------------------

    def run(self, generations: int, evaluate: Evaluate) -> Iterator[dict[str, Any]]:
        """Evaluate generation after generation, and give a record of each as it is finished.

        It goes on where it was, also in the middle of a generation, and ends early when a
        generation finds nothing new.

        Args:
            generations: how many there are at the end, those that are finished already included.
            evaluate: the score of an architecture; called once for each, in order.

        Yields:
            "generation", "best" (so far), "mean" (of this generation), "evaluated" (how many
            architectures this generation has), "seconds".

        Raises:
            SearchError: no architecture satisfies the constraints.
        """
        while len(self.records) < generations:
            start = time.perf_counter()
            if self.current is None:
                self.current = self.generation()
            if not self.current:
                break
            expect(evaluate, self.current)
            for arch in self.current:
                if arch not in self.scores:
                    self.scores[arch] = float(evaluate(arch))
            new = [self.scores[arch] for arch in self.current]
            record = {
                "generation": len(self.records),
                "best": max(self.scores.values()),
                "mean": sum(new) / len(new),
                "evaluated": len(new),
                "seconds": time.perf_counter() - start,
            }
            self.records.append(record)
            self.current = None
            yield record
        if not self.scores:
            raise nothing_fits(self.space, len(self.seen), "population")

    def best(self) -> list[Architecture]:
        """The parents: the size/5 best so far, the earlier of equals first."""
        ranked = sorted(self.scores, key=self.scores.__getitem__, reverse=True)
        return ranked[: max(1, self.size // 5)]

    # -- proposing ---------------------------------------------------------------------------------

    def generation(self) -> list[Architecture]:
        """The next architectures to evaluate; fewer than wanted where no more are found."""
        space, generator = self.space, self.generator
        new: list[Architecture] = []
        if parents := self.best():

            def parent() -> Architecture:
                return parents[int(torch.randint(len(parents), (), generator=generator))]

            half = self.size // 2
            new += self._new(half, lambda: space.mutate(parent(), _MUTATION, generator))
            new += self._new(half, lambda: crossover(space, parent(), parent(), generator))
        new += self._new(self.size - len(new), lambda: space.sample(generator))
        missing = self.size - len(new)
        if missing and space.size <= _TRIES * self.size:
            # Few are left, or they are hardly ever drawn: take from a list of them.
            left = [arch for arch in space.enumerate() if arch not in self.seen]
            order = iter(torch.randperm(len(left), generator=generator).tolist())
            new += self._new(missing, lambda: left[next(order)], tries=len(left))
        return new

    def _new(
        self, n: int, propose: Callable[[], Architecture], tries: int | None = None
    ) -> list[Architecture]:
        """Up to `n` proposals that were not met before and satisfy the constraints."""
        proposals = (propose() for _ in range(_TRIES * n if tries is None else tries))
        return list(islice(filter(self._accept, proposals), n))

    def _accept(self, arch: Architecture) -> bool:
        if arch in self.seen:
            return False
        self.seen[arch] = None
        return all(constraint(arch) for constraint in self.constraints)

    # -- saving ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next generations depend on, but for the space and the constraints.

        Plain data, and the generator's state as a uint8 tensor: `torch.load` reads it with
        `weights_only=True`. It may be taken at any time, also between two evaluations.
        """
        return {
            "size": self.size,
            "seen": [dict(arch) for arch in self.seen],
            "scores": [[dict(arch), score] for arch, score in self.scores.items()],
            "current": None if self.current is None else [dict(arch) for arch in self.current],
            "records": [dict(record) for record in self.records],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the population that gave `state` was.

        Raises:
            CheckpointError: the state has other entries, another size, or architectures that the
                space does not have. The population is as it was then.
        """
        if set(state) != _STATE:
            raise CheckpointError(
                f"the state of a population has the entries {sorted(_STATE)}, not {sorted(state)}"
            )
        if state["size"] != self.size:
            raise CheckpointError(
                f"the saved population has {state['size']} architectures in a generation, this one "
                f"{self.size}; make one of the same size"
            )
        seen = dict.fromkeys(map(self._known, state["seen"]))
        scores = {self._known(arch): float(score) for arch, score in state["scores"]}
        current = None if state["current"] is None else list(map(self._known, state["current"]))
        self.generator.set_state(state["generator"].cpu())
        self.seen, self.scores, self.current = seen, scores, current
        self.records = [dict(record) for record in state["records"]]

    def _known(self, decisions: Mapping[str, Any]) -> Architecture:
        try:
            return self.space.validate(decisions)
        except SpaceError as error:
            raise CheckpointError(
                f"the saved population is of another space: {error}; load it into one of the same "
                "model"
            ) from error


def nothing_fits(space: SearchSpace, drawn: int, larger: str) -> SearchError:
    """The error where none of `drawn` different architectures may be evaluated.

    Args:
        space: the space, whose bounds are named.
        drawn: how many were drawn.
        larger: what must be larger for more to be drawn.
    """
    bounds = ", ".join(f"{name} <= {bound:g}" for name, bound in space.bounds.items())
    return SearchError(
        f"no architecture satisfies the constraints: all {drawn} different ones that were drawn, "
        f"of {space.size:,}, were refused; loosen the constraints"
        f"{f' (the bounds are {bounds})' if bounds else ''}, or draw more with a larger {larger}"
    )


def crossover(
    space: SearchSpace,
    one: Architecture,
    two: Architecture,
    generator: torch.Generator | None = None,
) -> Architecture:
    """A canonical architecture with each decision from either of two, at equal chances.

    A decision that only one of them has is taken from that one; what becomes active by the mix and
    neither has is drawn uniformly.

    Args:
        space: the space of both.
        one: a canonical architecture.
        two: likewise.
        generator: for the draws.
    """

    def decide(choice: SpaceChoice) -> Decision:
        having = [parent for parent in (one, two) if choice.label in parent]
        if not having:
            return choice.draw(generator)
        which = int(torch.randint(len(having), (), generator=generator))
        return having[which].decision(choice.label)

    # Decided whether active or not, which leaves the law of the active ones as it is.
    return space.validate({choice.label: decide(choice) for choice in space.choices})
