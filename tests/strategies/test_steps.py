"""Weight steps and arch steps, for every strategy: who gets a gradient, and what is restored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nasfx
from nasfx import LayerChoice, SearchError
from tests.strategies.nets import (
    SAMPLED,
    STRATEGIES,
    Cell,
    Chain,
    Nested,
    Norms,
    Skips,
    batch,
    built,
    loss_of,
    on_path,
    spread,
    with_gradient,
)

KINDS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "nested": Nested,
    "norms": Norms,
    "skips": Skips,
    "any skips": lambda: Skips(None),
    "cell": Cell,
}


@pytest.mark.parametrize("strategy", SAMPLED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_step_gives_gradients_on_the_path_and_none_elsewhere(
    kind: str, strategy: str
) -> None:
    model = built(KINDS[kind])
    net = nasfx.transform(model, strategy, seed=5)
    seen = set()
    for _ in range(25):
        with net.weight_step():
            loss_of(net, *batch()).backward()
        found = with_gradient(model)
        path = net.path
        net.zero_grad()
        seen.add(repr(path))
        assert found == on_path(model, path), path
        assert all(p.grad is None for p in net.arch_parameters())
    assert len(seen) > 2


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["chain", "nested", "skips", "cell"])
def test_an_arch_step_gives_weights_no_gradient(kind: str, strategy: str) -> None:
    model = built(KINDS[kind])
    net = nasfx.transform(model, strategy)
    spread(net)
    for _ in range(10):
        with net.arch_step():
            net.objective(loss_of(net, *batch())).backward()
        assert all(p.grad is None for p in model.parameters())
    if strategy in ("darts", "fbnet", "proxyless"):
        # Both inputs of node1 are always chosen, whatever its alphas are.
        alphas = {n: p for n, p in net.arch.named_parameters() if n != "node1"}
        assert all(p.grad is not None and p.grad.any() for p in alphas.values())


@pytest.mark.parametrize("strategy", SAMPLED)
@pytest.mark.parametrize("kind", ["nested", "any skips", "norms"])
def test_momentum_and_decay_do_not_move_what_is_off_the_path(kind: str, strategy: str) -> None:
    model = built(KINDS[kind])
    net = nasfx.transform(model, strategy, seed=2)
    optimizer = torch.optim.SGD(
        net.weight_parameters(), 0.05, 0.9, weight_decay=1e-2, nesterov=True
    )
    arch_optimizer = net.arch_optimizer()
    paths = set()
    for _ in range(20):
        with net.arch_step():
            net.objective(loss_of(net, *batch(1))).backward()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        arch_optimizer.step()
        arch_optimizer.zero_grad()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        alphas = [p.detach().clone() for p in net.arch_parameters()]
        with net.weight_step():
            loss_of(net, *batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
        now = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert now <= on_path(model, net.path)[0], net.path
        assert all(torch.equal(p, a) for p, a in zip(net.arch_parameters(), alphas, strict=True))
        assert now
        paths.add(net.path)
    assert len(paths) > 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_the_user_froze_stays_frozen(strategy: str) -> None:
    model = built(Chain)
    model.stem.requires_grad_(False)
    net = nasfx.transform(model, strategy)
    frozen_alpha = net.arch_parameters()[0] if net.arch_parameters() else None
    if frozen_alpha is not None:
        frozen_alpha.requires_grad_(False)
    for step in (net.weight_step, net.arch_step, net.weight_step):
        with step():
            net_loss = loss_of(net, *batch())
            (net.objective(net_loss) if step == net.arch_step else net_loss).backward()
            assert not model.stem.weight.requires_grad
        assert not model.stem.weight.requires_grad
        assert model.head.weight.requires_grad
        if frozen_alpha is not None:
            assert not frozen_alpha.requires_grad
            assert frozen_alpha.grad is None
            assert net.arch_parameters()[1].requires_grad
    assert model.stem.weight.grad is None
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["weight", "arch"])
def test_gradients_are_switched_back_on_after_an_error(kind: str, strategy: str) -> None:
    net = nasfx.transform(built(Chain), strategy)
    before = {n: p.requires_grad for n, p in net.named_parameters()}
    step = net.weight_step if kind == "weight" else net.arch_step

    def failing() -> None:
        with step():
            frozen = net.arch_parameters() if kind == "weight" else net.weight_parameters()
            assert not any(p.requires_grad for p in frozen)
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        failing()
    assert {n: p.requires_grad for n, p in net.named_parameters()} == before
    with net.arch_step():  # and the next step is no nested one
        pass


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_steps_do_not_nest(strategy: str) -> None:
    net = nasfx.transform(built(Chain), strategy)
    steps = {"weight": net.weight_step, "arch": net.arch_step}
    for outer, inner in (("weight", "arch"), ("arch", "weight"), ("weight", "weight")):
        with steps[outer]():
            flags = [p.requires_grad for p in net.parameters()]
            with pytest.raises(SearchError, match=rf"{inner} step.* inside an? {outer} step"):  # noqa: SIM117
                with steps[inner]():
                    pass
            assert [p.requires_grad for p in net.parameters()] == flags
            loss_of(net, *batch())
    with net.arch_step():
        net.objective(loss_of(net, *batch())).backward()


@pytest.mark.parametrize("strategy", SAMPLED)
def test_a_weight_step_runs_one_candidate_of_each_choice(strategy: str) -> None:
    model = built(Nested)
    net = nasfx.transform(model, strategy, seed=1)
    forward: list[str] = []
    backward: list[str] = []
    names = {id(p): n.removesuffix(".weight") for n, p in model.named_parameters()}

    def hook(module: nn.Linear, _: Any, output: Tensor) -> None:
        name = names[id(module.weight)]
        forward.append(name)
        output.register_hook(lambda grad: backward.append(name))

    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(hook)
    eager: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: eager.append(name))
    seen = set()
    for _ in range(25):
        forward.clear(), backward.clear(), eager.clear()
        with net.weight_step():
            loss_of(net, *batch()).backward()
        with nasfx.activated(model, net.path), torch.no_grad():
            model(batch()[0])
        assert forward == eager
        assert sorted(backward) == sorted(eager)
        seen.add(net.path)
    assert len(seen) > 5


# -- sameness -------------------------------------------------------------------------------------


def _run(strategy: str, seed: int) -> tuple[list[str], dict[str, Tensor]]:
    model = built(Nested)
    net = nasfx.transform(model, strategy, seed=seed)
    weights = torch.optim.SGD(net.weight_parameters(), 0.05, 0.9)
    arch = net.arch_optimizer(lr=0.05)
    paths = []
    for i in range(12):
        with net.arch_step():
            net.objective(loss_of(net, *batch(100 + i))).backward()
        arch.step()
        arch.zero_grad()
        with net.weight_step():
            loss_of(net, *batch(i)).backward()
        weights.step()
        weights.zero_grad()
        paths.append(repr(net.path) if net.strategy.samples else "")
    return paths, {k: v.clone() for k, v in net.state_dict().items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_seed_gives_the_same_run_bit_for_bit(strategy: str) -> None:
    torch.manual_seed(1)
    paths, state = _run(strategy, 7)
    torch.manual_seed(2)  # nothing follows the global generator
    global_state = torch.get_rng_state()
    again_paths, again = _run(strategy, 7)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert paths == again_paths
    assert state.keys() == again.keys()
    for key, value in state.items():
        assert torch.equal(value, again[key]), key
    other_paths, other = _run(strategy, 8)
    if strategy in ("darts", "fbnet"):
        assert any(not torch.equal(v, other[k]) for k, v in state.items() if k.startswith("arch."))
    else:
        assert paths != other_paths


VARIANTS = {
    **{name: name for name in STRATEGIES},
    "hard": nasfx.FBNet(hard=True),
    "two": nasfx.Proxyless(gate="two"),
    "full": nasfx.Proxyless(gate="full"),
    "reinforce": nasfx.Proxyless(estimator="reinforce"),
    "fair": nasfx.SinglePath(fair=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_continues_from_its_state_dicts_bit_for_bit(variant: str) -> None:
    def made() -> tuple[nasfx.Supernet, torch.optim.Optimizer, torch.optim.Optimizer]:
        net = nasfx.transform(built(Nested), VARIANTS[variant], seed=3)
        weights = torch.optim.SGD(net.weight_parameters(), 0.05, 0.9)
        return net, weights, net.arch_optimizer(lr=0.05)

    def run(
        net: nasfx.Supernet, weights: torch.optim.Optimizer, arch: torch.optim.Optimizer,
        steps: range,
    ) -> None:  # fmt: skip
        for i in steps:
            with net.arch_step():
                net.objective(loss_of(net, *batch(100 + i))).backward()
            arch.step()
            arch.zero_grad()
            with net.weight_step():
                loss_of(net, *batch(i)).backward()
            weights.step()
            weights.zero_grad()
            if i % 3 == 2:
                net.end_epoch()

    whole, first, second = made(), made(), made()
    run(*whole, range(9))
    run(*first, range(5))
    for new, old in zip(second, first, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    run(*second, range(5, 9))
    expected, found = whole[0].state_dict(), second[0].state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert isinstance(value, Tensor)
        assert torch.equal(value, found[key]), key
    assert repr(whole[2].state_dict()) == repr(second[2].state_dict())


@pytest.mark.parametrize("strategies", [("proxyless", "single-path"), ("darts", "proxyless")])
def test_two_nets_of_one_model_share_its_weights_and_nothing_else(
    strategies: tuple[str, str],
) -> None:
    model = built(Nested)
    one, two = (nasfx.transform(model, s, seed=i) for i, s in enumerate(strategies))
    own = dict(model.named_parameters())
    for net in (one, two):
        assert all(p is own[n] for n, p in net.named_parameters() if not n.startswith("arch."))
    two.eval()
    arch = {k: v.clone() for k, v in two.state_dict().items() if k.startswith("arch.")}
    optimizer = torch.optim.SGD(one.parameters(), 0.1)
    for step in (one.arch_step, one.weight_step, one.arch_step):
        with step():
            loss_of(one, *batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(two.state_dict()[k], v) for k, v in arch.items())
    assert not any(m.training for m in two.modules())
    assert all(m.training for m in one.modules())
    assert all(m.training for m in model.modules())
    with one.weight_step(), two.arch_step():  # steps of two nets are no nested ones
        pass
    state = one.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in two.state_dict().items() if "arch." not in k)


# -- the whole of it ------------------------------------------------------------------------------


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Blank(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _toy() -> nn.Module:
    features = {"blank": Blank(), "same": nn.Identity(), "square": Square()}
    return nn.Sequential(
        LayerChoice(
            {name: nn.Sequential(f, nn.Linear(1, 1)) for name, f in features.items()}, label="x"
        )
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_candidate_that_is_plainly_best_is_found(strategy: str) -> None:
    """y = x**2: no other candidate explains any of it."""
    found = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        net = nasfx.transform(built(_toy, seed), strategy, seed=seed)
        weights = torch.optim.SGD(net.weight_parameters(), 0.1, 0.9)
        # A controller's rewards are noisy: it must not settle before the weights are trained.
        arch = net.arch_optimizer(lr=0.005 if strategy == "enas" else 0.05)

        def loss(net: nn.Module = net, g: torch.Generator = generator) -> Tensor:
            x = 2 * torch.rand(16, 1, generator=g, dtype=torch.float64) - 1
            return ((net(x) - 3 * x * x) ** 2).mean()

        for i in range(80):
            if i >= 20:
                with net.arch_step():
                    net.objective(loss()).backward()
                arch.step()
                arch.zero_grad()
            with net.weight_step():
                loss().backward()
            weights.step()
            weights.zero_grad()

        def evaluate(arch: nasfx.Architecture, net: nasfx.Supernet = net) -> float:
            with net.forced(arch), torch.no_grad():
                return -float(loss(net, torch.Generator().manual_seed(0)))

        found.append(net.conclude(evaluate)["x"])
    assert found.count("square") >= 9, found
