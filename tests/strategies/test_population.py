"""The population of an evolution: its records, its bounds, and that it goes on where it was."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import nasfx
from nasfx import Architecture, CheckpointError, LayerChoice, SearchError
from nasfx.space import SearchSpace
from nasfx.strategies.population import Population
from tests.strategies.nets import Nested, Skips


def digits(length: int) -> SearchSpace:
    """4**length architectures, one for each number of so many digits."""
    return nasfx.search_space(
        nn.Sequential(
            *(LayerChoice([nn.Identity() for _ in range(4)], label=f"c{i}") for i in range(length))
        )
    )


def number(arch: Architecture) -> float:
    return float(sum(int(v) * 4 ** int(k[1:]) for k, v in arch.items()))


def hashed(arch: Architecture) -> float:
    """A score for any space."""
    return float(sum(ord(c) * (i + 1) for i, c in enumerate(json.dumps(dict(arch)))) % 101)


def new(space: SearchSpace, size: int = 8, seed: int = 0, **options: Any) -> Population:
    constraints = options.get("constraints", ())
    return Population(space, constraints, size, torch.Generator().manual_seed(seed))


def saved(pool: Population) -> dict[str, Any]:
    """The state, as it comes back from a file."""
    file = io.BytesIO()
    torch.save(pool.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def facts(pool: Population) -> dict[str, Any]:
    """All that the next generations depend on, with the orders."""
    state = pool.state_dict()
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in state["records"]]
    order = [list(map(list, arch.items())) for arch in (*pool.seen, *pool.scores)]
    return {**state, "records": records, "generator": state["generator"].tolist(), "order": order}


# -- running --------------------------------------------------------------------------------------


def test_a_record_comes_when_its_generation_is_finished() -> None:
    pool = new(digits(6))
    asked: list[Architecture] = []
    for i, record in enumerate(pool.run(4, lambda arch: asked.append(arch) or number(arch))):
        assert len(asked) == 8 * (i + 1)
        scores = [number(arch) for arch in asked]
        assert record.pop("seconds") > 0
        assert record == {
            "generation": i, "best": max(scores), "mean": sum(scores[-8:]) / 8, "evaluated": 8,
        }  # fmt: skip
        assert pool.current is None
    assert list(pool.scores) == asked
    assert pool.best()[0] == max(asked, key=number)
    assert len(pool.records) == 4
    assert list(pool.run(4, number)) == []  # they are finished
    assert [r["generation"] for r in pool.run(6, number)] == [4, 5]


def test_it_goes_on_after_an_error_in_the_middle_of_a_generation() -> None:
    whole, broken = new(digits(6)), new(digits(6))
    assert len(list(whole.run(5, number))) == 5
    asked: list[Architecture] = []

    def evaluate(arch: Architecture) -> float:
        asked.append(arch)
        if len(asked) in (11, 12, 33):
            raise OSError("the disk")
        return number(arch)

    for _ in range(3):
        with pytest.raises(OSError, match="the disk"):
            list(broken.run(5, evaluate))
    list(broken.run(5, evaluate))
    assert facts(broken) == facts(whole)
    assert len(asked) == 40 + 3


# -- bounds ---------------------------------------------------------------------------------------


def test_neither_bounds_nor_constraints_are_ever_broken() -> None:
    space = digits(5)
    space.costs = {"flops": lambda a: sum(map(int, a.values())), "params": lambda a: int(a["c0"])}
    space.bounds = {"flops": 7, "params": 1}
    asked: list[Architecture] = []

    def odd(arch: Architecture) -> bool:
        asked.append(arch)
        return number(arch) % 2 == 1

    pool = new(space, 20, constraints=(odd,))
    list(pool.run(10, number))
    assert len(asked) == len(set(asked)) > len(pool.scores) > 60
    assert all(space.fits(arch) for arch in asked)
    assert any(not space.fits(arch) for arch in pool.seen)
    assert all(arch["c0"] == "1" and sum(map(int, arch.values())) <= 7 for arch in pool.scores)
    best = max((a for a in space.enumerate() if space.fits(a) and number(a) % 2 == 1), key=number)
    assert pool.best()[0] == best


def test_bounds_that_nothing_keeps_are_an_error_that_names_them() -> None:
    space = digits(2)
    space.costs, space.bounds = {"flops": number}, {"flops": -3.5}
    match = (
        r"no architecture satisfies the constraints: all 16 different ones that were drawn, of 16, "
        r"were refused; loosen the constraints \(the bounds are flops <= -3\.5\), or draw more "
        r"with a larger population"
    )
    with pytest.raises(SearchError, match=match):
        list(new(space).run(3, number))


# -- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [lambda: digits(6), Nested, lambda: Skips(2), lambda: Skips(None)])
@pytest.mark.parametrize("stop", [0, 1, 5, 8, 12, 24])
def test_a_reloaded_population_continues_identically(kind: Callable[[], Any], stop: int) -> None:
    """Saved before an evaluation, at the start or in the middle of a generation."""
    made = kind()
    space = made if isinstance(made, SearchSpace) else nasfx.search_space(made)
    states: list[dict[str, Any]] = []
    asked: list[Architecture] = []
    whole = new(space)

    def evaluate(arch: Architecture) -> float:
        if len(asked) == stop:
            states.append(saved(whole))
        asked.append(arch)
        return hashed(arch)

    list(whole.run(5, evaluate))
    if not states:  # a small space had ended before
        assert space.size <= stop
        states.append(saved(whole))
    again: list[Architecture] = []
    loaded = new(space, seed=99)
    list(loaded.run(1, lambda arch: 0.0))  # all of this is replaced
    loaded.load_state_dict(states[0])
    list(loaded.run(5, lambda arch: again.append(arch) or hashed(arch)))
    assert again == asked[stop:]
    assert facts(loaded) == facts(whole)
    assert loaded.best() == whole.best()
    assert [list(a) for a in loaded.scores] == [list(a) for a in whole.scores]


def test_it_continues_identically_between_generations() -> None:
    space = digits(6)
    whole, first = new(space), new(space)
    list(whole.run(5, number))
    list(first.run(2, number))
    loaded = new(space, seed=5)
    loaded.load_state_dict(saved(first))
    assert [r["generation"] for r in loaded.run(5, number)] == [2, 3, 4]
    assert facts(loaded) == facts(whole)


def test_what_has_ended_has_ended_when_it_is_reloaded() -> None:
    space = digits(6)
    met: list[Architecture] = []

    def constraint(arch: Architecture) -> bool:
        met.append(arch)
        return len(met) <= 8  # nothing of the second generation

    pool = new(space, constraints=(constraint,))
    assert len(list(pool.run(5, number))) == 1
    assert pool.current == []
    loaded = new(space)
    loaded.load_state_dict(saved(pool))
    before = facts(loaded)
    assert list(loaded.run(5, number)) == []  # without constraints it would find more
    assert facts(loaded) == before


def test_the_state_is_plain_data_and_a_copy() -> None:
    pool = new(nasfx.search_space(Skips(2)))
    run = pool.run(3, hashed)
    next(run)
    state = pool.state_dict()
    generator = state.pop("generator")
    assert generator.dtype == torch.uint8
    text = json.dumps(state)
    assert json.loads(text) == state
    assert all(type(score) is float for _, score in state["scores"])
    next(run)
    assert json.dumps(state) == text
    assert not torch.equal(generator, pool.generator.get_state())


def test_a_tensor_is_a_score() -> None:
    pool = new(digits(2))
    list(pool.run(1, lambda arch: torch.tensor(number(arch))))  # type: ignore[arg-type, return-value]
    assert all(type(score) is float for score in pool.scores.values())


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"size": 9}, r"has 9 architectures in a generation, this one 8"),
        ({"more": 0}, r"has the entries \['current', .*, not \['current', "),
        ({"seen": [{"c0": "0"}]}, r"is of another space: .*no decision for 'c1'.* same model"),
        ({"scores": [[{"d0": "0"}, 1.0]]}, r"is of another space: no choice has the label 'd0'"),
        ({"current": [{"c0": "9"}]}, r"is of another space: 'c0' has no candidate '9'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    changed: dict[str, Any], match: str
) -> None:
    pool = new(digits(3), seed=1)
    list(pool.run(2, number))
    state = {**saved(pool), **changed}
    other = new(digits(3))
    list(other.run(1, number))
    before = facts(other)
    with pytest.raises(CheckpointError, match=match):
        other.load_state_dict(state)
    assert facts(other) == before
    del state["seen"]
    with pytest.raises(CheckpointError, match=r"has the entries"):
        other.load_state_dict(state)
