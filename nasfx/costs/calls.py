"""The calls of an annotated graph, and the cost model that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import fx, nn

from nasfx.architecture import SpaceChoice
from nasfx.choice import EMPTY, SINGLE, InputChoice
from nasfx.costs.count import Count
from nasfx.costs.model import CostModel, Terms
from nasfx.places import Condition, Place, Use, places_and_uses
from nasfx.rewriting.graph import join, provenance


@dataclass(frozen=True)
class Call:
    """One call of a model, as a cost function of the user's sees it.

    Attributes:
        node: its node; of a candidate without a graph, the node of the choice.
        module: the called module; None for functions and methods.
        path: the module's path in the model, or the node's name.
        label: the choice in whose candidate the call stands, or "".
        candidate: that candidate, or "".
        count: what it costs on one sample.
    """

    node: fx.Node
    module: nn.Module | None
    path: str
    label: str
    candidate: str
    count: Count


def cost_model(
    gm: fx.GraphModule, choices: Iterable[SpaceChoice], of: str | Callable[[Call], float]
) -> CostModel:
    """The cost of every architecture, from the graph that the pass annotate-cost has annotated.

    Args:
        gm: the graph, in stage CHOICE.
        choices: the decisions of its space.
        of: "flops", "params" or "activation_bytes", or a function that gives a call's cost.
    """
    places, uses = places_and_uses(gm)
    if of == "params":
        terms = _parameter_terms(uses)
    else:
        terms: Terms = {}
        for use in uses:
            for condition, amount in _amounts(places, use, of):
                key = frozenset((condition,))
                terms[key] = terms.get(key, 0) + amount
    by_label = {choice.label: choice for choice in choices}
    return CostModel(tuple(places), {k: v for k, v in terms.items() if v}, by_label)


def _amounts(
    places: list[Place], use: Use, of: str | Callable[[Call], float]
) -> Iterator[tuple[Condition, float]]:
    """What a use costs, each amount with when it counts."""
    count: Count | None = use.node.meta.get("costs", {}).get((use.calls, use.candidate))
    if count is None:
        return
    if use.place is not None:
        if of == "activation_bytes":
            yield from reductions(places, use, count.activation_bytes)
    elif isinstance(of, str):
        yield use.condition, getattr(count, of)
    else:
        yield use.condition, of(_call(use, count))


def _call(use: Use, count: Count) -> Call:
    origin = provenance(use.node)
    module = _module(use)
    path = join(use.path, str(use.node.target), use.candidate) if module else use.node.name
    if use.candidate:
        choice = use.owner.get_submodule(str(use.node.target))
        return Call(use.node, module, path, str(choice.label), use.candidate, count)
    return Call(use.node, module, path, origin.label, origin.part, count)


def _module(use: Use) -> nn.Module | None:
    if use.node.op != "call_module":
        return None
    return use.owner.get_submodule(join(str(use.node.target), use.candidate))


def reductions(places: Sequence[Place], use: Use, size: int) -> Iterator[tuple[Condition, float]]:
    """Of the nodes that reduce the chosen inputs of a choice, `size` each, with when it counts."""
    choice = use.owner.get_submodule(str(use.node.target))
    assert isinstance(choice, InputChoice)
    place = use.place
    assert place is not None
    k, mean = choice.n_chosen, choice.reduction == "mean"
    if choice.reduction == "none":
        return
    if choice.reduction == "concat":
        yield use.condition, size if k != 1 else 0
    elif k is not None:
        yield use.condition, size * (k - 1 + (mean and k > 1))
    else:
        label = places[place].label

        def when(value: int) -> Condition:
            return Condition((place, (label, frozenset({value}))))

        # |S| - 1 additions, for the empty subset one tensor of zeros, for a mean of several a
        # division.
        for i in range(choice.n_candidates):
            yield when(i), size
        yield use.condition, size * (mean - 1)
        yield when(EMPTY), size * (2 - mean)
        if mean:
            yield when(SINGLE), -size


def _parameter_terms(uses: Iterable[Use]) -> Terms:
    """Every parameter once, whenever any of its uses is run."""
    conditions: dict[int, set[Condition]] = {}
    sizes: dict[int, int] = {}
    for use in uses:
        for parameter in _parameters(use):
            conditions.setdefault(id(parameter), set()).add(use.condition)
            sizes[id(parameter)] = parameter.numel()
    terms: Terms = {}
    for key, any_of in conditions.items():
        terms[frozenset(any_of)] = terms.get(frozenset(any_of), 0) + sizes[key]
    return terms


def _parameters(use: Use) -> Iterator[nn.Parameter]:
    if use.node.op == "get_attr":
        owner, _, name = str(use.node.target).rpartition(".")
        value = getattr(use.owner.get_submodule(owner), name)
        if isinstance(value, nn.Parameter):
            yield value
    elif (module := _module(use)) is not None:
        yield from module.parameters()
