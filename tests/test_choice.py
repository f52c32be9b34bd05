import copy
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasfx import InputChoice, LayerChoice, activated
from nasfx.errors import SpaceError
from tests.models import Block, Inputs, Nested, Tied, example

INPUTS = [torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]]), torch.tensor([[5.0, 7.0]])]


def raised(build: Callable[[], object]) -> str:
    """The message of the SpaceError of `build`, a lambda on one line, which it must name."""
    with pytest.raises(SpaceError) as error:
        build()
    line = inspect.getsourcelines(build)[1]
    message = str(error.value)
    assert re.search(rf"{re.escape(__file__)}:{line}\b", message), message
    return message


# -- LayerChoice -----------------------------------------------------------------------------------


def test_candidates_are_direct_children_under_their_names() -> None:
    conv, skip = nn.Conv2d(2, 2, 1), nn.Identity()
    choice = LayerChoice({"conv": conv, "skip": skip}, label="block")
    assert dict(choice.named_children()) == {"conv": conv, "skip": skip}
    assert choice.candidates == ("conv", "skip")
    assert list(choice.state_dict()) == ["conv.weight", "conv.bias"]
    assert choice.label == "block"


@pytest.mark.parametrize("container", [list, tuple, nn.ModuleList])
def test_candidates_in_a_list_are_named_by_number(container: Callable[[Any], Any]) -> None:
    relu, tanh = nn.ReLU(), nn.Tanh()
    choice = LayerChoice(container([relu, tanh]))
    assert dict(choice.named_children()) == {"0": relu, "1": tanh}
    assert choice.label is None


def test_the_first_candidate_runs_and_another_can_be_made_active() -> None:
    choice = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()})
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(choice(x), x.relu())
    choice.active = "tanh"
    assert choice.active == "tanh"
    assert torch.equal(choice(x), x.tanh())


def test_arguments_and_keywords_reach_the_candidate() -> None:
    class Candidate(nn.Module):
        def forward(self, x: Tensor, factor: float, *, shift: Tensor) -> tuple[Tensor, float]:
            return x * factor + shift, factor

    choice = LayerChoice([Candidate()])
    y, factor = choice(torch.ones(2), 3.0, shift=torch.tensor([1.0, 2.0]))
    assert y.tolist() == [4.0, 5.0]
    assert factor == 3.0


def test_relaxed_only_candidates_are_skipped_by_default_and_not_choosable() -> None:
    choice = LayerChoice(
        {"none": nn.ReLU(), "conv": nn.Tanh(), "skip": nn.Identity()}, relaxed_only=["none"]
    )
    assert choice.candidates == ("none", "conv", "skip")
    assert choice.choosable == ("conv", "skip")
    assert choice.active == "conv"


@pytest.mark.parametrize(
    "name",
    [
        "", "a.b", "half", "train", "forward", "weight_norm.x", "class", "None", "training",
        "_modules", "active", "candidates", "choosable", "label", "kind", "n_chosen", "site",
        "structure", "described", "holds_graphs", "relaxed_only", "_active",
    ],
)  # fmt: skip
def test_names_that_cannot_be_used(name: str) -> None:
    message = raised(lambda: LayerChoice({"ok": nn.ReLU(), name: nn.ReLU()}))
    assert repr(name) in message


@pytest.mark.parametrize("name", ["conv-3", "3x3", "none", "bias", "weight", "names", "graph"])
def test_unusual_names_that_can_be_used(name: str) -> None:
    choice = LayerChoice({name: nn.Linear(2, 2)})
    assert choice.candidates == (name,)
    assert list(choice.state_dict()) == [f"{name}.weight", f"{name}.bias"]


@pytest.mark.parametrize("label", ["", "a.b", 3, "half", "forward", "_parameters"])
def test_labels_that_cannot_be_used(label: Any) -> None:
    assert repr(label) in raised(lambda: LayerChoice([nn.ReLU()], label=label))
    assert repr(label) in raised(lambda: InputChoice(2, label=label))


def test_layer_choices_that_cannot_be_built() -> None:
    assert "at least one candidate" in raised(lambda: LayerChoice({}))
    assert "at least one candidate" in raised(lambda: LayerChoice([]))
    assert "'f' is a builtin" in raised(lambda: LayerChoice({"f": torch.relu}))  # type: ignore[dict-item]
    assert "get an instance" in raised(lambda: LayerChoice({"f": nn.ReLU}))  # type: ignore[dict-item]
    assert "'0' is a NoneType" in raised(lambda: LayerChoice([None]))  # type: ignore[list-item]
    assert "'typo'" in raised(lambda: LayerChoice({"a": nn.ReLU()}, relaxed_only=("typo",)))
    assert "'a'" in raised(lambda: LayerChoice({"a": nn.ReLU(), "b": nn.ReLU()}, relaxed_only="a"))
    assert "relaxed_only" in raised(lambda: LayerChoice({"a": nn.ReLU()}, relaxed_only=("a",)))
    assert "must be" in raised(lambda: LayerChoice({1: nn.ReLU()}))  # type: ignore[dict-item]


def test_an_unknown_active_candidate_names_the_choice_and_where_it_was_built() -> None:
    choice = LayerChoice({"a": nn.ReLU()}, label="block")
    with pytest.raises(SpaceError, match="no candidate 'typo'") as error:
        choice.active = "typo"
    assert "block" in str(error.value)
    assert f"{__file__}:" in str(error.value)
    assert choice.active == "a"


def test_the_site_of_a_choice_built_in_a_subclass_is_the_users() -> None:
    class Mine(LayerChoice):
        def __init__(self) -> None:
            super().__init__([nn.ReLU(), nn.Tanh()], label="mine")

    start = inspect.getsourcelines(Mine)[1]
    assert Mine().site == f"{__file__}:{start + 2}"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_what_is_active(again: Callable[[nn.Module], nn.Module]) -> None:
    model = Inputs()
    model.first.active, model.pick.active, model.any.active = "relu", (0, 2), ()
    copied = again(model)
    x = example()
    assert torch.equal(copied.eval()(x), model.eval()(x))
    assert (copied.first.active, copied.pick.active, copied.any.active) == ("relu", (0, 2), ())


# -- InputChoice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_chosen", "reduction", "active", "expected"),
    [
        (1, "sum", (1,), [[10.0, 20.0]]),
        (2, "sum", (0, 2), [[6.0, 9.0]]),
        (2, "sum", (2, 0), [[6.0, 9.0]]),
        (3, "sum", (0, 1, 2), [[16.0, 29.0]]),
        (2, "mean", (0, 2), [[3.0, 4.5]]),
        (1, "mean", (2,), [[5.0, 7.0]]),
        (2, "concat", (2, 0), [[1.0, 2.0, 5.0, 7.0]]),
        (1, "concat", (2,), [[5.0, 7.0]]),
        (None, "sum", (), [[0.0, 0.0]]),
        (None, "mean", (), [[0.0, 0.0]]),
        (None, "sum", (1, 2), [[15.0, 27.0]]),
        (None, "mean", (0, 1), [[5.5, 11.0]]),
    ],
)
def test_reductions(
    n_chosen: int | None, reduction: str, active: tuple[int, ...], expected: list[list[float]]
) -> None:
    choice = InputChoice(3, n_chosen, reduction=reduction)
    choice.active = active
    assert choice.active == tuple(sorted(active))
    assert choice(INPUTS).tolist() == expected


@pytest.mark.parametrize(("n_chosen", "active"), [(1, (1,)), (2, (0, 2)), (None, ()), (None, (2,))])
def test_reduction_none_gives_a_list_also_for_one(
    n_chosen: int | None, active: tuple[int, ...]
) -> None:
    choice = InputChoice(3, n_chosen, reduction="none")
    choice.active = active
    chosen = choice(INPUTS)
    assert isinstance(chosen, list)
    assert [id(t) for t in chosen] == [id(INPUTS[i]) for i in active]


def test_the_first_inputs_are_active_by_default_and_all_of_any_subset() -> None:
    assert InputChoice(3).active == (0,)
    assert InputChoice(3, 2).active == (0, 1)
    assert InputChoice(3, None).active == (0, 1, 2)
    assert InputChoice(3).candidates == ("0", "1", "2")


def test_an_index_stands_for_a_list_of_one() -> None:
    choice = InputChoice(3)
    choice.active = 2  # type: ignore[assignment]
    assert choice.active == (2,)


def test_zeros_of_the_empty_subset_have_the_first_inputs_shape_and_type() -> None:
    choice = InputChoice(2, None)
    choice.active = ()
    zeros = choice([torch.full((2, 3), torch.nan, dtype=torch.float64), torch.ones(1)])
    assert zeros.dtype == torch.float64
    assert torch.equal(zeros, torch.zeros(2, 3, dtype=torch.float64))


def test_input_choices_that_cannot_be_built() -> None:
    assert "not 0" in raised(lambda: InputChoice(0))
    assert "not 2.0" in raised(lambda: InputChoice(2.0))  # type: ignore[arg-type]
    assert "n_chosen=3" in raised(lambda: InputChoice(2, 3))
    assert "n_chosen=0" in raised(lambda: InputChoice(2, 0))
    assert "'max'" in raised(lambda: InputChoice(2, reduction="max"))
    assert "concatenated" in raised(lambda: InputChoice(2, None, reduction="concat"))


@pytest.mark.parametrize("active", [(3,), (-1,), (0, 1), (), ("0",), "0", (0.0,), None, True])
def test_active_inputs_that_there_are_not(active: Any) -> None:
    choice = InputChoice(3, label="skips")
    with pytest.raises(SpaceError, match="skips") as error:
        choice.active = active
    assert f"{__file__}:" in str(error.value)
    assert choice.active == (0,)


def test_repeated_active_inputs_are_refused() -> None:
    choice = InputChoice(3, 2)
    with pytest.raises(SpaceError, match="distinct"):
        choice.active = (1, 1)


def test_another_number_of_inputs_is_refused_when_called() -> None:
    with pytest.raises(SpaceError, match="called with 2 inputs but has n_candidates=3"):
        InputChoice(3)(INPUTS[:2])


# -- activated -------------------------------------------------------------------------------------


def test_activated_runs_an_architecture_and_restores_what_ran_before() -> None:
    model, x = Nested(), example()
    model.outer.active = "skip"
    with activated(model, {"outer": "inner", "act": "tanh"}) as inside:
        assert inside is model
        inner = model.outer.inner
        assert torch.equal(model(x), x + inner.conv(x).tanh())
    assert model.outer.active == "skip"
    assert model.outer.inner.act.active == "relu"


def test_activated_decides_all_choices_of_a_label_and_unlabelled_ones_by_path() -> None:
    model = Tied()
    with activated(model, {"tied": "relu", "free/0": "1"}):
        assert (model.one.active, model.two.active, model.free[0].active) == ("relu", "relu", "1")
        assert torch.equal(model(example()), example().relu().tanh().sigmoid())
    assert (model.one.active, model.two.active, model.free[0].active) == ("conv", "conv", "0")


def test_activated_takes_lists_of_indices_and_keeps_what_it_is_not_given() -> None:
    model = Inputs()
    model.third.active = "tanh"
    with activated(model, {"pick": [2, 0], "any": []}):
        assert (model.pick.active, model.any.active) == ((0, 2), ())
        assert model.third.active == "tanh"
    assert (model.pick.active, model.any.active) == ((0, 1), (0, 1, 2))


def test_activated_restores_after_an_error_inside_and_after_a_wrong_decision() -> None:
    model = Tied()
    with pytest.raises(ZeroDivisionError), activated(model, {"tied": "relu"}):
        _ = 1 / 0
    assert model.one.active == "conv"
    with (
        pytest.raises(SpaceError, match="typo"),
        activated(model, {"tied": "relu", "free/0": "typo"}),
    ):
        pass
    assert (model.one.active, model.two.active) == ("conv", "conv")


def test_activated_refuses_a_label_that_the_model_does_not_have() -> None:
    with pytest.raises(SpaceError, match="blok"), activated(Block(), {"blok": "skip"}):
        pass
