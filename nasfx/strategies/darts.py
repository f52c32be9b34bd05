"""DARTS: search by gradient descent on the mixture of all candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from nasfx.architecture import Architecture, SpaceChoice
from nasfx.choice import Decision
from nasfx.errors import SearchError
from nasfx.ops.arch_state import ArchState
from nasfx.passes import FunctionalizeInplace, LowerWeightedSum
from nasfx.rewriting.passes import Pass
from nasfx.space import SearchSpace
from nasfx.strategies.base import Strategy, choice_probabilities, derive_most_probable


@dataclass(frozen=True)
class Darts(Strategy):
    """First-order DARTS (arXiv 1806.09055): weights and alphas descend in turn on the mixture.

    Each LayerChoice is sum_k softmax(alpha)_k o_k(x), equation 2. An InputChoice whose inputs each
    come straight from a LayerChoice of their own (an edge of a DARTS cell) sums all of them and has
    no alpha; the n_chosen edges with the largest probability of a candidate other than a
    `relaxed_only` one are derived, ties to the lower index. Other input choices have an alpha per
    input.

    Attributes:
        inputs: "sum", the paper's form above; "softmax", NNI's, in which edges are weighted by an
            alpha of their own as well.
    """

    inputs: str = "sum"

    name: ClassVar[str] = "darts"
    samples: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.inputs not in ("sum", "softmax"):
            raise SearchError(f"Darts(inputs={self.inputs!r}): it must be 'sum' or 'softmax'")

    def edge_scored(self, choice: SpaceChoice) -> bool:
        """Whether the inputs of `choice` are ranked by their own layer choices."""
        return self.inputs == "sum" and bool(choice.edges) and choice.n_chosen is not None

    def passes(self, space: SearchSpace) -> tuple[Pass, ...]:
        """Candidates off shared memory, then the weighted sum."""
        summed = tuple(c.label for c in space.choices if self.edge_scored(c))
        return FunctionalizeInplace(), LowerWeightedSum(summed)

    def candidates(self, choice: SpaceChoice) -> tuple[Any, ...]:
        """All candidates, `relaxed_only` ones too; none for edge-scored inputs."""
        return () if self.edge_scored(choice) else choice.candidates

    def derive(self, arch: ArchState, space: SearchSpace) -> Architecture:
        """The most probable candidates; for edge-scored inputs the strongest edges."""
        decisions: dict[str, Decision] = derive_most_probable(arch, space)
        alphas = arch.alpha_parameters()
        for choice in space.choices:
            if self.edge_scored(choice):
                scores = [self._score(space[label], alphas[label]) for label in choice.edges]
                best = sorted(range(len(scores)), key=lambda i: -scores[i])[: choice.n_chosen]
                decisions[choice.label] = tuple(sorted(best))
        return space.validate(decisions)

    def _score(self, edge: SpaceChoice, alpha: torch.Tensor) -> float:
        p = choice_probabilities(edge, alpha.detach()).tolist()
        named = zip(p, edge.candidates, strict=True)
        return max(value for value, name in named if name not in edge.relaxed_only)

    def arch_optimizer(
        self,
        parameters: list[nn.Parameter],
        cls: type[torch.optim.Optimizer] | None,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """Adam(lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3), the authors'."""
        if cls is None:
            options = {"lr": 3e-4, "betas": (0.5, 0.999), "weight_decay": 1e-3} | options
        return super().arch_optimizer(parameters, cls, **options)
