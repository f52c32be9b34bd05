"""ENAS: a recurrent controller that learns by policy gradient which paths earn a reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx, nn

from nasfx.architecture import Architecture, SpaceChoice
from nasfx.choice import Decision
from nasfx.costs.diagrams import law_of
from nasfx.costs.graph import Chance
from nasfx.errors import SearchError
from nasfx.ops.arch_state import ArchState
from nasfx.ops.expectation import drawn_gate
from nasfx.passes import DeferProducers, LowerSampledPath
from nasfx.rewriting.editing import identifier
from nasfx.rewriting.passes import Pass
from nasfx.space import SearchSpace
from nasfx.strategies.base import Evaluate, Schedule, Strategy, check_whole, expect
from nasfx.strategies.controller import Controller, Question
from nasfx.strategies.random_search import best_of, generator_of

_TRIES = 100  # draws for each architecture that is wanted


@dataclass(frozen=True)
class Enas(Strategy):
    """ENAS (arXiv 1802.03268): weights and a controller are trained in turn on drawn paths.

    A weight step trains a path that the controller draws. In an arch step it draws one path with
    log-probability log p; to the reward, `entropy_weight` times the entropy is added, which gives
    R; the baseline b is moved towards R, and then (R - b) (-log p) + skip_weight KL is minimised,
    where KL pulls the rate of skips in choices of any subset to `skip_target`. The mean over the
    draws of an optimizer step is taken. Decisions are asked in the order of the graph, and every
    input of an InputChoice is known to the controller by the last choice that it comes from. log p
    is that of all decisions, active or not, since later ones depend on them.

    The authors let an epoch of the weights be followed by one of the controller, on batches of
    `valid`; so does `search`. It ends with the best of `final_samples` draws by the validation
    metric. The defaults are those of NNI's EnasTrainer; `Enas.macro()` and `Enas.micro()` have the
    constants of the authors' scripts.

    Attributes:
        hidden: units of the LSTM.
        temperature: divides the logits; None for 1.
        tanh_constant: c in c tanh(logits); None for none.
        op_tanh_reduce: divides c for layer choices.
        entropy_weight: see above.
        exact_entropy: the entropy of the distributions, as in the authors' micro controller, and
            not their estimate from what was drawn, as in the macro one.
        skip_target: see above.
        skip_weight: see above.
        baseline_decay: b becomes decay b + (1 - decay) R.
        op_bias: learned biases of candidates at the start, by name.
        fixed_bias: biases that are not learned: {pattern of labels: {candidate: value}}.
        learning_rate: of the controller's Adam.
        betas: likewise.
        eps: likewise.
        steps: optimizer steps of the controller after each epoch; None for as many as `valid` has
            batches for.
        aggregate: draws, each on a batch of its own, for each optimizer step.
        grad_clip: clip the controller's gradient to this norm; None for no clipping.
        final_samples: draws among which the search chooses.
        recalibrate: batches of `train` over which batch-norm statistics are averaged for each of
            them.

    Raises:
        SearchError: an option that is out of range.
    """

    hidden: int = 64
    temperature: float | None = None
    tanh_constant: float | None = 1.5
    op_tanh_reduce: float = 1.0
    entropy_weight: float = 1e-4
    exact_entropy: bool = False
    skip_target: float = 0.4
    skip_weight: float = 0.8
    baseline_decay: float = 0.999
    op_bias: Mapping[str, float] = field(default_factory=dict[str, float])
    fixed_bias: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict[str, Mapping[str, float]]
    )
    learning_rate: float = 0.00035
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    steps: int | None = None
    aggregate: int = 20
    grad_clip: float | None = None
    final_samples: int = 10
    recalibrate: int = 200

    name: ClassVar[str] = "enas"
    samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_whole(self, 1, "aggregate", "final_samples", "hidden")
        if not 0 <= self.baseline_decay <= 1:
            raise SearchError(
                f"Enas(baseline_decay={self.baseline_decay}): it must be between 0 and 1"
            )
        if self.steps is not None:
            check_whole(self, 1, "steps")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise SearchError(f"Enas(grad_clip={self.grad_clip}): it must be positive, or None")
        check_whole(self, 0, "recalibrate")

    @classmethod
    def macro(cls, **options: Any) -> Self:
        """The constants of the authors' script for the macro space."""
        authors: dict[str, Any] = {
            "baseline_decay": 0.99, "learning_rate": 0.001, "betas": (0.0, 0.999), "eps": 1e-3,
            "steps": 50, "aggregate": 20,
        }  # fmt: skip
        return cls(**(authors | options))

    @classmethod
    def micro(cls, **options: Any) -> Self:
        """The constants of the authors' script for the micro space.

        Its biases favour convolutions; give the names of yours: `op_bias={"sep_conv_3x3": 10.0,
        "sep_conv_5x5": 10.0}`, `fixed_bias={"normal/*": {"sep_conv_3x3": 0.25, ...}}`.
        """
        authors: dict[str, Any] = {
            "tanh_constant": 1.10, "op_tanh_reduce": 2.5, "exact_entropy": True,
            "baseline_decay": 0.99, "learning_rate": 0.0035, "betas": (0.0, 0.999), "eps": 1e-3,
            "steps": 30, "aggregate": 10, "skip_weight": 0.0,
        }  # fmt: skip
        return cls(**(authors | options))

    @property
    def rewarded(self) -> bool:
        """The controller learns from rewards."""
        return True

    @property
    def schedule(self) -> Schedule:
        """The controller's steps after every epoch of the weights."""
        return Schedule(0, self.steps, self.aggregate, recalibrate=self.recalibrate)

    def passes(self, space: SearchSpace) -> tuple[Pass, ...]:
        """Switches, producers on demand."""
        return LowerSampledPath(), DeferProducers()

    def candidates(self, choice: SpaceChoice) -> tuple[Any, ...]:
        """None: the controller holds the parameters."""
        return ()

    def arch_state(self, space: SearchSpace, seed: int, dtype: torch.dtype) -> ArchState:
        """`state.controller`, `state.baseline`; the most probable path is drawn."""
        arch = super().arch_state(space, seed, dtype)
        controller = Controller(
            [_question(choice) for choice in space.choices],
            hidden=self.hidden,
            temperature=self.temperature,
            tanh_constant=self.tanh_constant,
            op_tanh_reduce=self.op_tanh_reduce,
            skip_target=self.skip_target,
            exact_entropy=self.exact_entropy,
            op_bias=self.op_bias,
            fixed_bias=self.fixed_bias,
            generator=arch.state.generator,
            dtype=dtype,
        )
        arch.state.controller = controller
        arch.state.register_buffer("baseline", torch.zeros((), dtype=torch.float64))
        with torch.no_grad():
            arch.state.drawn = controller().decisions
        return arch

    def chance(self, graph: fx.Graph, choice: SpaceChoice) -> Chance:
        """What is drawn: the cost is that of the current path."""
        drawn = graph.create_node(
            "call_module", "arch", (choice.label,), name=f"drawn_{identifier(choice.label)}"
        )
        law = law_of(choice)
        # Entries of 0 and 1 are probabilities of independent inputs, whatever their number.
        means = law if isinstance(law, tuple) else None
        gate = graph.call_function(drawn_gate, (drawn, means, len(choice.choosable)))
        return Chance(gate, means)

    # -- steps -------------------------------------------------------------------------------------

    def draw(self, arch: ArchState, space: SearchSpace) -> dict[str, Decision]:
        """Let the controller draw a path."""
        with torch.no_grad():
            return _controller(arch)(generator=arch.state.generator).decisions

    def surrogate(self, arch: ArchState, space: SearchSpace, reward: float) -> Tensor:
        """(R - b) (-log p) + skip_weight KL, with the baseline moved first."""
        answer = _controller(arch)(arch.state.drawn)
        baseline = arch.state.get_buffer("baseline")
        reward += self.entropy_weight * float(answer.entropy)
        baseline.sub_((1 - self.baseline_decay) * (baseline - reward))
        arch.state.fresh["draws"] = arch.state.fresh.get("draws", 0) + 1
        # Inactive decisions too: the controller reads them before it takes later ones.
        log_p = torch.stack(list(answer.log_prob.values())).sum()
        loss = -(reward - float(baseline)) * log_p
        return loss + self.skip_weight * answer.skip_penalty

    def hook(self, optimizer: torch.optim.Optimizer, arch: ArchState, space: SearchSpace) -> None:
        """Before a step: the mean over its draws, clipped."""
        optimizer.register_step_pre_hook(lambda *_: self._average(arch))

    def _average(self, arch: ArchState) -> None:
        draws = arch.state.fresh.pop("draws", 0)
        parameters = list(_controller(arch).parameters())
        for p in parameters if draws else ():
            if p.grad is not None:
                p.grad.div_(draws)
        if draws and self.grad_clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.grad_clip)

    def arch_optimizer(
        self,
        parameters: list[nn.Parameter],
        cls: type[torch.optim.Optimizer] | None,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """Adam with the strategy's own constants."""
        if cls is None:
            own = {"lr": self.learning_rate, "betas": self.betas, "eps": self.eps}
            options = own | options
        return super().arch_optimizer(parameters, cls, **options)

    # -- what has been found -----------------------------------------------------------------------

    def probabilities(self, arch: ArchState, space: SearchSpace) -> dict[str, Tensor]:
        """Of each decision, given those of the current path before it."""
        with torch.no_grad():
            return dict(_controller(arch)(arch.state.drawn).probabilities)

    def derive(self, arch: ArchState, space: SearchSpace) -> Architecture:
        """The most probable decision at each question; if that breaks a bound, a draw that fits.

        Raises:
            SearchError: nothing that was drawn keeps within the bounds.
        """
        with torch.no_grad():
            greedy = space.validate(_controller(arch)().decisions)
        if space.fits(greedy):
            return greedy
        drawn = self._fitting(arch, space, 1)
        return drawn[0] if drawn else best_of(space, generator_of(arch), 1, lambda _: 0.0)

    def _fitting(self, arch: ArchState, space: SearchSpace, n: int) -> list[Architecture]:
        """Up to `n` different draws that keep within the bounds; the net's generator stays."""
        generator = generator_of(arch)
        found: dict[Architecture, None] = {}
        with torch.no_grad():
            for _ in range(_TRIES * n):
                drawn = space.validate(_controller(arch)(generator=generator).decisions)
                if space.fits(drawn):
                    found[drawn] = None
                if len(found) == min(n, space.size):
                    break
        return list(found)

    def conclude(self, space: SearchSpace, arch: ArchState, evaluate: Evaluate) -> Architecture:
        """The best of `final_samples` different draws by the validation metric.

        Where the controller draws none that keeps within the bounds, they are drawn uniformly.
        """
        if drawn := self._fitting(arch, space, self.final_samples):
            expect(evaluate, drawn)
            return max(drawn, key=evaluate)
        return best_of(space, generator_of(arch), self.final_samples, evaluate, "final_samples")


def _controller(arch: ArchState) -> Controller:
    controller = arch.state.controller
    assert isinstance(controller, Controller)
    return controller


def _question(choice: SpaceChoice) -> Question:
    n = len(choice.choosable)
    if choice.kind == "layer":
        return Question(choice.label, choice.choosable, n, 1)
    # Two inputs of one source would be known by one anchor, and for ever be as probable.
    first = {source: i for i, source in reversed(list(enumerate(choice.sources)))}
    sources = tuple(s if first[s] == i else None for i, s in enumerate(choice.sources))
    return Question(choice.label, None, n, choice.n_chosen, sources)
