"""FBNet: gradients of the sampled mixture, its cost, noise, temperature, and what is found."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nasfx
from nasfx import Architecture, FBNet, InputChoice, LayerChoice, SearchError, Supernet
from tests.strategies.nets import (
    Cell,
    Chain,
    Nested,
    Scale,
    Skips,
    batch,
    built,
    gate_gradients,
    loss_of,
    spread,
    subset_probabilities,
)

NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "nested and tied": Nested,
    "one input": lambda: Skips(1),
    "two inputs": lambda: Skips(2),
    "mean of two": lambda: Skips(2, "mean"),
    "any inputs": lambda: Skips(None),
    "mean of any": lambda: Skips(None, "mean"),
}
FACTORS = {"a": 1.0, "b": 10.0, "c": 100.0}


def net_of(
    kind: Callable[[], nn.Module], *, seed: int = 0, cost: Any = None, **options: Any
) -> Supernet:
    """With alphas that are far from equal, and a temperature that shows."""
    options = {"temperature": 1.7} | options
    net = nasfx.transform(
        built(kind), FBNet(**options), seed=seed, objective=cost, example_inputs=batch()[0]
    )
    spread(net, seed=1)
    return net


def noise_of(net: Supernet) -> dict[str, Tensor]:
    return dict(net.get_submodule("arch.state.noise").named_buffers())


def alphas_of(net: Supernet) -> dict[str, nn.Parameter]:
    return {n.removeprefix("arch."): p for n, p in net.named_parameters() if n.startswith("arch.")}


def temperature_of(net: Supernet) -> float:
    return float(net.state_dict()["arch.state.temperature"])


def logits_of(net: Supernet) -> dict[str, Tensor]:
    noise = noise_of(net)
    return {k: (p.detach() + noise[k]) / temperature_of(net) for k, p in alphas_of(net).items()}


# -- soft -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", [None, nasfx.Params(loss="fbnet-mul")], ids=["loss", "cost"])
@pytest.mark.parametrize("name", [*NETS, "cell"])
def test_gradients_are_those_of_finite_differences(name: str, cost: Any) -> None:
    net = net_of({**NETS, "cell": Cell}[name], cost=cost)
    x, y = batch()
    epsilon = 1e-5
    for _ in range(3):
        with net.arch_step():
            net.objective(loss_of(net, x, y)).backward()
            for label, alpha in alphas_of(net).items():
                differences = torch.zeros_like(alpha)
                for i in range(len(alpha)):
                    values: list[float] = []
                    with torch.no_grad():
                        for move in (epsilon, -epsilon):
                            alpha[i] += move
                            values.append(float(net.objective(loss_of(net, x, y))))
                            alpha[i] -= move
                    differences[i] = (values[0] - values[1]) / (2 * epsilon)
                assert alpha.grad is not None
                error = (alpha.grad - differences).norm() / differences.norm().clamp_min(1e-3)
                assert float(error) <= 1e-6, label
                if label != "node1":  # both of whose inputs are always chosen
                    assert differences.norm() > 0
        net.zero_grad()


def _law(choice: Any, logits: Tensor, decision: Any) -> Tensor:
    if choice.kind == "layer":
        return logits.softmax(0)[choice.candidates.index(decision)]
    if choice.n_chosen is None:
        p = logits.sigmoid()
        return torch.stack([p[i] if i in decision else 1 - p[i] for i in range(len(p))]).prod()
    values = list(choice.values())
    p = torch.softmax(torch.stack([logits[list(s)].sum() for s in values]), 0)
    return p[values.index(tuple(decision))]


@pytest.mark.parametrize("name", NETS)
def test_the_expected_cost_is_that_of_the_sample(name: str) -> None:
    """Summed over all architectures, under the law that the step's weights are."""
    net = net_of(NETS[name], cost=nasfx.Params(target=100.0))

    def expected(logits: dict[str, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for arch in net.space.enumerate():
            p = [_law(net.space[k], logits[k], arch.decision(k)) for k in arch]
            total = total + torch.stack(p).prod() * net.space.costs["params"](arch)
        return total

    values: list[float] = []
    for _ in range(3):
        with net.arch_step():
            logits = logits_of(net)
            found = net.expected_cost()["params"].detach()
        torch.testing.assert_close(found, expected(logits), rtol=1e-12, atol=0)
        values.append(float(found))
    assert len(set(values)) == 3
    torch.testing.assert_close(
        net.expected_cost()["params"].detach(),
        expected({k: p.detach() / 1.7 for k, p in alphas_of(net).items()}),
        rtol=1e-12,
        atol=0,
    )


def _factors() -> nn.Module:
    return nn.Sequential(
        LayerChoice({k: Scale(v) for k, v in FACTORS.items()}, label="x"), nn.Identity()
    ).append(nn.Linear(1, 1))


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_the_mixture_and_the_cost_have_the_very_same_weights(hard: bool) -> None:
    """A candidate costs what it multiplies with, so output and cost are one number."""
    model = _factors().double()
    linear = model[2]
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.bias.fill_(0.0)
    one = torch.ones(1, 1, dtype=torch.float64)
    cost = nasfx.CustomCost(costs={"x": FACTORS}, target=5.0)
    net = nasfx.transform(model, FBNet(hard=hard), objective=cost, example_inputs=one)
    spread(net)
    (alpha,) = net.arch_parameters()
    seen: set[float] = set()
    for step in (net.arch_step, net.weight_step) * 20:
        with step():
            output, found = net(one).sum(), net.expected_cost()["custom"]
            torch.testing.assert_close(output, found, rtol=1e-14, atol=0)
            if hard:
                assert found.item() in FACTORS.values()
            if step == net.arch_step:
                gradients = [torch.autograd.grad(v, alpha)[0] for v in (output, found)]
                torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)
                assert gradients[0].abs().max() > 0
        seen.add(float(found.detach()))
    assert len(seen) == (3 if hard else 40)


# -- hard -----------------------------------------------------------------------------------------


def _hard_decisions(net: Supernet) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for label, logits in logits_of(net).items():
        choice = net.space[label]
        if choice.kind == "layer":
            found[label] = choice.candidates[int(logits.argmax())]
        elif choice.n_chosen is None:
            found[label] = tuple(torch.nonzero(logits >= 0).flatten().tolist())
        else:
            found[label] = tuple(sorted(logits.topk(choice.n_chosen).indices.tolist()))
    return found


@pytest.mark.parametrize("name", NETS)
def test_the_straight_through_gradient(name: str) -> None:
    """J^T b / temperature at the noisy logits, b_k = <o_k, dL/do>; the gate runs one path."""
    net = net_of(NETS[name], hard=True, seed=3)
    model = net.traced.origin
    x, y = batch()
    seen: set[str] = set()
    for _ in range(12):
        with net.arch_step():
            decisions, logits = _hard_decisions(net), logits_of(net)
            loss = loss_of(net, x, y)
            loss.backward()
        seen.add(repr(decisions))
        with nasfx.activated(model, decisions), torch.no_grad():
            torch.testing.assert_close(loss.detach(), loss_of(model, x, y), rtol=1e-13, atol=0)
        b = gate_gradients(model, decisions, x, y)
        for label, alpha in alphas_of(net).items():
            choice = net.space[label]
            if label not in b:  # inside a candidate of weight 0
                assert alpha.grad is not None
                assert not alpha.grad.any()
                continue
            z = logits[label].clone().requires_grad_()
            if choice.kind == "layer":
                p = z.detach().softmax(0)
                expected = p * (b[label] - p @ b[label])
            else:
                (expected,) = torch.autograd.grad(
                    subset_probabilities(z, choice.n_chosen), z, b[label]
                )
            torch.testing.assert_close(
                alpha.grad,
                expected / 1.7,
                rtol=1e-10,
                atol=1e-12,
                msg=lambda m, w=label: f"{w}: {m}",
            )
        net.zero_grad()
    assert len(seen) > 3


def test_the_straight_through_gradient_of_the_empty_mean() -> None:
    """No input chosen: the output is zeros and the gradient stays of the size of its terms."""
    net = net_of(lambda: Skips(None, "mean"), hard=True)
    with torch.no_grad():
        alphas_of(net)["pick"].fill_(-50.0)
    with net.arch_step():
        assert _hard_decisions(net)["pick"] == ()
        loss_of(net, *batch()).backward()
    gradient = alphas_of(net)["pick"].grad
    assert gradient is not None
    assert gradient.abs().max() < 1


# -- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weight", "arch"])
def test_noise_stays_within_a_step_and_is_none_outside(kind: str) -> None:
    net = net_of(Nested)
    step = net.weight_step if kind == "weight" else net.arch_step
    x, _ = batch()
    with torch.no_grad():
        outside = net(x)
    seen: list[Tensor] = []
    for _ in range(3):
        with step():
            assert all(v.abs().min() > 0 for v in noise_of(net).values())
            first, again = net(x).detach(), net(x).detach()
        assert torch.equal(first, again)
        seen.append(first)
        assert not any(v.any() for v in noise_of(net).values())
        generator = net.state_dict()["arch.state.generator"]
        assert torch.equal(net(x), outside)
        assert torch.equal(net.state_dict()["arch.state.generator"], generator)
    seen.append(outside)
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_an_error_within_a_step_leaves_no_noise() -> None:
    net = net_of(Chain)
    with pytest.raises(KeyError), net.arch_step():
        raise KeyError
    assert not any(v.any() for v in noise_of(net).values())


def test_without_noise_the_weights_are_those_of_the_cooled_alphas() -> None:
    net = net_of(Chain)
    model = net.traced.origin
    x, _ = batch()
    weights = {k: (p / 1.7).softmax(0) for k, p in alphas_of(net).items()}
    h = torch.tanh(model.stem(x))
    for label, choice in (("first", model.first), ("second", model.second)):
        h = sum(
            w * choice.get_submodule(name)(h)
            for w, name in zip(weights[label], choice.candidates, strict=True)
        )
    torch.testing.assert_close(net(x), model.head(h), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("strategy_seed", [0, 5])
def test_the_same_seed_gives_the_same_noise(strategy_seed: int) -> None:
    def run(seed: int) -> list[Tensor]:
        net = net_of(Nested, seed=seed)
        found: list[Tensor] = []
        for step in (net.weight_step, net.arch_step):
            with step():
                found += [v.clone() for v in noise_of(net).values()]
        return found

    torch.manual_seed(1)
    one = run(strategy_seed)
    torch.manual_seed(2)
    two, other = run(strategy_seed), run(strategy_seed + 1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _many() -> nn.Module:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = LayerChoice({k: Scale(v) for k, v in FACTORS.items()}, label="op")
            self.any = InputChoice(3, None, label="any")
            self.head = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.op(x)
            return self.head(self.any([x, x * 2, x * 3]))

    return Many()


def test_the_noise_has_the_law_of_gumbel() -> None:
    """argmax(alpha + g) has the law softmax(alpha); for any subset alpha + g > 0 has sigmoid's."""
    net = net_of(_many, seed=2)
    n = 4000
    largest, taken = torch.zeros(3), torch.zeros(3)
    for _ in range(n):
        with net.weight_step():
            logits = logits_of(net)
        largest[logits["op"].argmax()] += 1 / n
        taken += (logits["any"] > 0) / n
    alphas = {k: p.detach() for k, p in alphas_of(net).items()}
    for found, p in ((largest, alphas["op"].softmax(0)), (taken, alphas["any"].sigmoid())):
        assert ((found - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


# -- the temperature, and what is saved -----------------------------------------------------------


def test_the_temperature_is_annealed_after_every_epoch_and_saved() -> None:
    net = nasfx.transform(built(Chain), "fbnet")
    assert temperature_of(net) == 5.0
    for epoch in range(1, 4):
        net.end_epoch()
        assert math.isclose(temperature_of(net), 5.0 * math.exp(-0.045 * epoch), rel_tol=1e-14)
    net = net_of(Chain, temperature=2.0, anneal=0.5)
    net.end_epoch()
    assert temperature_of(net) == 1.0
    other = net_of(Chain, temperature=9.0)
    other.load_state_dict(net.state_dict())
    assert temperature_of(other) == 1.0


def test_noise_is_not_in_the_state() -> None:
    net = net_of(Chain)
    with net.weight_step():
        keys = {k for k in net.state_dict() if k.startswith("arch.")}
    expected = {"arch.first", "arch.second", "arch.state.generator", "arch.state.temperature"}
    assert keys == expected


def _train(net: Supernet, steps: int) -> list[float]:
    weights = torch.optim.SGD(net.weight_parameters(), 0.05)
    arch = torch.optim.SGD(net.arch_parameters(), 0.5)
    losses: list[float] = []
    for i in range(steps):
        with net.arch_step():
            loss = net.objective(loss_of(net, *batch(100 + i)))
            loss.backward()
        arch.step()
        arch.zero_grad()
        with net.weight_step():
            loss_of(net, *batch(i)).backward()
        weights.step()
        weights.zero_grad()
        net.end_epoch()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_a_copy_goes_on_as_the_net_does(how: str, hard: bool) -> None:
    net = net_of(Nested, cost=nasfx.Params(target=50.0), hard=hard)
    _train(net, 4)
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        other = net_of(Nested, cost=nasfx.Params(target=50.0), hard=hard, seed=9)
        other.load_state_dict(net.state_dict())
    ours = {id(p) for p in net.parameters()}
    assert not any(id(p) in ours for p in other.parameters())
    assert _train(net, 4) == _train(other, 4)
    state = other.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_two_nets_of_one_model_share_its_weights_and_nothing_else() -> None:
    model = built(Nested)
    one, two = (nasfx.transform(model, FBNet(temperature=t)) for t in (1.0, 3.0))
    spread(two)
    own = dict(model.named_parameters())
    for net in (one, two):
        assert all(p is own[n] for n, p in net.named_parameters() if not n.startswith("arch."))
    kept = {k: v.clone() for k, v in two.state_dict().items() if k.startswith("arch.")}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    _train(one, 3)
    with one.weight_step():
        assert not any(v.any() for v in noise_of(two).values())
    state = two.state_dict()
    assert all(torch.equal(state[k], v) for k, v in kept.items())
    assert any(not torch.equal(state[k], v) for k, v in before.items())


# -- what is found --------------------------------------------------------------------------------


def test_draws_follow_the_softmax_of_the_alphas() -> None:
    net = net_of(Chain, seed=3)
    n = 3000
    counts = {"first": Counter[str](), "second": Counter[str]()}
    for _ in range(n):
        arch = net.sample()
        for label in counts:
            counts[label][arch[label]] += 1
    for label, counted in counts.items():
        p = alphas_of(net)[label].detach().softmax(0).tolist()
        for name, q in zip(net.space[label].candidates, p, strict=True):
            assert abs(counted[name] / n - q) < 4 * (q * (1 - q) / n) ** 0.5


def test_candidates_of_mixtures_alone_are_never_drawn() -> None:
    net = net_of(Cell)
    with torch.no_grad():
        for label, alpha in alphas_of(net).items():
            if not label.startswith("node"):
                alpha[0] = 50.0
    for _ in range(50):
        arch = net.sample()
        assert not any(v == "none" for v in arch.values())
    assert not any(v == "none" for v in net.derive().values())


@pytest.mark.parametrize("n", [0, 1, 6, 200])
def test_the_best_of_a_few_samples_is_returned(n: int) -> None:
    net = net_of(Chain, final_samples=n)
    asked: list[Architecture] = []

    def evaluate(arch: Architecture) -> float:
        asked.append(arch)
        return -abs(hash(arch) % 1000 - 500)

    best = net.conclude(evaluate)
    assert len(asked) == len(set(asked)) <= n + 1
    assert net.derive() in asked
    assert evaluate(best) == max(map(evaluate, list(asked)))
    if n == 200:
        assert set(asked) == set(net.space.enumerate())


def test_only_what_keeps_within_the_bounds_is_evaluated() -> None:
    net = net_of(Chain, final_samples=40, cost=nasfx.Params(max=60.0))
    costs = net.space.costs["params"]
    fitting = {a for a in net.space.enumerate() if costs(a) <= 60}
    assert 0 < len(fitting) < net.space.size
    with torch.no_grad():  # the most probable ones do not fit
        alphas_of(net)["first"].copy_(torch.tensor([1.0, 0.9, 0.0]))
        alphas_of(net)["second"].copy_(torch.tensor([0.5, 0.0, 0.2]))
    asked: set[Architecture] = set()
    best = net.conclude(lambda arch: asked.add(arch) or costs(arch))
    assert asked <= fitting
    assert best in fitting
    assert len(asked) > 1


def test_a_label_that_is_a_keyword_is_refused() -> None:
    with pytest.raises(nasfx.SpaceError, match=r"label 'in' is reserved: .* Python keyword"):
        nasfx.transform(nn.Sequential(LayerChoice([nn.Tanh(), nn.ReLU()], label="in")), "fbnet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, r"FBNet\(temperature=0\): it must be a positive number"),
        ({"temperature": -1.0}, r"temperature=-1.0"),
        ({"temperature": math.inf}, r"temperature=inf"),
        ({"temperature": math.nan}, r"temperature=nan"),
        ({"temperature": "5"}, r"temperature='5'"),
        ({"anneal": 0.0}, r"FBNet\(anneal=0.0\): it must be a positive number"),
        ({"final_samples": -1}, r"FBNet\(final_samples=-1\): it must be a whole number"),
        ({"recalibrate": -1}, r"recalibrate=-1\): it must be a whole number"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        FBNet(**options)


def test_the_start_and_the_optimizer_are_the_papers() -> None:
    net = nasfx.transform(built(Chain), "fbnet")
    assert not any(p.any() for p in net.arch_parameters())
    optimizer = net.arch_optimizer()
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.01, 5e-4)
    assert (FBNet().final_samples, FBNet().schedule.every) == (6, 0)
