"""DARTS: search by gradient descent on the mixture of all candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from nasfx.architecture import Architecture, SpaceChoice
from nasfx.choice import Decision
from nasfx.costs.graph import Chance
from nasfx.errors import SearchError
from nasfx.ops.arch_state import ArchState
from nasfx.passes import FunctionalizeInplace, LowerWeightedSum
from nasfx.rewriting.passes import Pass
from nasfx.space import SearchSpace
from nasfx.strategies.base import (
    Strategy,
    best_fitting,
    choice_probabilities,
    derive_most_probable,
)
from nasfx.strategies.unrolled import METHODS, Average, unrolled


@dataclass(frozen=True)
class Darts(Strategy):
    """DARTS (arXiv 1806.09055): weights and alphas descend in turn on the mixture.

    Each LayerChoice is sum_k softmax(alpha)_k o_k(x), equation 2. An InputChoice whose inputs each
    come straight from a LayerChoice of their own (an edge of a DARTS cell) sums all of them and has
    no alpha; the n_chosen edges with the largest probability of a candidate other than a
    `relaxed_only` one are derived, ties to the lower index. Other input choices have an alpha per
    input.

    Attributes:
        unrolled: False for first order. "finite-difference": arch steps minimise the validation
            loss after the weights' next step, equation 7, with the authors' finite difference,
            equation 8; "exact": with a Hessian-vector product by a second backward.
        inputs: "sum", the paper's form above; "softmax", NNI's, in which edges are weighted by an
            alpha of their own as well.
    """

    unrolled: bool | str = False
    inputs: str = "sum"

    name: ClassVar[str] = "darts"
    samples: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.inputs not in ("sum", "softmax"):
            raise SearchError(f"Darts(inputs={self.inputs!r}): it must be 'sum' or 'softmax'")
        if self.unrolled is not False and self.unrolled not in METHODS:
            raise SearchError(
                f"Darts(unrolled={self.unrolled!r}): it must be False or one of {METHODS}"
            )

    def edge_scored(self, choice: SpaceChoice) -> bool:
        """Whether the inputs of `choice` are ranked by their own layer choices."""
        return self.inputs == "sum" and bool(choice.edges) and choice.n_chosen is not None

    def passes(self, space: SearchSpace) -> tuple[Pass, ...]:
        """Candidates off shared memory, then the weighted sum."""
        summed = tuple(c.label for c in space.choices if self.edge_scored(c))
        return FunctionalizeInplace(), LowerWeightedSum(summed)

    def chance(self, graph: fx.Graph, choice: SpaceChoice) -> Chance | None:
        """The mixture's weights; edge-scored inputs all count, an upper bound."""
        return None if self.edge_scored(choice) else super().chance(graph, choice)

    @property
    def second_order(self) -> bool:
        """Whether arch steps also need the weights' next step."""
        return self.unrolled is not False

    def around_arch_step(
        self,
        weights: Sequence[nn.Parameter],
        alphas: Sequence[nn.Parameter],
        modules: Sequence[nn.Module],
        inner: Callable[[], Tensor] | None,
        weight_optimizer: torch.optim.Optimizer | None,
        average: Average | None = None,
    ) -> AbstractContextManager[None]:
        """The unrolled step's context, where it is asked for."""
        if not self.second_order:
            return super().around_arch_step(weights, alphas, modules, inner, weight_optimizer)
        if inner is None or weight_optimizer is None:
            raise SearchError(
                f"arch_step: Darts(unrolled={self.unrolled!r}) looks at the weights' next step, so "
                "it needs the training loss and the weights' optimizer:\n    with net.arch_step("
                "inner=lambda: F.cross_entropy(net(x), y), weight_optimizer=w):\n"
                "        net.objective(F.cross_entropy(net(xv), yv)).backward()"
            )
        method = str(self.unrolled)
        return unrolled(
            weights, alphas, modules, inner, weight_optimizer, method=method, average=average
        )

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
        return best_fitting(arch, space, space.validate(decisions))

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
