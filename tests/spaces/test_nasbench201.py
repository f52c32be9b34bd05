"""The NAS-Bench-201 space: the benchmark's counts and strings, all strategies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nasfx
from nasfx import Architecture, SpaceError, TracedModel
from nasfx.choice import activated
from nasfx.spaces import nasbench201
from tests.spaces.steps import check_strategy, check_subnet, images
from tests.strategies.nets import STRATEGIES

EVERY_OPERATION = (
    "|nor_conv_3x3~0|+|nor_conv_1x1~0|nor_conv_3x3~1|+|skip_connect~0|none~1|avg_pool_3x3~2|"
)
CONVOLUTIONS = EVERY_OPERATION.replace("skip_connect", "nor_conv_1x1").replace(
    "none", "nor_conv_3x3"
)


@pytest.fixture(scope="module")
def benchmark_net() -> TracedModel:
    return nasfx.trace(nasbench201.net())


@pytest.mark.parametrize(("string", "n1", "n3"), [(EVERY_OPERATION, 1, 2), (CONVOLUTIONS, 2, 3)])
def test_the_benchmarks_counts(benchmark_net: TracedModel, string: str, n1: int, n3: int) -> None:
    subnet = nasfx.finalize(benchmark_net, nasbench201.arch(string))
    count = nasfx.count(subnet, torch.zeros(1, 3, 32, 32))
    assert count.params == 73_306 + 28_000 * n1 + 243_040 * n3
    assert count.flops == 7_783_040 + 3_932_160 * n1 + 35_389_440 * n3


def test_the_space_has_15625_architectures_with_a_string_each() -> None:
    space = nasfx.search_space(nasbench201.net(2, 1))
    assert space.size == 15_625
    strings = set()
    for architecture in space.enumerate():
        string = nasbench201.arch_string(architecture)
        assert nasbench201.arch(string) == architecture
        strings.add(string)
    assert len(strings) == 15_625


def test_the_string_is_the_benchmarks() -> None:
    found = nasbench201.arch(EVERY_OPERATION)
    assert found == {
        "1<-0": "nor_conv_3x3",
        "2<-0": "nor_conv_1x1",
        "2<-1": "nor_conv_3x3",
        "3<-0": "skip_connect",
        "3<-1": "none",
        "3<-2": "avg_pool_3x3",
    }
    assert nasbench201.arch_string(found) == EVERY_OPERATION
    assert nasbench201.arch_string(dict(reversed(list(found.items())))) == EVERY_OPERATION


@pytest.mark.skipif(
    not (Path(os.environ.get("NASFX_DATA", "")) / "nb201_small.npz").is_file(),
    reason="NASFX_DATA names no folder with nb201_small.npz",
)
def test_the_table_of_the_benchmark_is_exactly_the_space() -> None:
    table: Any = np.load(Path(os.environ["NASFX_DATA"]) / "nb201_small.npz", allow_pickle=False)
    names = [str(name) for name in table["op_names"]]
    labels = [f"{i}<-{j}" for i, j in ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))]
    rows = {
        Architecture({label: names[k] for label, k in zip(labels, row, strict=True)})
        for row in table["ops"].tolist()
    }
    assert len(rows) == len(table["ops"]) == 15_625
    assert rows == set(nasfx.search_space(nasbench201.net(2, 1)).enumerate())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies(strategy: str) -> None:
    check_strategy(nasbench201.net(2, 1).double(), strategy, images(16))


def test_every_operation_in_a_subnet_that_equals_the_model() -> None:
    model = nasbench201.net(2, 2).double()
    check_subnet(model, model, nasbench201.arch(EVERY_OPERATION), images(16))


def test_a_cell_sums_the_edges_into_each_node() -> None:
    model = nasbench201.net(2, 1).double().eval()
    cell: Any = model.get_submodule("1")
    x = torch.randn(2, 2, 8, 8).double()
    arch = nasbench201.arch(EVERY_OPERATION)
    edge = {
        f"{i}<-{j}": choice.get_submodule(arch[f"{i}<-{j}"])
        for (i, j), choice in zip(nasbench201.EDGES, cell.edges, strict=True)
    }
    with torch.no_grad(), activated(model, arch):
        one = edge["1<-0"](x)
        two = edge["2<-0"](x) + edge["2<-1"](one)
        three = edge["3<-0"](x) + edge["3<-1"](one) + edge["3<-2"](two)
        assert torch.equal(cell(x), three)
        assert torch.equal(edge["3<-0"](x), x)
        assert not edge["3<-1"](one).any()


@pytest.mark.parametrize(
    "string",
    [
        "",
        "|none~0|",
        EVERY_OPERATION.replace("none", "nothing"),
        EVERY_OPERATION.replace("none~1", "none~2"),
        EVERY_OPERATION.replace("+", ""),
        EVERY_OPERATION[1:],
        EVERY_OPERATION + "+|none~0|none~1|none~2|none~3|",
    ],
)
def test_strings_that_are_none(string: str) -> None:
    with pytest.raises(SpaceError, match=r"is no architecture of NAS-Bench-201: write"):
        nasbench201.arch(string)


@pytest.mark.parametrize("change", [{"3<-2": "conv"}, {"4<-0": "none"}, {"1<-0": None}])
def test_architectures_that_have_no_string(change: dict[str, Any]) -> None:
    changed = {**nasbench201.arch(EVERY_OPERATION), **change}
    architecture = {label: name for label, name in changed.items() if name is not None}
    with pytest.raises(SpaceError, match="is no architecture of NAS-Bench-201: its labels are"):
        nasbench201.arch_string(architecture)


def test_sizes_that_cannot_be_built() -> None:
    with pytest.raises(SpaceError, match="0 cells or layers are too few; give 1 or more"):
        nasbench201.net(cells=0)
