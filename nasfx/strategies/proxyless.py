"""ProxylessNAS: one sampled path in memory, a gradient for every gate, or a policy gradient."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from nasfx.architecture import Architecture, SpaceChoice
from nasfx.choice import Decision
from nasfx.costs.graph import Chance
from nasfx.errors import SearchError
from nasfx.ops.arch_state import ArchState
from nasfx.ops.gates import log_probability, pair_gate
from nasfx.passes import DeferProducers, FunctionalizeInplace, LowerBinaryGate, LowerSampledPath
from nasfx.rewriting.editing import gate_node, identifier
from nasfx.rewriting.passes import Pass
from nasfx.space import SearchSpace
from nasfx.strategies.base import (
    Schedule,
    Strategy,
    best_fitting,
    check_whole,
    derive_most_probable,
    draw_decision,
)

_GATES = ("full_v2", "two", "full")
_ESTIMATORS = ("gradient", "reinforce")
_DECAY = 0.99  # how far the baseline goes towards the mean reward


@dataclass(frozen=True)
class Proxyless(Strategy):
    """ProxylessNAS (arXiv 1812.00332): every step draws a path from the softmax of the alphas.

    A weight step trains the drawn path. An arch step gives dL/dalpha = p (b - <p, b>) with
    b_k = <o_k(x), dL/do>, section 3.2, for which the candidates off the path run without a graph;
    their batch norms do not move. Where the loss is not linear in the choice's output this is a
    first-order estimate of the gradient of the expected loss.

    The authors train the weights alone for 40 epochs before the 120 of the search
    (`search(warmup=...)`), and on ImageNet take an arch step every 5th batch.

    Attributes:
        gate: "full_v2": only the drawn path's activations are kept, the other candidates run in
            backward. "full": they run in forward, the same gradient. "two": an arch step draws two
            candidates by p without replacement, softmax over these two decides which is active, and
            only their alphas learn; after the optimizer's step both are moved by the same amount,
            so that the probabilities of the others are as before (section 3.2.1). An objective's
            cost E reaches the same two: with q their softmax and c_k the cost of candidate k,
            dE/dalpha_i = q_i q_j (c_i - c_j) = -dE/dalpha_j. So a step of plain SGD on E alone
            moves probability from the dearer to the cheaper of the two and nowhere else: each
            small enough one, after one arch step, lowers E, or leaves it where both cost the same.
            (The gradient of sum_k p_k c_k, followed by the rescaling, may raise E: a dear but rare
            candidate gains on a frequent one.) This is the gradient of the authors' code, which
            takes the value of E for the two alone, too; here it is that of all candidates.
        estimator: "gradient", as above. "reinforce" (section 3.3.2): the gates are trained from the
            rewards R of drawn paths, with gradient mean_j (R_j - b) d(-log p_j)/dalpha over the
            draws of an optimizer step; the baseline b starts as the first mean of the rewards, and
            then goes 0.99 of the way to each, before it is used. As in the authors' code, where the
            reward is acc (ref / LAT)^0.1: an objective with loss "mul#power".
        skip_zero: no update of an alpha in steps in which the active candidate is a Zero (one whose
            graph gives zeros, or that gives its input where all others add to it), as in the
            authors' code; by default the paper's gradient is taken.
        arch_every: an arch step is taken before every so many weight steps, by `search`.
        draws: for "reinforce", paths for each optimizer step; on one batch.

    Raises:
        SearchError: an unknown option.
    """

    gate: str = "full_v2"
    estimator: str = "gradient"
    skip_zero: bool = False
    arch_every: int = 1
    draws: int = 10

    name: ClassVar[str] = "proxyless"
    samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, values in (("gate", _GATES), ("estimator", _ESTIMATORS)):
            if getattr(self, name) not in values:
                raise SearchError(
                    f"Proxyless({name}={getattr(self, name)!r}): it must be one of {values}"
                )
        check_whole(self, 1, "arch_every", "draws")
        if self.rewarded and (self.gate != "full_v2" or self.skip_zero):
            raise SearchError(
                "Proxyless(estimator='reinforce') has no gates with gradients: leave gate and "
                "skip_zero as they are"
            )

    @property
    def rewarded(self) -> bool:
        """Whether the gates learn from rewards."""
        return self.estimator == "reinforce"

    @property
    def schedule(self) -> Schedule:
        """Arch steps among the weight steps."""
        draws = self.draws if self.rewarded else 1
        return Schedule(every=self.arch_every, draws=draws, same_batch=True)

    def passes(self, space: SearchSpace) -> tuple[Pass, ...]:
        """Candidates off shared memory, binary gates, producers on demand."""
        if self.rewarded:
            return LowerSampledPath(), DeferProducers()
        return FunctionalizeInplace(), LowerBinaryGate(self.gate), DeferProducers()

    def candidates(self, choice: SpaceChoice) -> tuple[Any, ...]:
        """All that may be chosen."""
        return choice.choosable

    def arch_state(self, space: SearchSpace, seed: int, dtype: torch.dtype) -> ArchState:
        """The alphas; for "reinforce" also `state.baseline`, NaN before the first rewards."""
        arch = super().arch_state(space, seed, dtype)
        if self.rewarded:
            arch.state.register_buffer("baseline", torch.tensor(torch.nan, dtype=torch.float64))
        return arch

    def chance(self, graph: fx.Graph, choice: SpaceChoice) -> Chance | None:
        """The softmax of the alphas; of two paths, with the gradient of the step's pair."""
        if self.gate != "two":
            return super().chance(graph, choice)
        label = choice.label
        name = f"pair_{identifier(label)}"
        pair = graph.create_node("call_module", "arch", (label, "pair"), name=name)
        gate = gate_node(graph, pair_gate, self.logits(graph, label), label, pair)
        return Chance(gate, self.candidates(choice))

    # -- steps -------------------------------------------------------------------------------------

    def draw(self, arch: ArchState, space: SearchSpace) -> dict[str, Decision]:
        """Draw every label from its own distribution."""
        alphas = arch.alpha_parameters()
        return {
            choice.label: draw_decision(choice, alphas[choice.label], arch.state.generator)
            for choice in space.choices
        }

    def begin_step(self, arch: ArchState, space: SearchSpace, kind: str) -> None:
        """Draw the path; for arch steps of two paths, the two candidates of each choice."""
        if self.gate != "two" or kind != "arch":
            super().begin_step(arch, space, kind)
            return
        pairs: dict[str, tuple[int, ...]] = {}
        for choice in space.choices:
            alpha = arch.alpha_parameters()[choice.label].detach().to("cpu", torch.float64)
            pairs[choice.label], active = _draw_pair(alpha, arch.state.generator)
            name = choice.choosable[active]
            arch.state.drawn[choice.label] = name if choice.kind == "layer" else (name,)
        arch.state.fresh["pair"] = pairs
        moved: dict[str, set[int]] = arch.state.fresh.setdefault("moved", {})
        for label, pair in pairs.items():
            moved.setdefault(label, set()).update(pair)

    def withheld(self, arch: ArchState, space: SearchSpace) -> Collection[str]:
        """With `skip_zero`, the labels whose active candidate is a Zero."""
        if not self.skip_zero:
            return ()
        return [c.label for c in space.choices if arch.state.drawn[c.label] in c.zeros]

    def surrogate(self, arch: ArchState, space: SearchSpace, reward: float) -> Tensor:
        """(R - b) times -log p of the path; `hook` takes the mean and the new baseline."""
        drawn = dict(arch.state.drawn)
        arch.state.fresh.setdefault("rewards", []).append((drawn, reward))
        return -(reward - _old_baseline(arch)) * self._log_p(arch, space, drawn)

    def _log_p(self, arch: ArchState, space: SearchSpace, drawn: dict[str, Decision]) -> Tensor:
        """Log p of the active decisions, 0-d."""
        alphas = arch.alpha_parameters()
        terms: list[Tensor] = []
        for label in space.active(drawn):
            choice = space[label]
            names = choice.choosable if choice.kind == "layer" else None
            terms.append(log_probability(alphas[label], drawn[label], names, choice.n_chosen))
        return torch.stack(terms).sum()

    def hook(self, optimizer: torch.optim.Optimizer, arch: ArchState, space: SearchSpace) -> None:
        """Before a step: the mean over draws and the new baseline. After: rescale the two paths."""
        if self.rewarded:
            optimizer.register_step_pre_hook(lambda *_: self._average(arch, space))
        if self.gate == "two":
            rescaling = _Rescaling(arch)
            optimizer.register_step_pre_hook(lambda *_: rescaling.before())
            optimizer.register_step_post_hook(lambda *_: rescaling.after())

    def _average(self, arch: ArchState, space: SearchSpace) -> None:
        """Turn the sum of (R_j - b_old) d(-log p_j) into the mean of (R_j - b_new) d(-log p_j)."""
        draws = arch.state.fresh.pop("rewards", [])
        if not draws:
            return
        n, mean = len(draws), sum(reward for _, reward in draws) / len(draws)
        old, baseline = _old_baseline(arch), arch.state.get_buffer("baseline")
        if baseline.isnan():
            baseline.fill_(mean)
        else:
            baseline.add_(_DECAY * (mean - baseline))
        moved = old - float(baseline)
        grads = {p: p.grad for p in arch.alpha_parameters().values() if p.grad is not None}
        with torch.enable_grad():
            log_p = torch.stack([self._log_p(arch, space, drawn) for drawn, _ in draws]).sum()
        # A choice that was on no drawn path has no shift: zeros.
        shifts = torch.autograd.grad(
            -moved * log_p, list(grads), allow_unused=True, materialize_grads=True
        )
        for grad, shift in zip(grads.values(), shifts, strict=True):
            grad.add_(shift).div_(n)

    # -- what has been found -----------------------------------------------------------------------

    def derive(self, arch: ArchState, space: SearchSpace) -> Architecture:
        """The most probable candidates, as the paper does after the search."""
        return best_fitting(arch, space, space.validate(derive_most_probable(arch, space)))

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


def _old_baseline(arch: ArchState) -> float:
    return float(torch.nan_to_num(arch.state.get_buffer("baseline")))


def _draw_pair(alpha: Tensor, generator: torch.Generator) -> tuple[tuple[int, ...], int]:
    """Two indices drawn by softmax(alpha) without replacement, and which of them is active."""
    n = min(2, len(alpha))
    p = torch.softmax(alpha, -1)
    pair = tuple(torch.multinomial(p, n, generator=generator).tolist())
    of_two = torch.softmax(alpha[list(pair)], -1)
    return pair, pair[int(torch.multinomial(of_two, 1, generator=generator))]


class _Rescaling:
    """Keeps the sum of exp(alpha) over the candidates that took part in a step as it was."""

    def __init__(self, arch: ArchState) -> None:
        self.arch = arch
        self.kept: dict[str, tuple[list[int], Tensor]] = {}

    def before(self) -> None:
        """Note the sums, on entry of the optimizer's step."""
        alphas = self.arch.alpha_parameters()
        moved: dict[str, set[int]] = self.arch.state.fresh.pop("moved", {})
        self.kept = {
            label: (list(indices), torch.logsumexp(alphas[label].detach()[list(indices)], 0))
            for label, indices in moved.items()
            if alphas[label].grad is not None
        }

    def after(self) -> None:
        """Take the change of the sums off, after it."""
        with torch.no_grad():
            for label, (moved, old) in self.kept.items():
                alpha = self.arch.alpha_parameters()[label]
                alpha[moved] -= torch.logsumexp(alpha[moved], 0) - old
