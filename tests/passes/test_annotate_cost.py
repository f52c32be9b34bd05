from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from nasfx.passes import AnnotateCost
from torch import Tensor, nn

import nasfx
from nasfx import Count, LayerChoice, NasfxError
from nasfx.rewriting.graph import ModelGraph, graphs
from nasfx.rewriting.passes import PassContext
from nasfx.rewriting.printing import format_graph
from tests.conftest import fingerprint
from tests.models import CHANNELS, Block, Inputs, conv, example


def annotated(model: nn.Module, inputs: Any = None) -> ModelGraph:
    gm = nasfx.trace(model).graph_module
    ctx = PassContext((example(),) if inputs is None else inputs)
    assert AnnotateCost()(gm, ctx).modified is False
    return gm


def costs(gm: ModelGraph) -> str:
    rows: list[str] = []
    for path, inner in graphs(gm):
        for node in inner.graph.nodes:
            for (calls, candidate), count in node.meta.get("costs", {}).items():
                name = f"%{node.name}.{candidate}" if candidate else f"%{node.name}"
                inside = f" in {'/'.join(calls)}" if calls else ""
                figures = f"{count.flops} {count.params} {count.activation_bytes}"
                rows.append(f"{path or 'model'} {name}{inside}: {figures}")
    return "\n".join(rows)


def test_the_costs_of_a_block() -> None:
    # 25 pixels, 4 to 4 channels: a 3x3 kernel has 25 * 16 * 9 = 3600 MACs, a 5x5 kernel 10000; maps
    # of 100 floats are 400 bytes. `skip` is an identity: in a subnet no call is left of it.
    gm = annotated(Block())
    assert_expected_inline(
        costs(gm),
        """\
block.conv3 %_0 in block: 3600 144 400
block.conv3 %_1 in block: 0 8 400
block.conv3 %_2 in block: 0 0 400
block.conv5 %_0 in block: 10000 400 400
block.conv5 %_1 in block: 0 8 400
block.conv5 %_2 in block: 0 0 400
model %stem_0: 3600 144 400
model %stem_1: 0 8 400
model %stem_2: 0 0 400
model %mean: 0 0 16
model %head: 12 15 12""",
    )


def test_candidates_without_a_graph_and_input_choices() -> None:
    gm = annotated(Inputs())
    (first,) = [n for n in gm.graph.nodes if n.name == "first"]
    assert first.meta["costs"] == {
        ((), "conv"): Count(3600, 148, 400),
        ((), "relu"): Count(0, 0, 400),
    }
    (pick,) = [n for n in gm.graph.nodes if n.name == "pick"]
    assert pick.meta["costs"] == {((), ""): Count(0, 0, 400)}


class TwoResolutions(nn.Module):
    """One choice, called on 5x5 and on 3x3 pixels."""

    def __init__(self) -> None:
        super().__init__()
        candidates = {"seq": nn.Sequential(conv(), nn.ReLU()), "conv": conv(1)}
        self.block = LayerChoice(candidates, label="block")

    def forward(self, x: Tensor) -> Tensor:
        return self.block(nn.functional.avg_pool2d(self.block(x), 3, 1))


def test_a_choice_that_is_called_twice_costs_what_each_call_does() -> None:
    model = TwoResolutions()
    assert_expected_inline(
        costs(annotated(model)),
        """\
block.seq %_0 in block: 3600 148 400
block.seq %_0 in block_1: 1296 148 144
block.seq %_1 in block: 0 0 400
block.seq %_1 in block_1: 0 0 144
model %block.conv: 400 20 400
model %avg_pool2d: 0 0 144
model %block_1.conv: 144 20 144""",
    )
    found = nasfx.cost(model, example())
    assert (found.min.flops, found.max.flops) == (400 + 144, 3600 + 1296)


def test_costs_are_of_one_sample() -> None:
    assert costs(annotated(Block())) == costs(annotated(Block(), (example()[:1],)))


def test_a_second_run_replaces_the_costs() -> None:
    gm = annotated(Block())
    AnnotateCost()(gm, PassContext((torch.zeros(1, CHANNELS, 6, 6),)))
    assert "model %stem_0: 5184 144 576" in costs(gm)
    assert "3600" not in costs(gm)


def test_without_example_inputs() -> None:
    gm = nasfx.trace(Block()).graph_module
    with pytest.raises(NasfxError, match="costs need example_inputs"):
        AnnotateCost()(gm, PassContext())


class Picks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class OfValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="block")
        self.select = Picks()

    def forward(self, x: Tensor) -> Tensor:
        return self.select(self.block(x))


def test_a_shape_that_depends_on_values_is_refused_by_name() -> None:
    ctx = PassContext((example(),))
    leaf = nasfx.trace(OfValues(), leaf_modules=(Picks,)).graph_module
    with pytest.raises(NasfxError, match=r"the cost of %select = .* is not known: its shape dep"):
        AnnotateCost()(leaf, ctx)
    # Traced through, it is the function in it, with the line where it stands.
    inner = nasfx.trace(OfValues()).graph_module
    with pytest.raises(NasfxError, match=r"cost of %getitem = .*test_annotate_cost\.py:\d+\)"):
        AnnotateCost()(inner, ctx)


class OncePerBatch(nn.Module):
    """The product of a matrix with itself does not depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(3, 3))
        self.act = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * (self.matrix @ self.matrix).sum()


def test_what_is_computed_once_per_batch_is_refused_by_name() -> None:
    gm = nasfx.trace(OncePerBatch()).graph_module
    with pytest.raises(NasfxError, match="matmul"):
        AnnotateCost()(gm, PassContext((example(),)))
    AnnotateCost()(gm, PassContext((example()[:1],)))
    assert "model %matmul: 27 0 36" in costs(gm)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_model_moves(training: bool) -> None:
    model = Block().train(training)
    traced = nasfx.trace(model)
    before, text = fingerprint(model), format_graph(traced.graph_module)
    x = example()
    kept, state = x.clone(), torch.get_rng_state()
    AnnotateCost()(traced.graph_module, PassContext((x,)))
    assert fingerprint(model) == before
    assert format_graph(traced.graph_module) == text
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training is training for module in model.modules())
