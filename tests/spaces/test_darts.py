"""The DARTS space: published sizes, the genotype notation, both forms, all strategies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nasfx
from nasfx import SpaceError
from nasfx.choice import LayerChoice, activated, named_choices
from nasfx.spaces import darts
from tests.spaces.steps import FEWER_STRATEGIES, check_strategy, check_subnet, images, parameters

PAIRS = [("skip_connect", 0), ("sep_conv_3x3", 1)] * 4
SMALL = {
    f"{kind}/{label}": value
    for kind in ("normal", "reduce")
    for label, value in {
        "2": [0, 1],
        "2<-0": "skip_connect",
        "2<-1": "dil_conv_5x5",
        "3": [0, 2],
        "3<-0": "max_pool_3x3",
        "3<-2": "skip_connect",
    }.items()
}
"""An architecture for two nodes per cell."""


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of two nodes, which are traced in a third of the time."""
    monkeypatch.setattr(darts, "NODES", range(2, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "size", "params", "macs"),
    [
        (lambda: darts.cifar(36, 20, evaluation=True), 32, 3_349_342, 528_359_040),
        (lambda: darts.imagenet(48, 14, evaluation=True), 224, 4_718_752, 529_911_552),
    ],
    ids=["cifar", "imagenet"],
)
def test_the_published_nets_have_the_authors_counts(
    model: Any, size: int, params: int, macs: int
) -> None:
    subnet = nasfx.finalize(model(), darts.DARTS_V2)
    count = nasfx.count(subnet, torch.zeros(1, 3, size, size))
    assert (count.params, count.flops) == (params, macs)


def test_the_search_net_has_the_authors_parameters() -> None:
    assert parameters(darts.cifar()) == 1_930_618


def test_the_space_has_the_papers_size_and_holds_the_published_cells() -> None:
    space = nasfx.search_space(darts.cifar(2, 3))
    assert space.size == (180 * 7**8) ** 2
    for architecture in (darts.DARTS_V1, darts.DARTS_V2):
        assert space.validate(architecture) == architecture
    edge = space["normal/5<-4"]
    assert edge.candidates == darts.OPERATIONS
    assert edge.choosable == darts.OPERATIONS[1:]


def test_both_forms_and_both_nets_are_one_space() -> None:
    spaces = [
        {
            (choice.label, choice.candidates, choice.active)
            for _, choice in named_choices(make(2, 3, evaluation=evaluation))
        }
        for make in (darts.cifar, darts.imagenet)
        for evaluation in (False, True)
    ]
    assert len(spaces[0]) == 2 * (14 + 4)
    assert all(space == spaces[0] for space in spaces)


def test_the_published_cells() -> None:
    assert darts.DARTS_V1["normal/5"] == [0, 2]
    assert darts.DARTS_V1["reduce/5<-0"] == "avg_pool_3x3"
    assert darts.DARTS_V2["normal/5<-2"] == "dil_conv_3x3"
    assert darts.DARTS_V2["reduce/4"] == [0, 2]


@pytest.mark.usefixtures("two_nodes")
@pytest.mark.parametrize("strategy", FEWER_STRATEGIES)
def test_strategies(strategy: str) -> None:
    check_strategy(darts.cifar(2, 3).double(), strategy, images(16))


@pytest.mark.usefixtures("two_nodes")
@pytest.mark.parametrize("make", [darts.cifar, darts.imagenet])
def test_the_subnet_of_the_form_for_retraining_equals_the_model(make: Any) -> None:
    model = make(2, 3, 10, evaluation=True).double()
    subnet = check_subnet(model, model, SMALL, images(32))
    operations = {name.split(".")[5] for name in subnet.state_dict() if ".edges." in name}
    assert operations == {"skip_connect", "dil_conv_5x5"}  # the other one has no weights


def test_a_cell_sums_two_edges_per_node_and_concatenates_the_nodes() -> None:
    model = darts.cifar(4, 3).double()
    cell: Any = model.get_submodule("cells.1")
    s0, s1 = torch.randn(2, 12, 8, 8).double(), torch.randn(2, 16, 8, 8).double()
    arch = darts.DARTS_V1
    model.eval()
    with torch.no_grad():
        states = [cell.preprocess0(s0), cell.preprocess1(s1)]
        for i in range(2, 6):
            j, k = arch[f"reduce/{i}"]
            choices = cell.edges[i - 2]
            states.append(
                choices[j].get_submodule(arch[f"reduce/{i}<-{j}"])(states[j])
                + choices[k].get_submodule(arch[f"reduce/{i}<-{k}"])(states[k])
            )
        with activated(model, arch):
            found = cell(s0, s1)
    assert torch.equal(found, torch.cat(states[2:], 1))
    assert found.shape == (2, 32, 4, 4)


def test_reductions_stand_at_a_third_and_two_thirds() -> None:
    kinds = [
        str(next(m.label for m in cell.modules() if isinstance(m, LayerChoice)))[:6]
        for cell in darts.cifar(2, 8).get_submodule("cells").children()
    ]
    assert [i for i, kind in enumerate(kinds) if kind == "reduce"] == [2, 5]


def _pools(model: nn.Module) -> list[nn.Module]:
    choices = [m for m in model.modules() if isinstance(m, LayerChoice)]
    return [
        choice.get_submodule(f"{kind}_pool_3x3") for choice in choices for kind in ("max", "avg")
    ]


def test_batch_norms_of_both_forms() -> None:
    search, fixed = darts.cifar(2, 3), darts.cifar(2, 3, evaluation=True)
    affine = [n for n, m in search.named_modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
    assert affine == ["stem0.1"]
    assert all(m.affine for m in fixed.modules() if isinstance(m, nn.BatchNorm2d))
    norms = [any(isinstance(m, nn.BatchNorm2d) for m in p.modules()) for p in _pools(search)]
    assert all(norms)
    assert not any(isinstance(m, nn.BatchNorm2d) for p in _pools(fixed) for m in p.modules())


def test_none_gives_zeros_of_the_edges_shape() -> None:
    choices = [m for m in darts.cifar(2, 3).modules() if isinstance(m, LayerChoice)]
    for choice in choices:
        x = torch.randn(1, 4 if str(choice.label).startswith("reduce") else 2, 8, 8)
        if choice.get_submodule("max_pool_3x3.1").num_features != x.shape[1]:  # type: ignore[operator]
            continue
        zeros = choice.get_submodule("none")(x)
        assert zeros.shape == choice.get_submodule("sep_conv_3x3")(x).shape
        assert not zeros.any()


# -- drop path and the auxiliary head --------------------------------------------------------------


@pytest.mark.usefixtures("two_nodes")
def test_drop_path_stays_settable_in_the_subnet() -> None:
    model = darts.cifar(2, 3, evaluation=True)
    subnet = nasfx.finalize(model, SMALL)
    darts.set_drop_path(subnet, 0.5)
    dropped = [name for name, m in subnet.named_modules() if isinstance(m, nn.Dropout3d)]
    assert all(subnet.get_submodule(name).p == 0.5 for name in dropped)
    # By cell: all but the identities; a skip from a cell's input halves in the reductions.
    assert [sum(f"cells.{i}." in name for name in dropped) for i in range(3)] == [2, 3, 3]
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout3d)} == {0.0}
    x = torch.randn(4, 3, 16, 16)
    assert not torch.equal(subnet.train()(x), subnet(x))
    darts.set_drop_path(subnet, 0.0)
    assert torch.equal(subnet(x), subnet(x))


def test_drop_path_drops_whole_samples() -> None:
    model = darts.cifar(2, 3, evaluation=True)
    op = model.get_submodule("cells.0.edges.0.0.sep_conv_3x3")
    darts.set_drop_path(model, 0.5)
    x = torch.randn(64, 2, 4, 4)
    ratio = (op(x) / op.get_submodule("0")(x)).flatten(1)
    assert ((ratio == 0).all(1) | torch.isclose(ratio, torch.tensor(2.0)).all(1)).all()
    assert 0 < (ratio == 0).all(1).sum() < 64
    op.eval()
    assert torch.equal(op(x), op.get_submodule("0")(x))


def test_drop_path_refusals() -> None:
    with pytest.raises(SpaceError, match=r"p=1 must be in \[0, 1\)"):
        darts.set_drop_path(darts.cifar(2, 3, evaluation=True), 1)
    with pytest.raises(SpaceError, match="has no drop path"):
        darts.set_drop_path(darts.cifar(2, 3), 0.1)


@pytest.mark.usefixtures("two_nodes")
@pytest.mark.parametrize(("make", "size"), [(darts.cifar, 32), (darts.imagenet, 224)])
def test_the_auxiliary_head_reads_the_second_reduction_in_train_mode(make: Any, size: int) -> None:
    model = make(2, 3, 7, evaluation=True, auxiliary=True)
    subnet = nasfx.finalize(model, SMALL)
    x = images(size).float()
    logits, more = subnet.train()(x)
    assert logits.shape == more.shape == (2, 7)
    more.sum().backward()
    grads = {name for name, p in subnet.named_parameters() if p.grad is not None}
    assert any(name.startswith("head") for name in grads)
    assert any(name.startswith("cells.2") for name in grads)
    assert not any(name.startswith("classifier") for name in grads)
    assert subnet.eval()(x).shape == (2, 7)
    shipped = torch.fx.GraphModule(subnet, subnet.graph)
    assert torch.equal(shipped(x), subnet(x))
    assert not any(name.startswith("head") for name in shipped.state_dict())
    assert nasfx.count(shipped, x).params < parameters(subnet)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.head.modules())
    assert norms == (2 if make is darts.cifar else 1)


def test_the_auxiliary_head_needs_the_form_for_retraining() -> None:
    with pytest.raises(SpaceError, match="give evaluation=True too"):
        darts.cifar(2, 3, auxiliary=True)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normal", "message"),
    [
        (PAIRS[:-1], "normal: 7 pairs"),
        ([("conv", 0), *PAIRS[1:]], "normal: 'conv' is none of max_pool"),
        ([("none", 0), *PAIRS[1:]], "normal: 'none' is none of max_pool"),
        ([("skip_connect", 1), *PAIRS[1:]], r"node 2 reads \[1, 1\]"),
        ([("skip_connect", 2), *PAIRS[1:]], r"node 2 reads \[1, 2\]"),
        ([("skip_connect", -1), *PAIRS[1:]], r"node 2 reads \[-1, 1\]"),
    ],
)
def test_genotype_refuses_what_is_none(normal: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        darts.genotype(normal, PAIRS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 3}, "channels=3 must be an even number"),
        ({"cells": 2}, "2 cells or layers are too few; give 3 or more"),
        ({"classes": 0}, "classes=0"),
    ],
)
def test_sizes_that_cannot_be_built(options: dict[str, int], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        darts.cifar(**options)
