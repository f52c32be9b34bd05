"""ProxylessNAS: one sampled path in memory, a gradient for every gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nasfx.architecture import Architecture, SpaceChoice
from nasfx.choice import Decision
from nasfx.ops.arch_state import ArchState
from nasfx.ops.gates import draw_subset
from nasfx.passes import DeferProducers, FunctionalizeInplace, LowerBinaryGate
from nasfx.rewriting.passes import Pass
from nasfx.space import SearchSpace
from nasfx.strategies.base import Strategy, choosable, derive_most_probable


@dataclass(frozen=True)
class Proxyless(Strategy):
    """ProxylessNAS with gradient-based gates, the authors' `full_v2`.

    Source: arXiv 1812.00332, section 3.2.

    Every step draws a path from the softmax of the alphas. A weight step trains the drawn path. An
    arch step gives dL/dalpha = p (b - <p, b>) with b_k = <o_k(x), dL/do>, for which the candidates
    off the path run once without a graph, one after the other: only the drawn path's activations
    are kept, and the others' batch norms do not move. Where the loss is not linear in the choice's
    output this is a first-order estimate of the gradient of the expected loss.
    """

    name: ClassVar[str] = "proxyless"
    samples: ClassVar[bool] = True

    def passes(self, space: SearchSpace) -> tuple[Pass, ...]:
        """Candidates off shared memory, binary gates, producers on demand."""
        return FunctionalizeInplace(), LowerBinaryGate(), DeferProducers()

    def candidates(self, choice: SpaceChoice) -> tuple[Any, ...]:
        """All that may be chosen."""
        return choosable(choice)

    def draw(self, arch: ArchState, space: SearchSpace) -> dict[str, Decision]:
        """Draw every label from its own distribution."""
        alphas = arch.alpha_parameters()
        return {
            choice.label: draw_decision(choice, alphas[choice.label], arch.state.generator)
            for choice in space.choices
        }

    def derive(self, arch: ArchState, space: SearchSpace) -> Architecture:
        """The most probable candidates, as the paper does after the search."""
        return space.validate(derive_most_probable(arch, space))

    def arch_optimizer(
        self,
        parameters: list[nn.Parameter],
        cls: type[torch.optim.Optimizer] | None,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """Adam(lr=1e-3, betas=(0, 0.999), eps=1e-8, weight_decay=0), the authors'."""
        if cls is None:
            options = {"lr": 1e-3, "betas": (0.0, 0.999), "eps": 1e-8} | options
        return super().arch_optimizer(parameters, cls, **options)


def draw_decision(choice: SpaceChoice, alpha: Tensor, generator: torch.Generator) -> Decision:
    """One decision, drawn from the probabilities that `alpha` stands for."""
    values = alpha.detach().to("cpu", torch.float64)
    if choice.kind == "input":
        return draw_subset(values, choice.n_chosen, generator)
    index = int(torch.multinomial(torch.softmax(values, -1), 1, generator=generator))
    return choosable(choice)[index]
