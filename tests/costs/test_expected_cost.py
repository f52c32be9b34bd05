"""Expected costs against sums over all architectures, p(arch) times the count of the subnet."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from math import prod
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

import nasfx
from nasfx import (
    Architecture,
    Count,
    Darts,
    FBNet,
    InputChoice,
    LayerChoice,
    Proxyless,
    SearchSpace,
    Supernet,
)
from nasfx.architecture import SpaceChoice
from nasfx.choice import Decision
from nasfx.strategies import Strategy
from tests.models import Block, DartsNet, example
from tests.strategies.nets import (
    WIDTH,
    Cell,
    Chain,
    Nested,
    Scale,
    Skips,
    Zero,
    batch,
    built,
    dense,
    ops,
    spread,
)

X = batch()[0]
TOLERANCE = 1e-10


class Repeats(nn.Module):
    """One choice called twice, one decision for two choices, and a module in two candidates."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.block = ops("block")
        shared = nn.Linear(WIDTH, WIDTH)
        self.one = LayerChoice({"shared": shared, "scale": Scale(0.5)}, label="one")
        self.two = LayerChoice(
            {"shared": nn.Sequential(shared, nn.Tanh()), "own": dense()}, label="two"
        )
        self.tied = LayerChoice({"a": dense(), "b": Scale(2.0), "c": nn.Tanh()}, label="tied")
        self.again = LayerChoice({"a": Scale(3.0), "b": dense(), "c": dense()}, label="tied")
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(self.stem(x)).sin())
        return self.head(self.again(self.tied(self.two(self.one(x)))))


class Wiring(nn.Module):
    """`source` feeds two later nodes, which both feed a choice of two, and an any-subset choice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.source = LayerChoice({"lin": nn.Linear(WIDTH, WIDTH), "id": nn.Identity()}, label="s")
        self.left, self.right = nn.Linear(WIDTH, WIDTH), dense()
        self.edge = LayerChoice({"two": nn.Sequential(dense(), dense()), "halved": Scale(0.5)})
        self.pick = InputChoice(4, n_chosen=2, label="pick")
        self.any = InputChoice(3, n_chosen=None, label="any")
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        source = self.source(x)
        left, right, edge = self.left(source), self.right(source), self.edge(x)
        picked = self.pick([left, right, edge, x])
        return self.head(self.any([source, picked, edge]))


class Node(nn.Module):
    """A node of a DARTS cell that takes two of three edges."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.edges = nn.ModuleList(
            LayerChoice(
                {"none": Zero(), "lin": nn.Linear(WIDTH, WIDTH), "act": nn.Tanh()},
                label=f"edge{i}",
                relaxed_only=("none",),
            )
            for i in range(3)
        )
        self.pick = InputChoice(3, n_chosen=2, label="node")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.pick([edge(x * 0.5) for edge in self.edges])


def every_candidate_counts(model: nn.Module) -> nn.Module:
    """`model` with its `relaxed_only` candidates as ordinary ones, so that they can be counted."""
    for module in model.modules():
        if isinstance(module, LayerChoice):
            module.relaxed_only = ()
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "nested": Nested,
    "repeats": Repeats,
    "wiring": Wiring,
    "one of four": lambda: Skips(1),
    "two of four": lambda: Skips(2),
    "four of four": lambda: Skips(4),
    "any": lambda: Skips(None, "mean"),
    "mean": lambda: Skips(3, "mean"),
}
STRATEGIES: dict[str, Strategy | str] = {
    "darts": "darts",
    "fbnet": FBNet(temperature=0.7),
    "proxyless": "proxyless",
    "single-path": "single-path",
    "random": "random",
}
LEARNED = ("darts", "fbnet", "proxyless")


def priced(model: nn.Module, strategy: Strategy | str, seed: int = 3) -> Supernet:
    """A net with two objectives and uneven parameters."""
    objectives = [nasfx.Flops(50), nasfx.Params(50)]
    net = nasfx.transform(model, strategy, example_inputs=X, objective=objectives, seed=seed)
    spread(net, seed)
    return net


@contextmanager
def within(net: Supernet) -> Generator[None]:
    """An arch step for FBNet, whose noise is fixed there."""
    if net.strategy.name != "fbnet":
        yield
        return
    with net.arch_step():
        yield


def cost_of(net: Supernet, name: str = "flops") -> float:
    return float(net.expected_cost()[name].detach())


# -- what the tests compute for themselves ---------------------------------------------------------


@functools.cache
def counts(kind: str) -> tuple[SearchSpace, dict[Architecture, Count]]:
    model = every_candidate_counts(built({**KINDS, "node": Node}[kind]))
    net = nasfx.transform(model, "single-path")
    return net.space, {a: nasfx.count(nasfx.finalize(net, a), X) for a in net.space.enumerate()}


def logits_of(net: Supernet) -> dict[str, Tensor]:
    """The logits of the probabilities, with the step's noise, if there is any."""
    arch: Any = net.get_submodule("arch")
    alphas: dict[str, Tensor] = arch.alpha_parameters()
    if net.strategy.name != "fbnet":
        return {label: alpha.detach() for label, alpha in alphas.items()}
    noise, temperature = dict(arch.state.noise.named_buffers()), arch.state.temperature
    return {label: (a.detach() + noise[label]) / temperature for label, a in alphas.items()}


def probability(choice: SpaceChoice, logits: Tensor | None, decision: Decision) -> float:
    """Of one decision: subsets of a given size by going through all of them; None for uniform."""
    n = len(choice.candidates)
    if logits is None:
        logits = torch.zeros(n, dtype=torch.float64)
    weights = logits.exp().tolist()
    if isinstance(decision, str):
        return weights[choice.candidates.index(decision)] / sum(weights)
    size = choice.n_chosen
    subsets = [
        s
        for k in (range(n + 1) if size is None else [size])
        for s in itertools.combinations(range(n), k)
    ]
    return prod(weights[i] for i in decision) / sum(prod(weights[i] for i in s) for s in subsets)


def expectation(kind: str, logits: dict[str, Tensor]) -> dict[str, float]:
    space, counted = counts(kind)
    total, flops, params = 0.0, 0.0, 0.0
    for arch, count in counted.items():
        p = prod(probability(space[x], logits.get(x), arch.decision(x)) for x in arch)
        total, flops, params = total + p, flops + p * count.flops, params + p * count.params
    assert total == pytest.approx(1, rel=1e-12)
    return {"flops": flops, "params": params}


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_sum_over_all_architectures(kind: str, strategy: str) -> None:
    net = priced(built(KINDS[kind]), STRATEGIES[strategy])
    with within(net):
        found = {name: float(cost.detach()) for name, cost in net.expected_cost().items()}
        assert found == pytest.approx(expectation(kind, logits_of(net)), rel=TOLERANCE)


@pytest.mark.parametrize("gate", ["full", "two", "reinforce"])
def test_all_forms_of_proxyless_expect_the_same(gate: str) -> None:
    reinforce = Proxyless(estimator="reinforce")
    net = priced(built(Nested), reinforce if gate == "reinforce" else Proxyless(gate=gate))
    expected = expectation("nested", logits_of(net))["flops"]
    assert cost_of(net) == pytest.approx(expected, rel=TOLERANCE)
    with net.arch_step():
        assert cost_of(net) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("strategy", ["darts", "proxyless"])
def test_the_probabilities_are_those_that_the_net_shows(strategy: str) -> None:
    net = priced(built(Nested), strategy)
    shown = {label: p.log() for label, p in net.probabilities().items()}
    assert cost_of(net) == pytest.approx(expectation("nested", shown)["flops"], rel=TOLERANCE)


def test_fbnet_sees_the_noise_of_its_step() -> None:
    net = priced(built(Nested), FBNet(temperature=0.7))
    calm = cost_of(net)
    seen = set[float]()
    for _ in range(3):
        with net.arch_step():
            seen.add(cost_of(net))
            assert cost_of(net) in seen  # the noise of a step stays
    assert len(seen) == 3
    assert calm not in seen
    assert cost_of(net) == calm


def test_hard_gates_of_fbnet_cost_what_they_run_and_have_the_soft_gradient() -> None:
    hard, soft = (priced(built(Nested), FBNet(temperature=0.7, hard=h)) for h in (True, False))
    with hard.arch_step(), soft.arch_step():
        logits = logits_of(hard)
        best = {
            label: hard.space[label].candidates[int(values.argmax())]
            for label, values in logits.items()
        }
        assert cost_of(hard) == counts("nested")[1][hard.space.validate(best)].flops
        # By the chain rule the gradient is taken at the hard values: the one of the tied choice,
        # which nothing depends on, is that of the soft gates.
        for net in (hard, soft):
            net.expected_cost()["flops"].backward()
    grads = [dict(net.named_parameters())["arch.tied"].grad for net in (hard, soft)]
    assert grads[0] is not None
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


def test_candidates_that_are_never_chosen_are_in_mixtures_only() -> None:
    for strategy in (Darts(inputs="softmax"), FBNet(temperature=0.7)):
        net = priced(built(Node), strategy)
        with within(net):
            found = expectation("node", logits_of(net))["flops"]
            assert cost_of(net) == pytest.approx(found, rel=TOLERANCE)
    net = priced(built(Node), "proxyless")
    never = torch.tensor([-torch.inf], dtype=torch.float64)
    logits = {
        label: torch.cat([never, alpha]) if label.startswith("edge") else alpha
        for label, alpha in logits_of(net).items()
    }
    assert cost_of(net) == pytest.approx(expectation("node", logits)["flops"], rel=TOLERANCE)


def test_darts_counts_all_edges_of_a_node_whose_inputs_are_ranked_by_them() -> None:
    net = priced(built(Cell), "darts")
    p = {label: torch.softmax(a, 0) for label, a in logits_of(net).items()}
    assert len(p) == 5
    # none, lin, act: 0, 16 and 16 MACs; stem and head have 12 and 16.
    by_hand = 28 + sum(16 * float(q[1] + q[2]) for q in p.values())
    assert cost_of(net) == pytest.approx(by_hand, rel=TOLERANCE)
    by_hand = 16 + 18 + sum(20 * float(q[1] + q[2]) for q in p.values())
    assert cost_of(net, "params") == pytest.approx(by_hand, rel=TOLERANCE)


def test_cells_with_the_same_labels_cost_what_each_of_them_does() -> None:
    model = built(DartsNet)
    x = example(dtype=torch.float64)
    net = nasfx.transform(model, "darts", example_inputs=x, objective=nasfx.Flops(1, unit="k"))
    spread(net)
    p = {label: float(torch.softmax(a, 0)[1]) for label, a in logits_of(net).items()}
    # 25 pixels: a squeeze from 8 to 4 channels has 800 MACs, a 3x3 convolution 3600.
    by_hand = 3 * 0.8 + sum((2 if "normal" in k else 1) * 3.6 * q for k, q in p.items())
    assert cost_of(net) == pytest.approx(by_hand, rel=TOLERANCE)


@pytest.mark.parametrize("kind", ["nested", "wiring", "repeats", "two of four", "any"])
def test_enas_costs_what_the_current_path_does(kind: str) -> None:
    net = priced(built(KINDS[kind]), "enas")
    _, counted = counts(kind)
    paths = set[Architecture]()
    for _ in range(8):
        with net.weight_step():
            paths.add(net.path)
        count = counted[net.path]
        assert (cost_of(net), cost_of(net, "params")) == (count.flops, count.params)
    assert len(paths) > 1


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", LEARNED)
@pytest.mark.parametrize("kind", ["nested", "repeats", "wiring", "two of four", "any", "node"])
def test_the_gradient_is_that_of_the_value(kind: str, strategy: str) -> None:
    net = priced(built({**KINDS, "node": Node}[kind]), STRATEGIES[strategy])
    h = 1e-5
    with within(net):
        for name in ("flops", "params"):
            net.expected_cost()[name].backward()
            grads, differences = list[float](), list[float]()
            for p in net.arch_parameters():
                grads += [0.0] * len(p) if p.grad is None else p.grad.tolist()
                p.grad = None
                for i in range(len(p)):
                    values: list[float] = []
                    for step in (h, -2 * h):
                        p.data[i] += step
                        values.append(cost_of(net, name))
                    p.data[i] += h
                    differences.append((values[0] - values[1]) / (2 * h))
            exact, numeric = (torch.tensor(v, dtype=torch.float64) for v in (grads, differences))
            assert exact.norm() > 0
            assert float((exact - numeric).norm() / exact.norm()) <= 1e-6


def descend(net: Supernet, optimizer: torch.optim.Optimizer) -> None:
    """One arch step with a task loss that no parameter changes."""
    with net.arch_step():
        net.objective(torch.tensor(1.0, dtype=torch.float64)).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("gate", ["darts", "full_v2", "full", "two"])
@pytest.mark.parametrize("kind", ["chain", "nested", "repeats"])
def test_the_cost_alone_falls_at_every_step(kind: str, gate: str) -> None:
    net = priced(built(KINDS[kind]), "darts" if gate == "darts" else Proxyless(gate=gate))
    optimizer = net.arch_optimizer(torch.optim.SGD, lr=0.1)
    costs = [cost_of(net) / 50 + cost_of(net, "params") / 50]
    for _ in range(40):
        descend(net, optimizer)
        costs.append(cost_of(net) / 50 + cost_of(net, "params") / 50)
    assert all(after < before for before, after in itertools.pairwise(costs))


def pairs_of(net: Supernet) -> dict[str, list[int]]:
    arch: Any = net.get_submodule("arch")
    return {label: list(pair) for label, pair in arch.state.fresh["pair"].items()}


def table_of(n: int, generator: torch.Generator) -> Supernet:
    """A choice of `n` candidates with random costs, of which a few are far above the others."""
    costs = 40 * torch.rand(n, generator=generator, dtype=torch.float64) ** 4
    table = {"block": {f"c{i}": cost for i, cost in enumerate(costs.tolist())}}
    model = nn.Sequential(
        nn.Linear(3, WIDTH),
        LayerChoice({name: nn.Tanh() for name in table["block"]}, label="block"),
    ).double()
    objective = nasfx.CustomCost(1, costs=table, lambda_=1.0)
    return nasfx.transform(model, Proxyless(gate="two"), example_inputs=X, objective=objective)


# The default optimizer, too: with betas (0, 0.999) it moves each of the two against its gradient.
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("n", [2, 3, 7, 42, 64])
def test_no_step_of_two_paths_raises_the_cost(n: int, optimizer: str) -> None:
    generator = torch.Generator().manual_seed(n)
    for _ in range(3):
        net = table_of(n, generator)
        (alpha,) = net.arch_parameters()
        (node,) = [k for k in net.cost_graph.nodes if k.name == "custom_block"]
        costs = torch.tensor(node.args[1], dtype=torch.float64)
        for _ in range(40):
            scale, exponent = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            noise = torch.randn(n, generator=generator, dtype=torch.float64)
            alpha.data.copy_(4 * scale * noise)
            own = torch.optim.SGD if optimizer == "sgd" else None
            before, cost = alpha.detach().clone(), cost_of(net, "custom")
            descend(net, net.arch_optimizer(own, lr=10 ** (5 * exponent - 3)))
            (pair,) = pairs_of(net).values()
            others = [i for i in range(n) if i not in pair]
            assert torch.equal(alpha.detach()[others], before[others])
            kept = alpha.detach().softmax(0)[others] - before.softmax(0)[others]
            assert kept.abs().max() <= 1e-13 if others else len(pair) == 2
            cheap, dear = sorted(pair, key=lambda i: float(costs[i]))
            assert alpha[cheap] - alpha[dear] > before[cheap] - before[dear]
            assert cost_of(net, "custom") <= cost + 1e-12


@pytest.mark.parametrize("kind", ["chain", "nested", "repeats", "one of four"])
def test_two_paths_have_the_costs_gradient_where_the_others_stay(kind: str) -> None:
    net = priced(built(KINDS[kind]), Proxyless(gate="two"))
    alphas: dict[str, Tensor] = net.get_submodule("arch").alpha_parameters()  # type: ignore[operator]
    h = 1e-5
    for _ in range(5):
        with net.arch_step():
            net.expected_cost()["flops"].backward()
        for label, pair in pairs_of(net).items():
            alpha = alphas[label]
            start, grad = alpha.detach().clone(), alpha.grad
            alpha.grad = None
            p, expected = start.softmax(0), torch.zeros_like(start)
            for i in pair:
                values: list[float] = []
                for step in (h, -h):
                    alpha.data.copy_(start)
                    alpha.data[i] += step
                    sums = [a[pair].logsumexp(0) for a in (alpha.detach(), start)]
                    alpha.data[pair] -= sums[0] - sums[1]
                    values.append(cost_of(net))
                expected[i] = (values[0] - values[1]) / (2 * h) / p[pair].sum()
            alpha.data.copy_(start)
            found = torch.zeros_like(start) if grad is None else grad
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_the_cost_alone_falls_under_the_noise_of_fbnet_in_the_mean() -> None:
    net = priced(built(Nested), "fbnet")
    costs: list[list[float]] = []
    for seed in range(50):
        spread(net, seed=0)
        net.seed(seed)
        optimizer = net.arch_optimizer(torch.optim.SGD, lr=1.0)
        costs.append([cost_of(net)])
        for _ in range(3):
            for _ in range(5):
                descend(net, optimizer)
            costs[-1].append(cost_of(net))
    means = torch.tensor(costs, dtype=torch.float64).mean(0).tolist()
    assert all(after < before for before, after in itertools.pairwise(means))


class Many(nn.Module):
    """A choice among nine layers after one stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(9))
        self.pick = InputChoice(9, n_chosen=2, label="pick")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.pick([layer(x) for layer in self.layers])


def test_diagrams_grow_linearly_with_the_inputs_of_a_choice() -> None:
    net = nasfx.transform(Many(), "darts", example_inputs=X.float(), objective=nasfx.Flops(10))
    cases = [
        len(node.args[2][1])
        for node in net.cost_graph.nodes
        if getattr(node.target, "__name__", "") == "activity"
    ]
    assert max(cases) <= 18


# -- the graph -------------------------------------------------------------------------------------


def block(strategy: str) -> Supernet:
    objectives = [nasfx.Flops(4, unit="k"), nasfx.Params(300)]
    return nasfx.transform(Block(), strategy, example_inputs=example(), objective=objectives)


def test_the_graph_of_a_block() -> None:
    assert_expected_inline(
        str(block("darts").cost_graph),
        """\
%arch_block = get_attr[arch.block]
%gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
%flops_block = nasfx.ops.expected_cost(%gate_block, (3.6, 10.0, 0.0), None, label='block')
%flops = nasfx.ops.total_cost(3.612, [%flops_block])
%params_block = nasfx.ops.expected_cost(%gate_block, (152.0, 408.0, 0.0), None, label='block')
%params = nasfx.ops.total_cost(167.0, [%params_block])
return {'flops': %flops, 'params': %params}""",
    )


def test_the_graph_of_a_block_of_single_path() -> None:
    assert_expected_inline(
        str(block("single-path").cost_graph),
        """\
%uniform_gate = nasfx.ops.uniform_gate(('conv3', 'conv5', 'skip'), 3)
%flops_block = nasfx.ops.expected_cost(%uniform_gate, (3.6, 10.0, 0.0), None, label='block')
%flops = nasfx.ops.total_cost(3.612, [%flops_block])
%params_block = nasfx.ops.expected_cost(%uniform_gate, (152.0, 408.0, 0.0), None, label='block')
%params = nasfx.ops.total_cost(167.0, [%params_block])
return {'flops': %flops, 'params': %params}""",
    )


class Inside(nn.Module):
    """A choice in a candidate."""

    def __init__(self) -> None:
        super().__init__()
        inner = LayerChoice({"x": nn.Linear(3, 3), "y": nn.Tanh()}, label="inner")
        self.outer = LayerChoice({"a": nn.Sequential(nn.Linear(3, 3), inner), "b": nn.ReLU()})

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x)


def test_the_graph_of_a_choice_in_a_candidate_with_noise() -> None:
    net = nasfx.transform(Inside(), "fbnet", example_inputs=X.float(), objective=nasfx.Flops(10))
    lines = str(net.cost_graph).replace("(%arch_", "(\n  %arch_").replace(", {'", ",\n  {'")
    assert_expected_inline(
        lines,
        """\
%arch_outer = get_attr[arch.outer]
%arch_state_noise_outer = get_attr[arch.state.noise.outer]
%arch_state_temperature = get_attr[arch.state.temperature]
%logits_outer = nasfx.ops.gumbel_logits(
  %arch_outer, %arch_state_noise_outer, %arch_state_temperature)
%gate_outer = nasfx.ops.softmax_gate(%logits_outer, label='outer')
%arch_inner = get_attr[arch.inner]
%arch_state_noise_inner = get_attr[arch.state.noise.inner]
%arch_state_temperature_1 = get_attr[arch.state.temperature]
%logits_inner = nasfx.ops.gumbel_logits(
  %arch_inner, %arch_state_noise_inner, %arch_state_temperature_1)
%gate_inner = nasfx.ops.softmax_gate(%logits_inner, label='inner')
%flops_outer = nasfx.ops.expected_cost(%gate_outer, (9.0, 0.0), None, label='outer')
%active = nasfx.ops.activity({'outer': %gate_outer},
  {'outer': ('a', 'b')}, ('outer', ((('a',), True),)))
%flops_inner = nasfx.ops.expected_cost(%gate_inner, (9.0, 0.0), %active, label='inner')
%flops = nasfx.ops.total_cost(0.0, [%flops_outer, %flops_inner])
return {'flops': %flops}""",
    )
