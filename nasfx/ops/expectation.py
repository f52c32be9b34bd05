"""Expected costs: sums over what may be run, weighted by the probability that it is.

The probabilities come from the very gates of the choices, so that an expected cost has the gradient
that its definition says and, under Gumbel noise, sees the sample that the mixture sees.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nasfx.choice import EMPTY, SINGLE
from nasfx.ops.function import graph_function
from nasfx.ops.gates import log_subsets

Law = tuple[Any, ...] | int | None
"""What a chance vector means. A tuple: exactly one of these is chosen, entry i being the
probability of the i-th. None: inputs are chosen independently, entry i being the probability of
input i. A number k: entries are the logits of subsets of size k, p(S) ~ exp(sum over S)."""

Diagram = Any
"""A decision diagram: True, False, or (label, ((case, diagram), ...)), the cases excluding each
other and any other case standing for False. A case is a tuple of values for a law of one, else
(sets of indices that the chosen ones meet, sets that they do not meet)."""


@graph_function
def activity(
    chances: Mapping[str, Tensor], laws: Mapping[str, Law], diagram: Diagram
) -> Tensor | float:
    """The probability that something is run, 0-d: exact, for decisions independent of each other.

    Args:
        chances: by label the probabilities, or logits, of its decision.
        laws: by label what they mean.
        diagram: under which decisions it is run.
    """
    memo: dict[int, Tensor | float] = {}

    def probability(diagram: Diagram) -> Tensor | float:
        if isinstance(diagram, bool):
            return float(diagram)
        if id(diagram) not in memo:
            label, cases = diagram
            terms = [
                _of_case(chances[label], laws[label], case) * probability(below)
                for case, below in cases
            ]
            memo[id(diagram)] = sum(terms[1:], terms[0])
        return memo[id(diagram)]

    return probability(diagram)


def _of_case(chance: Tensor, law: Law, case: Any) -> Tensor:
    if isinstance(law, tuple):
        return chance[[i for i, value in enumerate(law) if value in case]].sum()
    met, missed = case
    # Inclusion and exclusion over the sets that are met: all of `missed` and some of them are not.
    total = torch.zeros((), dtype=chance.dtype, device=chance.device)
    for n in range(len(met) + 1):
        for some in itertools.combinations(met, n):
            union = frozenset(i for indices in (*missed, *some) for i in indices)
            total = total + (-1) ** n * _none_of(chance, law, union)
    return total


def _none_of(chance: Tensor, law: int | None, indices: frozenset[int]) -> Tensor:
    """The probability that no index is chosen; nor the subset that EMPTY or SINGLE names."""
    others = [i for i in range(len(chance)) if i not in indices]
    if law is None:
        none = (1 - chance[[i for i in range(len(chance)) if i in indices]]).prod()
        if EMPTY in indices:
            none = none - (1 - chance).prod()
        if SINGLE in indices:
            for i in others:
                rest = [j for j in range(len(chance)) if j != i]
                none = none - chance[i] * (1 - chance[rest]).prod()
        return none
    if len(others) < law:
        return torch.zeros((), dtype=chance.dtype, device=chance.device)
    left = log_subsets(list(chance[others].unbind(0)), law)
    return torch.exp(left - log_subsets(list(chance.unbind(0)), law))


@graph_function
def expected_cost(
    chance: Tensor, costs: tuple[float, ...], active: Any = None, label: str = ""
) -> Tensor:
    """sum_k chance[k] * costs[k], 0-d, times the probability `active` that the choice is run.

    Source: ProxylessNAS (arXiv 1812.00332), equation 5; FBNet (arXiv 1812.03443), equation 7.
    """
    del label  # for the reader of the graph
    cost = (chance * torch.tensor(costs, dtype=chance.dtype, device=chance.device)).sum()
    return cost if active is None else active * cost


@graph_function
def total_cost(fixed: float, parts: Sequence[Tensor]) -> Tensor:
    """`fixed`, which every subnet costs, and the parts that depend on decisions; 0-d."""
    if not parts:
        return torch.tensor(fixed, dtype=torch.float64)
    return torch.stack(list(parts)).sum() + fixed


@graph_function
def scaled(active: Any, cost: float) -> Tensor:
    """`cost`, times the probability `active` that it is incurred."""
    return active * cost


@graph_function
def uniform_gate(law: Law, n: int) -> Tensor:
    """The chance vector under which every decision of a choice is as likely as any other."""
    if isinstance(law, tuple):
        return torch.full((n,), 1 / n, dtype=torch.float64)
    if law is None:
        return torch.full((n,), 0.5, dtype=torch.float64)
    return torch.zeros(n, dtype=torch.float64)


@graph_function
def drawn_gate(decision: Any, law: Law, n: int) -> Tensor:
    """The chance vector of a drawn decision: 1 for what is chosen, 0 for what is not."""
    names = law if isinstance(law, tuple) else tuple(range(n))
    chosen = (decision,) if isinstance(decision, str) else decision
    return torch.tensor([float(name in chosen) for name in names], dtype=torch.float64)
