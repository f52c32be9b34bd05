"""DARTS: the mixture, its gradients, and what is derived from it. All in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nasfx
from nasfx import Darts, LayerChoice, SearchError, SpaceError
from tests.strategies.nets import (
    Cell,
    Chain,
    Nested,
    Norms,
    Skips,
    batch,
    built,
    loss_of,
    spread,
    subset_probabilities,
)

NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "nested and tied": Nested,
    "batch norms": Norms,
    "one input": lambda: Skips(1),
    "two inputs": lambda: Skips(2),
    "all inputs": lambda: Skips(4),
    "mean of two": lambda: Skips(2, "mean"),
    "any inputs": lambda: Skips(None),
    "mean of any": lambda: Skips(None, "mean"),
    "cell": Cell,
    "mean cell": lambda: Cell("mean"),
}


@pytest.mark.parametrize("name", NETS)
def test_arch_gradients_are_those_of_the_mixtures_loss(name: str) -> None:
    net = nasfx.transform(built(NETS[name]), "darts")
    spread(net, seed=1)
    x, y = batch()
    with net.arch_step():
        net.objective(loss_of(net, x, y)).backward()
    step = 1e-5
    for label, alpha in (
        (p, net.get_parameter(p)) for p in dict(net.arch.named_parameters(prefix="arch"))
    ):
        expected = torch.zeros_like(alpha)
        for i in range(len(alpha)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    alpha[i] += sign * step
                    values.append(loss_of(net, x, y))
                    alpha[i] -= sign * step
            expected[i] = (values[0] - values[1]) / (2 * step)
        assert alpha.grad is not None, label
        torch.testing.assert_close(alpha.grad, expected, rtol=1e-6, atol=1e-9)
        if name != "all inputs" or label != "arch.pick":
            assert alpha.grad.abs().max() > 1e-5, label


def test_the_mixture_is_equation_2() -> None:
    model = built(Chain).eval()
    net = nasfx.transform(model, "darts")
    spread(net)
    x, _ = batch()

    def mixed(choice: nn.Module, alpha: Tensor, value: Tensor) -> Tensor:
        p = torch.exp(alpha) / torch.exp(alpha).sum()
        return sum(q * o(value) for q, o in zip(p, choice.children(), strict=True))  # type: ignore[return-value]

    hidden = mixed(model.first, net.arch.get_parameter("first"), torch.tanh(model.stem(x)))
    expected = model.head(mixed(model.second, net.arch.get_parameter("second"), hidden))
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n_chosen", [1, 2, 3, 4, None])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_inputs_are_weighted_by_their_inclusion_probability(
    n_chosen: int | None, reduction: str
) -> None:
    model = built(lambda: Skips(n_chosen, reduction))
    net = nasfx.transform(model, "darts")
    spread(net)
    x, _ = batch()
    weights = subset_probabilities(net.arch.get_parameter("pick").detach(), n_chosen)
    torch.testing.assert_close(net.probabilities()["pick"], weights, rtol=1e-10, atol=1e-12)
    if reduction == "mean":
        weights = weights / weights.sum()
    stem = torch.tanh(model.stem(x))
    p = torch.softmax(net.arch.get_parameter("block"), 0)
    block = sum(q * o(stem) for q, o in zip(p, model.block.children(), strict=True))
    inputs = [stem, block, *(layer(stem) for layer in model.layers)]
    total = sum(w * v for w, v in zip(weights, inputs, strict=True))
    expected = model.head(torch.tanh(total))
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)


def test_a_weight_step_reaches_every_candidate_and_no_alpha() -> None:
    model = built(Nested)
    net = nasfx.transform(model, "darts")
    with net.weight_step():
        loss_of(net, *batch()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    assert [p.grad for p in net.arch_parameters()] == [None] * 4


def test_an_arch_step_reaches_no_weight() -> None:
    model = built(Nested)
    net = nasfx.transform(model, "darts")
    with net.arch_step():
        loss_of(net, *batch()).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.arch_parameters())


def _set(net: nasfx.Supernet, **alphas: list[float]) -> None:
    with torch.no_grad():
        for label, values in alphas.items():
            net.arch.get_parameter(label).copy_(torch.tensor(values))


def test_derive_takes_the_argmax_but_never_a_relaxed_only_one() -> None:
    choice = LayerChoice(
        {"none": nn.Identity(), "b": nn.Tanh(), "c": nn.ReLU()}, label="x", relaxed_only=["none"]
    )
    net = nasfx.transform(nn.Sequential(nn.Linear(3, 3), choice), "darts")
    assert net.arch.get_parameter("x").shape == (3,)
    _set(net, x=[5.0, 1.0, 2.0])
    assert net.derive() == {"x": "c"}
    _set(net, x=[5.0, 2.0, 2.0])
    assert net.derive() == {"x": "b"}


def _cell_alphas(net: nasfx.Supernet, scores: dict[str, list[float]]) -> None:
    for label, values in scores.items():
        _set(net, **{label: values})


def test_the_strongest_edges_are_derived() -> None:
    net = nasfx.transform(built(Cell), "darts")
    assert {n for n, _ in net.arch.named_parameters()} == {
        "1<-0", "1<-1", "2<-0", "2<-1", "2<-2"
    }  # fmt: skip
    # Edge 2<-0 has the largest alpha, but in `none`; its best other one is weakest.
    _cell_alphas(
        net,
        {
            "1<-0": [0, 1, 0], "1<-1": [0, 0, 1],
            "2<-0": [9, 2, 0], "2<-1": [0, 1, 0], "2<-2": [0, 0, 2],
        },
    )  # fmt: skip
    assert net.derive() == {
        "1<-0": "lin", "1<-1": "act", "2<-1": "lin", "2<-2": "act",
        "node1": [0, 1], "node2": [1, 2],
    }  # fmt: skip


def test_ties_of_edges_go_to_the_lower_index() -> None:
    net = nasfx.transform(built(Cell), "darts")
    _cell_alphas(net, {f"2<-{i}": [0, 1, 1] for i in range(3)})
    derived = net.derive()
    assert derived["node2"] == [0, 1]
    assert derived["2<-0"] == derived["2<-1"] == "lin"
    _cell_alphas(net, {"2<-2": [0, 1.5, 0]})
    assert net.derive()["node2"] == [0, 2]


def test_edge_scored_inputs_are_summed_without_an_alpha() -> None:
    model = built(Cell)
    net = nasfx.transform(model, "darts")
    spread(net)
    x, _ = batch()
    assert set(net.probabilities()) == {"1<-0", "1<-1", "2<-0", "2<-1", "2<-2"}
    s = torch.tanh(model.stem(x))
    states = [s, s * 0.5]
    for node in (1, 2):
        total = torch.zeros_like(s)
        for i, state in enumerate(states):
            p = torch.softmax(net.arch.get_parameter(f"{node}<-{i}"), 0)
            edge = model.edges[f"{node}_{i}"]
            total = total + sum(q * o(state) for q, o in zip(p, edge.children(), strict=True))
        states.append(total)
    expected = model.head(torch.cat(states[2:], 1))
    torch.testing.assert_close(net(x), expected, rtol=1e-11, atol=1e-12)


def test_inputs_softmax_gives_every_edge_an_alpha_of_its_own() -> None:
    net = nasfx.transform(built(Cell), Darts(inputs="softmax"))
    names = {n for n, _ in net.arch.named_parameters()}
    assert {"node1", "node2"} <= names
    assert set(net.probabilities()) == names
    _set(net, node2=[0.0, 1.0, 2.0])
    _cell_alphas(net, {"2<-0": [0, 9, 0]})
    assert net.derive()["node2"] == [1, 2]
    x, y = batch()
    with net.arch_step():
        loss_of(net, x, y).backward()
    grad = net.arch.get_parameter("node2").grad
    assert grad is not None
    assert grad.abs().max() > 0


def test_darts_refuses_an_unknown_form_of_inputs() -> None:
    with pytest.raises(SearchError, match=r"inputs='mean'.*'sum' or 'softmax'"):
        Darts(inputs="mean")


@pytest.mark.parametrize("reduction", ["concat", "none"])
def test_inputs_without_a_weighted_sum_are_refused(reduction: str) -> None:
    with pytest.raises(
        SpaceError, match=rf"'{reduction}' has no weighted sum: the mixture"
    ) as error:
        nasfx.transform(built(lambda: Skips(2, reduction)), "darts")
    assert "nets.py:" in str(error.value)


def test_the_optimizer_is_the_papers() -> None:
    net = nasfx.transform(built(Chain), "darts")
    optimizer = net.arch_optimizer()
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.5, 0.999), 1e-3)
    assert {id(p) for p in group["params"]} == {id(p) for p in net.arch_parameters()}
    assert net.arch_optimizer(lr=0.1).param_groups[0]["lr"] == 0.1
    assert net.arch_optimizer(lr=0.1).param_groups[0]["weight_decay"] == 1e-3
    other = net.arch_optimizer(torch.optim.SGD, lr=0.5)
    assert type(other) is torch.optim.SGD
    assert other.param_groups[0]["lr"] == 0.5


def test_the_first_alphas_are_small_and_follow_the_seed() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = LayerChoice([nn.Identity() for _ in range(400)], label="x")

        def forward(self, x: Tensor) -> Tensor:
            return self.x(x)

    first, again, other = (
        nasfx.transform(Many(), "darts", seed=s).arch_parameters()[0].detach() for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.8e-3 < float(first.std()) < 1.2e-3
    assert abs(float(first.mean())) < 2e-4
