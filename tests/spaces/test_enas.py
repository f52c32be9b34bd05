"""The ENAS spaces: sizes, notations, both forms against the paper's formulas, all strategies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nasfx
from nasfx import InputChoice, LayerChoice, SpaceError
from nasfx.choice import activated, named_choices
from nasfx.spaces import enas, enas_nets
from tests.spaces.steps import (
    FEWER_STRATEGIES,
    check_strategy,
    check_subnet,
    images,
    parameters,
)
from tests.strategies.nets import STRATEGIES

MICRO = [
    "normal/2/x", "normal/2/x/op", "normal/2/y", "normal/2/y/op",
    "reduce/6/x", "reduce/6/x/op", "reduce/6/y", "reduce/6/y/op",
]  # fmt: skip


def drawn(model: nn.Module, seed: int) -> dict[str, Any]:
    """A decision for every label, without a trace of the model."""
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    found: dict[str, Any] = {}
    for _, choice in named_choices(model):
        label = str(choice.label)
        if isinstance(choice, InputChoice):
            found[label] = [i for i in range(choice.n_candidates) if below(2)]
        elif label not in found:
            found[label] = choice.candidates[below(len(choice.candidates))]
    return found


@pytest.fixture
def few_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro net of one normal and one reduction cell."""
    monkeypatch.setattr(enas_nets, "_kinds", lambda _: ["normal", "reduce"])


@pytest.fixture
def few_nodes(few_cells: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with two nodes per cell."""
    monkeypatch.setattr(enas_nets, "NODES", range(2, 4))


# -- macro -----------------------------------------------------------------------------------------


def test_the_macro_space_has_the_papers_size() -> None:
    assert nasfx.search_space(enas.macro(2)).size == 6**12 * 2**66


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_on_macro(strategy: str) -> None:
    check_strategy(enas.macro(2, 3).double(), strategy, images(16))


def test_the_fixed_macro_subnet_equals_the_model() -> None:
    model = enas.macro(2, 5, evaluation=True).double()
    arch = enas.macro_arch([0, 1, 1, 2, 0, 1, 3, 1, 1, 1, 4, 0, 0, 0, 0])
    check_subnet(model, model, arch, images(16))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("evaluation", [False, True])
def test_a_macro_layer_joins_its_operation_and_skips(evaluation: bool, seed: int) -> None:
    layer: Any = enas_nets._MacroLayer(4, 4, evaluation=evaluation).double()
    states = [torch.randn(2, 4, 6, 6).double() for _ in range(5)]
    arch = drawn(layer, seed)
    op = layer.op.get_submodule(arch["op/4"])(states[4])
    skips: list[int] = arch["skip/4"]
    if evaluation:  # a 1x1 convolution of the concatenation
        weight = torch.cat([layer.joins[i][1].weight for i in [*skips, 4]], 1)
        joined = F.conv2d(torch.cat([*(states[i] for i in skips), op], 1).relu(), weight)
    else:
        joined = op + sum(states[i] for i in skips)
    with activated(layer, arch):
        found = layer(states)
    assert torch.allclose(found, layer.norm(joined), rtol=0, atol=1e-12)


def test_a_macro_subnet_holds_no_joins_of_skips_that_are_not_chosen() -> None:
    arch = enas.macro_arch([0, 1, 1, 2, 0, 1, 3, 0, 0, 1])
    subnet = nasfx.finalize(enas.macro(2, 4, evaluation=True), arch)
    joins = {tuple(n.split(".")[1:4:2]) for n in subnet.state_dict() if ".joins." in n}
    assert joins == {("1", "0"), ("1", "1"), ("2", "1"), ("2", "2"), ("3", "2"), ("3", "3")}


def test_macro_operations_of_both_forms() -> None:
    def convolutions(name: str, evaluation: bool) -> list[tuple[Any, ...]]:
        op = enas_nets._macro_operation(name, 4, 4, evaluation=evaluation)
        convs = [m for m in op.modules() if isinstance(m, nn.Conv2d)]
        assert all(conv.bias is None for conv in convs)
        return [(conv.kernel_size[0], conv.groups) for conv in convs]

    search = [convolutions(name, False) for name in enas_nets.MACRO_OPERATIONS]
    fixed = [convolutions(name, True) for name in enas_nets.MACRO_OPERATIONS]
    one = (1, 1)
    assert search == [
        [one, (3, 1)], [one, (3, 4), one], [one, (5, 1)], [one, (5, 4), one], [one], [one]
    ]  # fmt: skip
    assert fixed == [[one, (3, 1)], [one, (3, 1)], [one, (5, 1)], [one, (5, 1)], [one], [one]]


def test_the_fixed_macro_net_has_the_authors_parameters() -> None:
    """Of the authors' form, counted by hand: convolutions, and two for each normed channel."""
    # Every layer has a skip: without any the shape of its zeros is that of the first one's.
    c, ops, skips = 4, [0, 3, 2, 1], [[], [1], [0, 1], [0, 1, 1]]
    numbers = [n for op, bits in zip(ops, skips, strict=True) for n in (op, *bits)]
    expected, width = 27 * c + 2 * c, c
    for i, (op, bits) in enumerate(zip(ops, skips, strict=True)):
        kernel = 3 if op < 2 else 5
        expected += width * width * (1 + kernel**2) + 4 * width
        if i:
            expected += (sum(bits) + 1) * width * width + 2 * width
        if i in (0, 1):  # layers // 3 - 1 and 2 * (layers // 3) - 1
            # Of the i + 2 states those that a later layer reads are left in the subnet.
            read = {len(b) for b in skips[i + 1 :]} | {
                j for b in skips[i + 1 :] for j, bit in enumerate(b) if bit
            }
            halved = sum(1 for j in range(i + 2) if j in read)
            expected += halved * (2 * width * width + 4 * width)
            width *= 2
    expected += width * 10
    subnet = nasfx.finalize(enas.macro(c, 4, evaluation=True), enas.macro_arch(numbers))
    assert parameters(subnet) == expected


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([0, 6, 1], r"layer 1 is \[6, 1\], but takes an operation, 0 to 5, and 1 bits"),
        ([0, 1], r"layer 1 is \[1\]"),
        ([0, 1, 2], r"layer 1 is \[1, 2\]"),
    ],
)
def test_macro_arch_refuses_what_is_none(numbers: list[int], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        enas.macro_arch(numbers)


def test_macro_arch_reads_the_stem_first() -> None:
    arch = enas.macro_arch([0, 1, 0, 5, 0, 1])
    assert arch["skip/2"] == [1]
    assert arch["skip/1"] == []
    assert arch["op/2"] == "max_pool_3x3"


# -- micro -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_cells")
def test_the_micro_space_counts_all_decisions_and_holds_the_authors_cells() -> None:
    space = nasfx.search_space(enas.micro(4, 3))
    assert space.size == (5**5 * 2 * 3 * 4 * 5 * 6) ** 4
    assert space.validate(enas.ENAS_MICRO) == enas.ENAS_MICRO


def test_the_authors_cells() -> None:
    found = [enas.ENAS_MICRO[label] for label in MICRO]
    assert found == [
        "0", "avg_pool_3x3", "0", "sep_conv_3x3", "0", "max_pool_3x3", "1", "sep_conv_5x5",
    ]  # fmt: skip


@pytest.mark.usefixtures("few_nodes")
@pytest.mark.parametrize("strategy", FEWER_STRATEGIES)
def test_strategies_on_micro(strategy: str) -> None:
    check_strategy(enas.micro(2, 3).double(), strategy, images(16))


def _states(cell: Any, arch: Mapping[str, Any], kind: str, s0: Tensor, s1: Tensor) -> list[Tensor]:
    """The states of a cell, and for each whether no node reads it, by the paper's text."""
    states = [s0, s1]
    for i in enas_nets.NODES:
        sides: list[Tensor] = []
        for s, side in enumerate("xy"):
            label = f"{kind}/{i}/{side}"
            reading = cell.sides[2 * (i - 2) + s].get_submodule(arch[label])
            op = reading.op.get_submodule(arch[f"{label}/op"])
            sides.append(op(states[int(arch[label])]))
        states.append(sides[0] + sides[1])
    return states


def _loose(arch: Mapping[str, Any], kind: str) -> list[int]:
    read = {int(arch[f"{kind}/{i}/{side}"]) for i in enas_nets.NODES for side in "xy"}
    return [state for state in range(enas_nets.NODES.stop) if state not in read]


@pytest.mark.parametrize("seed", range(4))
def test_a_searched_micro_cell_projects_the_concatenation_of_its_loose_ends(seed: int) -> None:
    norm = nn.BatchNorm2d(4)
    exits: Any = {"output": (lambda: enas_nets._relu_conv(4, 4), norm)}
    cell: Any = enas_nets._Cell("normal", 4, 1, exits, drop=False).double()
    arch = drawn(cell, seed)
    s0, s1 = torch.randn(2, 2, 4, 6, 6).double()
    states, loose = _states(cell, arch, "normal", s0, s1), _loose(arch, "normal")
    weight = torch.cat([cell.ends[i].layers[0][1].weight for i in loose], 1)
    x = torch.cat([states[i] for i in loose], 1).relu()
    with activated(cell, arch):
        found = cell(s0, s1)["output"]
    assert torch.allclose(found, norm(F.conv2d(x, weight)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_what_reads_a_fixed_reduction_cell_reads_the_concatenation(seed: int) -> None:
    exits: Any = {
        "second": enas_nets._to_second(4, 6),
        "first": enas_nets._to_first(4, 6, halves=True),
        "logits": enas_nets._to_logits(4, 3, 0.0),
    }
    cell: Any = enas_nets._Cell("reduce", 4, 2, exits, drop=True).double()
    arch = drawn(cell, seed)
    s0, s1 = torch.randn(2, 2, 4, 8, 8).double()
    states, loose = _states(cell, arch, "reduce", s0, s1), _loose(arch, "reduce")
    states[:2] = [cell.halve[i](states[i]) for i in range(2)]
    x = torch.cat([states[i] for i in loose], 1).relu()

    def layers(exit: int) -> list[Any]:
        return [cell.ends[i].layers[exit] for i in loose]

    with activated(cell, arch):
        found = cell(s0, s1)
    second = F.conv2d(x, torch.cat([m[1].weight for m in layers(0)], 1))
    assert torch.allclose(found["second"], cell.after["second"](second), rtol=0, atol=1e-12)
    even = F.conv2d(x, torch.cat([m.even.weight for m in layers(1)], 1), stride=2)
    odd = F.conv2d(x[:, :, 1:, 1:], torch.cat([m.odd.weight for m in layers(1)], 1), stride=2)
    first = cell.after["first"](torch.cat([even, odd], 1))
    assert torch.allclose(found["first"], first, rtol=0, atol=1e-12)
    logits = F.linear(x.mean((2, 3)), torch.cat([m[4].weight for m in layers(2)], 1))
    assert torch.allclose(found["logits"], logits, rtol=0, atol=1e-12)


def _separable(c: int, kernel: int) -> int:
    return 2 * (c * kernel**2 + c * c + 2 * c)


def fixed_parameters(c: int, kinds: list[str], arch: Mapping[str, Any]) -> int:
    """Of the authors' fixed micro net, counted by hand from their description."""
    expected = 27 * 3 * c + 6 * c
    outputs = [3 * c, 3 * c]  # channels of the two outputs before the cell
    width = c
    for kind in kinds:
        width = 2 * width if kind == "reduce" else width
        loose = _loose(arch, kind)
        expected += sum(n * width + 2 * width for n in outputs)  # calibrations
        expected += width * width + 2 * width  # the further one of input 1
        for i in enas_nets.NODES:
            for side in "xy":
                state, op = int(arch[f"{kind}/{i}/{side}"]), arch[f"{kind}/{i}/{side}/op"]
                if op.startswith("sep"):
                    expected += _separable(width, int(op[-1]))
                elif op == "identity" and kind == "reduce" and state < 2:
                    expected += width * width + 2 * width
        if kind == "reduce":
            expected += sum(width * width + 2 * width for state in loose if state < 2)
        outputs = [outputs[1], len(loose) * width]
    return expected + outputs[1] * 10


FIXED_KINDS = ["normal", "reduce", "normal"]


# 7: loose inputs, in the reduction cell too; 0: an identity of stride 2.
@pytest.mark.parametrize("seed", [7, 0])
def test_the_fixed_micro_net_has_the_authors_parameters_and_equals_the_model(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enas_nets, "_kinds", lambda _: FIXED_KINDS)
    monkeypatch.setattr(enas_nets, "NODES", range(2, 4))
    model = enas.micro(4, 3, evaluation=True).double()
    arch = drawn(model, seed)
    subnet = check_subnet(model, model, arch, images(16))
    assert parameters(subnet) == fixed_parameters(4, FIXED_KINDS, arch)


@pytest.mark.slow
@pytest.mark.parametrize("evaluation", [False, True])
def test_the_authors_cells_in_both_forms(evaluation: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enas_nets, "_kinds", lambda _: FIXED_KINDS)
    model = enas.micro(4, 3, evaluation=evaluation).double()
    subnet = check_subnet(model, model, enas.ENAS_MICRO, images(16))
    if evaluation:
        assert parameters(subnet) == fixed_parameters(4, FIXED_KINDS, enas.ENAS_MICRO)
        enas.set_drop_path(subnet, 0.3)
        assert not torch.equal(subnet.train()(images(16)), subnet(images(16)))


def test_two_reductions_stand_among_the_micro_cells() -> None:
    assert [i for i, kind in enumerate(enas_nets._kinds(6)) if kind == "reduce"] == [2, 5]
    assert [i for i, kind in enumerate(enas_nets._kinds(15)) if kind == "reduce"] == [5, 11]
    assert len(enas_nets._kinds(6)) == 8


@pytest.mark.parametrize("evaluation", [False, True])
def test_the_auxiliary_head_of_micro(evaluation: bool) -> None:
    model = enas.micro(2, 3, 7, evaluation=evaluation, auxiliary=True)
    logits, more = model(images(32).float())
    assert logits.shape == more.shape == (2, 7)
    more.sum().backward()
    read = {name.split(".")[1] for name, p in model.named_parameters()
            if p.grad is not None and name.startswith("cells")}  # fmt: skip
    assert read == {"0", "1", "2", "3", "4"}
    assert model.eval()(images(32).float()).shape == (2, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: 2}, "normal/2/x reads state 2 with operation 2; states go up to 1"),
        ({1: 5}, "normal/2/x reads state 0 with operation 5"),
        ({39: -1}, "reduce/6/y reads state 1 with operation -1"),
    ],
)
def test_micro_arch_refuses_what_is_none(change: dict[int, int], message: str) -> None:
    numbers = [0, 2, 1, 0] * 10
    for i, value in change.items():
        numbers[i] = value
    with pytest.raises(SpaceError, match=message):
        enas.micro_arch(numbers)


def test_micro_arch_counts() -> None:
    with pytest.raises(
        SpaceError, match="39 numbers; two cells of five nodes of two sides take 40"
    ):
        enas.micro_arch([0] * 39)


def test_sizes_that_cannot_be_built() -> None:
    with pytest.raises(SpaceError, match=r"enas\.macro: 2 cells or layers are too few"):
        enas.macro(layers=2)
    with pytest.raises(SpaceError, match=r"enas\.micro: channels=5 must be an even number"):
        enas.micro(5)


def test_every_state_that_may_be_read_has_operations_of_its_own() -> None:
    choices = [m for m in enas.micro(2, 3).modules() if isinstance(m, LayerChoice)]
    ops = [c for c in choices if c.label == "normal/6/x/op"]
    cells = sum(kind == "normal" for kind in enas_nets._kinds(3))
    assert len(ops) == 6 * cells
    assert len({id(p) for c in ops for p in c.parameters()}) == sum(
        len(list(c.parameters())) for c in ops
    )
