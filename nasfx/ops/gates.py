"""Gates: the weights of a choice as pure functions of its architecture parameters.

Noise and drawn decisions are arguments, so the same gate gives the same value wherever it is read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nasfx.choice import Decision
from nasfx.ops.function import graph_function


class Gate(NamedTuple):
    """A sampled gate: its 0/1 weights, which carry the gradient, and the decision they encode.

    `wanted` are the indices of the weights that need a gradient, None for all.
    """

    weights: Tensor
    decision: Decision
    wanted: tuple[int, ...] | None = None


@graph_function
def softmax_gate(alpha: Tensor, hard: bool = False, label: str = "") -> Tensor:
    """The mixture weights of a LayerChoice: softmax(alpha), shape (candidates,).

    With `hard` they are 1 for the largest and 0 for the others, with the gradient of the softmax
    (straight-through; biased).

    Source: DARTS (arXiv 1806.09055), equation 2; with Gumbel noise in alpha, Gumbel-softmax (arXiv
    1611.01144), section 2.
    """
    del label  # for the reader of the graph
    p = torch.softmax(alpha, -1)
    return _straight_through(p, 1) if hard else p


@graph_function
def gumbel_logits(alpha: Tensor, noise: Tensor, temperature: Tensor) -> Tensor:
    """(alpha + noise) / temperature: with Gumbel noise, the logits of a relaxed sample.

    Source: FBNet (arXiv 1812.03443), equation 6.
    """
    return (alpha + noise) / temperature


def _straight_through(p: Tensor, n_chosen: int | None) -> Tensor:
    """0 or 1 forward, the gradient of `p` backward."""
    hot = torch.zeros_like(p)
    if n_chosen is None:
        hot[p >= 0.5] = 1
    else:
        hot[torch.topk(p, n_chosen).indices] = 1
    return hot + (p - p.detach())


@graph_function
def inclusion_gate(
    alpha: Tensor, n_chosen: int | None, mean: bool = False, hard: bool = False, label: str = ""
) -> Tensor:
    """The probability that each input is chosen, shape (inputs,).

    For `n_chosen` = k, subsets S of size k have p(S) proportional to exp(sum of alpha over S); the
    probabilities sum to k (k = 1: softmax). For None every input is chosen independently with
    sigmoid(alpha). With `mean` they are divided by their sum, as a mean over the chosen inputs is.
    With `hard` they are 0 or 1 with the gradient of the probabilities, as in `softmax_gate`.
    """
    del label
    probabilities = inclusion_probabilities(alpha, n_chosen)
    if hard:
        probabilities = _straight_through(probabilities, n_chosen)
    if not mean:
        return probabilities
    if n_chosen is not None:
        return probabilities / n_chosen
    total = probabilities.sum()
    if hard:  # weights of 0 alone are the empty subset, whose mean is 0
        return probabilities / torch.where(total > 0.5, total, 1.0)
    return probabilities / total.clamp_min(torch.finfo(alpha.dtype).tiny)


def inclusion_probabilities(alpha: Tensor, n_chosen: int | None) -> Tensor:
    """As `inclusion_gate`, without `mean`."""
    n = len(alpha)
    if n_chosen is None:
        return torch.sigmoid(alpha)
    if n_chosen == 1:
        return torch.softmax(alpha, -1)
    if n_chosen == n:
        return torch.ones_like(alpha) + 0 * alpha
    values = list(alpha.unbind(0))
    total = log_subsets(values, n_chosen)
    rest = [log_subsets(values[:i] + values[i + 1 :], n_chosen - 1) for i in range(n)]
    return torch.exp(alpha + torch.stack(rest) - total)


def log_subsets(values: list[Tensor], k: int) -> Tensor:
    """Log of the sum over subsets S of size k of exp(sum of values in S); k <= len(values)."""
    sums: list[Tensor | None] = [torch.zeros_like(values[0])] + [None] * k
    for value in values:
        for j in range(k, 0, -1):
            shorter, longer = sums[j - 1], sums[j]
            if shorter is not None:
                term = shorter + value
                sums[j] = term if longer is None else torch.logaddexp(longer, term)
    result = sums[k]
    assert result is not None
    return result


@graph_function
def binary_gate(
    alpha: Tensor, decision: Decision, names: tuple[str, ...] | None, n_chosen: int | None = 1,
    pair: tuple[int, ...] | None = None, label: str = "",
) -> Gate:  # fmt: skip
    """ProxylessNAS's binary gate: exactly 0 or 1 forward, the gradient of probabilities backward.

    With b = dL/dg it gives dL/dalpha_i = sum_j b_j dp_j/dalpha_i, where p are the probabilities of
    the candidates: p_i (b_i - <p, b>) for one of several.

    Args:
        alpha: the architecture parameters, shape (candidates,).
        decision: the drawn candidate's name, or the drawn inputs' indices.
        names: the candidates' names in order; None for inputs.
        n_chosen: how many are chosen, None for any subset.
        pair: the indices of the two candidates that take part, the drawn one among them: the
            probabilities are a softmax over these two, and the others get no gradient (section
            3.2.1). None for all.
        label: the choice's label, for the reader of the graph.

    Source: ProxylessNAS (arXiv 1812.00332), equations 3 and 4.
    """
    del label
    hot = torch.zeros_like(alpha)
    if isinstance(decision, str):
        assert names is not None
        hot[names.index(decision)] = 1
    elif decision:
        hot[list(decision)] = 1
    p = inclusion_probabilities(alpha, n_chosen) if pair is None else _of_pair(alpha, pair)
    return Gate(hot + (p - p.detach()), decision, pair)


@graph_function
def pair_gate(alpha: Tensor, pair: tuple[int, ...] | None = None, label: str = "") -> Tensor:
    """softmax(alpha), shape (candidates,), whose gradient is that of a softmax over `pair` alone.

    What costs are weighted by where two paths are drawn. For E = sum_k p_k c_k and q the softmax
    over the pair (i, j), dE/dalpha_i = q_i q_j (c_i - c_j) = -dE/dalpha_j, and 0 for the others.
    Times p_i + p_j this is the derivative of E where the probabilities of the others are kept.

    Args:
        alpha: the architecture parameters, shape (candidates,).
        pair: the indices of the two candidates that take part; None for the plain softmax.
        label: the choice's label, for the reader of the graph.

    Source: ProxylessNAS (arXiv 1812.00332), section 3.2.1 and equation 5. In the authors' code the
    value of E, too, is that of the pair alone.
    """
    del label
    p = torch.softmax(alpha, -1)
    if pair is None:
        return p
    of_pair = _of_pair(alpha, pair)
    return p.detach() + (of_pair - of_pair.detach())


def _of_pair(alpha: Tensor, pair: tuple[int, ...]) -> Tensor:
    """A softmax over the candidates of `pair`; 0 for the others."""
    where = torch.tensor(pair, device=alpha.device)
    return torch.zeros_like(alpha).index_put((where,), torch.softmax(alpha[where], -1))


def draw_subset(alpha: Tensor, n_chosen: int | None, generator: torch.Generator) -> tuple[int, ...]:
    """Draw a subset of inputs with p(S) proportional to exp(sum of alpha over S).

    Args:
        alpha: float64 on the CPU, shape (inputs,).
        n_chosen: the size of the subset; None for independent sigmoids.
        generator: the source of randomness.
    """
    uniform = torch.rand(len(alpha), generator=generator, dtype=alpha.dtype)
    if n_chosen is None:
        return tuple(i for i in range(len(alpha)) if uniform[i] < torch.sigmoid(alpha[i]))
    values = list(alpha.unbind(0))
    chosen: list[int] = []
    for i in range(len(values)):
        left = n_chosen - len(chosen)
        if left == 0:
            break
        if left < len(values) - i:  # else all that remain are taken
            # p(i in S | those before) = exp(alpha_i) E_(left-1)(after i) / E_left(i and after)
            taking = values[i] + log_subsets(values[i + 1 :], left - 1)
            if uniform[i] >= torch.exp(taking - log_subsets(values[i:], left)):
                continue
        chosen.append(i)
    return tuple(chosen)


def log_probability(
    alpha: Tensor, decision: Decision, names: tuple[str, ...] | None, n_chosen: int | None
) -> Tensor:
    """Log p(decision), 0-d, under the probabilities that `alpha` stands for.

    Args:
        alpha: the parameters, shape (candidates,).
        decision: a candidate's name, or the indices of inputs.
        names: the candidates' names; None for inputs.
        n_chosen: as for `inclusion_probabilities`; 1 for names.
    """
    if isinstance(decision, str):
        assert names is not None
        return torch.log_softmax(alpha, -1)[names.index(decision)]
    chosen = alpha[list(decision)].sum()
    if n_chosen is None:
        return chosen - torch.nn.functional.softplus(alpha).sum()
    return chosen - log_subsets(list(alpha.unbind(0)), n_chosen)
