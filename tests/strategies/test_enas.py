"""ENAS: the controller's update, what is drawn and found, and a toy that every strategy solves."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nasfx
from nasfx import Architecture, Enas, LayerChoice, Proxyless, SearchError, Supernet
from nasfx.strategies import Strategy
from nasfx.strategies.controller import Controller
from tests.strategies.nets import (
    WIDTH,
    Chain,
    Nested,
    Skips,
    batch,
    built,
    dense,
    drawn,
    loss_of,
    on_path,
    ops,
    spread,
    with_gradient,
)

Kind = Callable[[], nn.Module]


class Macro(nn.Module):
    """Two layers, the second of which also reads any of the outputs before it; 36 subnets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.first, self.second = ops("first"), ops("second")
        self.skips = nasfx.InputChoice(2, None, label="skips")
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        stem = torch.tanh(self.stem(x))
        first = self.first(stem)
        return self.head(self.second(first) + self.skips([stem, first]))


class Small(nn.Module):
    """A choice within a candidate, and one behind it; the inner one is not always active."""

    def __init__(self) -> None:
        super().__init__()
        inner = LayerChoice([nn.Tanh(), nn.ReLU()], label="inner")
        self.outer = LayerChoice(
            {"plain": nn.Linear(3, WIDTH), "holds": nn.Sequential(inner, nn.Linear(3, WIDTH))},
            label="outer",
        )
        self.last = LayerChoice({"u": dense(), "v": nn.Identity()}, label="last")
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.outer(x)))


def net_of(kind: Kind, *, seed: int = 0, objective: Any = None, **options: Any) -> Supernet:
    inputs = None if objective is None else batch()[0]
    strategy = Enas(**({"hidden": 6} | options))
    net = nasfx.transform(
        built(kind), strategy, seed=seed, objective=objective, example_inputs=inputs
    )
    spread(net, seed=1, scale=0.8)
    return net


def controller_of(net: Supernet) -> Controller:
    controller = net.get_submodule("arch.state.controller")
    assert isinstance(controller, Controller)
    return controller


def baseline_of(net: Supernet) -> float:
    return float(net.state_dict()["arch.state.baseline"])


# -- the update -----------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True], ids=["estimate", "exact entropy"])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("kind", [Chain, Macro], ids=["chain", "macro"])
def test_the_update_is_that_of_the_formula(kind: Kind, clip: float | None, exact: bool) -> None:
    """mean_j of (R_j - b_j) (-log p_j) + 0.8 KL_j, b moved to R_j first; clipped after the mean."""
    net = net_of(
        kind, entropy_weight=0.3, baseline_decay=0.9, grad_clip=clip, exact_entropy=exact, seed=2
    )
    optimizer = net.arch_optimizer(torch.optim.SGD, lr=0.5)
    generator = torch.Generator().manual_seed(0)
    b = 0.0
    for draws in (3, 1, 4):
        twin = copy.deepcopy(controller_of(net))
        losses: list[Tensor] = []
        for _ in range(draws):
            reward = float(torch.rand((), generator=generator, dtype=torch.float64)) - 0.2
            with net.arch_step():
                answer = twin(drawn(net))
                net.objective(loss_of(net, *batch()), reward=reward).backward()
            reward += 0.3 * float(answer.entropy)
            b = 0.9 * b + 0.1 * reward
            log_p = torch.stack(list(answer.log_prob.values())).sum()
            losses.append(-(reward - b) * log_p + 0.8 * answer.skip_penalty)
        torch.stack(losses).mean().backward()
        own = list(twin.parameters())
        if clip is not None:
            assert nn.utils.clip_grad_norm_(own, clip) > clip
        optimizer.step()
        optimizer.zero_grad()
        torch.optim.SGD(own, 0.5).step()
        for (name, p), expected in zip(controller_of(net).named_parameters(), own, strict=True):
            torch.testing.assert_close(p, expected, rtol=0, atol=1e-12, msg=name)
        assert abs(baseline_of(net) - b) < 1e-14
        assert all(p.grad is None for p in net.traced.origin.parameters())


def test_the_reward_is_minus_the_loss_unless_one_is_given() -> None:
    net = net_of(Chain, baseline_decay=0.0, entropy_weight=0.0)
    with net.arch_step():
        loss = loss_of(net, *batch())
        net.objective(loss).backward()
    assert abs(baseline_of(net) + loss.item()) < 1e-15


def test_the_reward_has_the_cost_weighed_in() -> None:
    cost = nasfx.Params(target=40.0)
    net = net_of(Chain, baseline_decay=0.0, entropy_weight=0.0, objective=cost)
    for _ in range(5):
        with net.arch_step():
            net.objective(loss_of(net, *batch()), reward=0.8).backward()
            params = net.space.costs["params"](net.path)
            assert float(net.expected_cost()["params"]) == params
        assert abs(baseline_of(net) - (0.8 - 0.1 * (params - 40) / 40)) < 1e-14


def every_draw(net: Supernet) -> Iterator[dict[str, Any]]:
    labels = [choice.label for choice in net.space.choices]
    for values in itertools.product(*(choice.values() for choice in net.space.choices)):
        yield dict(zip(labels, values, strict=True))


def _rewards(net: Supernet) -> dict[Architecture, float]:
    return {arch: 1.0 + (7 * i % 5) ** 2 for i, arch in enumerate(net.space.enumerate())}


def _expectation(net: Supernet) -> Tensor:
    """The gradient of -E R by the controller's parameters, over all that it may draw."""
    rewards, controller = _rewards(net), controller_of(net)
    terms: list[Tensor] = []
    for decisions in every_draw(net):
        answer = controller(decisions)
        p = torch.stack(list(answer.log_prob.values())).sum().exp()
        terms.append(-p * rewards[net.space.validate(decisions)])
    return _gradient(net, torch.stack(terms).sum())


def _gradient(net: Supernet, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(
        loss, net.arch_parameters(), allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.flatten() for g in found])


def _surrogate(net: Supernet, decisions: dict[str, Any]) -> Tensor:
    """The gradient of an arch step that has drawn `decisions`."""
    net._arch.state.drawn = decisions
    reward = _rewards(net)[net.path]
    return _gradient(net, net.strategy.surrogate(net._arch, net.space, reward))


PLAIN = {"baseline_decay": 1.0, "entropy_weight": 0.0, "skip_weight": 0.0}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(Chain, id="chain"),
        pytest.param(Macro, id="macro"),
        pytest.param(Small, id="nested last"),
        pytest.param(Nested, id="nested"),
        pytest.param(lambda: Skips(1), id="one input"),
    ],
)
def test_the_policy_gradient_is_that_of_the_expected_reward(kind: Kind) -> None:
    """Summed over all draws, weighted by their probability: no noise."""
    net = net_of(kind, **PLAIN)
    mean = torch.zeros(())
    total = 0.0
    for decisions in every_draw(net):
        answer = controller_of(net)(decisions)
        p = torch.stack(list(answer.log_prob.values())).sum().exp().item()
        total += p
        mean = mean + p * _surrogate(net, decisions)
    assert abs(total - 1) < 1e-12
    assert baseline_of(net) == 0
    expected = _expectation(net)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [2000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_the_mean_over_draws_nears_the_gradient(n: int) -> None:
    net = net_of(Macro, seed=3, **PLAIN)
    cache: dict[str, Tensor] = {}
    found: list[Tensor] = []
    for _ in range(n):
        decisions = net.strategy.draw(net._arch, net.space)
        key = repr(decisions)
        if key not in cache:
            cache[key] = _surrogate(net, decisions)
        found.append(cache[key])
    samples = torch.stack(found)
    expected = _expectation(net)
    errors = samples.std(0) / n**0.5
    assert ((samples.mean(0) - expected).abs() <= 4 * errors + 1e-12).all()
    assert (expected.abs() > 8 * errors).any()


def test_a_step_without_draws_does_nothing() -> None:
    net = net_of(Macro)
    optimizer = net.arch_optimizer()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer.step()
    with net.arch_step():  # drawn, but nothing learned from it
        loss_of(net, *batch())
    optimizer.step()
    state = net.state_dict()
    learned = [k for k in before if "controller" in k or "baseline" in k]
    assert len(learned) > 5
    assert all(torch.equal(state[k], before[k]) for k in learned)


# -- the weights ----------------------------------------------------------------------------------

SAMPLED: dict[str, Strategy] = {
    "enas": Enas(hidden=6),
    "random": nasfx.RandomSearch(),
    "single-path": nasfx.SinglePath(),
    "full": Proxyless(gate="full"),
    "two": Proxyless(gate="two"),
    "reinforce": Proxyless(estimator="reinforce"),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_what_is_off_the_path_has_no_gradient_and_stays_bit_by_bit(name: str) -> None:
    model = built(Nested)
    net = nasfx.transform(model, SAMPLED[name], seed=2)
    weights = torch.optim.SGD(net.weight_parameters(), 0.05, 0.9, weight_decay=1e-2)
    arch = net.arch_optimizer()
    moved: set[str] = set()
    for _ in range(20):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with net.arch_step():
            net.objective(loss_of(net, *batch(1))).backward()
        arch.step()
        arch.zero_grad()
        with net.weight_step():
            loss_of(net, *batch()).backward()
        assert with_gradient(model) == on_path(model, net.path)
        with_grad = {n for n, p in model.named_parameters() if p.grad is not None}
        weights.step()
        weights.zero_grad()
        now = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert now <= with_grad < set(before)
        moved |= now
    assert moved == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("kind", ["weight", "arch"])
def test_a_step_runs_one_candidate_of_each_active_choice(kind: str) -> None:
    model = built(Small)
    net = nasfx.transform(model, Enas(hidden=6), seed=1)
    names = {id(p): n.removesuffix(".weight") for n, p in model.named_parameters()}
    forward: list[str] = []
    backward: list[str] = []

    def hook(module: nn.Linear, _: Any, output: Tensor) -> None:
        forward.append(names[id(module.weight)])
        if output.requires_grad:
            output.register_hook(lambda _: backward.append(names[id(module.weight)]))

    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(hook)
    expected = {"plain": ["outer.plain"], "holds": ["outer.holds.1"], "u": ["last.u.0"], "v": []}
    seen: set[Architecture] = set()
    for _ in range(25):
        forward.clear(), backward.clear()
        with net.weight_step() if kind == "weight" else net.arch_step():
            loss = loss_of(net, *batch())
            (net.objective(loss) if kind == "arch" else loss).backward()
        ran = [*expected[net.path["outer"]], *expected[net.path["last"]], "head"]
        assert forward == ran
        assert backward == (ran[::-1] if kind == "weight" else [])
        seen.add(net.path)
    assert len(seen) > 4


# -- what is saved --------------------------------------------------------------------------------


def _train(net: Supernet, steps: int) -> list[Any]:
    weights = torch.optim.SGD(net.weight_parameters(), 0.05)
    arch = net.arch_optimizer(torch.optim.SGD, lr=0.3)
    found: list[Any] = []
    for i in range(steps):
        for _ in range(2):
            with net.arch_step():
                net.objective(loss_of(net, *batch(100 + i))).backward()
        arch.step()
        arch.zero_grad()
        with net.weight_step():
            loss = loss_of(net, *batch(i))
            loss.backward()
        weights.step()
        weights.zero_grad()
        found += [loss.item(), net.path, baseline_of(net)]
    return found


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_a_copy_goes_on_as_the_net_does(how: str) -> None:
    net = net_of(Skips)
    _train(net, 4)
    state = net.state_dict()
    assert "arch.state.baseline" in state
    assert "arch.state.controller.lstm.weight_hh" in state
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        other = net_of(Skips, seed=9)
        other.load_state_dict(state)
    ours = {id(p) for p in net.parameters()}
    assert not any(id(p) in ours for p in other.parameters())
    assert _train(net, 4) == _train(other, 4)
    again = other.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in net.state_dict().items())


# -- what is found --------------------------------------------------------------------------------


def test_derive_takes_the_most_probable_answers_and_draws_nothing() -> None:
    net = net_of(Skips)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = [net.derive() for _ in range(3)]
    assert found == [net.space.validate(controller_of(net)().decisions)] * 3
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("n", [1, 4, 20])
def test_the_best_of_different_draws_is_returned(n: int) -> None:
    net = net_of(Macro, final_samples=n)
    assert net.space.size == 36
    asked: list[Architecture] = []

    def evaluate(arch: Architecture) -> float:
        asked.append(arch)
        return -abs(len(asked) - 3)

    before = net.state_dict()["arch.state.generator"].clone()
    best = net.conclude(evaluate)
    assert len(asked) == len(set(asked)) == n
    assert best == asked[min(n, 3) - 1]
    assert torch.equal(net.state_dict()["arch.state.generator"], before)


def test_only_what_keeps_within_the_bounds_is_evaluated_and_derived() -> None:
    net = net_of(Chain, objective=nasfx.Params(max=60.0), final_samples=5)
    costs = net.space.costs["params"]
    fitting = {a for a in net.space.enumerate() if costs(a) <= 60}
    assert 5 <= len(fitting) < net.space.size
    asked: list[Architecture] = []
    assert net.conclude(lambda arch: asked.append(arch) or costs(arch)) in fitting
    assert len(asked) == 5
    assert set(asked) <= fitting
    assert net.derive() in fitting


def test_what_the_controller_never_draws_is_drawn_uniformly() -> None:
    """All that it draws breaks the bound."""
    options = {"op_bias": {"lin": 1000.0}, "tanh_constant": None}
    net = net_of(Chain, objective=nasfx.Params(max=30.0), **options)
    with torch.no_grad():
        for p in controller_of(net).b_soft.values():
            p.zero_()[0] = 1000.0
    only = {"first": "skip", "second": "halved"}
    assert controller_of(net)().decisions["first"] == "lin"
    assert net.derive() == net.conclude(lambda _: 0.0) == only


def test_the_constants_are_those_of_the_authors() -> None:
    macro, micro = Enas.macro(), Enas.micro()
    assert (macro.tanh_constant, macro.op_tanh_reduce, macro.exact_entropy) == (1.5, 1.0, False)
    assert (macro.skip_target, macro.skip_weight) == (0.4, 0.8)
    assert (macro.learning_rate, macro.schedule.steps, macro.schedule.draws) == (0.001, 50, 20)
    assert (micro.tanh_constant, micro.op_tanh_reduce, micro.exact_entropy) == (1.10, 2.5, True)
    assert (micro.learning_rate, micro.schedule.steps, micro.schedule.draws) == (0.0035, 30, 10)
    assert micro.skip_weight == 0
    for each in (macro, micro):
        assert (each.hidden, each.temperature, each.entropy_weight) == (64, None, 1e-4)
        assert (each.baseline_decay, each.betas, each.eps) == (0.99, (0.0, 0.999), 1e-3)
    assert Enas.micro(hidden=7, steps=2).schedule.steps == 2
    assert Enas.micro(hidden=7).learning_rate == 0.0035
    nni = Enas()
    assert (nni.learning_rate, nni.baseline_decay, nni.skip_weight) == (0.00035, 0.999, 0.8)
    assert (nni.schedule.every, nni.schedule.steps, nni.schedule.draws) == (0, None, 20)
    (group,) = net_of(Chain, learning_rate=0.01, betas=(0.0, 0.9)).arch_optimizer().param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.0, 0.9), 1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregate": 0}, r"Enas\(aggregate=0\): it must be a whole number of at least 1"),
        ({"aggregate": 1.5}, r"Enas\(aggregate=1.5\): it must be a whole number of at least 1"),
        ({"final_samples": 0}, r"Enas\(final_samples=0\)"),
        ({"hidden": 0}, r"Enas\(hidden=0\)"),
        ({"baseline_decay": 1.5}, r"Enas\(baseline_decay=1.5\): it must be between 0 and 1"),
        ({"steps": 0}, r"Enas\(steps=0\): it must be a whole number of at least 1"),
        ({"grad_clip": 0.0}, r"Enas\(grad_clip=0.0\): it must be positive, or None"),
        ({"recalibrate": -1}, r"recalibrate=-1\): it must be a whole number of at least 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        Enas(**options)


# -- a toy for every strategy ---------------------------------------------------------------------


class Square(nn.Module):
    """Has a parameter, so that it costs more than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * x + self.shift


class Blank(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


class Part(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 4 * torch.relu(0.5 - x.abs())


class Near(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs() ** 1.5


def _toy(part: type[nn.Module]) -> nn.Module:
    """For y = 3 x**2: "square" explains all of it but costs most.

    "part" explains half of it, or as `Near` nearly all: it is plainly the best of the others.
    """
    features = {"blank": Blank(), "same": nn.Identity(), "square": Square(), "part": part()}
    return nn.Sequential(
        LayerChoice(
            {name: nn.Sequential(f, nn.Linear(1, 1)) for name, f in features.items()}, label="x"
        )
    )


TOY: dict[str, tuple[Strategy, float]] = {
    "darts": (nasfx.Darts(), 0.05),
    "fbnet": (nasfx.FBNet(temperature=1.0, final_samples=4), 0.05),
    "full_v2": (Proxyless(), 0.05),
    "full": (Proxyless(gate="full"), 0.05),
    "two": (Proxyless(gate="two"), 0.1),
    "reinforce": (Proxyless(estimator="reinforce", draws=8), 0.1),
    "enas": (Enas(hidden=8, aggregate=4, baseline_decay=0.9, final_samples=3), 0.05),
    "single-path": (nasfx.SinglePath(population=4, generations=2), 0.05),
    "random": (nasfx.RandomSearch(final_samples=4), 0.05),
}


def _searched(name: str, seed: int, objective: Any = None) -> str:
    generator = torch.Generator().manual_seed(seed)

    def batches(n: int) -> list[tuple[Tensor, Tensor]]:
        xs = 2 * torch.rand(n, 16, 1, generator=generator, dtype=torch.float64) - 1
        return [(x, 3 * x * x) for x in xs]

    train, valid = batches(10), batches(6)
    strategy, lr = TOY[name]
    model = built(lambda: _toy(Part if objective is None else Near), seed)
    net = nasfx.transform(
        model,
        strategy,
        seed=seed,
        objective=objective,
        example_inputs=train[0][0],
    )
    optimizers = torch.optim.SGD(net.weight_parameters(), 0.1, 0.9), net.arch_optimizer(lr=lr)
    result = nasfx.search(
        net, train, valid, loss=F.mse_loss, epochs=14, warmup=8, optimizers=optimizers
    )
    return result.architecture["x"]


@pytest.mark.slow
@pytest.mark.parametrize("bounded", [False, True], ids=["free", "bounded"])
@pytest.mark.parametrize("name", TOY)
def test_search_finds_what_is_plainly_best(name: str, bounded: bool) -> None:
    """In 9 of 10 runs; with a bound that forbids it, the best of the others."""
    bound = nasfx.Params(max=2.0, target=2.0, lambda_=4.0) if bounded else None
    found = [_searched(name, seed, bound) for seed in range(10)]
    assert found.count("part" if bounded else "square") >= 9, found
