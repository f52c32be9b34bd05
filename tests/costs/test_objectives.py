"""What objectives do to losses and rewards, what they refuse, and bounds on what is derived."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nasfx
from nasfx import (
    Architecture,
    CustomCost,
    FBNet,
    Flops,
    InputChoice,
    LayerChoice,
    Objective,
    Params,
    Proxyless,
    SearchError,
    Supernet,
)
from nasfx.costs.calls import Call
from tests.models import MODELS, Block, Repeated, example
from tests.strategies.nets import (
    STRATEGIES,
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
    loss_of,
    spread,
)

X, Y = batch()
TASK = 1.7  # what the task loss is in most tests


def priced(
    model: nn.Module, objective: Any, strategy: Any = "darts", x: Tensor = X, seed: int = 0
) -> Supernet:
    net = nasfx.transform(model, strategy, example_inputs=x, objective=objective)
    spread(net, seed)
    return net


def objective_of(net: Supernet, loss: float = TASK) -> float:
    with net.arch_step():
        return float(net.objective(torch.tensor(loss, dtype=torch.float64)).detach())


def costs_of(net: Supernet) -> dict[str, float]:
    return {name: float(cost.detach()) for name, cost in net.expected_cost().items()}


# -- losses ----------------------------------------------------------------------------------------

L = TASK
LOSSES: list[tuple[Objective, Callable[[float], float]]] = [
    (Flops(40), lambda e: L + 0.1 * (e - 40) / 40),
    (Flops(40, lambda_=0.7), lambda e: L + 0.7 * (e - 40) / 40),
    (Flops(40, loss="add#linear"), lambda e: L + 0.1 * (e - 40) / 40),
    (Flops(40, loss="mul#log"), lambda e: L * 0.2 * (math.log(e) / math.log(40)) ** 0.3),
    (
        Flops(40, loss="mul#log", alpha=0.5, beta=2.0),
        lambda e: L * 0.5 * (math.log(e) / math.log(40)) ** 2,
    ),
    (Flops(40, loss="mul#power"), lambda e: L * (e / 40) ** 0.1),
    (Flops(40, loss="mul#power", beta=0.4), lambda e: L * (e / 40) ** 0.4),
    (Flops(loss="fbnet-mul"), lambda e: L * 0.2 * math.log(e) ** 0.6),
    (Flops(loss="fbnet-mul", alpha=3, beta=1), lambda e: L * 3 * math.log(e)),
    (Flops(loss="fbnet-add"), lambda e: L + 0.2 * e**0.6),
    (Flops(5, loss="fbnet-add", alpha=0.01, beta=0.5), lambda e: L + 0.01 * e**0.5),
    (Flops(max=1000), lambda e: L),
    (Params(0.04, unit="k"), lambda e: L + 0.1 * (e - 0.04) / 0.04),
]


@pytest.mark.parametrize("strategy", ["darts", "proxyless"])
@pytest.mark.parametrize(("objective", "formula"), LOSSES, ids=map(str, range(len(LOSSES))))
def test_losses(objective: Objective, formula: Callable[[float], float], strategy: str) -> None:
    net = priced(built(Chain), objective, strategy)
    expected = costs_of(net)[objective.name]
    assert objective_of(net) == pytest.approx(formula(expected), rel=1e-12)


def test_the_loss_of_fbnet_takes_the_cost_of_the_step() -> None:
    net = priced(built(Chain), Flops(loss="fbnet-mul"), "fbnet")
    with net.arch_step():
        cost = costs_of(net)["flops"]
        found = net.objective(torch.tensor(L, dtype=torch.float64))
        assert float(found.detach()) == pytest.approx(L * 0.2 * math.log(cost) ** 0.6, rel=1e-12)


def test_the_gradient_of_the_objective() -> None:
    """Factors and terms have the derivative of their formula, the task loss its own."""
    net = priced(built(Chain), [Flops(40, loss="mul#power"), Params(30)])
    with net.arch_step():
        task = loss_of(net, X, Y)
        net.objective(task).backward()
    found = [p.grad.clone() for p in net.arch_parameters() if p.grad is not None]
    net.zero_grad()
    task = loss_of(net, X, Y)
    cost = net.expected_cost()
    formula = task * (cost["flops"] / 40) ** 0.1 + 0.1 * (cost["params"] - 30) / 30
    by_hand = torch.autograd.grad(formula, net.arch_parameters())
    for one, other in zip(found, by_hand, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_of_several_objectives_factors_come_first_in_any_order() -> None:
    custom = CustomCost(3.0, costs=_chain_table(), lambda_=0.3, title="energy")
    several = [Params(30, lambda_=0.5), Flops(40, loss="mul#power"), custom]
    values: list[float] = []
    for objectives in (several, several[::-1]):
        net = priced(built(Chain), objectives)
        cost = costs_of(net)
        assert list(cost) == [o.name for o in objectives]
        by_hand = L * (cost["flops"] / 40) ** 0.1
        by_hand += 0.5 * (cost["params"] - 30) / 30 + 0.3 * (cost["energy"] - 3) / 3
        values.append(objective_of(net))
        assert values[-1] == pytest.approx(by_hand, rel=1e-12)
    assert values[0] == pytest.approx(values[1], rel=1e-14)


def _chain_table() -> dict[str, dict[str, float]]:
    return {
        "first": {"lin": 1.0, "deep": 2.5, "skip": 0.0},
        "second": {"bn": 4.0, "wide": 3.0, "halved": 0.25},
    }


@pytest.mark.parametrize(
    ("objective", "reward", "expected"),
    [
        (Flops(40), 0.9, 0.9 - 0.1 * 20 / 40),
        (Flops(40, lambda_=2), -0.9, -0.9 - 2 * 20 / 40),
        (Flops(loss="fbnet-add"), 0.9, 0.9 - 0.2 * 60**0.6),
        (Flops(40, loss="mul#power"), 0.9, 0.9 * (40 / 60) ** 0.1),
        (Flops(40, loss="mul#power"), -0.9, -0.9 * (60 / 40) ** 0.1),
        (Flops(40, loss="mul#power"), 0.0, 0.0),
        (Flops(40, loss="mul#log"), 0.9, 0.9 / (math.log(60) / math.log(40)) ** 0.3),
        (Flops(40, loss="mul#log", alpha=9), -0.9, -0.9 * (math.log(60) / math.log(40)) ** 0.3),
        (Flops(loss="fbnet-mul"), 0.9, 0.9 / math.log(60) ** 0.6),
        (Flops(max=50), 0.9, 0.9),
    ],
)
def test_rewards(objective: Objective, reward: float, expected: float) -> None:
    assert objective.rewarded(reward, 60) == pytest.approx(expected, rel=1e-12)
    assert objective.rewarded(reward, 90) <= objective.rewarded(reward, 60)


def test_scores_weigh_the_cost_of_the_architecture_itself() -> None:
    net = priced(built(Chain), [Params(30, lambda_=0.5), Flops(40, loss="mul#power")], "random")
    arch = net.space.validate({"first": "deep", "second": "wide"})
    # 12 + 8 MACs around, 16 for either; 16 + 10 parameters around, 20 for either.
    by_hand = 0.8 * (40 / 52) ** 0.1 - 0.5 * (66 - 30) / 30
    assert net.scored(0.8, arch) == pytest.approx(by_hand, rel=1e-12)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "300", True])
@pytest.mark.parametrize("name", ["target", "max", "lambda_"])
def test_figures_must_be_positive(name: str, value: Any) -> None:
    figures: dict[str, Any] = {"target": 1.0} | {name: value}
    with pytest.raises(SearchError, match=rf"Flops\({name}=.*positive number"):
        Flops(**figures)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Flops(3, unit="m"), r"Flops\(unit='m'\).*'', 'k', 'M', 'G'"),
        (lambda: Params(3, loss="log"), r"Params\(loss='log'\).*add#linear"),
        (lambda: Flops(loss="mul#log"), "needs a target"),
        (lambda: Flops(max=3, loss="add#linear"), "needs a target"),
        (lambda: Flops(3, alpha=0.1), "loss 'add#linear' has none"),
        (lambda: Flops(3, loss="mul#power", lambda_=0.1), "loss 'mul#power' has none"),
        (lambda: Flops(max=3, beta=0.1), "loss '' has none"),
        (lambda: Flops(1.0, loss="mul#log"), "logarithm of a target of at most 1"),
        (lambda: Flops(0.5, loss="mul#log", unit="G"), "logarithm of a target of at most 1"),
        (lambda: CustomCost(3, costs=5), r"CustomCost\(costs=5\)"),
        (lambda: CustomCost(3, costs={}, fixed=-1.0), "fixed costs -1.0"),
        (lambda: CustomCost(3, costs={}, fixed=math.nan), "fixed costs nan"),
    ],
)
def test_objectives_that_cannot_be(made: Callable[[], Objective], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        made()


class Free(nn.Module):
    """What `zero` costs nothing: no MAC, and no parameter; the other has 16 of either."""

    def __init__(self, relaxed: bool = False) -> None:
        super().__init__()
        self.block = LayerChoice(
            {"zero": Zero(), "lin": nn.Linear(3, 3, bias=False)},
            label="block",
            relaxed_only=["zero"] if relaxed else [],
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Flops(40, loss="mul#log"), r"logarithm.*above 1.*zero.*costs 0"),
        (Flops(loss="fbnet-mul"), r"logarithm.*above 1.*zero.*costs 0"),
        (Params(40, loss="mul#power"), r"power.*above 0.*zero.*costs 0"),
        (Params(loss="fbnet-add"), r"power.*above 0.*zero.*costs 0"),
    ],
)
def test_losses_that_are_not_defined_for_a_reachable_cost(
    objective: Objective, message: str, relaxed: bool
) -> None:
    with pytest.raises(SearchError, match=message):
        priced(built(lambda: Free(relaxed)), objective)
    priced(built(lambda: Free(relaxed)), type(objective)(40))  # a sum is defined


def test_a_logarithm_needs_a_unit_that_is_small_enough() -> None:
    with pytest.raises(SearchError, match=r"costs 0\.02 in units of 'k'; use a smaller unit"):
        priced(built(Chain), Flops(2, unit="k", loss="mul#log"))
    net = priced(built(Chain), Flops(40, loss="mul#log"))  # the cheapest costs 20
    assert math.isfinite(objective_of(net))
    cost = CustomCost(40, costs=lambda _: 0.0, fixed=1.0, loss="mul#log")
    with pytest.raises(SearchError, match=r"above 1, but .* costs 1 in units of 'one'"):
        priced(built(Chain), cost)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bound_below_the_cheapest_is_refused(strategy: str) -> None:
    message = r"flops: no architecture costs at most max=19; the cheapest one costs 20$"
    with pytest.raises(SearchError, match=message):
        priced(built(Chain), Flops(max=19), strategy)
    priced(built(Chain), Flops(max=20), strategy)


def test_the_message_on_a_bound_has_its_unit() -> None:
    message = r"max=0\.01k; the cheapest one costs 0\.02k$"
    with pytest.raises(SearchError, match=message):
        priced(built(Chain), Flops(max=0.01, unit="k"))


def test_a_candidate_that_is_never_chosen_keeps_no_bound() -> None:
    with pytest.raises(SearchError, match="the cheapest one costs 9"):
        priced(built(lambda: Free(relaxed=True)), Flops(max=5))


@pytest.mark.parametrize("given", ["flops", 3.0, [Flops(3), "params"], {"flops": 3}])
def test_what_is_no_objective(given: Any) -> None:
    with pytest.raises(SearchError, match=r"give nasfx.Flops\(\.\.\.\)"):
        priced(built(Chain), given)


def test_two_objectives_of_one_name() -> None:
    with pytest.raises(SearchError, match=r"one name: \['flops', 'flops'\]"):
        priced(built(Chain), [Flops(3), Flops(max=300)])
    several = [CustomCost(3, costs=_chain_table(), title=title) for title in ("a", "b")]
    assert list(costs_of(priced(built(Chain), several))) == ["a", "b"]


def test_an_objective_needs_example_inputs() -> None:
    with pytest.raises(SearchError, match="an objective needs shapes to count"):
        nasfx.transform(Chain(), "darts", objective=Flops(3))


# -- units and costs of one's own ------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "size"), [("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9)])
def test_units(unit: str, size: float) -> None:
    plain = priced(built(Chain), Flops(40))
    net = priced(built(Chain), Flops(40 / size, max=60 / size, unit=unit))
    assert costs_of(net)["flops"] == pytest.approx(costs_of(plain)["flops"] / size, rel=1e-12)
    assert objective_of(net) == pytest.approx(objective_of(plain), rel=1e-12)
    assert net.space.bounds == {"flops": 60 / size}


def test_a_table_is_paid_at_every_call_of_a_choice_that_runs() -> None:
    table = {"block": {"conv": 5.0, "tanh": 0.5}}
    x = example()
    net = priced(Repeated(), CustomCost(1, costs=table, fixed=2.0), "single-path", x)
    cost = net.space.costs["custom"]
    assert cost(Architecture({"block": "conv"})) == 3 * 5 + 2
    assert cost(Architecture({"block": "tanh"})) == 3 * 0.5 + 2
    assert costs_of(net) == {"custom": pytest.approx(3 * 2.75 + 2)}


def test_a_table_of_nested_and_tied_choices() -> None:
    table = {
        "outer": {"plain": 1.0, "holds": 2.0, "direct": 4.0},
        "inner": {"0": 8.0, "1": 16.0},
        "direct": {"a": 32.0, "b": 64.0},
        "tied": {"u": 128.0, "v": 256.0},
    }
    net = priced(built(Nested), CustomCost(1, costs=table), "single-path")
    for arch in net.space.enumerate():
        by_hand = sum(table[k][v] * (2 if k == "tied" else 1) for k, v in arch.items())
        assert net.space.costs["custom"](arch) == by_hand


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"first": {"lin": 1, "deep": 2}}, "no cost for candidate 'skip' of 'first'"),
        ({"first": {"lin": 1, "deep": 2, "skip": 0}}, "no cost for candidate 'bn' of 'second'"),
        (_chain_table() | {"third": {"a": 1}}, "a row for 'third', no layer choice"),
        (_chain_table() | {"second": {"bm": 1}}, "'second' has no candidate 'bm'"),
        (
            _chain_table() | {"second": {"bn": math.nan, "wide": 1, "halved": 1}},
            "'second', candidate 'bn' costs nan",
        ),
        (
            _chain_table() | {"second": {"bn": 1, "wide": -2, "halved": 1}},
            "'second', candidate 'wide' costs -2",
        ),
        (
            _chain_table() | {"second": {"bn": 1, "wide": "2", "halved": 1}},
            "'second', candidate 'wide' costs '2'",
        ),
    ],
)
def test_tables_that_are_wrong(table: Any, message: str) -> None:
    with pytest.raises(SearchError, match=f"energy: .*{message}"):
        priced(built(Chain), CustomCost(1, costs=table, title="energy"))


def test_a_row_for_an_input_choice_is_refused() -> None:
    table = {"block": {"lin": 1, "deep": 1, "skip": 1}, "pick": {"0": 1}}
    with pytest.raises(SearchError, match="a row for 'pick', no layer choice"):
        priced(built(Skips), CustomCost(1, costs=table))


def test_a_function_is_given_every_call() -> None:
    calls: list[Call] = []

    def flops(call: Call) -> float:
        calls.append(call)
        return call.count.flops + 0.5

    net = priced(built(Chain), CustomCost(1, costs=flops, fixed=3), "single-path")
    seen = {(c.path, c.label, c.candidate): type(c.module).__name__ for c in calls}
    assert seen["stem", "", ""] == "Linear"
    assert seen["first.lin", "first", "lin"] == "Linear"
    assert seen["first.deep.0", "first", "deep"] == "Linear"
    assert seen["first.deep.1", "first", "deep"] == "Tanh"
    assert seen["tanh", "", ""] == "NoneType"
    assert not any(path.startswith("first.skip") for path, _, _ in seen)  # an identity is no call
    cost = net.space.costs["custom"]
    # stem, tanh and head: 20 and three halves; `deep` has two calls, `halved` one.
    assert cost(net.space.validate({"first": "deep", "second": "halved"})) == 20 + 16 + 3 + 6 * 0.5
    assert cost(net.space.validate({"first": "skip", "second": "halved"})) == 20 + 3 + 4 * 0.5


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf, None])
def test_functions_whose_cost_is_none(value: Any) -> None:
    cost = CustomCost(1, costs=lambda call: value if call.path == "head" else 1.0)
    with pytest.raises(SearchError, match=rf"custom: the call of head costs {value!r}"):
        priced(built(Chain), cost)


# -- without objectives ----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_objectives_no_cost(strategy: str) -> None:
    net = nasfx.transform(built(Chain), strategy, example_inputs=X)
    assert net.expected_cost() == {}
    assert net.space.costs == {}
    assert net.space.bounds == {}


@pytest.mark.parametrize("strategy", ["darts", "fbnet", "proxyless"])
def test_a_mere_bound_leaves_gradients_as_they_are(strategy: str) -> None:
    model = built(Chain)
    grads: list[list[Tensor]] = []
    for objective in (None, [], Flops(max=60)):
        net = nasfx.transform(
            copy.deepcopy(model), strategy, example_inputs=X, objective=objective, seed=5
        )
        with net.arch_step():
            net.objective(loss_of(net, X, Y)).backward()
        grads.append([p.grad for p in net.arch_parameters() if p.grad is not None])
    assert len(grads[0]) == 2
    for others in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], others, strict=True))


def test_objectives_belong_to_the_net() -> None:
    several = [Flops(40), Params(max=100)]
    net = priced(built(Chain), several)
    assert net.objectives == tuple(several)
    again = copy.deepcopy(net)
    assert costs_of(again) == costs_of(net)
    again.arch_parameters()[0].data += torch.tensor([3.0, 0, 0])
    assert costs_of(again) != costs_of(net)


# -- what is derived within bounds -----------------------------------------------------------------


class Uneven(nn.Module):
    """Candidates of many costs; an input choice over their outputs, and one inside a candidate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.one = LayerChoice(
            {"a": nn.Linear(WIDTH, WIDTH), "b": nn.Sequential(dense(), dense()), "c": nn.Tanh()},
            label="one",
        )
        inner = LayerChoice({"x": nn.Linear(WIDTH, WIDTH), "y": Scale(0.5)}, label="inner")
        self.two = LayerChoice({"holds": nn.Sequential(inner, dense()), "id": nn.Identity()})
        self.three = dense()
        self.pick = InputChoice(4, n_chosen=2, label="pick")
        self.any = InputChoice(3, n_chosen=None, label="any")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        one = self.one(x)
        two, three = self.two(one), self.three(x)
        return self.any([self.pick([x, one, two, three]), three, x]) + x


class UnevenCell(Cell):
    """A cell in which a candidate of every edge costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        for edge in self.edges.values():
            edge.act = nn.Tanh()


def subset_log_p(alpha: list[float], chosen: tuple[int, ...], n_chosen: int | None) -> float:
    """Log p of a subset, from the formula."""
    if n_chosen is None:
        p = [1 / (1 + math.exp(-a)) for a in alpha]
        return sum(math.log(q if i in chosen else 1 - q) for i, q in enumerate(p))
    weights = {s: math.exp(sum(alpha[i] for i in s)) for s in _subsets(len(alpha), n_chosen)}
    return math.log(weights[chosen] / sum(weights.values()))


def _subsets(n: int, k: int) -> Iterator[tuple[int, ...]]:
    if k == 0:
        yield ()
        return
    for last in range(k - 1, n):
        for rest in _subsets(last, k - 1):
            yield (*rest, last)


def log_p(net: Supernet, arch: Architecture) -> float:
    """The sum of log p over the active labels that have parameters."""
    state: Any = net.get_submodule("arch")
    total = 0.0
    for label, alpha in state.alpha_parameters().items():
        if label not in arch:
            continue
        choice, values = net.space[label], alpha.detach()
        if choice.kind == "input":
            total += subset_log_p(values.tolist(), tuple(arch[label]), choice.n_chosen)
            continue
        names = choice.candidates if len(values) == len(choice.candidates) else choice.choosable
        total += float(torch.log_softmax(values, 0)[names.index(arch[label])])
    return total


@pytest.mark.parametrize("strategy", ["darts", "fbnet", "proxyless"])
@pytest.mark.parametrize("kind", [Nested, Uneven, UnevenCell])
def test_derive_keeps_the_bounds_and_is_the_most_probable(
    kind: Callable[[], nn.Module], strategy: str
) -> None:
    open_net = nasfx.transform(built(kind), strategy, example_inputs=X)
    free = priced(built(kind), [Flops(), Params()], "random")
    architectures = list(free.space.enumerate())
    middle = {
        name: sorted(cost(a) for a in architectures)[len(architectures) // 3]
        for name, cost in free.space.costs.items()
    }
    objectives = [Flops(max=middle["flops"]), Params(max=middle["params"] + 8)]
    net = priced(built(kind), objectives, strategy)
    fitting = [a for a in architectures if net.space.fits(a)]
    assert 0 < len(fitting) < len(architectures)
    broken = 0
    for seed in range(30):
        spread(net, seed, scale=2.0)
        spread(open_net, seed, scale=2.0)
        derived, unbounded = net.derive(), open_net.derive()
        assert net.space.fits(derived)
        assert derived == net.space.validate(derived)
        if net.space.fits(unbounded):
            assert derived == unbounded
            continue
        broken += 1
        best = max(log_p(net, arch) for arch in fitting)
        assert log_p(net, derived) == pytest.approx(best, abs=1e-7)
    assert broken >= 5


@pytest.mark.parametrize("strategy", [FBNet(final_samples=4), Proxyless(gate="two"), "darts"])
def test_a_concluded_search_keeps_the_bounds(strategy: Any) -> None:
    net = priced(built(Nested), Flops(max=53), strategy)
    asked: list[Architecture] = []

    def evaluate(arch: Architecture) -> float:
        asked.append(arch)
        return -len(asked)

    for seed in range(5):
        spread(net, seed)
        assert net.space.fits(net.conclude(evaluate))
    assert all(net.space.fits(arch) for arch in asked)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_cheapest_architecture_to_derive(name: str) -> None:
    x = example()
    model = MODELS[name]()
    cheapest = nasfx.cost(model, x).min.flops
    if cheapest == 0:
        cheapest = 1  # a bound is positive
    net = priced(model, Flops(max=cheapest), "proxyless", x)
    assert net.space.costs["flops"](net.derive()) <= cheapest


def test_block_without_a_bound_is_the_most_probable() -> None:
    x = example()
    net = priced(Block(), Flops(5, unit="k"), "darts", x)
    net.arch_parameters()[0].data.copy_(torch.tensor([0.0, 1.0, 0.5]))
    assert net.derive() == {"block": "conv5"}
    bounded = priced(Block(), Flops(max=8, unit="k"), "darts", x)
    bounded.arch_parameters()[0].data.copy_(torch.tensor([0.0, 1.0, 0.5]))
    assert bounded.derive() == {"block": "skip"}
