import itertools
import math

import pytest
import torch
from torch import Tensor

from nasfx.ops import Gate, binary_gate, inclusion_gate, pair_gate, softmax_gate
from nasfx.ops.gates import draw_subset

SIZES = [(1, 1), (3, 1), (3, 2), (3, 3), (5, 2), (5, 4), (6, 3), (4, None), (1, None)]


def alphas(n: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def subsets(n: int, k: int | None) -> list[tuple[int, ...]]:
    sizes = range(n + 1) if k is None else (k,)
    return [s for size in sizes for s in itertools.combinations(range(n), size)]


def law(alpha: Tensor, k: int | None) -> dict[tuple[int, ...], float]:
    """p(S) by enumeration, proportional to exp(sum of alpha over S)."""
    weights = {s: math.exp(sum(alpha[i].item() for i in s)) for s in subsets(len(alpha), k)}
    total = math.fsum(weights.values())
    return {s: w / total for s, w in weights.items()}


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_inclusion_is_that_of_all_subsets(n: int, k: int | None) -> None:
    alpha = alphas(n)
    p = law(alpha, k)
    expected = [math.fsum(w for s, w in p.items() if i in s) for i in range(n)]
    found = inclusion_gate(alpha, k)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )
    if k is not None:
        assert found.sum().item() == pytest.approx(k, abs=1e-12)


def test_the_gate_of_a_pair_has_the_value_of_all_and_the_gradient_of_two() -> None:
    alpha = alphas(5).requires_grad_()
    c = torch.tensor([3.0, 1.0, 7.0, 20.0, 5.0], dtype=torch.float64)
    found = pair_gate(alpha, (3, 1))
    torch.testing.assert_close(found, alpha.softmax(0), rtol=1e-15, atol=0)
    (found * c).sum().backward()
    q = alpha.detach()[[3, 1]].softmax(0)
    expected = torch.zeros(5, dtype=torch.float64)
    expected[3] = q[0] * q[1] * (c[3] - c[1])
    expected[1] = -expected[3]
    torch.testing.assert_close(alpha.grad, expected, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(pair_gate, alpha)


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("mean", [False, True])
def test_inclusion_has_the_right_gradient(n: int, k: int | None, mean: bool) -> None:
    alpha = alphas(n).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: inclusion_gate(a, k, mean), alpha)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_mean_has_weights_that_sum_to_one(n: int, k: int | None) -> None:
    weights = inclusion_gate(alphas(n), k, True)
    p = inclusion_gate(alphas(n), k)
    torch.testing.assert_close(weights, p / p.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "k"), [(4, 2), (4, 1), (4, None), (4, 4)])
def test_inclusion_is_finite_for_extreme_alphas(n: int, k: int | None) -> None:
    alpha = torch.tensor([900.0, -900.0, 0.0, 899.0], dtype=torch.float64, requires_grad=True)
    p = inclusion_gate(alpha, k)
    (grad,) = torch.autograd.grad(p.square().sum(), alpha)
    assert p.isfinite().all()
    assert grad.isfinite().all()
    assert (p >= 0).all()
    assert (p <= 1 + 1e-12).all()


def test_softmax_gate() -> None:
    alpha = alphas(4).requires_grad_()
    torch.testing.assert_close(softmax_gate(alpha, label="x"), alpha.exp() / alpha.exp().sum())
    assert torch.autograd.gradcheck(softmax_gate, alpha)


@pytest.mark.parametrize(("n", "k"), [(3, 1), (5, 2), (5, 4), (3, 3), (3, None)])
def test_subsets_are_drawn_from_their_law(n: int, k: int | None) -> None:
    alpha = alphas(n)
    p = law(alpha, k)
    generator = torch.Generator().manual_seed(0)
    draws = 5_000
    counts = dict.fromkeys(p, 0)
    for _ in range(draws):
        counts[draw_subset(alpha, k, generator)] += 1  # KeyError: no subset, or not ascending
    chi2 = sum((counts[s] - draws * q) ** 2 / (draws * q) for s, q in p.items())
    freedom = len(p) - 1
    # Wilson and Hilferty's approximation of the 0.999 quantile; the seed is fixed.
    h = 2 / (9 * freedom) if freedom else 0
    assert chi2 <= freedom * (1 - h + 3.09 * math.sqrt(h)) ** 3 + 1e-9


def test_draws_follow_the_generator_alone() -> None:
    state = torch.get_rng_state()
    draws = [
        [draw_subset(alphas(5), 2, g) for _ in range(20)]
        for g in (torch.Generator().manual_seed(s) for s in (1, 1, 2))
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("n", "k"), [(2, 1), (4, 1), (5, 2), (4, None), (3, 3)])
def test_a_binary_gate_is_hot_and_has_the_gradient_of_the_probabilities(
    n: int, k: int | None
) -> None:
    b = alphas(n) + 1
    for subset in subsets(n, k):
        alpha = alphas(n).requires_grad_()
        names = tuple("abcde"[:n]) if k == 1 else None
        decision = names[subset[0]] if names else subset
        gate = binary_gate(alpha, decision, names, k, label="x")
        assert isinstance(gate, Gate)
        assert gate.decision == decision
        assert gate.weights.tolist() == [float(i in subset) for i in range(n)]
        (found,) = torch.autograd.grad((gate.weights * b).sum(), alpha)
        (expected,) = torch.autograd.grad((inclusion_gate(alpha, k) * b).sum(), alpha)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        if k == 1:
            p = alpha.detach().softmax(0)
            torch.testing.assert_close(found, p * (b - p @ b), rtol=1e-12, atol=1e-12)
        if k is None:
            p = alpha.detach().sigmoid()
            torch.testing.assert_close(found, b * p * (1 - p), rtol=1e-12, atol=1e-12)
