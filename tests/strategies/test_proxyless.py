"""ProxylessNAS: gates' gradients, one path in memory, draws. All in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nasfx
from nasfx import LayerChoice, SpaceError
from tests.strategies.nets import (
    WIDTH,
    Cell,
    Chain,
    Nested,
    Norms,
    Skips,
    batch,
    built,
    dense,
    drawn,
    gate_gradients,
    loss_of,
    set_draw,
    spread,
    subset_probabilities,
)

NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "nested and tied": Nested,
    "batch norms": Norms,
    "one input": lambda: Skips(1),
    "two inputs": lambda: Skips(2),
    "mean of two": lambda: Skips(2, "mean"),
    "any inputs": lambda: Skips(None),
    "mean of any": lambda: Skips(None, "mean"),
    "cell": Cell,
}


@pytest.mark.parametrize("name", NETS)
def test_alpha_gradients_on_every_path(name: str) -> None:
    model = built(NETS[name])
    net = nasfx.transform(model, "proxyless")
    spread(net, seed=1, scale=0.5)
    everything = {repr(arch) for arch in net.space.enumerate()}
    x, y = batch()
    seen: set[str] = set()
    for _ in range(3000):
        if seen == everything:
            break
        with net.arch_step():
            fresh = repr(net.path) not in seen
            seen.add(repr(net.path))
            if fresh:
                net.objective(loss_of(net, x, y)).backward()
        if not fresh:
            continue
        b = gate_gradients(model, drawn(net), x, y)
        for label, alpha in dict(net.arch.named_parameters()).items():
            if label not in net.path:
                assert alpha.grad is None, (label, net.path)
            else:
                values = alpha.detach().clone().requires_grad_()
                choice = net.space[label]
                p = (
                    torch.softmax(values, 0)
                    if choice.kind == "layer"
                    else subset_probabilities(values, choice.n_chosen)
                )
                if choice.n_chosen == 1:
                    expected = p * (b[label] - p @ b[label])
                else:
                    (expected,) = torch.autograd.grad(p, values, b[label])
                torch.testing.assert_close(
                    alpha.grad,
                    expected.detach(),
                    rtol=1e-10,
                    atol=1e-12,
                    msg=lambda m, where=(label, net.path): f"{where}: {m}",
                )
        net.zero_grad()
    assert seen == everything


def test_gates_of_one_choice_by_the_formula_of_the_paper() -> None:
    """dL/dalpha_i = sum_j dL/dg_j p_j (delta_ij - p_i), written out for numbers."""
    a, b, c = (nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(3))
    with torch.no_grad():
        for module, weight in zip((a, b, c), (2.0, 3.0, -1.0), strict=True):
            module.weight.fill_(weight)
    net = nasfx.transform(
        nn.Sequential(LayerChoice({"a": a, "b": b, "c": c}, label="x")), "proxyless"
    )
    with torch.no_grad():
        net.arch_parameters()[0].copy_(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log())
    with net.arch_step():
        output = net(torch.ones(1, 1, dtype=torch.float64))
        (output * 10).sum().backward()
    # b = (20, 30, -10), <p, b> = 15
    expected = torch.tensor([0.5 * 5, 0.25 * 15, 0.25 * -25], dtype=torch.float64)
    torch.testing.assert_close(net.arch_parameters()[0].grad, expected, rtol=1e-12, atol=0)


def test_a_gate_is_exactly_one_or_zero_forward() -> None:
    model = built(Chain)
    net = nasfx.transform(model, "proxyless")
    spread(net)
    x, _ = batch()
    for _ in range(10):
        with net.arch_step(), nasfx.activated(model, net.path):
            norm = model.second.bn[1]
            kept = {k: v.clone() for k, v in norm.state_dict().items()}
            expected = model(x)
            norm.load_state_dict(kept)
            assert torch.equal(net(x), expected)


def test_gradients_add_up_over_calls_within_a_step() -> None:
    model = built(Nested)
    net = nasfx.transform(model, "proxyless")
    x, y = batch()
    with net.arch_step():
        set_draw(net, {"outer": "holds", "inner": "1", "direct": "a", "tied": "u"})
        loss_of(net, x, y).backward()
        once = [p.grad.clone() for p in net.arch_parameters() if p.grad is not None]
        loss_of(net, x, y).backward()
    twice = [p.grad for p in net.arch_parameters() if p.grad is not None]
    for one, two in zip(once, twice, strict=True):
        torch.testing.assert_close(two, 2 * one, rtol=1e-13, atol=0)
        assert one.abs().max() > 0


def test_no_alpha_has_a_gradient_after_a_weight_step() -> None:
    net = nasfx.transform(built(Nested), "proxyless")
    for _ in range(5):
        with net.weight_step():
            loss_of(net, *batch()).backward()
        assert all(p.grad is None for p in net.arch_parameters())


# -- full_v2 --------------------------------------------------------------------------------------


def _hungry(candidates: int) -> nn.Module:
    def one() -> nn.Module:
        return nn.Sequential(
            nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, WIDTH)
        )

    return nn.Sequential(
        nn.Linear(3, WIDTH),
        LayerChoice([one() for _ in range(candidates)], label="x"),
        nn.Tanh(),
        LayerChoice([one() for _ in range(candidates)], label="y"),
        nn.Linear(WIDTH, 2),
    )


def _saved_elements(net: nasfx.Supernet) -> int:
    """How many elements autograd keeps for backward in an arch step, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with net.arch_step(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(net, *batch())
        alive = dict(kept)
        net.objective(loss).backward()
    return sum(alive.values())


def test_an_arch_step_keeps_the_activations_of_one_path() -> None:
    two, eight = (
        _saved_elements(nasfx.transform(built(lambda n=n: _hungry(n)), "proxyless")) for n in (2, 8)
    )
    hidden = 6 * 64  # one hidden activation of a candidate
    # The gates themselves are eight instead of two numbers, saved a few times over.
    assert eight - two < 200 < hidden
    assert 2 * hidden <= two <= 5 * hidden


def test_candidates_off_the_path_run_in_backward_without_a_graph() -> None:
    net = nasfx.transform(built(lambda: _hungry(3)), "proxyless")
    calls: list[tuple[str, str, bool]] = []
    phase = "forward"
    for choice in ("1", "3"):
        for name in "012":
            module = net.get_submodule(f"{choice}.{name}.0")

            def hook(
                _: nn.Module, args: object, out: Tensor, key: str = f"{choice}.{name}"
            ) -> None:
                calls.append((phase, key, torch.is_grad_enabled()))

            module.register_forward_hook(hook)
    with net.arch_step():
        active = {"1": net.path["x"], "3": net.path["y"]}
        loss = loss_of(net, *batch())
        phase = "backward"
        loss.backward()
    on = {f"{choice}.{name}" for choice, name in active.items()}
    assert {key for when, key, grad in calls if when == "forward" and grad} == on
    off = [(key, grad) for when, key, grad in calls if when == "backward"]
    assert sorted(off) == sorted(
        (f"{c}.{n}", False) for c in ("1", "3") for n in "012" if f"{c}.{n}" not in on
    )
    assert len(calls) == 6


def test_inactive_batch_norms_stay_byte_for_byte() -> None:
    model = built(Norms)
    net = nasfx.transform(model, "proxyless")
    seen = set()
    for _ in range(20):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with net.arch_step():
            active = net.path["block"]
            seen.add(active)
            loss_of(net, *batch()).backward()
        for key, value in model.state_dict().items():
            moved = not torch.equal(value, before[key])
            ours = key.startswith(f"block.{active}.1.") and "running" in key
            ours = ours or key == f"block.{active}.1.num_batches_tracked"
            assert moved == ours, (key, active)
            if key.endswith("num_batches_tracked"):
                assert int(value - before[key]) == int(ours)
    assert seen == {"a", "b", "c"}


def test_an_input_that_is_not_chosen_is_only_run_in_backward() -> None:
    model = built(lambda: Skips(1))
    net = nasfx.transform(model, "proxyless")
    calls: list[str] = []
    # Deferred producers are held by modules of ours; the layers themselves are the user's clones.
    for module in net.modules():
        if isinstance(module, nn.Linear) and module.weight is model.layers[0][0].weight:
            module.register_forward_hook(lambda *_: calls.append("layer"))
    x, y = batch()
    with net.weight_step():
        set_draw(net, {"pick": (3,)})
        loss_of(net, x, y).backward()
    assert not calls
    with net.arch_step():
        set_draw(net, {"pick": (3,)})
        loss = loss_of(net, x, y)
        assert not calls
        loss.backward()
    assert calls


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_producers_of_inputs_off_the_path_leave_no_trace(reduction: str) -> None:
    class Normed(Skips):
        def __init__(self) -> None:
            super().__init__(1, reduction)
            self.layers = nn.ModuleList(dense(norm=True) for _ in range(2))

    model = built(Normed)
    net = nasfx.transform(model, "proxyless")
    modes: list[bool] = []
    for module in net.modules():
        if isinstance(module, nn.Linear) and module.weight is model.layers[0][0].weight:
            module.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    before = {k: v.clone() for k, v in model.layers[0].state_dict().items()}
    with net.arch_step():
        set_draw(net, {"pick": (3,)})
        loss_of(net, *batch()).backward()
    assert modes == [False]
    after = model.layers[0].state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert int(model.layers[1][1].num_batches_tracked) == 1


# -- draws, derive, optimizer ---------------------------------------------------------------------


def test_draws_follow_the_probabilities() -> None:
    net = nasfx.transform(built(lambda: Skips(2)), "proxyless", seed=3)
    spread(net, scale=0.7)
    n = 3000
    counts: dict[str, Counter[object]] = {"block": Counter(), "pick": Counter()}
    for _ in range(n):
        with net.weight_step():
            for label, value in drawn(net).items():
                counts[label][value] += 1
    p = torch.softmax(net.arch.get_parameter("block").detach(), 0).tolist()
    expected: dict[str, dict[object, float]] = {
        "block": dict(zip(("lin", "deep", "skip"), p, strict=True))
    }
    alpha = net.arch.get_parameter("pick").detach()
    subsets = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    q = torch.softmax(torch.stack([alpha[list(s)].sum() for s in subsets]), 0).tolist()
    expected["pick"] = dict(zip(subsets, q, strict=True))
    for label, law in expected.items():
        assert set(counts[label]) <= set(law)
        for value, probability in law.items():
            deviation = 5 * (probability * (1 - probability) / n) ** 0.5
            assert abs(counts[label][value] / n - probability) < deviation, (label, value)


def test_draws_of_any_subset_are_independent() -> None:
    net = nasfx.transform(built(lambda: Skips(None)), "proxyless", seed=4)
    spread(net)
    n = 2000
    taken = torch.zeros(4)
    pairs = torch.zeros(4, 4)
    for _ in range(n):
        hot = torch.zeros(4)
        with net.weight_step():
            hot[list(drawn(net)["pick"])] = 1
        taken += hot / n
        pairs += torch.outer(hot, hot) / n
    p = torch.sigmoid(net.arch.get_parameter("pick").detach()).float()
    torch.testing.assert_close(taken, p, atol=5 * 0.5 / n**0.5, rtol=0)
    both = torch.outer(p, p)
    off = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(pairs[off], both[off], atol=5 * 0.5 / n**0.5, rtol=0)


def test_derive_takes_the_most_probable_path() -> None:
    net = nasfx.transform(built(Nested), "proxyless")
    with torch.no_grad():
        for label, values in {
            "outer": [0.0, 1.0, 0.5], "inner": [0.1, 0.3], "direct": [3.0, 0.0], "tied": [0.0, 0.1],
        }.items():  # fmt: skip
            net.arch.get_parameter(label).copy_(torch.tensor(values))
    assert net.derive() == {"outer": "holds", "inner": "1", "tied": "v"}


def test_inputs_are_derived_by_their_own_alphas() -> None:
    net = nasfx.transform(built(Cell), "proxyless")
    with torch.no_grad():
        net.arch.get_parameter("node2").copy_(torch.tensor([0.5, 0.1, 0.4]))
        net.arch.get_parameter("2<-1").copy_(torch.tensor([9.0, 0.0]))
    assert net.derive()["node2"] == [0, 2]
    assert net.arch.get_parameter("2<-0").shape == (2,)  # `none` is relaxed_only: no gate


@pytest.mark.parametrize("reduction", ["concat", "none"])
def test_inputs_without_a_gate_are_refused(reduction: str) -> None:
    with pytest.raises(SpaceError, match=rf"'{reduction}' has no binary gate: an input") as error:
        nasfx.transform(built(lambda: Skips(2, reduction)), "proxyless")
    assert "nets.py:" in str(error.value)


def test_the_optimizer_is_the_papers() -> None:
    net = nasfx.transform(built(Chain), "proxyless")
    optimizer = net.arch_optimizer()
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    found = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    assert found == (1e-3, (0.0, 0.999), 1e-8, 0)
    assert {id(p) for p in group["params"]} == {id(p) for p in net.arch_parameters()}
    assert net.arch_optimizer(weight_decay=0.1).param_groups[0]["betas"] == (0.0, 0.999)
    assert type(net.arch_optimizer(torch.optim.SGD, lr=1.0)) is torch.optim.SGD
