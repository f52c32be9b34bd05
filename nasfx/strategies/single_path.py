"""Single path one-shot: train uniformly drawn subnets, then evolve among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from nasfx.architecture import Architecture, SpaceChoice
from nasfx.choice import Decision
from nasfx.costs.diagrams import law_of
from nasfx.costs.graph import Chance
from nasfx.errors import CheckpointError, SearchError
from nasfx.ops.arch_state import ArchState
from nasfx.ops.expectation import uniform_gate
from nasfx.passes import DeferProducers, LowerSampledPath
from nasfx.rewriting.passes import Pass
from nasfx.space import SearchSpace
from nasfx.strategies.base import Evaluate, Schedule, Strategy, check_whole
from nasfx.strategies.population import Population

_TRIES = 500  # draws until a path lies in its bin


@dataclass(frozen=True)
class UniformPaths(Strategy):
    """What single path and random search share: every step runs one uniformly drawn path.

    Nothing is learned about the architecture while training, so there are no alphas and nothing to
    derive. Bounds declared at `transform` do not narrow the draws: paths are drawn from the whole
    space, and only what a search evaluates at its end keeps within the bounds.

    Attributes:
        recalibrate: before `nasfx.search` evaluates an architecture, batch-norm statistics become
            the average over so many training batches, at most one pass; 0 leaves them as they are.
    """

    recalibrate: int = field(default=200, kw_only=True)

    samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_whole(self, 0, "recalibrate")

    @property
    def schedule(self) -> Schedule:
        """Weight steps alone."""
        return Schedule(recalibrate=self.recalibrate)

    def passes(self, space: SearchSpace) -> tuple[Pass, ...]:
        """Switches, producers on demand."""
        return LowerSampledPath(), DeferProducers()

    def candidates(self, choice: SpaceChoice) -> tuple[Any, ...]:
        """None: the law is uniform."""
        return ()

    def chance(self, graph: fx.Graph, choice: SpaceChoice) -> Chance:
        """The uniform law."""
        law = law_of(choice)
        node = graph.call_function(uniform_gate, (law, len(choice.choosable)))
        return Chance(node, law)

    def draw(self, arch: ArchState, space: SearchSpace) -> dict[str, Decision]:
        """Draw every label uniformly."""
        return {choice.label: choice.draw(arch.state.generator) for choice in space.choices}

    def probabilities(self, arch: ArchState, space: SearchSpace) -> dict[str, Tensor]:
        """The uniform law."""
        result: dict[str, Tensor] = {}
        for choice in space.choices:
            n = len(choice.choosable)
            share = 0.5 if choice.n_chosen is None else (choice.n_chosen or 1) / n
            result[choice.label] = torch.full((n,), share)
        return result

    def derive(self, arch: ArchState, space: SearchSpace) -> Architecture:
        """Nothing to derive."""
        raise SearchError(
            f"{self.name} learns no distribution over architectures, so nothing can be derived "
            "from it: nasfx.search returns the best architecture that it evaluated "
            "(result.architecture), or give one of your own, nasfx.finalize(net, arch)"
        )


@dataclass(frozen=True)
class SinglePath(UniformPaths):
    """SPOS (arXiv 1904.00420): every weight step trains one uniformly drawn path.

    Nothing is learned about the architecture while training. `search` ends with the paper's
    evolution under the shared weights (section 3.4, see `nasfx.evolve`), among the architectures
    that keep within the bounds declared at `transform`, and returns the best. Training paths are
    drawn from the whole space, with or without bounds.

    Attributes:
        population: architectures in a generation of the evolution, at least 2.
        generations: how many, the first included.
        bins: (low, high, step) of a cost in its objective's unit, as in the authors' code, which
            has 290, 360 and 10 million FLOPs: each draw chooses one of the bins [low, low + step],
            [low + step, low + 2 step], ... up to high, at equal chances, and draws paths until one
            lies in it; after 500 that do not, the next one as it is. It holds for training and for
            `net.sample()`; `probabilities()` and `expected_cost()` stay those of uniform draws.
        bins_of: the name of that cost, of an objective declared at `transform`.
        fair: strict fairness (FairNAS, arXiv 1907.01845): of the weight steps that run a choice of
            n candidates, every n are a round, in which each candidate is trained exactly once, in
            random order. Likewise for the inputs of an InputChoice of one; other input choices stay
            uniform. To sum the gradients of a round before the optimizer steps, as FairNAS does, is
            up to the loop.
        recalibrate: see `UniformPaths`; the authors' 200.

    Raises:
        SearchError: an option that is out of range, or `bins` together with `fair`.
    """

    population: int = 50
    generations: int = 20
    bins: tuple[float, float, float] | None = None
    bins_of: str = "flops"
    fair: bool = False

    name: ClassVar[str] = "single-path"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, 2, "population")
        check_whole(self, 1, "generations")
        if self.bins is not None:
            _check_bins(self.bins)
            if self.fair:
                raise SearchError(
                    "bins and fair are two ways to draw paths: a path that lies in a bin need not "
                    "have the candidates whose turn it is; leave one of them out"
                )

    def arch_state(self, space: SearchSpace, seed: int, dtype: torch.dtype) -> ArchState:
        """The state that draws paths; with `fair` also `state.queues`."""
        arch = super().arch_state(space, seed, dtype)
        if self.fair:
            choices = filter(_single, space.choices)
            arch.state.queues = Queues({c.label: len(c.choosable) for c in choices})
        return arch

    def check(self, space: SearchSpace) -> None:
        """Refuse `bins` of a cost that the net does not know."""
        if self.bins is not None and self.bins_of not in space.costs:
            known = ", ".join(map(repr, space.costs)) or "none"
            raise SearchError(
                f"SinglePath(bins={self.bins}) draws paths by their {self.bins_of!r}, a cost that "
                f"the net does not know (it knows {known}): declare it as an objective at "
                "transform, nasfx.transform(model, strategy, objective=nasfx.Flops(), "
                "example_inputs=x) for 'flops'"
            )

    def draw(self, arch: ArchState, space: SearchSpace) -> dict[str, Decision]:
        """Draw every label uniformly; with `bins` until the path's cost lies in a drawn bin."""
        if self.bins is None:
            return super().draw(arch, space)
        cost = space.costs[self.bins_of]
        low, high, step = self.bins
        count = round((high - low) / step)
        low += step * int(torch.randint(count, (), generator=arch.state.generator))
        for _ in range(_TRIES):
            drawn = super().draw(arch, space)
            if low <= cost(space.validate(drawn)) <= low + step:
                return drawn
        return super().draw(arch, space)

    def begin_step(self, arch: ArchState, space: SearchSpace, kind: str) -> None:
        """Draw the step's path; with `fair`, weight steps take the candidates whose turn it is."""
        super().begin_step(arch, space, kind)
        if not self.fair or kind != "weight":
            return
        generator, queues = arch.state.generator, arch.state.queues
        assert isinstance(queues, Queues)

        def decide(choice: SpaceChoice) -> Decision:
            if not _single(choice):
                return choice.draw(generator)
            value = choice.choosable[_take(queues, choice.label, generator)]
            return value if choice.kind == "layer" else (value,)

        # Only of what is active: a candidate has had its turn when it was trained.
        path = space.walk(decide)
        arch.state.drawn |= {label: path.decision(label) for label in path}

    def conclude(self, space: SearchSpace, arch: ArchState, evaluate: Evaluate) -> Architecture:
        """The best that an evolution finds; the first of equals.

        Its draws start where the net's generator stands, which stays there: what is concluded again
        evaluates the same architectures in the same order, as after a checkpoint.

        Raises:
            SearchError: no architecture keeps within the bounds.
        """
        pool = Population(space, (), self.population, generator_of(arch))
        for _ in pool.run(self.generations, evaluate):
            pass
        return pool.best()[0]


def generator_of(arch: ArchState) -> torch.Generator:
    """A generator of its own that draws what the net's would."""
    generator = torch.Generator()
    generator.set_state(arch.state.generator.get_state())
    return generator


def _check_bins(bins: Any) -> None:
    """Raise SearchError where `bins` is no (low, high, step) that gives whole bins."""
    fits = isinstance(bins, tuple) and len(bins) == 3
    fits = fits and all(isinstance(x, int | float) and isfinite(x) for x in bins)
    if fits:
        low, high, step = bins
        fits = 0 <= low < high and step > 0
        count = round((high - low) / step) if fits else 0
        fits = count >= 1 and abs(count * step - (high - low)) <= 1e-6 * step
    if not fits:
        raise SearchError(
            f"bins={bins!r} must be (low, high, step) in the cost's unit, with 0 <= low < high and "
            "high - low a multiple of step, as (290e6, 360e6, 10e6) for FLOPs"
        )


# -- strict fairness -------------------------------------------------------------------------------


def _single(choice: SpaceChoice) -> bool:
    """Whether one of the candidates is chosen, so that they can take turns."""
    return choice.kind == "layer" or choice.n_chosen == 1


class Queues(nn.Module):
    """By label, as int64 buffers of any length: the candidates whose turn is still to come."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self._sizes = dict(sizes)
        for label in sizes:
            self.register_buffer(label, torch.zeros(0, dtype=torch.int64))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        for label, n in self._sizes.items():
            key = prefix + label
            if key in state_dict:  # else it is reported as missing
                queue = state_dict[key].flatten().tolist()
                if sorted({*queue} & {*range(n)}) != sorted(queue):
                    raise CheckpointError(f"{key} = {queue} is no queue of {n} candidates")
                self._buffers[label] = self.get_buffer(label).new_zeros(len(queue))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _take(queues: Queues, label: str, generator: torch.Generator) -> int:
    """The candidate of `label` whose turn it is; a new round is in random order."""
    queue = queues.get_buffer(label)
    if not len(queue):
        n = queues._sizes[label]
        queue = torch.randperm(n, generator=generator).to(queue.device)
    queues._buffers[label] = queue[1:].clone()
    return int(queue[0])
