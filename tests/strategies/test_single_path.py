"""Single path one-shot: uniform, binned and fair draws, and the evolution at the end."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nasfx
from nasfx import Architecture, CheckpointError, InputChoice, LayerChoice, SearchError, SinglePath
from nasfx.strategies.population import Population
from tests.strategies.nets import Cell, Chain, Nested, Skips, batch, built, drawn, loss_of


def test_every_way_to_decide_is_equally_likely() -> None:
    net = nasfx.transform(built(lambda: Skips(2)), "single-path", seed=1)
    n = 2400
    counts: dict[str, Counter[object]] = {"block": Counter(), "pick": Counter()}
    for _ in range(n):
        with net.weight_step():
            for label, value in drawn(net).items():
                counts[label][value] += 1
    assert set(counts["block"]) == {"lin", "deep", "skip"}
    assert set(counts["pick"]) == {(i, j) for i in range(4) for j in range(i + 1, 4)}
    for label, counter in counts.items():
        p = 1 / len(counter)
        for value, count in counter.items():
            assert abs(count / n - p) < 5 * (p * (1 - p) / n) ** 0.5, (label, value)


def test_any_subset_is_drawn_the_empty_one_too() -> None:
    net = nasfx.transform(built(lambda: Skips(None)), "single-path", seed=1)
    seen = set()
    for _ in range(400):
        with net.weight_step():
            seen.add(drawn(net)["pick"])
    assert len(seen) == 16


def test_relaxed_only_candidates_are_never_drawn() -> None:
    net = nasfx.transform(built(Cell), "single-path", seed=1)
    seen: dict[str, set[object]] = {}
    for _ in range(60):
        with net.weight_step():
            for label, value in net.path.items():
                seen.setdefault(label, set()).add(str(value))
    assert seen.pop("node1") == {"[0, 1]"}
    assert len(seen.pop("node2")) == 3
    assert all(values == {"lin", "act"} for values in seen.values())
    assert len(seen) == 5


@pytest.mark.parametrize("reduction", ["concat", "none", "mean", "sum"])
def test_every_reduction_is_accepted(reduction: str) -> None:
    model = built(lambda: Skips(2, reduction))
    net = nasfx.transform(model, "single-path")
    x, y = batch()
    for _ in range(8):
        with net.weight_step():
            loss_of(net, x, y).backward()
            with nasfx.activated(model, net.path):
                assert torch.equal(net(x), model(x))


def test_there_is_nothing_to_derive() -> None:
    net = nasfx.transform(built(Chain), "single-path")
    with pytest.raises(
        SearchError, match=r"learns no distribution.*nasfx\.search.*finalize\(net, arch\)"
    ):
        net.derive()
    with pytest.raises(SearchError, match=r"learns no distribution"):
        nasfx.finalize(net)


def test_there_are_no_alphas_and_their_optimizer_does_nothing() -> None:
    net = nasfx.transform(built(Nested), "single-path")
    assert net.arch_parameters() == []
    optimizer = net.arch_optimizer()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with net.arch_step():
        net.objective(loss_of(net, *batch())).backward()
        drawn_now = net.state_dict()
    optimizer.step()
    optimizer.zero_grad()
    for key, value in net.state_dict().items():
        if "arch.state" in key:
            assert torch.equal(value, drawn_now[key]), key
        elif "running" not in key and "num_batches" not in key:
            assert torch.equal(value, before[key]), key
    assert {id(p) for p in net.weight_parameters()} == {id(p) for p in net.parameters()}


# -- the end of a search --------------------------------------------------------------------------


def wide() -> nn.Module:
    """4**6 subnets."""
    return nn.Sequential(
        *(LayerChoice([nn.Identity() for _ in range(4)], label=f"c{i}") for i in range(6))
    )


def number(arch: Architecture) -> float:
    return float(sum(int(v) * 4 ** int(k[1:]) for k, v in arch.items()))


def test_conclude_takes_the_best_of_all_in_a_small_space() -> None:
    net = nasfx.transform(built(Chain), "single-path")
    asked = []

    def evaluate(arch: Architecture) -> float:
        asked.append(arch)
        return (arch["first"] == "deep") + 2 * (arch["second"] == "wide")

    assert net.conclude(evaluate) == {"first": "deep", "second": "wide"}
    assert len(asked) == len(set(asked)) == 9


def test_conclude_is_the_evolution_of_the_authors() -> None:
    """50 in each of 20 generations; a smaller one is the same code with its own numbers."""
    net = nasfx.transform(wide(), "single-path")
    assert (SinglePath().population, SinglePath().generations) == (50, 20)
    asked: list[Architecture] = []
    best = net.conclude(lambda arch: asked.append(arch) or number(arch))
    assert len(asked) == len(set(asked)) == 1000
    assert number(best) == 4**6 - 1

    net = nasfx.transform(wide(), SinglePath(population=7, generations=3), seed=5)
    asked.clear()
    best = net.conclude(lambda arch: asked.append(arch) or -number(arch))
    generator = torch.Generator()
    generator.set_state(net._arch.state.generator.get_state())
    pool = Population(net.space, (), 7, generator)
    assert len(list(pool.run(3, lambda arch: -number(arch)))) == 3
    assert asked == list(pool.scores)
    assert len(asked) == 21
    assert best == pool.best()[0] == min(asked, key=number)


def test_what_is_concluded_again_is_the_same_and_the_net_draws_as_before() -> None:
    nets = [
        nasfx.transform(wide(), SinglePath(population=6, generations=3), seed=s) for s in (1, 2)
    ]
    asked: list[list[Architecture]] = []
    for net in (nets[0], nets[0], nets[1]):
        asked.append([])
        before = net._arch.state.generator.get_state()
        net.conclude(lambda arch: asked[-1].append(arch) or number(arch))
        assert torch.equal(net._arch.state.generator.get_state(), before)
    assert asked[0] == asked[1] != asked[2]


def test_the_first_of_equals_is_returned() -> None:
    net = nasfx.transform(built(Chain), "single-path")
    asked: list[Architecture] = []
    assert net.conclude(lambda arch: asked.append(arch) or 0.0) == asked[0]


def test_conclude_keeps_within_the_bounds_and_training_does_not() -> None:
    net = nasfx.transform(wide(), SinglePath(population=10, generations=8))
    net.space.costs = {"flops": number}
    net.space.bounds = {"flops": 1000.0}
    asked: list[Architecture] = []
    best = net.conclude(lambda arch: asked.append(arch) or number(arch))
    assert len(asked) == 80
    assert max(map(number, asked)) == number(best) <= 1000
    assert max(number(net.sample()) for _ in range(20)) > 1000
    net.space.bounds = {"flops": -1.0}
    with pytest.raises(SearchError, match=r"no architecture satisfies.*bounds are flops <= -1"):
        net.conclude(number)


# -- bins -----------------------------------------------------------------------------------------


def binned(
    bins: tuple[float, float, float],
    bins_of: str = "flops",
    model: nn.Module | None = None,
    cost: Callable[[Architecture], float] = number,
) -> nasfx.Supernet:
    """A net that draws by `cost`, in the place of one that is declared."""
    net = nasfx.transform(
        model or wide(),
        SinglePath(bins=bins, bins_of=bins_of),
        seed=3,
        example_inputs=batch()[0],
        objective=nasfx.CustomCost(costs=lambda call: 0.0, title=bins_of),
    )
    net.space.costs = {bins_of: cost}
    return net


@pytest.mark.parametrize("bins_of", ["flops", "params"])
def test_every_draw_lies_in_a_bin_and_all_bins_are_equally_likely(bins_of: str) -> None:
    """The last bin has as many draws as the others, though fewer paths; edges belong to both."""
    net = binned((600, 1200, 200), bins_of=bins_of)
    counts: Counter[int] = Counter()
    for i in range(200):
        with net.weight_step() if i % 2 else net.arch_step():
            cost = number(net.path)
            assert set(drawn(net)) == {f"c{i}" for i in range(6)}
        assert 600 <= cost <= 1200
        counts[min(2, int(cost - 600) // 200)] += 1
    assert all(abs(n - 200 / 3) < 5 * (200 * 2 / 9) ** 0.5 for n in counts.values())
    assert len(counts) == 3
    assert all(600 <= number(net.sample()) <= 1200 for _ in range(50))


def test_bins_that_few_paths_lie_in_are_drawn_as_often() -> None:
    """Uniform draws would give the first bin one in 16."""
    net = binned((0, 64, 16))
    net.space.costs = {"flops": lambda arch: number(arch) ** 0.5}
    counts = Counter(int(number(net.sample()) ** 0.5) // 16 for _ in range(400))
    assert set(counts) == {0, 1, 2, 3}
    assert all(abs(n - 100) < 5 * (400 * 3 / 16) ** 0.5 for n in counts.values())


def test_after_500_tries_the_path_is_any() -> None:
    net = binned((0.25, 0.75, 0.25))  # costs are whole
    costs: list[Architecture] = []
    net.space.costs = {"flops": lambda arch: costs.append(arch) or number(arch)}
    state = net._arch.state.generator.get_state()
    found = net.sample()
    assert len(costs) == 500
    net._arch.state.generator.set_state(state)
    torch.randint(2, (), generator=net._arch.state.generator)  # the bin
    expected = [net.space.sample(net._arch.state.generator) for _ in range(501)]
    assert costs == expected[:-1]
    assert found == expected[-1]


def test_bins_count_only_what_is_active() -> None:
    net = binned((2, 2.5, 0.5), model=built(Nested), cost=len)
    for _ in range(20):
        with net.weight_step():
            assert set(drawn(net)) == {"outer", "inner", "direct", "tied"}
            assert set(net.path) == {"outer", "tied"}
    net = binned((4, 5, 1), model=built(Nested), cost=len)
    assert len(net.sample()) < 4  # no canonical one has all four


def test_bins_of_a_cost_that_the_net_does_not_know_are_an_error() -> None:
    match = r"'flops', a cost .* \(it knows 'params'\): declare it .*objective=nasfx\.Flops\(\)"
    with pytest.raises(SearchError, match=match):
        nasfx.transform(
            wide(),
            SinglePath(bins=(0, 10, 5)),
            example_inputs=batch()[0],
            objective=nasfx.Params(max=1e6),
        )


@pytest.mark.parametrize(
    "bins",
    [
        (1, 2), (0, 10, 0), (0, 10, -5), (10, 10, 1), (10, 0, 5), (0, 10, 3), (0, 10, 20),
        (-5, 5, 5), (0, float("inf"), 1), (0, float("nan"), 1), ("0", 1, 1), [0, 10, 5], 10,
    ],
)  # fmt: skip
def test_bins_that_are_none_are_refused(bins: Any) -> None:
    with pytest.raises(SearchError, match=r"must be \(low, high, step\)"):
        SinglePath(bins=bins)


def test_bins_of_fractions_are_whole_bins() -> None:
    assert SinglePath(bins=(0.1, 0.7, 0.1)).bins == (0.1, 0.7, 0.1)
    assert SinglePath(bins=(290e6, 360e6, 10e6)).bins_of == "flops"


# -- strict fairness ------------------------------------------------------------------------------


class Uneven(nn.Module):
    """Choices of 1, 2, 3, 5 (with one that is never chosen) candidates, and of inputs."""

    def __init__(self) -> None:
        super().__init__()

        def several(n: int, label: str, relaxed_only: tuple[str, ...] = ()) -> LayerChoice:
            layers = [nn.Linear(3, 3) for _ in range(n)]
            return LayerChoice(layers, label=label, relaxed_only=relaxed_only)

        self.layers = nn.Sequential(
            several(1, "one"), several(2, "two"), several(3, "three"), several(5, "five", ("2",))
        )
        self.pick = InputChoice(5, label="pick")
        self.pair = InputChoice(4, n_chosen=2, label="pair")

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        x = self.pick([x * i for i in range(5)])
        return self.pair([x + i for i in range(4)])


SIZES = {"one": 1, "two": 2, "three": 3, "five": 4, "pick": 5}


def fair(kind: Callable[[], nn.Module] = Uneven, seed: int = 0) -> nasfx.Supernet:
    return nasfx.transform(built(kind), SinglePath(fair=True), seed=seed)


def trained(net: nasfx.Supernet, steps: int) -> list[dict[str, Any]]:
    """The paths of so many weight steps; what is inactive is left out."""
    paths = []
    for _ in range(steps):
        with net.weight_step():
            paths.append({k: str(v) for k, v in net.path.items()})
    return paths


def rounds(values: list[str], n: int) -> list[list[str]]:
    return [values[i : i + n] for i in range(0, len(values) - n + 1, n)]


def test_every_round_has_every_candidate_exactly_once_in_random_order() -> None:
    paths = trained(fair(), 240)
    for label, n in SIZES.items():
        found = rounds([path[label] for path in paths if label in path], n)
        assert len(found) >= 48
        everything = sorted(found[0])
        assert len(set(everything)) == n
        assert all(sorted(one) == everything for one in found)
        orders = Counter(map(tuple, found))
        assert len(orders) == min({1: 1, 2: 2, 3: 6, 4: 24, 5: 120}[n], len(orders))
        assert len(orders) >= {1: 1, 2: 2, 3: 6, 4: 20, 5: 30}[n]
    assert "2" not in {path["five"] for path in paths if "five" in path}
    pairs = [path["pair"] for path in paths]
    assert {str(list(p)) for p in itertools.combinations(range(4), 2)} == set(pairs)
    assert any(len(set(six)) < 6 for six in rounds(pairs, 6))  # these stay uniform


def test_orders_are_equally_likely_and_labels_are_independent() -> None:
    paths = trained(fair(lambda: nn.Sequential(wide()[0], wide()[1])), 4 * 600)
    firsts = Counter((p["c0"], p["c1"]) for p in paths)
    assert len(firsts) == 16
    assert all(abs(n - 150) < 5 * (150 * 15 / 16) ** 0.5 for n in firsts.values())
    starts = Counter(one[0] for one in rounds([p["c0"] for p in paths], 4))
    assert all(abs(n - 150) < 5 * (600 * 3 / 16) ** 0.5 for n in starts.values())


@pytest.mark.parametrize("kind", [Nested, lambda: Skips(1)])
def test_a_turn_is_a_step_that_runs_the_choice(kind: Callable[[], nn.Module]) -> None:
    net = fair(kind)
    paths = trained(net, 120)
    assert any(len(path) < len(net.space.choices) for path in paths)
    for choice in net.space.choices:
        n = len(choice.choosable)
        found = rounds([path[choice.label] for path in paths if choice.label in path], n)
        assert len(found) >= 5
        assert all(len(set(one)) == n for one in found)
    with net.weight_step():  # what is inactive has a decision all the same
        assert set(drawn(net)) == {choice.label for choice in net.space.choices}


def test_neither_samples_nor_arch_steps_nor_conclude_take_a_turn() -> None:
    net = fair()
    paths: list[dict[str, Any]] = []
    for _ in range(60):
        paths += trained(net, 1)
        net.sample()
        with net.arch_step():
            pass
        net.conclude(lambda arch: 0.0) if len(paths) == 30 else None
    for label, n in SIZES.items():
        found = rounds([path[label] for path in paths if label in path], n)
        assert all(len(set(one)) == n for one in found)


def queues(net: nasfx.Supernet) -> dict[str, list[int]]:
    prefix = "arch.state.queues."
    state = net.state_dict()
    return {k.removeprefix(prefix): v.tolist() for k, v in state.items() if k.startswith(prefix)}


@pytest.mark.parametrize("before", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("other", [0, 1, 4])
def test_the_queues_are_saved_in_the_middle_of_a_round(before: int, other: int) -> None:
    net, loaded = fair(seed=1), fair(seed=2)
    trained(net, before)
    trained(loaded, other)  # queues of other lengths
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(v.dtype == torch.int64 for k, v in state.items() if ".queues." in k)
    loaded.load_state_dict(state)
    assert queues(loaded) == queues(net)
    assert set(queues(net)) == set(SIZES)
    if before == 7:
        assert {k: len(v) for k, v in queues(net).items() if k in ("one", "two", "three")} == {
            "one": 0, "two": 1, "three": 2,
        }  # fmt: skip
    copies = [loaded, copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    expected = trained(net, 30)
    assert all(trained(each, 30) == expected for each in copies)
    # What was loaded is not shared.
    assert {k: v.tolist() for k, v in state.items() if ".queues." in k} != {
        f"arch.state.queues.{k}": v for k, v in queues(loaded).items()
    }


def test_queues_that_are_none_are_refused() -> None:
    net = fair()
    state = net.state_dict()
    for bad in ([0, 0], [3], [-1], [0, 1, 2, 3]):
        key = "arch.state.queues.three"
        with pytest.raises(CheckpointError, match=rf"{key} = .* is no queue of 3 candidates"):
            net.load_state_dict(state | {key: torch.tensor(bad)})
    assert net.load_state_dict(state)
    del state["arch.state.queues.three"]
    with pytest.raises(RuntimeError, match=r"Missing key.*arch\.state\.queues\.three"):
        net.load_state_dict(state)
    plain = nasfx.transform(built(Uneven), "single-path")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*arch\.state\.queues\.two"):
        plain.load_state_dict(state)
    assert not queues(plain)


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"population": 1}, r"population=1\): it must be a whole number of at least 2"),
        ({"generations": 0}, r"generations=0\): it must be a whole number of at least 1"),
        ({"recalibrate": -1}, r"recalibrate=-1\): it must be a whole number of at least 0"),
        ({"recalibrate": True}, r"recalibrate=True\): it must be a whole number"),
        ({"recalibrate": ([], 200)}, r"recalibrate=\(\[\], 200\)\): it must be a whole number"),
        ({"bins": (0, 10, 5), "fair": True}, r"bins and fair are two ways"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(SearchError, match=match):
        SinglePath(**options)


def test_search_is_told_to_recalibrate() -> None:
    assert SinglePath().recalibrate == 200
    assert SinglePath(recalibrate=0).recalibrate == 0
    assert SinglePath(7, 3).population == 7
