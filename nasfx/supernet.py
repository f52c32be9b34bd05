"""`transform`: a model with choices becomes a supernet that a strategy searches."""

from __future__ import annotations

import copy as copying
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from nasfx.architecture import Architecture
from nasfx.collapsing import OneHot, collapsed
from nasfx.errors import SearchError, SpaceError
from nasfx.ops.arch_state import ArchState
from nasfx.ops.stages import CHOICE
from nasfx.passes import Canonicalize, InferShapes, RemoveDeadCode
from nasfx.rewriting.graph import ModelGraph, carry_hooks, copy_graph_module, share_tree
from nasfx.rewriting.passes import Pass, PassContext
from nasfx.rewriting.pipeline import History, Pipeline
from nasfx.space import SearchSpace, space_of
from nasfx.strategies import Strategy, strategy_named
from nasfx.strategies.base import Evaluate
from nasfx.tracing import TracedModel, as_tuple, refuse_names, set_modes, trace

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
    ) -> None:
        super().__init__()
        share_tree(self, lowered["train"])
        carry_hooks(self, traced)
        # In dictionaries, so that nn.Module does not register them: they share the tree above.
        self.__dict__["_held"] = {"traced": traced, "arch": arch}
        self.__dict__["_choice_graphs"] = dict(choice_graphs)
        self.__dict__["_lowered"] = dict(lowered)
        self.__dict__["_subnets"] = {}
        self.histories = dict(histories)
        self.strategy = strategy
        self.space = space
        self._step = ""
        self._forced: list[Architecture] = []
        self.training = traced.training
        self._generate_code()

    def _generate_code(self) -> None:
        # Now and not at the first call, which torch.compile may be tracing.
        for gm in self.__dict__["_lowered"].values():
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
        return self.strategy.arch_optimizer(parameters, cls, **options)

    @property
    def in_step(self) -> bool:
        """Whether a weight step or an arch step is open."""
        return bool(self._step)

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
    def arch_step(self) -> Generator[None, None, None]:
        """A step of the architecture: draws a path where it samples, weights get no gradient.

        Raises:
            SearchError: steps are nested.

        Example:
            >>> # with net.arch_step():
            >>> #     net.objective(loss(net(x), y)).backward()
            >>> # optimizer.step(); optimizer.zero_grad()
        """
        with self._stepping("arch", self.weight_parameters()):
            yield

    @contextmanager
    def _stepping(self, kind: str, frozen: Sequence[nn.Parameter]) -> Generator[None, None, None]:
        if self._step:
            raise SearchError(
                f"{_a_step(kind)} was opened inside {_a_step(self._step)}; close that one first"
            )
        # Only ever off: a parameter that the user froze stays frozen.
        switched = [p for p in frozen if p.requires_grad]
        self._step = kind
        try:
            if self.strategy.samples:
                self._arch.state.drawn = self.strategy.draw(self._arch, self.space)
            for p in switched:
                p.requires_grad_(False)
            yield
        finally:
            for p in switched:
                p.requires_grad_(True)
            self._step = ""

    def objective(self, loss: Tensor) -> Tensor:
        """What an arch step minimises; always something that `.backward()` can be called on.

        Args:
            loss: the task loss on a validation batch, 0-d.

        Raises:
            SearchError: outside of an arch step.
        """
        if self._step != "arch":
            where = f"in {_a_step(self._step)}" if self._step else "outside of a step"
            raise SearchError(
                f"objective() was called {where}; it is what an arch step minimises: "
                "with net.arch_step(): net.objective(loss).backward()"
            )
        return loss if loss.requires_grad else loss.detach().requires_grad_()

    def expected_cost(self) -> dict[str, Tensor]:
        """The expected cost for every objective by name; empty, since none is declared."""
        return {}

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
        """The architecture that a finished search returns.

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


def transform(
    model: nn.Module,
    strategy: str | Strategy,
    *,
    example_inputs: Any = None,
    extra_passes: Sequence[Pass] = (),
    verify: str = "fast",
    seed: int = 0,
    copy: bool = False,
    leaf_modules: Sequence[type | str] = (),
) -> Supernet:
    """Rewrite every choice of `model` into what a search strategy needs.

    Args:
        model: a module with LayerChoice and InputChoice modules. It stays as it is, but for its
            weights, which the supernet shares and trains.
        strategy: "darts", "proxyless", "single-path", or an instance of a strategy.
        example_inputs: a tensor or a tuple for `model.forward`; with them shapes are known, so
            candidates that cannot be summed are refused here and not at the first step.
        extra_passes: instances of passes of your own. Those of stage CHOICE rewrite the graph
            that both the search and `finalize` start from; others run at the end of their stage.
        verify: "fast" checks the graph between all passes, "off" does not.
        seed: for the architecture parameters and the drawn paths.
        copy: give the supernet weights of its own.
        leaf_modules: module classes or paths to keep as one node each.

    Raises:
        TraceError: the model cannot be traced.
        SpaceError: there is no choice, or the strategy has no rule for one.
        SearchError: no such strategy.
        PassError, VerifyError: a pass failed, or left a graph that breaks a rule.

    Example:
        >>> from nasfx import LayerChoice
        >>> model = nn.Sequential(LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act"))
        >>> net = transform(model, "darts")
        >>> print(net.graph)
        %input_1 = placeholder[input]
        %arch_act = get_attr[arch.act]
        %gate_act = nasfx.ops.softmax_gate(%arch_act, label='act')
        %_0_relu = call_module[0.relu](%input_1)
        %_0_tanh = call_module[0.tanh](%input_1)
        %_0 = nasfx.ops.mix(%gate_act, [%_0_relu, %_0_tanh], label='act')
        return %_0
    """
    chosen = strategy_named(strategy)
    if verify not in ("fast", "off"):
        raise SearchError(f"verify={verify!r} must be 'fast' or 'off'")
    if "arch" in dict(model.named_children()) or hasattr(model, "arch"):
        raise SpaceError(
            "the model has an attribute `arch`, the name of the architecture parameters"
        )
    refuse_names(model, Supernet)
    inputs = None if example_inputs is None else as_tuple(example_inputs)
    traced = trace(copying.deepcopy(model) if copy else model, inputs, leaf_modules=leaf_modules)
    space = space_of(traced)
    if not space.choices:
        raise SpaceError(
            f"{type(model).__name__} has no choice to search: mark one with nasfx.LayerChoice or "
            "nasfx.InputChoice"
        )
    double = any(p.dtype == torch.float64 for p in model.parameters())
    arch = chosen.arch_state(space, seed, torch.float64 if double else torch.float32)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    arch.to(device)
    # What the choices are searched in is what is shipped: the subnets are made of the choice graph
    # with the user's own passes of that stage; the strategy's passes run on a copy.
    own = [p for p in extra_passes if isinstance(p, Pass) and p.consumes == CHOICE]
    others = [p for p in extra_passes if p not in own]
    front = Pipeline((Canonicalize(), InferShapes())).with_passes(own)
    lowering = Pipeline((*chosen.passes(space), RemoveDeadCode())).with_passes(others)
    choice_graphs: dict[str, ModelGraph] = {}
    lowered: dict[str, ModelGraph] = {}
    histories: dict[str, History] = {}
    several = len(traced.graph_modules) > 1
    for mode, gm in traced.graph_modules.items():
        ctx = PassContext(inputs, mode == "train")
        check, dump = verify != "off", f"{mode}-" if several else ""
        history = front.run(gm, ctx, verify_each=check, dump=dump)
        choice_graphs[mode] = gm
        working = copy_graph_module(gm)
        working._modules["arch"] = arch
        lowering.run(working, ctx, verify_each=check, dump=dump, history=history)
        histories[mode], lowered[mode] = history, working
    rewritten = {p.name for p in own}
    changed = [r for h in histories.values() for r in h.records if r.changed]
    traced.rewritten_by = tuple(
        dict.fromkeys(r.name for r in changed if r.name.split("(")[0] in rewritten)
    )
    return Supernet(traced, chosen, space, choice_graphs, lowered, histories, arch)
