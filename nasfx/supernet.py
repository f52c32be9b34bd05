"""The supernet: a model whose choices a strategy has rewritten, and the steps that train it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from nasfx.architecture import Architecture
from nasfx.collapsing import OneHot, collapsed
from nasfx.costs.objectives import Objective
from nasfx.errors import SearchError
from nasfx.ops.arch_state import ArchState
from nasfx.rewriting.graph import ModelGraph, carry_hooks, share_tree
from nasfx.rewriting.pipeline import History
from nasfx.space import SearchSpace
from nasfx.strategies import Strategy
from nasfx.strategies.base import Evaluate
from nasfx.strategies.unrolled import Average
from nasfx.tracing import TracedModel, set_modes

_CACHED_SUBNETS = 8


class Supernet(nn.Module):
    """A model whose choices a strategy has rewritten. Made by `transform`.

    It carries the model's own names at the top level and architecture parameters as `arch.<label>`;
    it pickles, deep-copies and moves between devices as any module. Weights are the model's own:
    training the net trains the model.

    Attributes:
        space: the search space.
        strategy: the strategy.
        traced: the traced model, with the reasons why modules are opaque.
        history: what every pass did.
        objectives: what the architecture should cost.
    """

    space: SearchSpace
    strategy: Strategy
    histories: dict[str, History]

    def __init__(
        self,
        traced: TracedModel,
        strategy: Strategy,
        space: SearchSpace,
        choice_graphs: Mapping[str, ModelGraph],
        lowered: Mapping[str, ModelGraph],
        histories: Mapping[str, History],
        arch: ArchState,
        objectives: Sequence[Objective],
        cost_graph: ModelGraph,
    ) -> None:
        super().__init__()
        share_tree(self, lowered["train"])
        carry_hooks(self, traced)
        # In dictionaries, so that nn.Module does not register them: they share the tree above.
        self.__dict__["_held"] = {"traced": traced, "arch": arch}
        self.__dict__["_choice_graphs"] = dict(choice_graphs)
        self.__dict__["_lowered"] = dict(lowered)
        self.__dict__["_costs"] = {"graph": cost_graph}
        self.__dict__["_subnets"] = {}
        self.histories = dict(histories)
        self.strategy = strategy
        self.space = space
        self.objectives = tuple(objectives)
        self._step = ""
        self._forced: list[Architecture] = []
        self.training = traced.training
        self._generate_code()

    def _generate_code(self) -> None:
        # Now and not at the first call, which torch.compile may be tracing.
        for gm in (*self.__dict__["_lowered"].values(), *self.__dict__["_costs"].values()):
            gm.generate_code()

    def __getstate__(self) -> dict[str, Any]:
        if self._step:
            raise SearchError(
                "a net cannot be copied or pickled inside a step, where gradients are switched off"
            )
        return {**self.__dict__, "_forced": [], "_subnets": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._generate_code()

    # -- what it is --------------------------------------------------------------------------------

    @property
    def traced(self) -> TracedModel:
        """The traced model."""
        return self.__dict__["_held"]["traced"]

    @property
    def history(self) -> History:
        """What every pass did to the train graph; `histories` has "eval" where it differs."""
        return self.histories["train"]

    @property
    def graph_module(self) -> ModelGraph:
        """The lowered graph module of the current mode."""
        return self._of_mode(self.__dict__["_lowered"])

    @property
    def graph(self) -> fx.Graph:
        """The lowered graph of the current mode; `print` it."""
        return self.graph_module.graph

    def choice_graph(self, mode: str) -> ModelGraph:
        """The graph before lowering, in which choices are nodes; for "train" or "eval"."""
        graphs = self.__dict__["_choice_graphs"]
        return graphs.get(mode, graphs["train"])

    @property
    def cost_graph(self) -> fx.Graph:
        """The graph that computes the expected costs; `print` it."""
        return self.__dict__["_costs"]["graph"].graph

    def _of_mode(self, graphs: Mapping[str, ModelGraph]) -> ModelGraph:
        return graphs["train"] if self.training else graphs.get("eval", graphs["train"])

    @property
    def _arch(self) -> ArchState:
        return self.__dict__["_held"]["arch"]

    def train(self, mode: bool = True) -> Supernet:
        """Switch the mode as the model's own `train` does."""
        self.traced.train(mode)
        set_modes(self, self.traced.origin, mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the mixture, or the current path; within `forced` that architecture's subnet.

        Never draws: before the first step the path is the most probable one.
        """
        if self._forced:
            return self.subnet_graph(self._forced[-1])(*args, **kwargs)
        return self.graph_module(*args, **kwargs)

    # -- parameters --------------------------------------------------------------------------------

    def weight_parameters(self) -> list[nn.Parameter]:
        """All parameters but those of the architecture."""
        own = {id(p) for p in self._arch.parameters()}
        return [p for p in self.parameters() if id(p) not in own]

    def arch_parameters(self) -> list[nn.Parameter]:
        """The architecture parameters; none for strategies that learn no distribution."""
        return list(self._arch.parameters())

    def arch_optimizer(
        self, cls: type[torch.optim.Optimizer] | None = None, **options: Any
    ) -> torch.optim.Optimizer:
        """An optimizer of the architecture parameters: the paper's, or `cls(..., **options)`.

        Where there are no such parameters its step does nothing.

        Example:
            >>> # net.arch_optimizer(torch.optim.Adam, lr=1e-2)
        """
        parameters = self.arch_parameters() or [nn.Parameter(torch.zeros(0))]
        optimizer = self.strategy.arch_optimizer(parameters, cls, **options)
        self.strategy.hook(optimizer, self._arch, self.space)
        return optimizer

    @property
    def in_step(self) -> bool:
        """Whether a weight step or an arch step is open."""
        return bool(self._step)

    @property
    def step_kind(self) -> str:
        """The step that is open: "weight", "arch", or "" for none."""
        return self._step

    # -- steps -------------------------------------------------------------------------------------

    @contextmanager
    def weight_step(self) -> Generator[None, None, None]:
        """A step of the weights: draws a path where it samples, alphas get no gradient.

        Run forward and backward inside the block; let the optimizer step after it.

        Raises:
            SearchError: steps are nested.

        Example:
            >>> # with net.weight_step():
            >>> #     loss(net(x), y).backward()
            >>> # optimizer.step(); optimizer.zero_grad()
        """
        with self._stepping("weight", self.arch_parameters()):
            yield

    @contextmanager
    def arch_step(
        self,
        inner: Callable[[], Tensor] | None = None,
        weight_optimizer: torch.optim.Optimizer | None = None,
        average: Average | None = None,
    ) -> Generator[None, None, None]:
        """A step of the architecture: draws a path where it samples, weights get no gradient.

        Args:
            inner: for unrolled DARTS: the loss on a training batch, called at several weights.
            weight_optimizer: for unrolled DARTS: the weights' optimizer, whose step is unrolled;
                neither it nor the weights have changed afterwards.
            average: for unrolled DARTS on several processes, see `nasfx.strategies.unrolled`.

        Raises:
            SearchError: steps are nested; `inner` is missing, or has no use.

        Example:
            >>> # with net.arch_step():
            >>> #     net.objective(loss(net(x), y)).backward()
            >>> # optimizer.step(); optimizer.zero_grad()
        """
        weights = self.weight_parameters()
        modules = self, *self.__dict__["_lowered"].values()
        around = self.strategy.around_arch_step(
            weights, self.arch_parameters(), modules, inner, weight_optimizer, average
        )
        frozen = () if self.strategy.second_order else weights
        with self._stepping("arch", frozen, around):
            yield

    @contextmanager
    def _stepping(
        self,
        kind: str,
        frozen: Sequence[nn.Parameter],
        around: AbstractContextManager[None] | None = None,
    ) -> Generator[None, None, None]:
        if self._step:
            raise SearchError(
                f"{_a_step(kind)} was opened inside {_a_step(self._step)}; close that one first"
            )
        self._step = kind
        switched: list[nn.Parameter] = []
        try:
            self.strategy.begin_step(self._arch, self.space, kind)
            alphas = self._arch.alpha_parameters()
            withheld = self.strategy.withheld(self._arch, self.space) if kind == "arch" else ()
            # Only ever off: a parameter that the user froze stays frozen.
            switched += [
                p for p in (*frozen, *(alphas[label] for label in withheld)) if p.requires_grad
            ]
            for p in switched:
                p.requires_grad_(False)
            with around or nullcontext():
                yield
        finally:
            for p in switched:
                p.requires_grad_(True)
            self.strategy.end_step(self._arch)
            self._step = ""

    def objective(self, loss: Tensor, reward: Tensor | float | None = None) -> Tensor:
        """What an arch step minimises; always something that `.backward()` can be called on.

        It is the loss with the expected costs weighed in as the objectives say, or for strategies
        that learn from rewards a surrogate whose gradient is the policy gradient.

        Args:
            loss: the task loss on a validation batch, 0-d.
            reward: of the drawn path, higher is better, for strategies that learn from rewards; by
                default minus the loss. Others do not read it.

        Raises:
            SearchError: outside of an arch step.
        """
        if self._step != "arch":
            where = f"in {_a_step(self._step)}" if self._step else "outside of a step"
            raise SearchError(
                f"objective() was called {where}; it is what an arch step minimises: "
                "with net.arch_step(): net.objective(loss).backward()"
            )
        if self.strategy.rewarded:
            value = float(-loss.detach() if reward is None else reward)
            value = self.scored(value, self.path)
            return self.strategy.surrogate(self._arch, self.space, value)
        costs = self.expected_cost()
        for of in sorted(self.objectives, key=lambda o: o.adds):
            loss = of.penalised(loss, costs[of.name])
        return loss if loss.requires_grad else loss.detach().requires_grad_()

    def scored(self, metric: float, arch: Architecture) -> float:
        """A metric of `arch`, higher is better, with what it costs weighed in by the objectives."""
        for of in sorted(self.objectives, key=lambda o: o.adds):
            metric = of.rewarded(metric, self.space.costs[of.name](arch))
        return metric

    def expected_cost(self) -> dict[str, Tensor]:
        """The expected cost for every objective by name, 0-d, in its unit, differentiable.

        Under the probabilities of the strategy: in a step with the step's noise, outside of steps
        without. Where paths are drawn by a controller (ENAS) it is the cost of the current path.
        For DARTS it counts all edges of a node whose inputs are ranked by their edges: an upper
        bound.
        """
        return self.__dict__["_costs"]["graph"]()

    def end_epoch(self) -> None:
        """Tell the strategy that an epoch with arch steps is over: it anneals its temperature."""
        self.strategy.end_epoch(self._arch)

    # -- architectures -----------------------------------------------------------------------------

    def probabilities(self) -> dict[str, Tensor]:
        """By label, the probability of every candidate, shape (candidates,), detached.

        For an InputChoice, the probability that each input is among the chosen ones. An input
        choice that is ranked by its edges (DARTS) has no entry.
        """
        return self.strategy.probabilities(self._arch, self.space)

    def sample(self) -> Architecture:
        """An architecture drawn from the current probabilities; the current path stays.

        Raises:
            SearchError: the strategy draws no paths.
        """
        return self.space.validate(self.strategy.draw(self._arch, self.space))

    @property
    def path(self) -> Architecture:
        """The path that was drawn last, canonical; readable in a step and after it.

        Raises:
            SearchError: the strategy draws no paths.
        """
        if not self.strategy.samples:
            raise SearchError(
                f"{self.strategy.name} runs the mixture of all candidates, so there is no path; "
                "derive() gives the architecture that it has found so far"
            )
        return self.space.validate(self._arch.state.drawn)

    def derive(self) -> Architecture:
        """The architecture that the search has found so far.

        Raises:
            SearchError: the strategy learns no distribution to derive one from.
        """
        return self.strategy.derive(self._arch, self.space)

    def conclude(self, evaluate: Evaluate) -> Architecture:
        """The architecture that a finished search returns; it keeps within the bounds.

        Args:
            evaluate: gives an architecture's validation metric under the shared weights; strategies
                that learn no distribution call it for several.
        """
        return self.strategy.conclude(self.space, self._arch, evaluate)

    def seed(self, seed: int) -> None:
        """Seed the generator that draws paths."""
        self._arch.state.generator.manual_seed(seed)

    @contextmanager
    def forced(self, arch: Mapping[str, Any]) -> Generator[Architecture, None, None]:
        """Within the block, forward runs the subnet of `arch` on the live tensors.

        Wins over the drawn path, and may be nested.

        Raises:
            SpaceError: `arch` is no architecture of the space.
        """
        architecture = self.space.validate(arch)
        self._forced.append(architecture)
        try:
            yield architecture
        finally:
            self._forced.pop()

    def subnet_graph(self, arch: Architecture) -> ModelGraph:
        """The collapsed graph of a canonical architecture, in this mode and on the live tensors."""
        mode = "train" if self.training or "eval" not in self.__dict__["_choice_graphs"] else "eval"
        cache: dict[Any, ModelGraph] = self.__dict__["_subnets"]
        key = arch, mode
        if key not in cache:
            while len(cache) >= _CACHED_SUBNETS:
                cache.pop(next(iter(cache)))
            cache[key] = collapsed(self.choice_graph(mode), arch)
        return cache[key]

    def run_one_hot(self, arch: Architecture, *inputs: Any) -> Any:
        """The lowered graph's output with gates that pick `arch`, a canonical architecture."""
        gm = self.graph_module
        if not self.strategy.samples:
            return OneHot(gm, self.space, arch).run(*inputs)
        drawn = self._arch.state.drawn
        try:
            self._arch.state.drawn = drawn | {label: arch.decision(label) for label in arch}
            return gm(*inputs)
        finally:
            self._arch.state.drawn = drawn


def _a_step(kind: str) -> str:
    return "an arch step" if kind == "arch" else "a weight step"
