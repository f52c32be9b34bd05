"""`transform`: a model with choices becomes a supernet that a strategy searches."""

from __future__ import annotations

import copy as copying
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nasfx.costs.graph import expected_cost_graph
from nasfx.costs.model import CostModel
from nasfx.costs.objectives import Objective, checked_objectives
from nasfx.errors import SearchError, SpaceError
from nasfx.ops.stages import CHOICE
from nasfx.passes import (
    AnnotateCost,
    Canonicalize,
    CheapenDepthwise,
    CheapenPools,
    DropZeroCandidates,
    FoldGatesIntoNorms,
    FoldLinearCandidates,
    InferShapes,
    PropagateChannelsLast,
    RemoveDeadCode,
    ShareNorms,
    ShareSubexpressions,
)
from nasfx.rewriting.graph import ModelGraph, copy_graph_module
from nasfx.rewriting.passes import Pass, PassContext
from nasfx.rewriting.pipeline import History, Pipeline
from nasfx.space import SearchSpace, space_of
from nasfx.strategies import Strategy, strategy_named
from nasfx.strategies.bounded import check_bounds
from nasfx.supernet import Supernet
from nasfx.tracing import as_tuple, refuse_names, trace

WEIGHTED_SUM: tuple[Pass, ...] = (
    DropZeroCandidates(), FoldLinearCandidates(), ShareSubexpressions(), ShareNorms(),
    FoldGatesIntoNorms(own_gain=True), PropagateChannelsLast(), CheapenDepthwise(), CheapenPools(),
)  # fmt: skip
"""What `transform(optimize="auto")` runs on the lowered graph of a weighted-sum strategy.

Batch norms without a gain are not folded: that saves memory and costs time (docs/performance.md).
"""

SAMPLED_PATH: tuple[Pass, ...] = (PropagateChannelsLast(), CheapenDepthwise(), CheapenPools())
"""The same for a strategy that runs one path."""


def transform(
    model: nn.Module,
    strategy: str | Strategy,
    *,
    example_inputs: Any = None,
    objective: Objective | Sequence[Objective] | None = None,
    optimize: str | Sequence[Pass] = "auto",
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
        strategy: "darts", "fbnet", "proxyless", "enas", "single-path", "random", or an instance of
            a strategy.
        example_inputs: a tensor or a tuple for `model.forward`; with them shapes are known, so
            candidates that cannot be summed are refused here and not at the first step.
        objective: what the architecture should cost, beside the task: `Flops`, `Params` or
            `Latency`, `CustomCost`, or several of them; they need `example_inputs`.
        optimize: which passes make the lowered graph cheaper to run. "auto" takes
            `nasfx.transforming.WEIGHTED_SUM` for strategies that run the mixture of all candidates
            and `SAMPLED_PATH` for those that run one path: a fixed rule, so runs repeat. "off"
            takes none; or give instances of passes. `history` has what each of them did, and
            declined.
        extra_passes: instances of passes of your own. Those of stage CHOICE rewrite the graph
            that both the search and `finalize` start from; others run at the end of their stage.
        verify: "fast" checks the graph between all passes, "off" does not.
        seed: for the architecture parameters and the drawn paths.
        copy: give the supernet weights of its own.
        leaf_modules: module classes or paths to keep as one node each.

    Raises:
        TraceError: the model cannot be traced.
        SpaceError: there is no choice, or the strategy has no rule for one.
        SearchError: no such strategy, or no such value of `optimize`; a bound that no architecture
            keeps, or an objective whose logarithm is not defined.
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
    objectives = checked_objectives(objective)
    if objectives and example_inputs is None:
        raise SearchError(
            "an objective needs shapes to count: transform(..., example_inputs=x) with a batch of "
            "one or more"
        )
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
    if objectives:
        front = front.with_passes([AnnotateCost()])
    lowering = Pipeline((*chosen.passes(space), RemoveDeadCode()))
    lowering = lowering.with_passes(_optimisations(optimize, chosen)).with_passes(others)
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
    counted = choice_graphs.get("eval", choice_graphs["train"])
    models = _declare(space, objectives, counted, inputs or ())
    chosen.check(space)
    costs = expected_cost_graph(lowered["train"], models, chosen.chance)
    return Supernet(
        traced, chosen, space, choice_graphs, lowered, histories, arch, objectives, costs
    )


def _optimisations(optimize: str | Sequence[Pass], strategy: Strategy) -> Sequence[Pass]:
    """The passes that `optimize` stands for."""
    if not isinstance(optimize, str):
        return optimize
    if optimize not in ("auto", "off"):
        raise SearchError(
            f"optimize={optimize!r} must be 'auto', 'off', or a list of instances of passes"
        )
    if optimize == "off":
        return ()
    return SAMPLED_PATH if strategy.samples else WEIGHTED_SUM


def _declare(
    space: SearchSpace,
    objectives: Sequence[Objective],
    gm: ModelGraph,
    inputs: tuple[Any, ...],
) -> dict[str, CostModel]:
    """Let the space know what architectures cost, and what they may; the costs by name."""
    models: dict[str, CostModel] = {}
    for objective in objectives:
        model = objective.model(gm, space.choices, inputs)
        objective.check(model)
        space.costs[objective.name] = models[objective.name] = model
        if objective.max is not None:
            space.bounds[objective.name] = objective.max
    check_bounds(space)
    return models
