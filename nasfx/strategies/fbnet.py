"""FBNet: search by gradient descent on a Gumbel-softmax mixture, under a cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from nasfx.architecture import Architecture, SpaceChoice
from nasfx.choice import Decision
from nasfx.costs.graph import Chance
from nasfx.errors import SearchError
from nasfx.ops.arch_state import ArchState
from nasfx.passes import FunctionalizeInplace, LowerGumbelSum
from nasfx.passes.lower_gumbel_sum import noisy_logits
from nasfx.rewriting.passes import Pass
from nasfx.space import SearchSpace
from nasfx.strategies.base import (
    Evaluate,
    Schedule,
    Strategy,
    best_fitting,
    check_whole,
    derive_most_probable,
    draw_decision,
    expect,
)


@dataclass(frozen=True)
class FBNet(Strategy):
    """FBNet (arXiv 1812.03443): the mixture is weighted by a sample of the Gumbel-softmax.

    Every step draws noise g and weighs candidate i by softmax((alpha + g) / temperature)_i; the
    expected cost is that of the very same weights. Inputs of an InputChoice are weighted by
    their inclusion probabilities with (alpha + g) / temperature in place of alpha; for any subset g
    is the difference of two Gumbel draws. `search` trains the weights on `train` in every epoch,
    then the alphas in one pass over `valid`, and multiplies the temperature by `anneal`; the
    authors split 80 % to 20 %, and train the weights alone in the first 10 of 90 epochs
    (warmup=10). Outside of steps there is no noise.

    At the end several subnets are drawn from softmax(alpha); the best under the shared weights is
    returned, and all are in the result's `evaluated`, for training each of them.

    Attributes:
        temperature: at the start.
        anneal: what it is multiplied with after each epoch with arch steps.
        hard: weights of 0 and 1 in forward, with the gradient of the soft ones: the
            straight-through estimator, which is biased.
        final_samples: how many subnets are drawn at the end.
        recalibrate: batches of `train` over which batch-norm statistics are averaged for each of
            them.

    Raises:
        SearchError: an option that is out of range.
    """

    temperature: float = 5.0
    anneal: float = math.exp(-0.045)
    hard: bool = False
    final_samples: int = 6
    recalibrate: int = 200

    name: ClassVar[str] = "fbnet"
    samples: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("temperature", "anneal"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise SearchError(f"FBNet({name}={value!r}): it must be a positive number")
        check_whole(self, 0, "final_samples")
        check_whole(self, 0, "recalibrate")

    @property
    def schedule(self) -> Schedule:
        """A pass over the validation data after every epoch of the weights."""
        return Schedule(every=0, recalibrate=self.recalibrate)

    def passes(self, space: SearchSpace) -> tuple[Pass, ...]:
        """Candidates off shared memory, then the sum weighted by a sample."""
        return FunctionalizeInplace(), LowerGumbelSum(hard=self.hard)

    def candidates(self, choice: SpaceChoice) -> tuple[Any, ...]:
        """All candidates, `relaxed_only` ones too."""
        return choice.candidates

    def initial_alpha(self, n: int, generator: torch.Generator) -> Tensor:
        """Zeros: all candidates are as probable."""
        return torch.zeros(n, dtype=torch.float64)

    def arch_state(self, space: SearchSpace, seed: int, dtype: torch.dtype) -> ArchState:
        """The alphas, `state.temperature` and, not saved, the noise of the step."""
        arch = super().arch_state(space, seed, dtype)
        arch.state.register_buffer("temperature", torch.tensor(self.temperature, dtype=dtype))
        arch.state.noise = nn.Module()
        for label, alpha in arch.alpha_parameters().items():
            zeros = torch.zeros_like(alpha, requires_grad=False)
            arch.state.noise.register_buffer(label, zeros, persistent=False)
        return arch

    def logits(self, graph: fx.Graph, label: str) -> fx.Node:
        """Those of the step's sample."""
        return noisy_logits(graph, label)

    def chance(self, graph: fx.Graph, choice: SpaceChoice) -> Chance | None:
        """The mixture's own weights, before a mean divides them."""
        chance = super().chance(graph, choice)
        if chance is None or not self.hard or isinstance(chance.law, int):
            return chance
        chance.node.kwargs = {"hard": True, **chance.node.kwargs}
        return chance

    def begin_step(self, arch: ArchState, space: SearchSpace, kind: str) -> None:
        """Draw the step's noise."""
        for choice in space.choices:
            alpha = arch.alpha_parameters()[choice.label]
            noise = _gumbel(len(alpha), arch.state.generator)
            if choice.kind == "input" and choice.n_chosen is None:
                noise = noise - _gumbel(len(alpha), arch.state.generator)
            self._set_noise(arch, choice.label, noise.to(alpha))

    def end_step(self, arch: ArchState) -> None:
        """No noise outside of steps."""
        for label, alpha in arch.alpha_parameters().items():
            self._set_noise(arch, label, torch.zeros_like(alpha, requires_grad=False))

    def _set_noise(self, arch: ArchState, label: str, noise: Tensor) -> None:
        # A new tensor: autograd may hold the old one.
        arch.state.get_submodule("noise")._buffers[label] = noise.detach()

    def end_epoch(self, arch: ArchState) -> None:
        """Lower the temperature."""
        arch.state.get_buffer("temperature").mul_(self.anneal)

    def draw(self, arch: ArchState, space: SearchSpace) -> dict[str, Decision]:
        """Draw every label from softmax(alpha), for the subnets at the end."""
        alphas = arch.alpha_parameters()
        decisions: dict[str, Decision] = {}
        for choice in space.choices:
            alpha = alphas[choice.label].detach()
            if choice.relaxed_only:
                kept = [i for i, c in enumerate(choice.candidates) if c in choice.choosable]
                alpha = alpha[kept]
            decisions[choice.label] = draw_decision(choice, alpha, arch.state.generator)
        return decisions

    def derive(self, arch: ArchState, space: SearchSpace) -> Architecture:
        """The most probable candidates."""
        return best_fitting(arch, space, space.validate(derive_most_probable(arch, space)))

    def conclude(self, space: SearchSpace, arch: ArchState, evaluate: Evaluate) -> Architecture:
        """The best of `final_samples` drawn subnets that keep within the bounds, and `derive`'s."""
        found = {self.derive(arch, space): None}
        for _ in range(self.final_samples):
            drawn = space.validate(self.draw(arch, space))
            if space.fits(drawn):
                found[drawn] = None
        expect(evaluate, list(found))
        return max(found, key=evaluate)

    def arch_optimizer(
        self,
        parameters: list[nn.Parameter],
        cls: type[torch.optim.Optimizer] | None,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """Adam(lr=0.01, weight_decay=5e-4), the paper's."""
        if cls is None:
            options = {"lr": 0.01, "weight_decay": 5e-4} | options
        return super().arch_optimizer(parameters, cls, **options)


def _gumbel(n: int, generator: torch.Generator) -> Tensor:
    """Standard Gumbel draws: minus the logarithm of exponential ones."""
    return -torch.empty(n, dtype=torch.float64).exponential_(generator=generator).log()
