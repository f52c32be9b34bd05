"""ProxylessNAS's other forms: all paths, two paths, zeros skipped, and REINFORCE. In float64."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nasfx
from nasfx import Architecture, LayerChoice, Proxyless, SearchError, SpaceError, Supernet
from tests.strategies.nets import (
    WIDTH,
    Chain,
    Nested,
    Norms,
    Skips,
    Zero,
    batch,
    built,
    drawn,
    gate_gradients,
    loss_of,
    set_draw,
    spread,
)

Kind = Callable[[], nn.Module]


def net_of(kind: Kind, *, seed: int = 0, objective: Any = None, **options: Any) -> Supernet:
    inputs = None if objective is None else batch()[0]
    strategy = Proxyless(**options)
    net = nasfx.transform(
        built(kind), strategy, seed=seed, objective=objective, example_inputs=inputs
    )
    spread(net, seed=1, scale=0.7)
    return net


def alphas_of(net: Supernet) -> dict[str, nn.Parameter]:
    return net._arch.alpha_parameters()


def every_draw(net: Supernet) -> Iterator[dict[str, Any]]:
    labels = [choice.label for choice in net.space.choices]
    for values in itertools.product(*(choice.values() for choice in net.space.choices)):
        yield dict(zip(labels, values, strict=True))


# -- full -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [Chain, Nested, Norms, Skips, lambda: Skips(1, "mean"), lambda: Skips(None, "mean")],
    ids=["chain", "nested", "norms", "two inputs", "mean of one", "mean of any"],
)
def test_full_gives_the_gradients_of_full_v2_on_every_path(kind: Kind) -> None:
    nets = [net_of(kind, gate=gate) for gate in ("full_v2", "full")]
    x, y = batch()
    for decisions in every_draw(nets[0]):
        found: list[dict[str, Tensor | None]] = []
        for net in nets:
            with net.arch_step():
                set_draw(net, decisions)
                net.objective(loss_of(net, x, y)).backward()
            found.append({k: p.grad for k, p in alphas_of(net).items()})
            net.zero_grad()
        for label, expected in found[0].items():
            grad = found[1][label]
            assert (grad is None) == (expected is None) == (label not in nets[0].path), label
            if grad is not None:
                torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)
    state = nets[1].state_dict()
    for key, value in nets[0].state_dict().items():  # batch norms have moved in the same way
        assert torch.equal(value, state[key]) or key == "arch.state.generator", key


@pytest.mark.parametrize("gate", ["full", "two"])
def test_inactive_batch_norms_do_not_move(gate: str) -> None:
    net = net_of(Norms, gate=gate)
    model = net.traced.origin
    seen: set[str] = set()
    for _ in range(20):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with net.arch_step():
            active = net.path["block"]
            loss_of(net, *batch()).backward()
        seen.add(active)
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        names = ("running_mean", "running_var", "num_batches_tracked")
        assert moved == {f"block.{active}.1.{name}" for name in names}
        assert int(model.state_dict()[f"block.{active}.1.num_batches_tracked"]) == 1 + int(
            before[f"block.{active}.1.num_batches_tracked"]
        )
    assert seen == {"a", "b", "c"}


class Five(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.op = LayerChoice([nn.Linear(WIDTH, WIDTH) for _ in range(5)], label="op")
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.op(torch.tanh(self.stem(x))))


def _calls(net: Supernet) -> list[tuple[str, str, bool]]:
    """(phase, candidate, whether with a graph) of every call of a candidate in an arch step."""
    calls: list[tuple[str, str, bool]] = []
    phase = "forward"
    handles = []
    for name in net.space["op"].candidates:

        def hook(*_: Any, name: str = name) -> None:
            calls.append((phase, name, torch.is_grad_enabled()))

        handles.append(net.get_submodule(f"op.{name}").register_forward_hook(hook))
    with net.arch_step():
        loss = net.objective(loss_of(net, *batch()))
        phase = "backward"
        loss.backward()
    for handle in handles:
        handle.remove()
    return calls


def test_full_runs_all_in_forward_and_one_with_a_graph() -> None:
    net = net_of(Five, gate="full")
    calls = _calls(net)
    active = net.path["op"]
    assert sorted(calls) == sorted(("forward", name, name == active) for name in "01234")


# -- two ------------------------------------------------------------------------------------------


def _pairs(net: Supernet) -> dict[str, tuple[int, ...]]:
    return net._arch.state.fresh["pair"]


@pytest.mark.parametrize(
    "kind", [Chain, Nested, Norms, lambda: Skips(1)], ids=["chain", "nested", "norms", "one input"]
)
def test_two_paths_learn_by_the_softmax_of_the_two(kind: Kind) -> None:
    net = net_of(kind, gate="two", seed=4)
    model = net.traced.origin
    x, y = batch()
    seen: set[str] = set()
    for _ in range(40):
        with net.arch_step():
            pairs, decisions = _pairs(net), drawn(net)
            loss_of(net, x, y).backward()
        seen.add(repr((pairs, decisions)))
        b = gate_gradients(model, decisions, x, y)
        for label, alpha in alphas_of(net).items():
            if label not in net.path:
                assert alpha.grad is None
                continue
            choice, pair = net.space[label], list(pairs[label])
            active = decisions[label] if choice.kind == "layer" else decisions[label][0]
            assert len(set(pair)) == 2
            assert choice.choosable.index(active) in pair
            p, own = alpha.detach()[pair].softmax(0), b[label][pair]
            expected = torch.zeros_like(alpha)
            expected[pair] = p * (own - p @ own)
            torch.testing.assert_close(alpha.grad, expected, rtol=1e-10, atol=1e-13)
            assert alpha.grad is not None
            assert all(alpha.grad[i] == 0 for i in range(len(alpha)) if i not in pair)
        net.zero_grad()
    assert len(seen) > 10


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_probabilities_of_the_others_stay(optimizer: str, draws: int) -> None:
    net = net_of(Five, gate="two", seed=5)
    own = torch.optim.SGD if optimizer == "sgd" else None
    arch = net.arch_optimizer(own, lr=0.5 if own else 0.1)
    (alpha,) = net.arch_parameters()
    largest = 0.0
    for _ in range(20):
        taking: set[int] = set()
        before = alpha.detach().clone()
        for i in range(draws):
            with net.arch_step():
                taking |= set(_pairs(net)["op"])
                net.objective(10 * loss_of(net, *batch(i))).backward()
        arch.step()
        arch.zero_grad()
        others = [i for i in range(5) if i not in taking]
        p, q = before.softmax(0), alpha.detach().softmax(0)
        torch.testing.assert_close(q[others], p[others], rtol=0, atol=1e-12)
        assert torch.equal(alpha.detach()[others], before[others])
        kept = list(taking)
        torch.testing.assert_close(q[kept].sum(), p[kept].sum(), rtol=0, atol=1e-12)
        largest = max(largest, float((q - p).abs().max()))
    assert largest > 1e-3


def test_a_choice_that_is_not_run_stays_as_it_is() -> None:
    net = net_of(Nested, gate="two", seed=6)
    arch = net.arch_optimizer(torch.optim.SGD, lr=0.5)
    inactive = 0
    for _ in range(20):
        before = {k: p.detach().clone() for k, p in alphas_of(net).items()}
        with net.arch_step():
            loss_of(net, *batch()).backward()
        arch.step()
        arch.zero_grad()
        for label, alpha in alphas_of(net).items():
            assert torch.equal(alpha.detach(), before[label]) == (label not in net.path)
            inactive += label not in net.path
    assert inactive > 10


def test_two_paths_run_two_candidates() -> None:
    net = net_of(Five, gate="two", seed=7)
    seen: set[tuple[int, ...]] = set()
    for _ in range(15):
        calls = _calls(net)
        pair, active = _pairs(net)["op"], net.path["op"]
        (other,) = [str(i) for i in pair if str(i) != active]
        assert calls == [("forward", active, True), ("backward", other, False)]
        seen.add(pair)
    assert len(seen) > 4


def test_two_inputs_are_read_and_the_others_are_not_computed() -> None:
    net = net_of(lambda: Skips(1), gate="two", seed=8)
    layers = net.traced.origin.get_submodule("layers")
    own = {id(layers.get_parameter(f"{i}.0.weight")): i + 2 for i in range(2)}
    ran: list[int] = []
    for module in net.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in own:
            index = own[id(module.weight)]
            module.register_forward_hook(lambda *_, i=index: ran.append(i))
    for _ in range(20):
        ran.clear()
        with net.arch_step():
            loss_of(net, *batch()).backward()
        assert sorted(ran) == sorted(i for i in _pairs(net)["pick"] if i >= 2)


@pytest.mark.parametrize("n_chosen", [2, None])
def test_two_paths_of_inputs_of_which_one_is_not_chosen_are_refused(n_chosen: int | None) -> None:
    with pytest.raises(SpaceError, match=rf"two paths.*n_chosen={n_chosen}.*gate='full_v2'") as e:
        net_of(lambda: Skips(n_chosen), gate="two")
    assert "nets.py:" in str(e.value)


def test_pairs_are_drawn_without_replacement_and_the_active_one_among_them() -> None:
    net = net_of(Chain, gate="two", seed=9)
    n = 4000
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    choice = net.space["first"]
    for _ in range(n):
        with net.arch_step():
            pair = tuple(sorted(_pairs(net)["first"]))
            found[pair, choice.choosable.index(drawn(net)["first"])] += 1
    alpha = alphas_of(net)["first"].detach()
    p = alpha.softmax(0).tolist()
    law: dict[tuple[tuple[int, ...], int], float] = {}
    for i, j in itertools.combinations(range(3), 2):
        both = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        law[(i, j), i] = both * p[i] / (p[i] + p[j])
        law[(i, j), j] = both * p[j] / (p[i] + p[j])
    assert abs(sum(law.values()) - 1) < 1e-12
    assert set(found) <= set(law)
    for event, q in law.items():
        assert abs(found[event] / n - q) < 4 * (q * (1 - q) / n) ** 0.5, event


def test_a_weight_step_of_two_paths_draws_one_path_by_all_alphas() -> None:
    net = net_of(Five, gate="two", seed=10)
    n = 2000
    counts: Counter[str] = Counter()
    with net.arch_step():
        loss_of(net, *batch())
    for _ in range(n):
        with net.weight_step():
            counts[net.path["op"]] += 1
    for i, q in enumerate(alphas_of(net)["op"].detach().softmax(0).tolist()):
        assert abs(counts[str(i)] / n - q) < 4 * (q * (1 - q) / n) ** 0.5


# -- zeros ----------------------------------------------------------------------------------------


class Like(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Zeros(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        for label in ("first", "second"):
            ops = {
                "times": Zero(),
                "like": Like(),
                "lin": nn.Linear(WIDTH, WIDTH),
                "tanh": nn.Tanh(),
            }
            setattr(self, label, LayerChoice(ops, label=label))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = x + self.first(x)
        return self.head(x + self.second(x))


@pytest.mark.parametrize("cost", [None, nasfx.Params(target=20.0)], ids=["loss", "cost"])
@pytest.mark.parametrize("gate", ["full_v2", "full", "two"])
@pytest.mark.parametrize("skip_zero", [True, False], ids=["skip", "default"])
def test_active_zeros_are_skipped_where_asked(skip_zero: bool, gate: str, cost: Any) -> None:
    net = net_of(Zeros, gate=gate, skip_zero=skip_zero, objective=cost, seed=1)
    assert net.space["first"].zeros == ("times", "like")
    arch = net.arch_optimizer()
    kinds: set[tuple[bool, bool]] = set()
    for _ in range(30):
        before = {k: p.detach().clone() for k, p in alphas_of(net).items()}
        with net.arch_step():
            net.objective(loss_of(net, *batch())).backward()
        zero = {label: value in ("times", "like") for label, value in net.path.items()}
        kinds.add((zero["first"], zero["second"]))
        for label, alpha in alphas_of(net).items():
            assert alpha.requires_grad
            withheld = skip_zero and zero[label]
            assert (alpha.grad is None) == withheld
            if alpha.grad is not None:
                nothing = gate == "two" and _both_zero(net, label)
                assert bool(alpha.grad.any()) != nothing
        arch.step()
        for label, alpha in alphas_of(net).items():
            if alpha.grad is None:
                assert torch.equal(alpha.detach(), before[label])
        arch.zero_grad()
    assert len(kinds) == 4


def _both_zero(net: Supernet, label: str) -> bool:
    return set(_pairs(net)[label]) == {0, 1}


# -- REINFORCE ------------------------------------------------------------------------------------


def log_p(net: Supernet, path: Architecture, alphas: Mapping[str, Tensor]) -> Tensor:
    terms: list[Tensor] = []
    for label in path:
        choice, alpha = net.space[label], alphas[label]
        if choice.kind == "layer":
            terms.append(alpha.log_softmax(0)[choice.choosable.index(path[label])])
            continue
        values = list(choice.values())
        scores = torch.stack([alpha[list(s)].sum() for s in values])
        terms.append(scores.log_softmax(0)[values.index(path.decision(label))])
    return torch.stack(terms).sum()


@pytest.mark.parametrize(
    "kind", [Nested, Skips, lambda: Skips(None)], ids=["nested", "two inputs", "any inputs"]
)
def test_the_update_is_that_of_the_formula(kind: Kind) -> None:
    """mean_j (R_j - b) d(-log p_j)/dalpha, b the mean at first and then b + 0.99 (mean - b)."""
    net = net_of(kind, estimator="reinforce", seed=2)
    optimizer = net.arch_optimizer(torch.optim.SGD, lr=0.3)
    generator = torch.Generator().manual_seed(0)
    b = None
    for draws in (4, 1, 6):
        alphas = {k: p.detach().clone().requires_grad_() for k, p in alphas_of(net).items()}
        rewards: list[float] = []
        log_ps: list[Tensor] = []
        for _ in range(draws):
            rewards.append(float(torch.rand((), generator=generator, dtype=torch.float64)) - 0.3)
            with net.arch_step():
                net.objective(loss_of(net, *batch()), reward=rewards[-1]).backward()
            log_ps.append(log_p(net, net.path, alphas))
        mean = sum(rewards) / draws
        b = mean if b is None else b + 0.99 * (mean - b)
        loss = torch.stack(
            [-(r - b) * each for r, each in zip(rewards, log_ps, strict=True)]
        ).mean()
        optimizer.step()
        optimizer.zero_grad()
        expected = torch.autograd.grad(loss, list(alphas.values()), materialize_grads=True,
                                       allow_unused=True)  # fmt: skip
        for (label, old), grad in zip(alphas.items(), expected, strict=True):
            torch.testing.assert_close(
                alphas_of(net)[label].detach(), old.detach() - 0.3 * grad, rtol=0, atol=1e-12
            )
        assert abs(float(net.state_dict()["arch.state.baseline"]) - b) < 1e-14
        assert all(p.grad is None for p in net.traced.origin.parameters())


def test_the_reward_is_minus_the_loss_unless_one_is_given() -> None:
    net = net_of(Nested, estimator="reinforce")
    optimizer = net.arch_optimizer()
    x, y = batch()
    with net.arch_step():
        loss = loss_of(net, x, y)
        net.objective(loss).backward()
    optimizer.step()
    assert float(net.state_dict()["arch.state.baseline"]) == -loss.item()


def test_the_reward_has_the_cost_weighed_in_as_in_the_paper() -> None:
    cost = nasfx.Params(target=40.0, loss="mul#power")
    net = net_of(Chain, estimator="reinforce", objective=cost, seed=3)
    optimizer = net.arch_optimizer()
    rewards: list[float] = []
    for _ in range(5):
        with net.arch_step():
            net.objective(loss_of(net, *batch()), reward=0.8).backward()
            rewards.append(0.8 * (40 / net.space.costs["params"](net.path)) ** 0.1)
    optimizer.step()
    baseline = float(net.state_dict()["arch.state.baseline"])
    assert abs(baseline - sum(rewards) / 5) < 1e-14
    assert len(set(rewards)) > 1


def test_a_step_without_draws_does_nothing() -> None:
    net = net_of(Nested, estimator="reinforce")
    optimizer = net.arch_optimizer()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer.step()
    state = net.state_dict()
    assert all(torch.equal(v, state[k]) or "baseline" in k for k, v in before.items())
    assert state["arch.state.baseline"].isnan()


class Small(nn.Module):
    """Two choices, one within a candidate of the other; 4 subnets."""

    def __init__(self) -> None:
        super().__init__()
        inner = LayerChoice([nn.Tanh(), nn.ReLU(), nn.Identity()], label="inner")
        self.outer = LayerChoice(
            {"plain": nn.Linear(3, 2), "holds": nn.Sequential(inner, nn.Linear(3, 2))},
            label="outer",
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x)


def test_the_policy_gradient_is_unbiased() -> None:
    """The mean over draws of R d(-log p), against the gradient of -E R over all architectures."""
    net = net_of(Small, estimator="reinforce", seed=4)
    arch, alphas = net._arch, alphas_of(net)
    rewards = {a: 1.0 + i**2 for i, a in enumerate(net.space.enumerate())}
    gradients: dict[str, Tensor] = {}

    def gradient() -> Tensor:
        """Of the drawn path; it depends on nothing else."""
        key = repr(arch.state.drawn)
        if key not in gradients:
            loss = net.strategy.surrogate(arch, net.space, rewards[net.path])
            found = torch.autograd.grad(
                loss, list(alphas.values()), allow_unused=True, materialize_grads=True
            )
            gradients[key] = torch.cat(found)
        return gradients[key]

    n = 20_000
    found: list[Tensor] = []
    for _ in range(n):
        arch.state.drawn = net.strategy.draw(arch, net.space)
        found.append(gradient())
    samples = torch.stack(found)
    expectation = torch.stack([-log_p(net, a, alphas).exp() * r for a, r in rewards.items()]).sum()
    expected = torch.cat(torch.autograd.grad(expectation, list(alphas.values())))
    errors = samples.std(0) / n**0.5
    assert ((samples.mean(0) - expected).abs() < 4 * errors).all()
    assert (expected.abs() > 10 * errors).any()


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "three"}, r"Proxyless\(gate='three'\): it must be one of"),
        ({"estimator": "ppo"}, r"Proxyless\(estimator='ppo'\): it must be one of"),
        ({"arch_every": 0}, r"arch_every=0"),
        ({"draws": 0}, r"draws=0"),
        ({"estimator": "reinforce", "gate": "two"}, r"leave gate and skip_zero as they are"),
        ({"estimator": "reinforce", "skip_zero": True}, r"leave gate and skip_zero"),
    ],
)
def test_options_that_do_not_go(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        Proxyless(**options)


def test_the_schedule_follows_the_options() -> None:
    assert (Proxyless().schedule.every, Proxyless(arch_every=5).schedule.every) == (1, 5)
    assert (Proxyless().schedule.draws, Proxyless(draws=3).schedule.draws) == (1, 1)
    schedule = Proxyless(estimator="reinforce", draws=3).schedule
    assert (schedule.draws, schedule.same_batch) == (3, True)
