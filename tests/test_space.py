import collections
import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nasfx
from nasfx import Architecture, InputChoice, LayerChoice, SearchSpace, activated, search_space
from nasfx.choice import default_label, named_choices
from nasfx.errors import SpaceError
from tests.models import (
    MODELS,
    DartsNet,
    EnasMacro,
    Inputs,
    Nested,
    RandomModel,
    Step,
    example,
    random_steps,
)

# -- an independent count: run the model on symbols, and look at what its result is made of --------


class Term:
    """A value that remembers how it was computed."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __add__(self, other: "Term") -> "Term":
        return Term("add", self.parts, other.parts)

    def __truediv__(self, n: int) -> "Term":
        return Term("div", self.parts, n)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> "Term":
        """The empty subset of an InputChoice needs its first input's shape."""
        assert func is torch.zeros_like
        return Term("zeros", args[0].parts)


class Op(nn.Module):
    """A module that no other equals; a leaf when traced."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Any) -> Any:
        assert isinstance(x, Term)
        return Term(self.name, x.parts)


def values_of(choice: nn.Module) -> Iterator[Any]:
    if isinstance(choice, LayerChoice):
        yield from choice.choosable
        return
    assert isinstance(choice, InputChoice)
    n = choice.n_candidates
    for k in range(n + 1) if choice.n_chosen is None else (choice.n_chosen,):
        yield from map(list, itertools.combinations(range(n), k))


def mark_inputs(choice: nn.Module, args: tuple[list[Term]]) -> tuple[list[Term]]:
    """Make every input of an InputChoice one that no other equals."""
    return ([Term("input", i, x.parts) for i, x in enumerate(args[0])],)


def results(model: nn.Module) -> dict[Any, list[dict[str, Any]]]:
    """Every result that the model can compute, with the assignments of all labels that give it."""
    model = copy.deepcopy(model)
    for _, choice in named_choices(model):
        if isinstance(choice, InputChoice):
            choice.register_forward_pre_hook(mark_inputs)
    values = {
        choice.label or default_label(path): list(values_of(choice))
        for path, choice in named_choices(model)
    }
    found: dict[Any, list[dict[str, Any]]] = {}
    for picked in itertools.product(*values.values()):
        architecture = dict(zip(values, picked, strict=True))
        with activated(model, architecture):
            found.setdefault(model(Term("x")).parts, []).append(architecture)
    return found


def space_of(model: nn.Module) -> SearchSpace:
    return search_space(nasfx.trace(model, leaf_modules=(Op,)))


def check_against_results(model: nn.Module) -> None:
    """One canonical architecture for each result, and nothing else."""
    space = space_of(model)
    by_result = results(model)
    canonical: dict[Any, Architecture] = {}
    for result, architectures in by_result.items():
        (canonical[result],) = {space.validate(a) for a in architectures}
    assert len(set(canonical.values())) == len(by_result)
    assert space.size == len(by_result)
    listed = list(space.enumerate())
    assert len(listed) == len(by_result)
    assert set(listed) == set(canonical.values())
    for architecture in listed:
        assert space.validate(architecture) == architecture
        assert set(space.active(architecture)) == set(architecture)
        # No decision can be left out.
        for label in architecture:
            with pytest.raises(SpaceError, match=f"no decision for '{label}'"):
                space.validate({k: v for k, v in architecture.items() if k != label})


def symbolic(steps: tuple[Step, ...]) -> RandomModel:
    return RandomModel(steps, make=lambda kind, name: Op(name))


def n_assignments(model: nn.Module) -> int:
    labels = {c.label or default_label(p): len(list(values_of(c))) for p, c in named_choices(model)}
    return math.prod(labels.values())


@settings(max_examples=100)
@given(random_steps().map(symbolic).filter(lambda m: n_assignments(m) <= 400))
def test_random_spaces_are_what_running_every_assignment_gives(model: RandomModel) -> None:
    check_against_results(model)


class Graph(nn.Module):
    """A model of symbols whose forward is given."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.body = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Any) -> Any:
        return self.body(self, x)


def ops(name: str, *names: str, label: str | None = None) -> LayerChoice:
    return LayerChoice({n: Op(f"{name}.{n}") for n in names or ("p", "q")}, label=label or name)


class Second(nn.Module):
    """Reads both of its arguments, or one."""

    def __init__(self, name: str, reads: str) -> None:
        super().__init__()
        self.op, self.reads = Op(name), reads

    def forward(self, x: Any, y: Any) -> Any:
        return self.op({"x": lambda: x, "y": lambda: y, "xy": lambda: x + y}[self.reads]())


def pick(n: int, k: int | None = 1, **options: Any) -> InputChoice:
    return InputChoice(n, k, label="pick", **options)


def producers(k: int | None) -> Graph:
    return Graph(
        lambda s, x: s.pick([s.a(x), s.b(x), s.c(x)]),
        a=ops("a"),
        b=ops("b", "p", "q", "r"),
        c=ops("c"),
        pick=pick(3, k),
    )


SPACES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "one": (lambda: nn.Sequential(ops("a", "p", "q", "r")), 3),
    "product": (lambda: nn.Sequential(ops("a"), ops("b", "p", "q", "r")), 6),
    "tied": (lambda: nn.Sequential(ops("a"), ops("b", label="a")), 2),
    "nested": (
        lambda: nn.Sequential(
            LayerChoice({"deep": nn.Sequential(Op("deep"), ops("i")), "out": Op("out")}, label="o")
        ),
        3,
    ),
    "direct": (
        lambda: nn.Sequential(
            LayerChoice({"deep": ops("i", "p", "q", "r"), "out": Op("out")}, label="o")
        ),
        4,
    ),
    "nested tied, active if any place is": (
        lambda: nn.Sequential(
            LayerChoice({"deep": nn.Sequential(ops("i")), "out": Op("out")}, label="o"),
            ops("top", label="i"),
        ),
        4,
    ),
    "tied inside two candidates": (
        lambda: nn.Sequential(
            LayerChoice(
                {
                    "l": nn.Sequential(Op("l"), ops("i1", label="i")),
                    "r": nn.Sequential(Op("r"), ops("i2", label="i")),
                    "none": Op("none"),
                },
                label="o",
            )
        ),
        5,
    ),
    "choose one of three producers": (lambda: producers(1), 2 + 3 + 2),
    "choose two": (lambda: producers(2), 6 + 4 + 6),
    "choose all": (lambda: producers(3), 12),
    # The empty subset reads the shape of input 0.
    "any subset": (lambda: producers(None), 2 + 2 + 3 + 2 + 6 + 4 + 6 + 12),
    "a producer that is also read elsewhere": (
        lambda: Graph(
            lambda s, x: (lambda a: s.pick([a, s.b(x)]) + a)(s.a(x)),
            a=ops("a"), b=ops("b"), pick=pick(2),
        ),
        2 + 4,
    ),
    "one producer for two inputs": (
        lambda: Graph(
            lambda s, x: (lambda a: s.pick([a, x, s.after(a)]))(s.a(x)),
            a=ops("a"), after=ops("after"), pick=pick(3),
        ),
        2 + 1 + 4,
    ),
    "a chain of producers": (
        lambda: Graph(lambda s, x: s.pick([s.b(s.a(x)), x]), a=ops("a"), b=ops("b"), pick=pick(2)),
        4 + 1,
    ),
    "a choice that only some candidates read": (
        lambda: Graph(
            lambda s, x: s.c(x, s.a(x)),
            a=ops("a"),
            c=LayerChoice({"one": Second("1", "x"), "two": Second("2", "xy")}, label="c"),
        ),
        1 + 2,
    ),
    "different arguments of different candidates": (
        lambda: Graph(
            lambda s, x: s.c(s.a(x), s.b(x)),
            a=ops("a"), b=ops("b", "p", "q", "r"),
            c=LayerChoice({"x": Second("x", "x"), "y": Second("y", "y")}, label="c"),
        ),
        2 + 3,
    ),
    "called twice, once on demand": (
        lambda: Graph(
            lambda s, x: s.pick([s.a(x), x]) + s.b(s.a(s.b(x))),
            a=ops("a"), b=ops("b"), pick=pick(2),
        ),
        2 * 2 * 2,
    ),
    "tied labels on demand": (
        lambda: Graph(
            lambda s, x: s.pick([s.a(x), s.b(x), s.c(x)]),
            a=ops("a"), b=ops("b", label="a"), c=ops("c"), pick=pick(3),
        ),
        2 + 2 + 2,
    ),
    "tied input choices": (
        lambda: Graph(
            lambda s, x: s.pick([s.a(x), s.b(x)]) + s.again([s.c(x), x]),
            a=ops("a"), b=ops("b"), c=ops("c"), pick=pick(2), again=pick(2),
        ),
        4 + 2,
    ),
    "input choice inside a candidate": (
        lambda: nn.Sequential(
            LayerChoice({"deep": producers(1), "out": Op("out")}, label="o"), ops("after")
        ),
        (7 + 1) * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPACES)
def test_the_size_is_the_number_of_different_subnets(name: str) -> None:
    build, size = SPACES[name]
    assert space_of(build()).size == size
    check_against_results(build())


def test_an_argument_that_is_read_for_nothing_is_not_a_demand() -> None:
    class Wasteful(nn.Module):
        def forward(self, x: Any, y: Any) -> Any:
            _ = y + y
            return x

    model = Graph(
        lambda s, x: s.c(x, s.a(x)),
        a=ops("a"),
        c=LayerChoice({"one": Wasteful(), "two": Second("2", "xy")}, label="c"),
    )
    check_against_results(model)


class Listed(nn.Module):
    """Takes what an InputChoice with reduction "none" gives."""

    def forward(self, values: list[Tensor]) -> Tensor:
        return torch.stack(values).sum(0) if len(values) else torch.zeros(2, 4, 5, 5)


def test_the_empty_list_needs_no_input() -> None:
    model = Graph(
        lambda s, x: s.listed(s.pick([s.a(x), s.b(x)])),
        a=LayerChoice({"p": nn.ReLU(), "q": nn.Tanh()}, label="a"),
        b=LayerChoice({"p": nn.ReLU(), "q": nn.Tanh()}, label="b"),
        pick=pick(2, None, reduction="none"),
        listed=Listed(),
    )
    space = search_space(model)
    assert space.size == 1 + 2 + 2 + 4
    assert {"pick": []} in list(space.enumerate())


def test_a_choice_whose_result_nobody_reads_is_never_active() -> None:
    model = Graph(lambda s, x: (s.a(x), s.b(x))[1], a=ops("a"), b=ops("b"))
    space = space_of(model)
    assert space.size == 2
    assert space.validate({"a": "p", "b": "q"}) == {"b": "q"}
    assert [dict(a) for a in space.enumerate()] == [{"b": "p"}, {"b": "q"}]


@pytest.mark.parametrize("name", MODELS)
def test_finalize_makes_as_many_different_subnets_as_the_size(name: str) -> None:
    model = MODELS[name]()
    space = search_space(model)
    seen = set()
    for architecture in itertools.islice(space.enumerate(), 40):
        subnet = nasfx.finalize(model, architecture, copy=False)
        nodes = [(n.op, str(n.target), str(n.args)) for n in subnet.graph.nodes]
        seen.add((tuple(nodes), *(architecture.get(c) for c in ("outer", "kernel"))))
    assert len(seen) == min(space.size, 40)


def seven_ops() -> dict[str, nn.Module]:
    names = ("none", "max", "avg", "skip", "sep3", "sep5", "dil3", "dil5")
    return {name: nn.Identity() for name in names}


def test_the_size_of_darts() -> None:
    """Four nodes, eight operations of which `none` is not chosen, two kinds of cell."""
    space = search_space(DartsNet(("normal", "reduce", "normal"), 4, seven_ops))
    assert space.size == (180 * 7**8) ** 2
    assert len(space.choices) == 2 * (14 + 4)
    assert space["normal/3"].edges == ("normal/3<-0", "normal/3<-1", "normal/3<-2")
    assert space["normal/3<-0"].places == ("cells.0.edges.1.0", "cells.2.edges.1.0")
    sample = space.sample(torch.Generator().manual_seed(0))
    assert len(sample) == 2 * (8 + 4)  # eight edges and four nodes a kind of cell
    assert "none" not in sample.values()


def test_the_size_of_the_enas_macro_space() -> None:
    assert search_space(EnasMacro(12)).size == 6**12 * 2**66


def test_the_size_of_a_chain_in_which_every_layer_may_drop_all_before_it() -> None:
    """size(i) = 1 + 2 size(i - 1): either the input, or a layer over what came before."""

    def chain(n: int) -> nn.Module:
        modules = {f"l{i}": ops(f"l{i}") for i in range(n)}
        picks = {f"i{i}": InputChoice(2, label=f"i{i}") for i in range(n)}

        def forward(self: nn.Module, x: Any) -> Any:
            y = x
            for i in range(n):
                y = getattr(self, f"i{i}")([x, getattr(self, f"l{i}")(y)])
            return y

        return Graph(forward, **modules, **picks)

    check_against_results(chain(3))
    size = 1
    for n in range(1, 31):
        size = 1 + 2 * size
        if n in (1, 2, 5, 30):
            assert space_of(chain(n)).size == size
    long = space_of(chain(300))
    assert long.size == 2**301 - 1
    assert long.validate(long.sample(torch.Generator().manual_seed(0)))


def test_the_size_of_a_dag_whose_last_node_alone_is_read() -> None:
    """Every node reads one or two of all that is before it, as in NASNet's cells."""

    def dag(n: int) -> nn.Module:
        layers = {f"l{i}": ops(f"l{i}") for i in range(n)}
        picks = {f"i{i}": InputChoice(i + 1, min(2, i + 1), label=f"i{i}") for i in range(n)}

        def forward(self: nn.Module, x: Any) -> Any:
            values = [x]
            for i in range(n):
                values.append(getattr(self, f"l{i}")(getattr(self, f"i{i}")(values)))
            return values[-1]

        return Graph(forward, **layers, **picks)

    def count(n: int) -> int:
        """From the last node back, with the set of the nodes that are still needed."""
        needed = collections.Counter({frozenset({n}): 1})
        total = 0
        for i in range(n, 0, -1):
            after: collections.Counter[frozenset[int]] = collections.Counter()
            for nodes, ways in needed.items():
                if i not in nodes:
                    after[nodes] += ways
                    continue
                for inputs in itertools.combinations(range(i), min(2, i)):
                    after[nodes - {i} | frozenset(inputs) - {0}] += 2 * ways
            needed = after
        total = sum(needed.values())
        return total

    check_against_results(dag(3))
    for n in (3, 4, 6):
        assert space_of(dag(n)).size == count(n)


# -- drawing ---------------------------------------------------------------------------------------

# The 0.9999 quantiles of chi-square, by degrees of freedom.
CHI_SQUARE = {1: 15.1, 2: 18.4, 4: 23.5, 5: 25.7, 7: 29.9, 8: 31.8, 11: 37.4}


def assert_drawn_by(draw: Callable[[], Any], law: Mapping[Any, float], n: int = 3000) -> None:
    counts = collections.Counter(draw() for _ in range(n))
    assert set(counts) <= set(law)
    assert sum(law.values()) == pytest.approx(1)
    statistic = sum((counts[v] - n * p) ** 2 / (n * p) for v, p in law.items())
    assert statistic < CHI_SQUARE[len(law) - 1]


def test_samples_draw_each_active_decision_uniformly() -> None:
    space = search_space(Nested())
    generator = torch.Generator().manual_seed(1)
    law = {
        Architecture({"outer": "inner", "act": "relu"}): 1 / 6,
        Architecture({"outer": "inner", "act": "tanh"}): 1 / 6,
        Architecture({"outer": "direct", "kernel": "k1"}): 1 / 6,
        Architecture({"outer": "direct", "kernel": "k3"}): 1 / 6,
        Architecture({"outer": "skip"}): 1 / 3,
    }
    assert_drawn_by(lambda: space.sample(generator), law)


@pytest.mark.parametrize(("n", "k"), [(3, 1), (4, 2), (3, None), (3, 3)])
def test_subsets_of_inputs_are_drawn_uniformly(n: int, k: int | None) -> None:
    space = search_space(Graph(lambda s, x: s.pick([x] * n), pick=pick(n, k)))
    generator = torch.Generator().manual_seed(2)
    sizes = range(n + 1) if k is None else (k,)
    subsets = [s for size in sizes for s in itertools.combinations(range(n), size)]
    if len(subsets) == 1:
        assert space.sample(generator) == {"pick": [0, 1, 2]}
        return
    law = {s: 1 / len(subsets) for s in subsets}
    assert_drawn_by(lambda: tuple(space.sample(generator)["pick"]), law)


def test_relaxed_only_candidates_are_never_drawn() -> None:
    choice = LayerChoice({n: nn.ReLU() for n in "abcd"}, label="c", relaxed_only=("b",))
    space = search_space(nn.Sequential(choice))
    assert space.size == 3
    generator = torch.Generator().manual_seed(3)
    assert_drawn_by(lambda: space.sample(generator)["c"], dict.fromkeys("acd", 1 / 3))


@pytest.mark.parametrize("name", MODELS)
def test_samples_are_canonical_repeatable_and_leave_the_global_generator(name: str) -> None:
    space = search_space(MODELS[name]())
    everything = set(space.enumerate()) if space.size < 3000 else None
    state = torch.get_rng_state()
    one, other = (torch.Generator().manual_seed(5) for _ in range(2))
    for _ in range(20):
        sample = space.sample(one)
        assert sample == space.sample(other)
        assert sample == space.validate(sample)
        assert list(sample) == [c.label for c in space.choices if c.label in sample]
        assert everything is None or sample in everything
    assert torch.equal(torch.get_rng_state(), state)


def test_mutation_with_p_zero_changes_nothing_and_with_p_one_draws_all_anew() -> None:
    space = search_space(Nested())
    generator = torch.Generator().manual_seed(4)
    for architecture in space.enumerate():
        assert space.mutate(architecture, 0, generator) == architecture
    start = {"outer": "direct", "kernel": "k3"}
    law = {"inner": 1 / 3, "direct": 1 / 3, "skip": 1 / 3}
    assert_drawn_by(lambda: space.mutate(start, 1, generator)["outer"], law)


def test_mutation_draws_each_decision_with_probability_p() -> None:
    """A decision keeps its value with 1 - p, or is drawn as it was: 1 - p + p / n."""
    space = search_space(nn.Sequential(ops("a", "p", "q"), ops("b", "p", "q")))
    model = {"a": "p", "b": "q"}
    generator = torch.Generator().manual_seed(6)
    keep, change = 0.85, 0.15
    law = {
        ("p", "q"): keep * keep, ("q", "q"): change * keep,
        ("p", "p"): keep * change, ("q", "p"): change * change,
    }  # fmt: skip
    CHI_SQUARE.setdefault(3, 21.1)
    assert_drawn_by(lambda: tuple(space.mutate(model, 0.3, generator).values()), law)


def test_mutation_drops_what_becomes_inactive_and_draws_what_becomes_active() -> None:
    space = search_space(Nested())
    generator = torch.Generator().manual_seed(7)
    for _ in range(50):
        mutated = space.mutate({"outer": "inner", "act": "tanh"}, 0.5, generator)
        assert mutated == space.validate(mutated)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_mutation_with_what_is_no_probability(p: float) -> None:
    with pytest.raises(SpaceError, match="probability"):
        search_space(Nested()).mutate({"outer": "skip"}, p)


def test_mutation_of_a_wrong_architecture() -> None:
    with pytest.raises(SpaceError, match="typo"):
        search_space(Nested()).mutate({"outer": "typo"}, 0.5)


# -- validate --------------------------------------------------------------------------------------


def test_validate_drops_the_inactive_and_orders_the_rest() -> None:
    space = search_space(Inputs())
    given = {"any": [2, 0], "third": "tanh", "pick": (1, 0), "first": "relu"}
    canonical = space.validate(given)
    assert canonical == {"first": "relu", "pick": [0, 1], "any": [0, 2]}
    assert list(canonical) == [c.label for c in space.choices if c.label != "third"]
    assert space.validate(Architecture(given)) == canonical
    assert "third" in given


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"typo": "conv"}, ["no choice has the label 'typo'", "'first'", "'pick'"]),
        ({"first": "typo"}, ["'first' has no candidate 'typo'", "conv", "relu"]),
        ({"first": [0]}, ["'first'", "0"]),
        ({"pick": "conv"}, ["'pick' chooses inputs", "'conv'"]),
        ({"pick": [0]}, ["'pick'", "1 inputs", "n_chosen is 2"]),
        ({"pick": 0}, ["'pick'", "1 inputs", "n_chosen is 2"]),
        ({"pick": [0, 1, 2]}, ["'pick'", "3 inputs"]),
        ({"pick": [0, 3]}, ["'pick'", "below 3"]),
        ({"pick": [-1, 0]}, ["'pick'", "below 3"]),
        ({"pick": [1, 1]}, ["'pick'", "distinct"]),
        ({"any": [0, 0]}, ["'any'", "distinct"]),
        ({"first": None}, ["'first'", "None"]),
        ({"pick": [0.0, 1.0]}, ["'pick'", "0.0"]),
        ({"pick": [True, False]}, ["'pick'", "True"]),
        ({"third": "typo"}, ["'third' has no candidate 'typo'"]),
    ],
)
def test_validate_says_what_is_wrong(changes: dict[str, Any], words: list[str]) -> None:
    space = search_space(Inputs())
    right = {"first": "relu", "third": "conv", "pick": [0, 1], "any": []}
    assert set(space.validate(right)) == {"first", "pick", "any"}
    with pytest.raises(SpaceError) as error:
        space.validate({**right, **changes})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("missing", ["first", "pick", "any"])
def test_validate_names_a_missing_active_label(missing: str) -> None:
    space = search_space(Inputs())
    right = {"first": "relu", "pick": [0, 1], "any": []}
    with pytest.raises(SpaceError, match=f"no decision for '{missing}', which is active"):
        space.validate({k: v for k, v in right.items() if k != missing})


def test_a_relaxed_only_candidate_cannot_be_chosen() -> None:
    space = search_space(DartsNet(n_nodes=1))
    sample = dict(space.sample(torch.Generator().manual_seed(0)))
    edge = next(label for label in sample if "<-" in label)
    with pytest.raises(SpaceError, match=f"'{edge}': 'none' is relaxed_only"):
        space.validate({**sample, edge: "none"})


def test_the_space_of_a_supernet_and_of_a_traced_model() -> None:
    model = Nested()
    space = search_space(model)
    assert search_space(nasfx.trace(model)).choices == space.choices
    net = nasfx.transform(model, "single-path")
    assert search_space(net).choices == space.choices
    assert search_space(net).size == 5
    assert search_space(nn.Sequential(nn.ReLU())).choices == ()
    assert search_space(nn.Sequential(nn.ReLU())).size == 1


def test_choices_are_described_outer_ones_first() -> None:
    space = search_space(Nested())
    assert [c.label for c in space.choices] == ["outer", "act", "kernel"]
    assert space["outer"].candidates == ("inner", "direct", "skip")
    assert space["act"].places == ("outer.inner.act",)
    assert [c.kind for c in search_space(Inputs()).choices] == ["layer", "layer", "input", "input"]
    assert search_space(Inputs())["pick"].candidates == (0, 1, 2)
    assert search_space(Inputs())["pick"].n_chosen == 2
    assert search_space(Inputs())["any"].n_chosen is None
    assert search_space(Inputs())["pick"].edges == ()  # `second` is no choice
    assert "5 architectures" in repr(space)


# -- Architecture ----------------------------------------------------------------------------------

decisions = st.dictionaries(
    st.text(min_size=1),
    st.one_of(st.text(), st.lists(st.integers(0, 9), unique=True)),
    max_size=5,
)


@given(decisions)
def test_architectures_are_mappings_that_survive_every_round_trip(given: dict[str, Any]) -> None:
    arch = Architecture(given)
    plain = {k: v if isinstance(v, str) else sorted(v) for k, v in given.items()}
    assert dict(arch) == plain
    assert list(arch) == list(given)
    assert len(arch) == len(given)
    for other in (Architecture(arch), copy.deepcopy(arch), pickle.loads(pickle.dumps(arch))):
        assert other == arch
        assert hash(other) == hash(arch)


@given(decisions)
@settings(max_examples=30)
def test_json_round_trip(given: dict[str, Any]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arch.json"
        arch = Architecture(given)
        arch.to_json(path)
        again = Architecture.from_json(str(path))
    assert again == arch
    assert list(again) == list(arch)


def test_architectures_are_equal_by_value_and_in_any_order() -> None:
    one = Architecture({"a": "x", "b": [2, 0]})
    same = Architecture({"b": (0, 2), "a": "x"})
    assert one == same == {"a": "x", "b": [0, 2]}
    assert hash(one) == hash(same)
    assert {one: 1}[same] == 1
    assert one != Architecture({"a": "x", "b": [0, 1]})
    assert one != Architecture({"a": "x"})
    assert Architecture({"a": 1}) == Architecture({"a": [1]}) == {"a": [1]}


def test_architectures_cannot_be_changed() -> None:
    given = {"a": "x", "b": [0, 2]}
    arch = Architecture(given)
    with pytest.raises(TypeError):
        arch["a"] = "y"  # type: ignore[index]
    with pytest.raises(AttributeError):
        arch.more = 1  # type: ignore[attr-defined]
    arch["b"].append(3)
    given["b"].append(4)  # type: ignore[attr-defined]
    given["a"] = "y"
    assert arch == {"a": "x", "b": [0, 2]}


@pytest.mark.parametrize("value", [None, 1.5, True, [True], [1.0], ["a"], [[0]], {"x": 1}, {1, 2}])
def test_values_that_are_no_decision(value: Any) -> None:
    with pytest.raises(SpaceError, match="'block'"):
        Architecture({"block": value})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a JSON file"),
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("\xff\xfe", "not a JSON file"),
        ("[1, 2]", "no JSON object"),
        ("null", "no JSON object"),
        ('"a"', "no JSON object"),
        ('{"block": null}', "'block'"),
        ('{"block": 1.5}', "'block'"),
        ('{"block": true}', "'block'"),
        ('{"block": [0, "a"]}', "'block'"),
        ('{"block": {"x": 1}}', "'block'"),
    ],
)
def test_malformed_json(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "arch.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SpaceError, match=words):
        Architecture.from_json(path)


def test_json_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Architecture.from_json(tmp_path / "no.json")


def test_an_architecture_from_json_runs(tmp_path: Path) -> None:
    model = Nested()
    Architecture({"outer": "inner", "act": "tanh"}).to_json(tmp_path / "arch.json")
    arch = Architecture.from_json(tmp_path / "arch.json")
    x = example()
    with activated(model, arch):
        assert torch.equal(nasfx.finalize(model, arch)(x), model(x))


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


@pytest.mark.parametrize(
    ("other", "zeros"), [(_Residual, ("skip",)), (lambda: nn.Conv2d(4, 4, 1), ())]
)
def test_a_skip_adds_nothing_where_all_others_add_to_their_input(
    other: Callable[[], nn.Module], zeros: tuple[str, ...]
) -> None:
    candidates = {"a": _Residual(), "b": other(), "skip": nn.Identity()}
    (choice,) = nasfx.search_space(nn.Sequential(LayerChoice(candidates, label="c"))).choices
    assert choice.zeros == zeros
