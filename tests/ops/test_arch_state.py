import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import nasfx
from nasfx import CheckpointError, LayerChoice
from nasfx.ops import ArchState
from tests.strategies.nets import STRATEGIES


def state(seed: int = 0) -> ArchState:
    made = ArchState(
        {"block": torch.tensor([1.0, 2.0]), "pick/0": torch.tensor([0.5, 0.25, 0.125])},
        {"block": ("a", "b"), "pick/0": (0, 1, 2), "uniform": ("c", "d")},
        seed,
    )
    made.state.drawn = {"block": "b", "pick/0": (0, 2), "uniform": "c"}
    return made


def other() -> ArchState:
    made = state(seed=99)
    made.state.drawn = {"block": "a", "pick/0": (), "uniform": "d"}
    with torch.no_grad():
        for alpha in made.parameters():
            alpha.zero_()
    return made


def assert_same(a: ArchState, b: ArchState) -> None:
    assert a.state.drawn == b.state.drawn
    assert a.state.candidate_names == b.state.candidate_names
    assert a.alpha_parameters().keys() == b.alpha_parameters().keys()
    assert all(torch.equal(p, b.alpha_parameters()[k]) for k, p in a.alpha_parameters().items())
    draws = [torch.rand(5, generator=g).tolist() for g in (a.state.generator, b.state.generator)]
    assert draws[0] == draws[1]


def test_forward_gives_the_decision() -> None:
    made = state()
    assert made("block") == "b"
    assert made("pick/0") == (0, 2)


def test_state_dict_holds_tensors_alone_and_everything() -> None:
    found = state().state_dict()
    assert list(found) == [
        "block", "pick/0", "state.generator",
        "state.path.block", "state.path.pick/0", "state.path.uniform",
    ]  # fmt: skip
    assert all(isinstance(v, torch.Tensor) for v in found.values())
    assert found["state.generator"].dtype == torch.uint8
    assert found["state.path.pick/0"].tolist() == [0, 2]
    assert found["state.path.block"].tolist() == [1]


def test_state_dict_round_trip_also_when_nested() -> None:
    for wrap in (lambda m: m, lambda m: nn.ModuleDict({"arch": m})):
        made, loaded = state(), other()
        torch.rand(3, generator=made.state.generator)
        result = wrap(loaded).load_state_dict(wrap(made).state_dict())
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert_same(loaded, made)


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies(again: Callable[[ArchState], ArchState]) -> None:
    made = state()
    torch.rand(3, generator=made.state.generator)
    copied = again(made)
    position = made.state.generator.get_state()
    assert_same(copied, made)
    made.state.generator.set_state(position)
    torch.rand(7, generator=copied.state.generator)
    assert torch.equal(made.state.generator.get_state(), position), "the generator is its own"
    copied.state.drawn["block"] = "a"
    with torch.no_grad():
        copied.get_parameter("block").zero_()
    assert made.state.drawn["block"] == "b"
    assert made.get_parameter("block").tolist() == [1, 2]


def test_missing_and_unknown_keys_are_errors() -> None:
    found = state().state_dict()
    del found["state.generator"]
    with pytest.raises(RuntimeError, match=r"Missing key.*state\.generator"):
        other().load_state_dict(found)
    other().load_state_dict(found, strict=False)
    found = state().state_dict() | {"state.path.stranger": torch.tensor([0])}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*state\.path\.stranger"):
        other().load_state_dict(found)


@pytest.mark.parametrize("indices", [[2], [-1], [], [0, 1]])
def test_an_index_of_no_candidate_is_an_error(indices: list[int]) -> None:
    found = state().state_dict()
    found["state.path.block"] = torch.tensor(indices, dtype=torch.int64)
    with pytest.raises(CheckpointError, match=r"state\.path\.block = .* of 'block'"):
        other().load_state_dict(found)


@pytest.mark.parametrize("indices", [[3], [-1], [0, 0]])
def test_an_index_of_no_input_is_an_error(indices: list[int]) -> None:
    found = state().state_dict()
    found["state.path.pick/0"] = torch.tensor(indices, dtype=torch.int64)
    with pytest.raises(CheckpointError, match=r"pick/0"):
        other().load_state_dict(found)


@pytest.mark.parametrize("label", ["names", "alphas", "drawn", "generator", "fresh"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_label_may_be_called_as_an_attribute_of_the_state(label: str, strategy: str) -> None:
    net = nn.Sequential(LayerChoice({"lin": nn.Linear(2, 2), "tanh": nn.Tanh()}, label=label))
    made = nasfx.transform(net, strategy)
    made(torch.randn(1, 2))
    made.load_state_dict(made.state_dict())
    copy.deepcopy(made)
