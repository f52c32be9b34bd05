"""Single path one-shot: train uniformly drawn subnets, then choose among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nasfx.architecture import Architecture, SpaceChoice
from nasfx.choice import Decision
from nasfx.errors import SearchError
from nasfx.ops.arch_state import ArchState
from nasfx.passes import DeferProducers, LowerSampledPath
from nasfx.rewriting.passes import Pass
from nasfx.space import SearchSpace
from nasfx.strategies.base import Evaluate, Strategy, choosable


@dataclass(frozen=True)
class SinglePath(Strategy):
    """SPOS (arXiv 1904.00420): every weight step trains one uniformly drawn path.

    Nothing is learned about the architecture while training, so there are no alphas and nothing to
    derive. `search` ends by evaluating `final_samples` uniformly drawn, different architectures
    under the shared weights and returns the best.

    Attributes:
        final_samples: how many architectures are evaluated at the end; all of a smaller space.
    """

    final_samples: int = 50

    name: ClassVar[str] = "single-path"
    samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.final_samples < 1:
            raise SearchError(f"final_samples={self.final_samples} must be at least 1")

    def passes(self, space: SearchSpace) -> tuple[Pass, ...]:
        """Switches, producers on demand."""
        return LowerSampledPath(), DeferProducers()

    def candidates(self, choice: SpaceChoice) -> tuple[Any, ...]:
        """None: the law is uniform."""
        return ()

    def draw(self, arch: ArchState, space: SearchSpace) -> dict[str, Decision]:
        """Draw every label uniformly."""
        return {choice.label: choice.draw(arch.state.generator) for choice in space.choices}

    def probabilities(self, arch: ArchState, space: SearchSpace) -> dict[str, Tensor]:
        """The uniform law."""
        result: dict[str, Tensor] = {}
        for choice in space.choices:
            n = len(choosable(choice))
            share = 0.5 if choice.n_chosen is None else (choice.n_chosen or 1) / n
            result[choice.label] = torch.full((n,), share)
        return result

    def derive(self, arch: ArchState, space: SearchSpace) -> Architecture:
        """Nothing to derive."""
        raise SearchError(
            "single-path learns no distribution over architectures, so nothing can be derived "
            "from it: nasfx.search returns the best architecture that it evaluated "
            "(result.architecture), or give one of your own, nasfx.finalize(net, arch)"
        )

    def conclude(self, space: SearchSpace, arch: ArchState, evaluate: Evaluate) -> Architecture:
        """The best of `final_samples` architectures; the first of equals."""
        return best_of(space, arch.state.generator, self.final_samples, evaluate)


def best_of(
    space: SearchSpace, generator: torch.Generator, n: int, evaluate: Evaluate
) -> Architecture:
    """The best of `n` different, uniformly drawn architectures; of all if there are no more."""
    if space.size <= n:
        drawn = list(space.enumerate())
    else:
        seen: dict[Architecture, None] = {}
        for _ in range(100 * n):  # nested spaces have architectures that are hardly ever drawn
            seen[space.sample(generator)] = None
            if len(seen) == n:
                break
        drawn = list(seen)
    return max(drawn, key=evaluate)
