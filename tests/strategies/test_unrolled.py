"""The unrolled arch step against closed forms, brute force, and what must not change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import nasfx
from nasfx import SearchError
from nasfx.strategies.unrolled import METHODS, unrolled
from tests.conftest import digest
from tests.strategies.nets import Cell, Norms, Skips, batch, built, loss_of, spread

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
FINE = 1e-5  # finite differences then err by about 1e-10


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Problem:
    """Weights, alphas and two losses as functions of them: not linear in anything."""

    def __init__(self) -> None:
        self.w = [nn.Parameter(normal(*s, seed=i)) for i, s in enumerate(((3, 4), (4,), (4, 2)))]
        self.a = [nn.Parameter(normal(n, seed=10 + n)) for n in (4, 2)]
        self.modules: list[nn.Module] = []

    def loss(self, w: Sequence[Tensor], a: Sequence[Tensor], seed: int) -> Tensor:
        x, y = batch(seed)
        hidden = torch.tanh(x @ w[0] + w[1]) * torch.softmax(a[0], 0)
        return ((torch.tanh(hidden @ w[2]) * torch.exp(a[1]) - y) ** 2).mean()

    def training(self, w: Sequence[Tensor], a: Sequence[Tensor]) -> Tensor:
        return self.loss(w, a, seed=1)

    def validation(self, w: Sequence[Tensor], a: Sequence[Tensor]) -> Tensor:
        return self.loss(w, a, seed=2)

    def step(self, optimizer: Any, method: str = "exact", **options: Any) -> list[Tensor | None]:
        """The alphas' gradient by an unrolled step."""
        inner = options.pop("inner", lambda: self.training(self.w, self.a))
        with unrolled(self.w, self.a, self.modules, inner, optimizer, method=method, **options):
            self.validation(self.w, self.a).backward()
        grads = [a.grad for a in self.a]
        for a in self.a:
            a.grad = None
        return grads


def brute_force(
    problem: Any, optimizer: torch.optim.SGD, training: Loss, validation: Loss
) -> Sequence[Tensor]:
    """d/dalpha of the validation loss, with autograd through torch's own step.

    torch detaches the buffer of a first momentum step; a zero buffer without dampening is equal.
    """
    trained = [p for p in problem.w if p.requires_grad]
    loss = training(problem.w, problem.a)
    grads = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True)
    twins = {p: p + 0 for p in problem.w}
    for p, grad in zip(trained, grads, strict=True):
        twins[p].retain_grad()
        twins[p].grad = grad
    stepping = torch.optim.SGD([next(iter(twins.values()))], lr=1.0, differentiable=True)
    stepping.param_groups.clear()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad:
                average = optimizer.state.get(p, {}).get("momentum_buffer")
                first = {"dampening": 0.0} if average is None else {}
                alone = {**group, **first, "params": [twins[p]], "differentiable": True}
                stepping.add_param_group(alone)
                zeros = torch.zeros_like(p)
                stepping.state[twins[p]]["momentum_buffer"] = (
                    zeros if average is None else average.clone()
                )
    stepping.step()
    return torch.autograd.grad(validation([twins[p] for p in problem.w], problem.a), problem.a)


def close(found: Sequence[Tensor | None], expected: Sequence[Tensor], rtol: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert float((one - other).norm() / other.norm()) < rtol


def sgd(problem: Problem, warm: int = 0, **options: Any) -> torch.optim.SGD:
    """SGD that has taken `warm` steps on the training loss."""
    optimizer = torch.optim.SGD(problem.w, **options)
    for _ in range(warm):
        problem.training(problem.w, problem.a).backward()
        optimizer.step()
        for p in (*problem.w, *problem.a):
            p.grad = None
    return optimizer


STEPS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (0, {"lr": 0.3}),
    "tensor lr": (0, {"lr": torch.tensor(0.3)}),
    "decay": (0, {"lr": 0.3, "weight_decay": 0.1}),
    "first momentum": (0, {"lr": 0.3, "momentum": 0.9, "dampening": 0.4}),
    "momentum": (2, {"lr": 0.3, "momentum": 0.9}),
    "dampening": (2, {"lr": 0.3, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    "first nesterov": (0, {"lr": 0.2, "momentum": 0.9, "nesterov": True}),
    "nesterov": (3, {"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "maximize": (0, {"lr": 0.3, "maximize": True, "weight_decay": 0.1}),
    "all maximized": (
        2,
        {"lr": 0.1, "momentum": 0.8, "dampening": 0.5, "maximize": True, "weight_decay": 0.2},
    ),
}


# -- values ----------------------------------------------------------------------------------------


class Quadratic(Problem):
    """L_trn = w'Aw/2 + w'Ba and L_val = |w - t|^2/2 + w'Ca."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a = [nn.Parameter(normal(5, seed=0))], [nn.Parameter(normal(3, seed=1))]
        root = normal(5, 5, seed=2)
        self.A, self.B, self.C = root @ root.T, normal(5, 3, seed=3), normal(5, 3, seed=4)
        self.t = normal(5, seed=5)

    def training(self, w: Sequence[Tensor], a: Sequence[Tensor]) -> Tensor:
        return w[0] @ self.A @ w[0] / 2 + w[0] @ self.B @ a[0]

    def validation(self, w: Sequence[Tensor], a: Sequence[Tensor]) -> Tensor:
        return ((w[0] - self.t) ** 2).sum() / 2 + w[0] @ self.C @ a[0]


@pytest.mark.parametrize(("method", "rtol"), [("exact", 1e-10), ("finite-difference", 1e-9)])
def test_on_quadratics_the_gradient_is_the_closed_form(method: str, rtol: float) -> None:
    q = Quadratic()
    w, a, lr = q.w[0].detach(), q.a[0].detach(), 0.1
    moved = w - lr * (q.A @ w + q.B @ a)
    v = moved - q.t + q.C @ a
    first_order = q.C.T @ w
    expected = q.C.T @ moved - lr * q.B.T @ v
    found = q.step(torch.optim.SGD(q.w, lr=lr), method)
    close(found, [expected], rtol)
    assert float((expected - first_order).norm()) > 0.1 * float(first_order.norm())


@pytest.mark.parametrize(("method", "rtol"), [("exact", 1e-12), ("finite-difference", 1e-7)])
@pytest.mark.parametrize("kind", STEPS)
def test_the_gradient_is_the_one_through_the_step(kind: str, method: str, rtol: float) -> None:
    problem = Problem()
    warm, options = STEPS[kind]
    optimizer = sgd(problem, warm, **options)
    expected = brute_force(problem, optimizer, problem.training, problem.validation)
    close(problem.step(optimizer, method, epsilon=FINE), expected, rtol)
    problem.validation(problem.w, problem.a).backward()
    for a, unrolled_grad in zip(problem.a, expected, strict=True):
        assert a.grad is not None
        assert float((a.grad - unrolled_grad).norm() / unrolled_grad.norm()) > 1e-3


@pytest.mark.parametrize("kind", STEPS)
def test_in_the_block_the_weights_are_where_the_optimizer_goes_next(kind: str) -> None:
    problem = Problem()
    warm, options = STEPS[kind]
    optimizer = sgd(problem, warm, **options)
    twin, twin_optimizer = copy.deepcopy((problem, optimizer))
    twin.training(twin.w, twin.a).backward()
    twin_optimizer.step()
    before = [w.detach().clone() for w in problem.w]
    with unrolled(
        problem.w, problem.a, [], lambda: problem.training(problem.w, problem.a), optimizer,
        method="exact",
    ):  # fmt: skip
        for w, moved, old in zip(problem.w, twin.w, before, strict=True):
            assert torch.equal(w, moved)
            assert not torch.equal(w, old)


@pytest.mark.parametrize(("method", "rtol"), [("exact", 1e-12), ("finite-difference", 1e-7)])
def test_every_weight_moves_as_its_group_says(method: str, rtol: float) -> None:
    problem = Problem()
    groups = [
        {"params": problem.w[:1], "lr": 0.5},
        {"params": problem.w[1:], "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    # One of the second group has a buffer, the other one takes its first step.
    optimizer.state[problem.w[2]]["momentum_buffer"] = normal(4, 2, seed=3)
    expected = brute_force(problem, optimizer, problem.training, problem.validation)
    close(problem.step(optimizer, method, epsilon=FINE), expected, rtol)


def test_finite_differences_take_the_authors_step() -> None:
    problem = Problem()
    lr = 0.3
    a = problem.a
    g = torch.autograd.grad(problem.training(problem.w, a), problem.w)
    moved = [(w - lr * d).detach().requires_grad_() for w, d in zip(problem.w, g, strict=True)]
    *dalpha, v0, v1, v2 = torch.autograd.grad(problem.validation(moved, a), [*a, *moved])
    r = 0.01 / torch.cat([v.reshape(-1) for v in (v0, v1, v2)]).norm()
    plus, minus = (
        torch.autograd.grad(
            problem.training([w + s * v for w, v in zip(problem.w, (v0, v1, v2), strict=True)], a),
            a,
        )
        for s in (r, -r)
    )
    expected = [d - lr * (p - m) / (2 * r) for d, p, m in zip(dalpha, plus, minus, strict=True)]
    optimizer = sgd(problem, lr=lr)
    found = problem.step(optimizer, "finite-difference")
    close(found, expected, 1e-11)
    exact = problem.step(optimizer, "exact")
    gaps = [float((f - e).norm()) for f, e in zip(found, exact, strict=True)]
    assert all(gap > 1e-9 for gap in gaps)  # so a step of another size would have been seen


@pytest.mark.parametrize("kind", [Cell, Skips, Norms])
@pytest.mark.parametrize(("method", "rtol"), [("exact", 1e-10), ("finite-difference", 1e-6)])
def test_a_supernet_s_gradient_is_the_one_through_the_step(
    kind: Callable[[], nn.Module], method: str, rtol: float
) -> None:
    net = nasfx.transform(built(kind), "darts")
    spread(net)
    names = {p: name for name, p in net.named_parameters()}
    weights, alphas = net.weight_parameters(), net.arch_parameters()
    optimizer = torch.optim.SGD(weights, lr=0.2, momentum=0.9, weight_decay=0.1)

    def loss_at(seed: int) -> Loss:
        def loss(w: Sequence[Tensor], a: Sequence[Tensor]) -> Tensor:
            values = zip((*weights, *alphas), (*w, *a), strict=True)
            x, y = batch(seed)
            return ((functional_call(net, {names[p]: v for p, v in values}, (x,)) - y) ** 2).mean()

        return loss

    problem = Problem()
    problem.w, problem.a = weights, alphas
    expected = brute_force(problem, optimizer, loss_at(1), loss_at(2))
    inner = lambda: loss_of(net, *batch(1))  # noqa: E731
    with unrolled(weights, alphas, [net], inner, optimizer, method=method, epsilon=FINE):
        loss_of(net, *batch(2)).backward()
    close([a.grad for a in alphas], expected, rtol)


@pytest.mark.parametrize("method", METHODS)
def test_alpha_gradients_accumulate(method: str) -> None:
    problem = Problem()
    optimizer = sgd(problem, lr=0.3)
    expected = problem.step(optimizer, method)
    old = [normal(*a.shape, seed=5) for a in problem.a]
    for a, grad in zip(problem.a, old, strict=True):
        a.grad = grad.clone()
    grads = [a.grad for a in problem.a]
    found = problem.step(optimizer, method)
    assert all(one is other for one, other in zip(found, grads, strict=True))
    close([f - g for f, g in zip(found, old, strict=True)], expected, 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_alphas_that_one_loss_does_not_use(method: str) -> None:
    problem = Problem()
    fixed = [a.detach() for a in problem.a]
    problem.validation = lambda w, a: problem.loss(w, fixed, 2)  # type: ignore[method-assign]
    g = torch.autograd.grad(problem.training(problem.w, problem.a), problem.w, create_graph=True)
    moved = [w - 0.3 * d for w, d in zip(problem.w, g, strict=True)]
    expected = torch.autograd.grad(problem.validation(moved, problem.a), problem.a)
    unused = nn.Parameter(normal(2, seed=0))
    frozen = nn.Parameter(normal(2, seed=0), requires_grad=False)
    problem.a += [unused, frozen]
    found = problem.step(sgd(problem, lr=0.3), method, epsilon=FINE)
    close(found[:2], expected, 1e-7)
    assert found[2:] == [None, None]


@pytest.mark.parametrize(("side", "sign"), [(2, 1), (3, -1)])
def test_an_alpha_that_is_used_at_one_end_of_the_difference_alone(side: int, sign: int) -> None:
    problem = Problem()
    extra = nn.Parameter(normal(4, seed=0))
    ends: list[Tensor] = []

    def inner() -> Tensor:
        ends.append(problem.w[1].detach().clone())
        loss = problem.training(problem.w, problem.a)
        return loss + extra @ problem.w[1] if len(ends) == side else loss

    lr, epsilon = 0.3, 0.1
    optimizer = sgd(problem, lr=lr)
    with unrolled(
        problem.w, [extra], [], inner, optimizer, method="finite-difference", epsilon=epsilon
    ):
        problem.validation(problem.w, problem.a).backward()
        norm = lr * torch.cat([w.grad.reshape(-1) for w in problem.w if w.grad is not None]).norm()
    # The gradient is w[1] at that end and nothing at the other.
    close([extra.grad], [-sign * ends[side - 1] * norm / (2 * epsilon)], 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_loss_whose_weight_gradient_knows_no_alpha(method: str) -> None:
    problem = Problem()
    inner = lambda: sum(w.sum() for w in problem.w) + problem.a[0].sum()  # noqa: E731
    optimizer = sgd(problem, lr=0.3)
    moved = [(w - 0.3).detach() for w in problem.w]
    expected = torch.autograd.grad(problem.validation(moved, problem.a), problem.a)
    close(problem.step(optimizer, method, inner=inner), expected, 1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("body", ["nothing", "no weights", "zero lr", "no alphas"])
def test_without_a_second_term_the_training_loss_runs_once(body: str, method: str) -> None:
    problem = Problem()
    calls: list[int] = []

    def inner() -> Tensor:
        calls.append(0)
        return problem.training(problem.w, problem.a)

    optimizer = sgd(problem, lr=0.0 if body == "zero lr" else 0.3)
    alphas = [] if body == "no alphas" else problem.a
    expected = torch.ones_like(problem.a[0])
    with unrolled(problem.w, alphas, [], inner, optimizer, method=method):
        if body == "no weights":
            problem.a[0].sum().backward()
        elif body == "zero lr":
            (problem.a[0].sum() + problem.w[0].sum()).backward()
        elif body == "no alphas":
            problem.validation(problem.w, problem.a).backward()
    assert len(calls) == 1
    if body in ("no weights", "zero lr"):
        assert problem.a[0].grad is not None
        assert torch.equal(problem.a[0].grad, expected)


# -- which weights move ----------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "rtol"), [("exact", 1e-12), ("finite-difference", 1e-7)])
@pytest.mark.parametrize("kind", ["frozen", "not held", "unused"])
def test_weights_that_do_not_move(kind: str, method: str, rtol: float) -> None:
    problem = Problem()
    still = problem.w[1]
    inner = lambda: problem.training(problem.w, problem.a)  # noqa: E731
    held = problem.w
    training: Loss = problem.training
    if kind == "frozen":
        still.requires_grad_(False)
        still.grad = normal(4, seed=8)
    elif kind == "not held":
        held = [problem.w[0], problem.w[2]]
    else:
        zeros = torch.zeros(4, dtype=torch.float64)
        training = lambda w, a: problem.training([w[0], zeros, w[2]], a)  # noqa: E731
        inner = lambda: training(problem.w, problem.a)  # noqa: E731
    optimizer = torch.optim.SGD(held, lr=0.3, momentum=0.9, weight_decay=0.1)
    for p in held:
        optimizer.state[p]["momentum_buffer"] = normal(*p.shape, seed=6)
    expected = brute_force(problem, optimizer, training, problem.validation)
    before = digest(still)
    with unrolled(problem.w, problem.a, [], inner, optimizer, method=method, epsilon=FINE):
        if kind == "frozen":
            assert digest(still) == before
        assert digest(still)[-1] == before[-1]
        problem.validation(problem.w, problem.a).backward()
    close([a.grad for a in problem.a], expected, rtol)
    assert digest(still) == before


def test_a_weight_given_twice_moves_once() -> None:
    problem = Problem()
    optimizer = sgd(problem, lr=0.3)
    expected = problem.step(optimizer)
    problem.w = [*problem.w, problem.w[0]]
    close(problem.step(optimizer), expected, 1e-14)


# -- what must not change --------------------------------------------------------------------------


def tensors_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Everything that must be as it was: objects, bytes and the gradients of weights."""
    state = optimizer.state_dict()
    return (
        {n: digest(p) for n, p in net.named_parameters() if not n.startswith("arch.")},
        {n: (digest(b), b._version) for n, b in net.named_buffers()},
        [(k, n, digest(t)) for k, v in state["state"].items() for n, t in v.items()],
        state["param_groups"],
        len(optimizer.state),
    )


class BoomError(Exception):
    pass


@pytest.mark.parametrize("momentum", ["fresh", "warm"])
@pytest.mark.parametrize(
    ("method", "raised"),
    [
        *((method, raised) for method in METHODS for raised in (None, "body", 1, 2)),
        ("finite-difference", 3),
    ],
)
def test_all_is_as_it_was(method: str, raised: str | int | None, momentum: str) -> None:
    net = nasfx.transform(built(Norms), "darts")
    spread(net)
    weights, alphas = net.weight_parameters(), net.arch_parameters()
    weights[2].requires_grad_(False)
    optimizer = torch.optim.SGD(weights[:-1], lr=0.2, momentum=0.9)
    if momentum == "warm":
        loss_of(net, *batch(3)).backward()
        optimizer.step()
    for w in weights[::2]:
        w.grad = normal(*w.shape, seed=4)
    for w in weights[1::2]:
        w.grad = None
    calls: list[int] = []

    def inner() -> Tensor:
        calls.append(0)
        loss = loss_of(net, *batch(1))
        if len(calls) == raised:
            raise BoomError
        return loss

    for a in alphas:
        a.grad = None
    before = tensors_of(net, optimizer)
    counters = [b for n, b in net.named_buffers() if n.endswith("num_batches_tracked")]
    assert len(counters) == 3
    after_body: list[Tensor] = []
    try:
        with unrolled(weights, alphas, [net], inner, optimizer, method=method):
            assert all(w.grad is None for w in weights if w.requires_grad)
            loss_of(net, *batch(2)).backward()
            after_body = [a.grad.clone() for a in alphas if a.grad is not None]
            if raised == "body":
                raise BoomError
    except BoomError:
        assert raised is not None
    else:
        assert raised is None
        assert len(calls) == (2 if method == "exact" else 3)
    assert tensors_of(net, optimizer) == before
    found = [a.grad for a in alphas if a.grad is not None]
    assert len(found) == len(after_body) == (0 if raised == 1 else 1)
    for grad, first_term in zip(found, after_body, strict=True):
        assert torch.equal(grad, first_term) == (raised is not None)


class Counting(nn.Module):
    """Its output depends on how often it ran."""

    calls: Tensor

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.dropout = nn.Dropout(p)
        self.seen: list[tuple[float, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        scale = self.dropout(torch.ones(4, dtype=torch.float64))
        self.seen.append((float(self.calls), scale))
        return x * scale * self.calls


class Counted(Problem):
    """A module that counts and drops out stands in both losses."""

    def __init__(self, p: float = 0.0, checkpointed: bool = False) -> None:
        super().__init__()
        self.module = Counting(p)
        self.modules = [self.module]
        self.checkpointed = checkpointed

    def loss(self, w: Sequence[Tensor], a: Sequence[Tensor], seed: int) -> Tensor:
        x, y = batch(seed)
        hidden = torch.tanh(x @ w[0] + w[1]) * torch.softmax(a[0], 0)
        if self.checkpointed:
            hidden = checkpoint(self.module, hidden, use_reentrant=False)
        else:
            hidden = self.module(hidden)
        return ((torch.tanh(hidden @ w[2]) * torch.exp(a[1]) - y) ** 2).mean()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_call_starts_from_the_buffers_that_were_found(
    method: str, checkpointed: bool
) -> None:
    problem = Counted(checkpointed=checkpointed)
    optimizer = sgd(problem, lr=0.3)
    before = digest(problem.module.calls), problem.module.calls._version
    problem.step(optimizer, method)
    assert (digest(problem.module.calls), problem.module.calls._version) == before
    if not checkpointed:
        assert [count for count, _ in problem.module.seen] == [1.0] * len(problem.module.seen)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("method", "calls"), [("exact", 2), ("finite-difference", 3)])
def test_every_call_draws_the_same_and_the_generator_goes_on(
    method: str, calls: int, checkpointed: bool
) -> None:
    problem = Counted(p=0.5, checkpointed=checkpointed)
    optimizer = sgd(problem, lr=0.3)
    masks: list[Tensor] = []

    def inner() -> Tensor:
        n = len(problem.module.seen)
        loss = problem.training(problem.w, problem.a)
        masks.append(problem.module.seen[n][1])
        return loss

    torch.manual_seed(11)
    with torch.random.fork_rng(devices=[]):
        problem.training(problem.w, problem.a)
        problem.validation(problem.w, problem.a)
        expected_mask = problem.module.seen[1][1]
        expected_state = torch.get_rng_state()
    problem.module.calls.zero_()
    n = len(problem.module.seen)
    problem.step(optimizer, method, inner=inner)
    assert len(masks) == calls
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert 0 < int((masks[0] == 0).sum()) < 4
    # The block draws after the first call, what it would have drawn without the others.
    in_block = problem.module.seen[n + (2 if checkpointed else 1)][1]
    assert torch.equal(in_block, expected_mask)
    assert not torch.equal(in_block, masks[0])
    assert torch.equal(torch.get_rng_state(), expected_state)


@pytest.mark.parametrize("method", METHODS)
def test_the_generator_goes_on_where_a_later_call_raises(method: str) -> None:
    problem = Problem()
    draws: list[Tensor] = []

    def inner() -> Tensor:
        draws.append(torch.rand(()))
        if len(draws) == 2:
            raise BoomError
        return problem.training(problem.w, problem.a)

    torch.manual_seed(3)
    first, second = torch.rand(()), torch.rand(())
    torch.manual_seed(3)
    with pytest.raises(BoomError):
        problem.step(sgd(problem, lr=0.3), method, inner=inner)
    assert torch.equal(draws[0], first)
    assert torch.equal(draws[1], first)
    assert torch.equal(torch.rand(()), second)


@pytest.mark.parametrize("method", METHODS)
def test_inner_runs_with_gradients_whatever_stands_around(method: str) -> None:
    problem = Problem()
    optimizer = sgd(problem, lr=0.3)
    expected = problem.step(optimizer, method)
    inner = lambda: problem.training(problem.w, problem.a)  # noqa: E731
    with torch.no_grad(), unrolled(problem.w, problem.a, [], inner, optimizer, method=method):
        assert not torch.is_grad_enabled()
        with torch.enable_grad():
            problem.validation(problem.w, problem.a).backward()
    close([a.grad for a in problem.a], expected, 1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_around_the_step_uses_no_stale_weights(method: str) -> None:
    layer = nn.Linear(3, 2)
    alpha = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    x = torch.ones(4, 3)
    outputs: list[Tensor] = []

    def inner() -> Tensor:
        outputs.append(layer(x))
        return ((outputs[-1].float() * alpha) ** 2).mean()

    with torch.autocast("cpu", torch.bfloat16):
        with unrolled(
            list(layer.parameters()), [alpha], [], inner, optimizer, method=method, epsilon=0.5
        ):
            inside = layer(x)
            moved = nn.functional.linear(
                x.bfloat16(), layer.weight.data.bfloat16(), layer.bias.data.bfloat16()
            )
            assert torch.equal(inside, moved)
            assert not torch.equal(inside, outputs[0])
            inside.float().sum().backward()
        after = layer(x)
    assert torch.equal(after, outputs[0])
    if method == "exact":
        assert torch.equal(outputs[1], outputs[0])
    else:
        assert not torch.equal(outputs[1], outputs[2])


# -- refusals --------------------------------------------------------------------------------------


class Wrapper:
    """As Fabric's: it keeps the optimizer under `optimizer`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def fabricated(optimizer: torch.optim.Optimizer) -> Any:
    return Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)


@pytest.mark.parametrize("wrap", [Wrapper, fabricated])
def test_wrapped_optimizers_are_unwrapped(wrap: Callable[[Any], Any]) -> None:
    problem = Problem()
    optimizer = sgd(problem, warm=2, lr=0.3, momentum=0.9)
    expected = problem.step(optimizer)
    close(problem.step(wrap(optimizer)), expected, 1e-14)
    with pytest.raises(SearchError, match="the step of Adam cannot be unrolled"):
        problem.step(wrap(torch.optim.Adam(problem.w)))


class Own(torch.optim.SGD):
    pass


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, Own])
def test_other_optimizers_are_refused(kind: Any) -> None:
    problem = Problem()
    message = rf"the step of {kind.__name__} cannot be unrolled, only that of torch.optim.SGD"
    with pytest.raises(SearchError, match=message):
        problem.step(kind(problem.w))


def test_an_optimizer_of_none_of_the_weights_is_refused() -> None:
    problem = Problem()
    with pytest.raises(SearchError, match="holds none of the 3 weights"):
        problem.step(torch.optim.SGD(problem.a, lr=0.1))


@pytest.mark.parametrize("method", ["second", "", None])
def test_methods_are_checked(method: Any) -> None:
    problem = Problem()
    with pytest.raises(SearchError, match="must be 'finite-difference' or 'exact'"):
        problem.step(sgd(problem, lr=0.1), method)


@pytest.mark.parametrize("epsilon", [0, -0.01, float("nan")])
def test_the_size_of_the_change_is_checked(epsilon: float) -> None:
    problem = Problem()
    with pytest.raises(SearchError, match=r"epsilon=.* must be positive"):
        problem.step(sgd(problem, lr=0.1), epsilon=epsilon)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (lambda p: 0.5, "returned a float; it must return the training loss"),
        (lambda p: p.w[1], r"returned a Parameter of shape \(4,\); it must return"),
        (lambda p: p.training(p.w, p.a).detach(), "does not depend on any weight"),
        (lambda p: p.training([w.detach() for w in p.w], p.a), "does not depend on any weight"),
    ],
)
def test_inner_must_give_a_loss_of_the_weights(
    inner: Callable[[Problem], Any], message: str
) -> None:
    problem = Problem()
    before = [digest(w) for w in problem.w]
    with pytest.raises(SearchError, match=message):
        problem.step(sgd(problem, lr=0.1), inner=lambda: inner(problem))
    assert [digest(w) for w in problem.w] == before
