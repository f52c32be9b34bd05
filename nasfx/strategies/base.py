"""What a strategy is: its passes, its parameters, its draws and how it derives an architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from nasfx.architecture import Architecture, SpaceChoice
from nasfx.choice import Decision
from nasfx.costs.graph import Chance
from nasfx.errors import SearchError
from nasfx.ops.arch_state import ArchState
from nasfx.ops.gates import (
    draw_subset,
    inclusion_gate,
    inclusion_probabilities,
    log_probability,
    log_subsets,
    softmax_gate,
)
from nasfx.rewriting.editing import attribute, gate_node
from nasfx.rewriting.passes import Pass
from nasfx.space import SearchSpace
from nasfx.strategies.bounded import Score, best_within_bounds
from nasfx.strategies.unrolled import Average

Evaluate = Callable[[Architecture], float]
"""Gives an architecture's metric; see `expect`."""


def expect(evaluate: Evaluate, archs: Sequence[Architecture]) -> None:
    """Tell `evaluate` for which architectures it will be asked next.

    One that has a method `expect` may evaluate them together, or divide them among processes.
    """
    if (ahead := getattr(evaluate, "expect", None)) is not None:
        ahead(archs)


"""The validation score of one architecture under the shared weights; higher is better."""


@dataclass(frozen=True)
class Schedule:
    """When `nasfx.search` takes arch steps.

    Attributes:
        every: one optimizer step of the architecture before every so many weight steps; 0 for none
            among the weight steps, but a phase of its own after those of the epoch.
        steps: optimizer steps in such a phase; None for as many as make one pass over `valid`.
        draws: arch steps, each with a draw of its own, that an optimizer step averages.
        same_batch: whether these share one batch of `valid`.
        recalibrate: over how many training batches, at most one pass, batch-norm statistics are
            averaged anew for every architecture that is evaluated at the end; 0 for none.
    """

    every: int = 1
    steps: int | None = None
    draws: int = 1
    same_batch: bool = False
    recalibrate: int = 0


@dataclass(frozen=True)
class Strategy(ABC):
    """A search strategy. Instances hold options only, so one may serve several nets.

    A new strategy is one subclass in one file, with its passes; hand an instance to `transform`.

    Class attributes:
        name: in kebab-case, as `transform` takes it.
        samples: whether every step draws a path.
        rewarded: whether the architecture is learned from the rewards of drawn paths, through
            `surrogate`, and not from the gradient of the loss.
    """

    name: ClassVar[str]
    samples: ClassVar[bool]

    # -- what stands in the graph ------------------------------------------------------------------

    @abstractmethod
    def passes(self, space: SearchSpace) -> tuple[Pass, ...]:
        """The passes from stage CHOICE to stage SUPERNET."""

    def check(self, space: SearchSpace) -> None:  # noqa: B027  # most have nothing to refuse
        """Refuse what cannot be searched, once the space knows its costs and bounds.

        Raises:
            SearchError: as said.
        """

    @abstractmethod
    def candidates(self, choice: SpaceChoice) -> tuple[Any, ...]:
        """The candidates that get an architecture parameter, in order; () for none."""

    def initial_alpha(self, n: int, generator: torch.Generator) -> Tensor:
        """The architecture parameters at the start: 1e-3 times standard normal draws."""
        return 1e-3 * torch.randn(n, generator=generator, dtype=torch.float64)

    def arch_state(self, space: SearchSpace, seed: int, dtype: torch.dtype) -> ArchState:
        """New architecture parameters for `space`, with the most probable path drawn."""
        generator = torch.Generator().manual_seed(seed)
        alphas = {
            choice.label: self.initial_alpha(len(candidates), generator).to(dtype)
            for choice in space.choices
            if (candidates := self.candidates(choice))
        }
        names = {choice.label: choice.choosable for choice in space.choices}
        counts = {choice.label: choice.n_chosen for choice in space.choices}
        arch = ArchState(alphas, names, seed, counts)
        arch.state.generator.set_state(generator.get_state())
        if self.samples:
            arch.state.drawn = {
                choice.label: most_probable(choice, alphas.get(choice.label))
                for choice in space.choices
            }
        return arch

    def chance(self, graph: fx.Graph, choice: SpaceChoice) -> Chance | None:
        """The node that holds the probabilities of `choice` in the graph of the expected cost.

        None counts all its inputs as chosen.
        """
        names = self.candidates(choice)
        logits = self.logits(graph, choice.label)
        if choice.kind == "layer":
            return Chance(gate_node(graph, softmax_gate, logits, choice.label), names)
        if choice.n_chosen in (None, 1):
            gate = gate_node(graph, inclusion_gate, logits, choice.label, choice.n_chosen)
            return Chance(gate, names if choice.n_chosen == 1 else None)
        return Chance(logits, choice.n_chosen)

    def logits(self, graph: fx.Graph, label: str) -> fx.Node:
        """The node of the parameters that the gates of `label` are made of."""
        return attribute(graph, f"arch.{label}")

    # -- steps -------------------------------------------------------------------------------------

    @property
    def rewarded(self) -> bool:
        """See the class attributes."""
        return False

    @property
    def schedule(self) -> Schedule:
        """When `nasfx.search` takes arch steps."""
        return Schedule()

    def draw(self, arch: ArchState, space: SearchSpace) -> dict[str, Decision]:
        """A decision for every label, inactive ones included, drawn with the state's generator."""
        raise SearchError(f"{self.name} runs the mixture of all candidates and draws no path")

    def begin_step(self, arch: ArchState, space: SearchSpace, kind: str) -> None:
        """On entry of a step of kind "weight" or "arch": draw what the step runs."""
        if self.samples:
            arch.state.drawn = self.draw(arch, space)

    def end_step(self, arch: ArchState) -> None:  # noqa: B027  # most have nothing to do
        """On exit of a step, also after an error: forget the step's noise."""

    def withheld(self, arch: ArchState, space: SearchSpace) -> Collection[str]:
        """The labels whose parameters get no gradient in the arch step that has begun."""
        return ()

    def surrogate(self, arch: ArchState, space: SearchSpace, reward: float) -> Tensor:
        """For rewarded strategies: what an arch step minimises; it touches no weight."""
        raise SearchError(f"{self.name} learns from the gradient of the loss and has no surrogate")

    @property
    def second_order(self) -> bool:
        """Whether arch steps also need the weights' next step."""
        return False

    def around_arch_step(
        self,
        weights: Sequence[nn.Parameter],
        alphas: Sequence[nn.Parameter],
        modules: Sequence[nn.Module],
        inner: Callable[[], Tensor] | None,
        weight_optimizer: torch.optim.Optimizer | None,
        average: Average | None = None,
    ) -> AbstractContextManager[None]:
        """What an arch step runs in; see `Supernet.arch_step` for the arguments."""
        if inner is not None or weight_optimizer is not None:
            raise SearchError(
                f"arch_step: {self.name} is of first order and takes neither inner nor "
                "weight_optimizer; they belong to Darts(unrolled=...)"
            )
        return nullcontext()

    def end_epoch(self, arch: ArchState) -> None:  # noqa: B027
        """After an epoch with arch steps: anneal what is annealed."""

    def arch_optimizer(
        self,
        parameters: list[nn.Parameter],
        cls: type[torch.optim.Optimizer] | None,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """The optimizer of the architecture parameters: the paper's, or `cls` with `options`."""
        return (cls or torch.optim.Adam)(parameters, **options)

    def hook(  # noqa: B027
        self, optimizer: torch.optim.Optimizer, arch: ArchState, space: SearchSpace
    ) -> None:
        """Hang the strategy's own corrections on the steps of an optimizer of its parameters."""

    # -- what has been found -----------------------------------------------------------------------

    @abstractmethod
    def derive(self, arch: ArchState, space: SearchSpace) -> Architecture:
        """The architecture that the search has found, from its parameters alone.

        Raises:
            SearchError: the strategy learns no distribution.
        """

    def probabilities(self, arch: ArchState, space: SearchSpace) -> dict[str, Tensor]:
        """By label, the probability that each candidate is chosen, or is among the chosen."""
        alphas = arch.alpha_parameters()
        return {
            choice.label: choice_probabilities(choice, alphas[choice.label].detach())
            for choice in space.choices
            if choice.label in alphas
        }

    def conclude(self, space: SearchSpace, arch: ArchState, evaluate: Evaluate) -> Architecture:
        """The architecture that a finished search returns; may evaluate several."""
        return self.derive(arch, space)


def choice_probabilities(choice: SpaceChoice, alpha: Tensor) -> Tensor:
    """The probabilities that `alpha` stands for."""
    if choice.kind == "layer":
        return torch.softmax(alpha, -1)
    return inclusion_probabilities(alpha, choice.n_chosen)


def most_probable(choice: SpaceChoice, alpha: Tensor | None) -> Decision:
    """The decision of the highest probability; ties go to the first.

    `alpha` belongs to all candidates, or to the choosable ones; None stands for equal ones.
    """
    names = choice.choosable
    n = len(names)
    values = [0.0] * n if alpha is None else alpha.detach().tolist()
    if choice.kind == "layer":
        if len(values) > n:
            values = [v for v, c in zip(values, choice.candidates, strict=True) if c in names]
        return names[max(range(n), key=values.__getitem__)]
    if choice.n_chosen is None:
        return tuple(i for i in range(n) if values[i] >= 0)
    return tuple(sorted(sorted(range(n), key=lambda i: -values[i])[: choice.n_chosen]))


def derive_most_probable(arch: ArchState, space: SearchSpace) -> dict[str, Decision]:
    """The most probable decision for every label with parameters."""
    alphas: Mapping[str, Tensor] = arch.alpha_parameters()
    return {
        choice.label: most_probable(choice, alphas[choice.label])
        for choice in space.choices
        if choice.label in alphas
    }


def draw_decision(choice: SpaceChoice, alpha: Tensor, generator: torch.Generator) -> Decision:
    """One decision, drawn from the probabilities that `alpha` stands for."""
    values = alpha.detach().to("cpu", torch.float64)
    if choice.kind == "input":
        return draw_subset(values, choice.n_chosen, generator)
    index = int(torch.multinomial(torch.softmax(values, -1), 1, generator=generator))
    return choice.choosable[index]


def best_fitting(arch: ArchState, space: SearchSpace, derived: Architecture) -> Architecture:
    """`derived` if it keeps within the bounds of the space, else the most probable that does.

    Raises:
        SearchError: none does.
    """
    if space.fits(derived):
        return derived
    alphas = arch.alpha_parameters()
    scores = {
        choice.label: _score(choice, alphas[choice.label].detach().double())
        for choice in space.choices
        if choice.label in alphas
    }
    return best_within_bounds(space, scores)


def _score(choice: SpaceChoice, alpha: Tensor) -> Score:
    """The logarithm of a decision's probability as a sum over what is chosen."""
    if choice.kind == "layer":
        names = choice.candidates if len(alpha) > len(choice.choosable) else choice.choosable
        log_p = torch.log_softmax(alpha, -1).tolist()
        values = {n: p for n, p in zip(names, log_p, strict=True) if n in choice.choosable}
        return Score(values)
    none: Decision = ()
    values = dict(enumerate(alpha.tolist()))
    if choice.n_chosen is None:
        return Score(values, float(log_probability(alpha, none, None, None)))
    return Score(values, -float(log_subsets(list(alpha.unbind(0)), choice.n_chosen)))


def check_whole(strategy: Strategy, least: int, *names: str) -> None:
    """Raise SearchError unless the options of these names are whole numbers of at least `least`."""
    for name in names:
        value = getattr(strategy, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise SearchError(
                f"{type(strategy).__name__}({name}={value!r}): it must be a whole number of at "
                f"least {least}"
            )
