"""`transform` and the Supernet: what forward runs, state, copies, errors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import nasfx
from nasfx import (
    Architecture,
    CheckpointError,
    InputChoice,
    LayerChoice,
    SearchError,
    SpaceError,
    Supernet,
    TraceError,
)
from tests.strategies.nets import (
    SAMPLED,
    STRATEGIES,
    WIDTH,
    Cell,
    Chain,
    Nested,
    Norms,
    Skips,
    batch,
    built,
    drawn,
    loss_of,
    set_draw,
    spread,
)

KINDS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "nested": Nested,
    "norms": Norms,
    "skips": Skips,
    "any skips": lambda: Skips(None),
    "cell": Cell,
}


def _state(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


# -- forward --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", SAMPLED)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_runs_the_current_path_and_never_draws(kind: str, strategy: str) -> None:
    model = built(KINDS[kind]).eval()
    net = nasfx.transform(model, strategy)
    x, _ = batch()
    for _ in range(4):
        before = _state(net)
        for _ in range(3):
            with nasfx.activated(model, net.path):
                assert torch.equal(net(x), model(x))
        after = net.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items())
        with net.weight_step():
            pass


@pytest.mark.parametrize("strategy", SAMPLED)
def test_every_path_equals_the_eager_model_also_in_train_mode(strategy: str) -> None:
    model = built(Nested)
    net = nasfx.transform(model, strategy)
    x, _ = batch()
    for arch in net.space.enumerate():
        set_draw(net, {label: arch.decision(label) for label in arch})
        assert net.path == arch
        with nasfx.activated(model, arch):
            assert torch.equal(net(x), model(x))


def test_before_the_first_draw_the_path_is_the_most_probable_one() -> None:
    for seed in range(6):
        net = nasfx.transform(built(Nested), "proxyless", seed=seed)
        assert net.path == net.derive()
    paths = {nasfx.transform(built(Nested), "proxyless", seed=s).path for s in range(6)}
    assert len(paths) > 1
    first = nasfx.transform(built(Chain), "single-path", seed=3).path
    assert first == {"first": "lin", "second": "bn"}


@pytest.mark.parametrize("strategy", SAMPLED)
def test_the_path_is_canonical_and_readable_in_a_step_and_after_it(strategy: str) -> None:
    net = nasfx.transform(built(Nested), strategy)
    labels = set()
    for step in (net.weight_step, net.arch_step) * 20:
        with step():
            within = net.path
            assert isinstance(within, Architecture)
            assert net.space.validate(within) == within
            every = drawn(net)
            assert set(every) == {"outer", "inner", "direct", "tied"}
            assert net.space.validate(every) == within
        assert net.path == within
        labels.add(frozenset(within))
    assert labels == {
        frozenset({"outer", "tied"}),
        frozenset({"outer", "tied", "inner"}),
        frozenset({"outer", "tied", "direct"}),
    }


def test_darts_has_no_path_and_draws_no_sample() -> None:
    net = nasfx.transform(built(Chain), "darts")
    with pytest.raises(SearchError, match=r"mixture of all candidates.*derive\(\)"):
        _ = net.path
    with pytest.raises(SearchError, match=r"draws no path"):
        net.sample()


@pytest.mark.parametrize("strategy", SAMPLED)
def test_sample_draws_another_architecture_and_keeps_the_path(strategy: str) -> None:
    net = nasfx.transform(built(Nested), strategy)
    path = net.path
    samples = [net.sample() for _ in range(30)]
    assert all(net.space.validate(s) == s for s in samples)
    assert len(set(samples)) > 5
    assert net.path == path


def test_proxyless_samples_from_its_probabilities() -> None:
    net = nasfx.transform(built(Chain), "proxyless")
    with torch.no_grad():
        net.arch.get_parameter("first").copy_(torch.tensor([0.0, 50.0, 0.0]))
        net.arch.get_parameter("second").copy_(torch.tensor([-50.0, 0.0, 0.0]))
    samples = [net.sample() for _ in range(30)]
    assert {s["first"] for s in samples} == {"deep"}
    assert {s["second"] for s in samples} == {"wide", "halved"}


# -- forced ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_forced_equals_the_eager_model_for_every_architecture(
    kind: str, strategy: str, training: bool
) -> None:
    model = built(KINDS[kind]).train(training)
    net = nasfx.transform(model, strategy)
    if strategy != "darts":
        with net.weight_step():
            pass
    x, y = batch()
    for arch in list(net.space.enumerate())[:24]:
        eager = copy.deepcopy(model)
        with nasfx.activated(eager, arch):
            expected = eager(x)
            ((expected - y) ** 2).mean().backward()
        with net.forced(dict(arch)) as given:
            assert given == arch
            found = net(x)
            ((found - y) ** 2).mean().backward()
        assert torch.equal(found, expected)
        for (name, a), (_, b) in zip(
            model.named_parameters(), eager.named_parameters(), strict=True
        ):
            assert (a.grad is None) == (b.grad is None), name
            assert a.grad is None or torch.equal(a.grad, b.grad), name
        for (name, a), (_, b) in zip(model.named_buffers(), eager.named_buffers(), strict=True):
            assert torch.equal(a, b), name
        net.zero_grad()


def test_forced_nests_wins_over_the_draw_and_ends_with_its_block() -> None:
    model = built(Chain).eval()
    net = nasfx.transform(model, "proxyless")
    x, _ = batch()
    a, b = {"first": "lin", "second": "wide"}, {"first": "skip", "second": "bn"}

    def eager(arch: Any) -> Tensor:
        with nasfx.activated(model, arch):
            return model(x)

    with net.weight_step():
        path = net.path
        with net.forced(a):
            assert torch.equal(net(x), eager(a))
            with net.forced(b):
                assert torch.equal(net(x), eager(b))
            assert torch.equal(net(x), eager(a))
        assert net.path == path
        assert torch.equal(net(x), eager(path))
    with pytest.raises(KeyError), net.forced(a):
        raise KeyError
    assert torch.equal(net(x), eager(path))
    assert not torch.equal(eager(a), eager(b))


def test_forced_follows_training_and_the_mode() -> None:
    model = built(Norms)
    net = nasfx.transform(model, "proxyless")
    x, _ = batch()
    with net.forced({"block": "a"}):
        first = net(x)
        with torch.no_grad():
            model.head.weight.mul_(2)
            model.head.bias.mul_(2)
        assert torch.equal(net(x), first * 2)
        net.eval()
        evaluated = net(x)
        model.eval()
        with nasfx.activated(model, {"block": "a"}):
            assert torch.equal(evaluated, model(x))
        assert not torch.allclose(evaluated, first * 2)


def test_forced_refuses_what_is_no_architecture() -> None:
    net = nasfx.transform(built(Chain), "darts")
    for arch, message in (
        ({"first": "lin"}, "no decision for 'second'"),
        ({"first": "lin", "second": "conv"}, "no candidate 'conv'"),
        ({"first": "lin", "second": "bn", "third": "x"}, "no choice has the label 'third'"),
    ):
        with pytest.raises(SpaceError, match=message), net.forced(arch):
            pass
    net(batch()[0])


# -- objective, probabilities, cost ---------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_objective_belongs_to_an_arch_step(strategy: str) -> None:
    net = nasfx.transform(built(Chain), strategy)
    x, y = batch()
    with pytest.raises(SearchError, match=r"outside of a step.*with net\.arch_step\(\)"):
        net.objective(loss_of(net, x, y))
    with net.weight_step(), pytest.raises(SearchError, match="in a weight step"):
        net.objective(loss_of(net, x, y))
    with net.arch_step():
        loss = loss_of(net, x, y)
        objective = net.objective(loss)
        if not net.strategy.rewarded:
            assert torch.equal(objective.detach(), loss.detach())
        objective.backward()
    assert all(p.grad is not None for p in net.arch_parameters())


def test_probabilities() -> None:
    net = nasfx.transform(built(lambda: Skips(2)), "proxyless")
    spread(net)
    p = net.probabilities()
    assert set(p) == {"block", "pick"}
    alpha = net.arch.get_parameter("block").detach()
    torch.testing.assert_close(p["block"], torch.exp(alpha) / torch.exp(alpha).sum())
    assert float(p["pick"].sum()) == pytest.approx(2)
    assert not any(v.requires_grad for v in p.values())
    uniform = nasfx.transform(built(lambda: Skips(2)), "single-path").probabilities()
    assert {k: v.tolist() for k, v in uniform.items()} == {
        "block": pytest.approx([1 / 3] * 3), "pick": [0.5] * 4,
    }  # fmt: skip
    anything = nasfx.transform(built(lambda: Skips(None)), "single-path").probabilities()
    assert anything["pick"].tolist() == [0.5] * 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_there_is_no_expected_cost_without_an_objective(strategy: str) -> None:
    assert nasfx.transform(built(Chain), strategy).expected_cost() == {}


def test_parameters_are_the_models_own_and_those_of_the_architecture() -> None:
    model = built(Nested)
    net = nasfx.transform(model, "darts")
    assert [id(p) for p in net.weight_parameters()] == [id(p) for p in model.parameters()]
    named = dict(net.named_parameters())
    labels = [n for n in named if n.startswith("arch.")]
    assert set(labels) == {"arch.outer", "arch.inner", "arch.direct", "arch.tied"}
    assert {id(named[n]) for n in labels} == {id(p) for p in net.arch_parameters()}
    assert len(net.arch_parameters()) == 4


# -- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_holds_the_models_keys_and_arch(kind: str, strategy: str) -> None:
    model = built(KINDS[kind])
    net = nasfx.transform(model, strategy)
    state = net.state_dict()
    own = {k: v for k, v in state.items() if not k.startswith("arch.")}
    assert own.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert value.data_ptr() == own[key].data_ptr(), key
    assert all(isinstance(v, Tensor) for v in state.values())
    assert state["arch.state.generator"].dtype == torch.uint8
    alphas = {k for k in state if k.startswith("arch.") and not k.startswith("arch.state.")}
    own_alphas = {f"arch.{n}" for n, _ in net.arch.named_parameters() if "state." not in n}
    assert alphas == own_alphas
    assert bool(alphas) == (strategy in ("darts", "fbnet", "proxyless"))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["nested", "any skips", "cell"])
def test_a_loaded_state_goes_on_as_the_saved_net_does(kind: str, strategy: str) -> None:
    net = nasfx.transform(built(KINDS[kind]), strategy, seed=1)
    spread(net)
    for _ in range(3):
        with net.weight_step():
            loss_of(net, *batch()).backward()
    state = _state(net)
    other = nasfx.transform(built(KINDS[kind], seed=9), strategy, seed=9)
    other.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    x, _ = batch()
    if not net.strategy.samples:
        assert torch.equal(net.eval()(x), other.eval()(x))
        return
    assert other.path == net.path
    for _ in range(12):
        with net.weight_step(), other.weight_step():
            assert other.path == net.path
            assert torch.equal(net(x), other(x))


def test_a_state_that_does_not_fit_is_refused() -> None:
    net = nasfx.transform(built(Chain), "proxyless")
    state = _state(net)
    with pytest.raises(RuntimeError, match=r"arch\.state\.path\.unknown"):
        net.load_state_dict({**state, "arch.state.path.unknown": torch.tensor([0])})
    with pytest.raises(RuntimeError, match=r"arch\.unknown"):
        net.load_state_dict({**state, "arch.unknown": torch.zeros(3)})
    for value in ([3], [-1], [0, 1], []):
        with pytest.raises(CheckpointError, match=r"no decision of 'first'"):
            net.load_state_dict({**state, "arch.state.path.first": torch.tensor(value)})
    without = {k: v for k, v in state.items() if k != "arch.state.generator"}
    with pytest.raises(RuntimeError, match=r"arch\.state\.generator"):
        net.load_state_dict(without)
    net.load_state_dict(state)


@pytest.mark.parametrize("value", [[7, 8], [0], [1, 1], [-1, 0], [0, 1, 2]])
def test_a_path_of_inputs_that_does_not_fit_is_refused(value: list[int]) -> None:
    net = nasfx.transform(built(Skips), "proxyless")
    state = _state(net)
    with pytest.raises(CheckpointError, match=r"'pick'"):
        net.load_state_dict({**state, "arch.state.path.pick": torch.tensor(value)})


def test_a_state_without_a_path_of_a_label_is_refused() -> None:
    net = nasfx.transform(built(Chain), "proxyless")
    state = _state(net)
    del state["arch.state.path.first"]
    with pytest.raises((RuntimeError, CheckpointError), match="first"):
        net.load_state_dict(state)


def _copied(net: Supernet) -> Supernet:
    return copy.deepcopy(net)


def _pickled(net: Supernet) -> Supernet:
    return pickle.loads(pickle.dumps(net))


def _saved(net: Supernet) -> Supernet:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [_copied, _pickled, _saved])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_compute_the_same_outputs_and_gradients(
    kind: str, strategy: str, copied: Callable[[Supernet], Supernet]
) -> None:
    net = nasfx.transform(built(KINDS[kind]), strategy, seed=2)
    spread(net)
    with net.weight_step():
        pass
    twin = copied(net)
    assert twin.space.size == net.space.size
    assert list(twin.state_dict()) == list(net.state_dict())
    storages, others = (
        {t.data_ptr() for t in (*n.parameters(), *n.buffers())} for n in (net, twin)
    )
    assert storages
    assert not storages & others
    x, y = batch()
    for kind_of_step in ("arch", "weight") * 4:
        for n in (net, twin):
            with n.arch_step() if kind_of_step == "arch" else n.weight_step():
                loss = loss_of(n, x, y)
                (n.objective(loss) if kind_of_step == "arch" else loss).backward()
        grads = {n: p.grad for n, p in net.named_parameters()}
        assert any(g is not None and g.any() for g in grads.values()) or not net.arch_parameters()
        for name, p in twin.named_parameters():
            a, b = grads[name], p.grad
            assert (a is None) == (b is None), name
            assert a is None or (b is not None and torch.equal(a, b)), name
        for n in (net, twin):
            n.zero_grad()
            with torch.no_grad():
                for p in n.parameters():
                    p.add_(0.01)
    # What hangs on the copy must be the copy's own.
    arch = net.space.sample(torch.Generator().manual_seed(0))
    for n in (net, twin):
        n.eval()
    with net.forced(arch), twin.forced(arch):
        assert torch.equal(net(x), twin(x))
    assert torch.equal(nasfx.finalize(net, arch)(x), nasfx.finalize(twin, arch)(x))
    with torch.no_grad():
        twin.get_submodule("head").weight.zero_()
        twin.get_submodule("head").bias.zero_()
    assert not net(x).eq(0).any()
    assert twin(x).eq(0).all()
    with twin.forced(arch):
        assert twin(x).eq(0).all()
    assert nasfx.finalize(twin, arch)(x).eq(0).all()
    twin.double()
    assert str(twin.graph) == str(net.graph)
    assert str(twin.history) == str(net.history)


@pytest.mark.parametrize("copied", [_copied, _pickled])
def test_a_copied_pair_of_model_and_net_stays_a_pair(copied: Callable[[Any], Any]) -> None:
    model = built(Chain)
    net = nasfx.transform(model, "darts")
    both = copied(nn.ModuleDict({"model": model, "net": net}))
    a, b = both["model"], both["net"]
    assert a.stem.weight is b.get_parameter("stem.weight")
    assert a.stem.weight is not model.stem.weight


# -- what others do to the net --------------------------------------------------------------------


def test_a_retraced_darts_net_keeps_its_gradients() -> None:
    net = nasfx.transform(built(Nested), "darts")
    spread(net)
    again = fx.symbolic_trace(net.graph_module)
    x, y = batch()
    loss_of(net, x, y).backward()
    expected = {n: p.grad for n, p in net.named_parameters()}
    net.zero_grad()
    loss_of(again, x, y).backward()
    found = dict(again.named_parameters())
    assert found.keys() == expected.keys()
    for name, p in found.items():
        assert torch.equal(p.grad, expected[name]), name


@pytest.mark.parametrize("strategy", SAMPLED)
@pytest.mark.parametrize("kind", ["chain", "skips", "nested", "cell"])
def test_retracing_a_sampled_net_is_refused(kind: str, strategy: str) -> None:
    net = nasfx.transform(built(KINDS[kind]), strategy)
    with pytest.raises(TraceError, match=r"must not be traced through"):
        fx.symbolic_trace(net.graph_module)


@pytest.mark.parametrize("kind", ["chain", "nested", "skips", "cell"])
def test_a_darts_net_compiles_as_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    net = nasfx.transform(built(KINDS[kind]), "darts")
    spread(net)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    x, y = batch()
    expected = loss_of(net, x, y)
    expected.backward()
    grads = {n: p.grad for n, p in net.named_parameters()}
    net.zero_grad()
    found = loss_of(compiled, x, y)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_conversions_move_model_and_net(strategy: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Nested()
    net = nasfx.transform(model, strategy)
    assert all(p.dtype == torch.float32 for p in net.arch_parameters())
    net.double()
    x, y = batch()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert all(p.dtype == torch.float64 for p in net.parameters())
    for step in (net.arch_step, net.weight_step):
        with step():
            loss = loss_of(net, x, y)
            (net.objective(loss) if step == net.arch_step else loss).backward()
    arch = net.space.sample(torch.Generator().manual_seed(0))
    with net.forced(arch), nasfx.activated(model, arch):
        assert torch.equal(net(x), model(x))
    model.float()
    assert net(x.float()).dtype == torch.float32
    with net.forced(arch):
        assert net(x.float()).dtype == torch.float32
    net.to(torch.float64)
    with net.forced(arch), nasfx.activated(model, arch):
        assert torch.equal(net(x), model(x))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_moving_to_another_device_moves_model_and_net(strategy: str) -> None:
    model = built(Norms)
    net = nasfx.transform(model, strategy)
    net.to("meta")
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert all(t.is_meta for t in net.parameters())
    assert net(torch.zeros(5, 3, dtype=torch.float64, device="meta")).shape == (5, 2)


def test_alphas_follow_the_models_precision() -> None:
    double = nasfx.transform(built(Chain), "darts")
    single = nasfx.transform(built(Chain).float(), "darts")
    assert {p.dtype for p in double.arch_parameters()} == {torch.float64}
    assert {p.dtype for p in single.arch_parameters()} == {torch.float32}
    assert {p.dtype for p in nasfx.transform(built(Chain).half(), "darts").arch_parameters()} == {
        torch.float32
    }
    for a, b in zip(double.arch_parameters(), single.arch_parameters(), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_modes_of_net_and_model_are_independent(strategy: str) -> None:
    model = built(Norms)
    net = nasfx.transform(model, strategy)
    net.eval()
    assert all(m.training for m in model.modules())
    assert not any(m.training for m in net.modules())
    model.eval()
    net.train()
    assert not any(m.training for m in model.modules())
    assert all(m.training for m in net.modules())
    assert nasfx.transform(model, strategy).training is False


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_users_model_stays_as_it_is(
    kind: str, strategy: str, untouched: Callable[[nn.Module], nn.Module]
) -> None:
    model = built(KINDS[kind])
    model.register_forward_hook(lambda *_: None)
    model.get_submodule("stem").register_buffer("note", torch.ones(2), persistent=False)
    next(model.parameters()).requires_grad_(False)
    loss_of(model, *batch()).backward()  # gradients are the user's, too
    model.eval()
    untouched(model)
    net = nasfx.transform(model, strategy, example_inputs=batch()[0])
    net.train()
    nasfx.search_space(net).sample()
    net.eval()
    with torch.no_grad():
        net(batch()[0])
    nasfx.finalize(net, net.space.sample(torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_copy_gives_independent_weights(
    strategy: str, untouched: Callable[[nn.Module], nn.Module]
) -> None:
    model = untouched(built(Norms))
    net = nasfx.transform(model, strategy, copy=True)
    assert not {id(p) for p in net.parameters()} & {id(p) for p in model.parameters()}
    before = _state(model)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in (net.arch_step, net.weight_step):
        with step():
            loss = loss_of(net, *batch())
            (net.objective(loss) if step == net.arch_step else loss).backward()
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(net.get_parameter("head.weight"), model.head.weight)


# -- train and eval code --------------------------------------------------------------------------


class TwoModes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.block = LayerChoice({"a": nn.Linear(WIDTH, WIDTH), "b": nn.Tanh()}, label="block")
        self.auxiliary = nn.Linear(WIDTH, 2)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        if self.training:
            return self.head(x) + self.auxiliary(x)
        return self.head(x)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_train_and_eval_code_follow_the_mode(strategy: str) -> None:
    model = built(TwoModes)
    net = nasfx.transform(model, strategy)
    assert set(net.histories) == {"train", "eval"}
    x, _ = batch()
    texts = set()
    for training in (True, False, True):
        model.train(training)
        net.train(training)
        texts.add(str(net.graph))
        for name in ("a", "b"):
            with nasfx.activated(model, {"block": name}), net.forced({"block": name}):
                assert torch.equal(net(x), model(x))
            if net.strategy.samples:
                set_draw(net, {"block": name})
                with nasfx.activated(model, {"block": name}):
                    assert torch.equal(net(x), model(x))
    assert len(texts) == 2
    assert any("auxiliary" in text for text in texts)
    assert list(net.state_dict())[: len(model.state_dict())] == list(model.state_dict())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("copied", [_copied, _pickled])
def test_copies_keep_both_modes(strategy: str, copied: Callable[[Supernet], Supernet]) -> None:
    net = nasfx.transform(built(TwoModes), strategy)
    twin = copied(net)
    x, _ = batch()
    for training in (False, True):
        net.train(training)
        twin.train(training)
        assert torch.equal(net(x), twin(x))
        with net.forced({"block": "b"}), twin.forced({"block": "b"}):
            assert torch.equal(net(x), twin(x))
    with torch.no_grad():
        twin.get_parameter("head.weight").zero_()
        twin.get_parameter("head.bias").zero_()
    assert twin.eval()(x).eq(0).all()
    assert not net.eval()(x).eq(0).any()


# -- errors of transform --------------------------------------------------------------------------


def test_a_model_without_a_choice_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"Sequential has no choice to search: mark one with"):
        nasfx.transform(nn.Sequential(nn.ReLU()), "darts")


@pytest.mark.parametrize(
    ("given", "offered"),
    [("dart", "darts"), ("single_path", "single-path"), ("Proxylessnas", "proxyless")],
)
def test_the_nearest_strategy_is_offered(given: str, offered: str) -> None:
    with pytest.raises(SearchError, match=rf"'{given}': did you mean '{offered}'\?"):
        nasfx.transform(built(Chain), given)


def test_what_is_no_strategy_is_refused() -> None:
    with pytest.raises(SearchError, match=r"neither a strategy's name .*'darts'.* nor an instance"):
        nasfx.transform(built(Chain), nasfx.Darts)  # type: ignore[arg-type]
    with pytest.raises(SearchError, match=r"no strategy is called 'zzz': there are 'darts'"):
        nasfx.transform(built(Chain), "zzz")


def test_verify_is_one_of_two() -> None:
    with pytest.raises(SearchError, match=r"verify='slow' must be 'fast' or 'off'"):
        nasfx.transform(built(Chain), "darts", verify="slow")
    x, _ = batch()
    on, off = (nasfx.transform(built(Chain), "darts", verify=v) for v in ("fast", "off"))
    assert torch.equal(on(x), off(x))


def test_a_child_named_arch_is_refused(untouched: Callable[[nn.Module], nn.Module]) -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.arch = nn.Linear(3, 3)
            self.block = LayerChoice([nn.ReLU(), nn.Tanh()], label="block")

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.arch(x))

    with pytest.raises(SpaceError, match=r"attribute `arch`"):
        nasfx.transform(untouched(Taken()), "darts")


class Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = LayerChoice({"same": nn.Linear(3, 3), "wider": nn.Linear(3, 5)}, label="b")

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).sum(-1)


def test_candidates_of_unlike_shapes_are_refused_with_the_line() -> None:
    with pytest.raises(SpaceError, match=r"\(6, 3\), \(6, 5\)") as error:
        nasfx.transform(Uneven(), "darts", example_inputs=torch.zeros(6, 3))
    message = str(error.value)
    line = Uneven.forward.__code__.co_firstlineno + 1
    assert f"test_supernet.py:{line}" in message
    assert "'b'" in message
    assert "candidate 1 differs" in message


def test_without_shapes_they_are_refused_at_the_first_forward() -> None:
    net = nasfx.transform(Uneven(), "darts")
    with pytest.raises(SearchError, match=r"choice 'b'.*candidate 1 differs: \(6, 3\), \(6, 5\)"):
        net(torch.zeros(6, 3))


def test_sampled_nets_take_candidates_of_unlike_shapes() -> None:
    model = Uneven()
    net = nasfx.transform(model, "single-path", example_inputs=torch.zeros(6, 3))
    x = torch.randn(6, 3)
    for name in ("same", "wider"):
        set_draw(net, {"b": name})
        with nasfx.activated(model, {"b": name}):
            assert torch.equal(net(x), model(x))


def test_proxyless_says_so_where_gates_would_need_one_shape() -> None:
    net = nasfx.transform(Uneven(), "proxyless")
    with pytest.raises(SearchError, match=r"choice 'b'.*differs"), net.arch_step():
        net(torch.zeros(6, 3)).sum().backward()
    with net.weight_step():
        net(torch.zeros(6, 3)).sum().backward()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_candidates_with_tuples_and_keywords(strategy: str) -> None:
    class Pair(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3)
            self.factor = factor

        def forward(
            self, x: Tensor, *, y: Tensor, scale: float
        ) -> tuple[Tensor, dict[str, Tensor]]:
            return self.lin(x) + y * scale, {"k": y * self.factor}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = LayerChoice([Pair(0.5), Pair(2.0)], label="pair")

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.pair(x, y=x * 2, scale=0.3)
            return a * b["k"]

    model = built(Net)
    net = nasfx.transform(model, strategy)
    x, _ = batch()
    outputs = []
    for name in "01":
        with nasfx.activated(model, {"pair": name}), net.forced({"pair": name}):
            assert torch.equal(net(x), model(x))
        with nasfx.activated(model, {"pair": name}):
            outputs.append(model.pair(x, y=x * 2, scale=0.3))
    if strategy == "darts":
        p = torch.softmax(net.arch.get_parameter("pair"), 0)
        first = p[0] * outputs[0][0] + p[1] * outputs[1][0]
        second = p[0] * outputs[0][1]["k"] + p[1] * outputs[1][1]["k"]
        torch.testing.assert_close(net(x), first * second, rtol=1e-12, atol=1e-14)
    with net.arch_step():
        net.objective(net(x).square().mean()).backward()
    if strategy != "enas":  # of whose parameters some are for later decisions
        assert all(p.grad is not None and p.grad.any() for p in net.arch_parameters())


# -- what is shown --------------------------------------------------------------------------------


def test_explain_shows_a_choice_before_and_after() -> None:
    net = nasfx.transform(built(Chain), "darts")
    text = nasfx.explain(net, "first")
    before, after = text.split("after lower-weighted-sum:")
    line = Chain.forward.__code__.co_firstlineno + 1
    assert text.startswith("choice 'first': lin, deep, skip\n  at first\n")
    assert f"nets.py:{line}" in before
    assert "as traced:\n  %first = call_module[first](" in before
    assert "mix" not in before
    assert "%gate_first = nasfx.ops.softmax_gate(%arch_first, label='first')" in after
    assert "%first = nasfx.ops.mix(%gate_first, [" in after
    assert "second" not in text.replace("test_", "")
    with pytest.raises(SpaceError, match=r"no choice has the label 'nope'.*'first'"):
        nasfx.explain(net, "nope")


def test_history_names_every_pass() -> None:
    net = nasfx.transform(built(Chain), "proxyless")
    names = [r.name for r in net.history.records]
    assert names == [
        "trace", "canonicalize", "infer-shapes", "functionalize-inplace", "lower-binary-gate",
        "defer-producers", "remove-dead-code", "propagate-channels-last", "cheapen-depthwise",
        "cheapen-pools",
    ]  # fmt: skip
    assert net.history.text() == str(net.graph)
    assert "call_module[first](%" in net.history.text(0)
    assert "+%gate_first = nasfx.ops.binary_gate(" in net.history.diff(3, 4)


def test_nasfx_dump_writes_every_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NASFX_DUMP", str(tmp_path / "dump"))
    net = nasfx.transform(built(Chain), "darts")
    files = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert len(files) == len(net.history)
    assert any("lower-weighted-sum" in name for name in files)
    last = (tmp_path / "dump" / files[-1]).read_text()
    assert last.strip() == str(net.graph).strip()
    nasfx.transform(built(TwoModes), "darts")
    both = {p.name for p in (tmp_path / "dump").iterdir()} - set(files)
    assert {name.split("-")[0] for name in both} == {"train", "eval"}


def test_input_choice_values_are_lists_in_paths() -> None:
    class Pick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pick = InputChoice(2, label="pick")

        def forward(self, x: Tensor) -> Tensor:
            return self.pick([x, x * 2])

    net = nasfx.transform(Pick(), "single-path")
    assert net.path == {"pick": [0]}
    x = torch.ones(2)
    with net.forced({"pick": 1}):
        assert net(x).tolist() == [2, 2]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_seed_decides_the_draws(strategy: str) -> None:
    net = nasfx.transform(built(Nested), strategy)
    if strategy == "darts":
        net.seed(3)
        assert net.state_dict()["arch.state.generator"].dtype == torch.uint8
        return
    runs = []
    for seed in (3, 3, 4):
        net.seed(seed)
        runs.append([repr(net.sample()) for _ in range(10)])
    assert runs[0] == runs[1] != runs[2]
