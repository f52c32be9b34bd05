from collections.abc import Callable
from typing import Any

import pytest
import torch
from nasfx.passes import LowerSampledPath
from torch import Tensor, fx, nn

import nasfx
from nasfx import InputChoice, LayerChoice, VerifyError
from nasfx.ops import CHOICE, SUBNET, SUPERNET, ArchState, mix
from nasfx.rewriting.graph import ModelGraph, Provenance, copy_graph_module, set_provenance
from nasfx.rewriting.passes import PassContext
from nasfx.rewriting.verifier import ANY, Stage, verify


def linear_relu() -> ModelGraph:
    return nasfx.trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).graph_module


def reads_another_graph(gm: ModelGraph) -> None:
    stranger = fx.Graph().placeholder("stranger")
    _, linear, _, _ = gm.graph.nodes
    linear.args = (stranger,)


def reads_what_comes_later(gm: ModelGraph) -> None:
    x, linear, relu, _ = gm.graph.nodes
    linear.args = (relu,)
    relu.args = (x,)


def takes_a_name(gm: ModelGraph) -> None:
    list(gm.graph.nodes)[2].name = "_0"


def has_two_outputs(gm: ModelGraph) -> None:
    *_, output = gm.graph.nodes
    with gm.graph.inserting_after(output):
        gm.graph.create_node("output", "output", (next(iter(gm.graph.nodes)),))


def calls_no_module(gm: ModelGraph) -> None:
    list(gm.graph.nodes)[1].target = "0.weight"


def calls_a_missing_module(gm: ModelGraph) -> None:
    list(gm.graph.nodes)[1].target = "gone.conv"


def reads_a_missing_tensor(gm: ModelGraph) -> None:
    with gm.graph.inserting_before(list(gm.graph.nodes)[1]):
        gm.graph.create_node("get_attr", "0.scale")


def calls_what_cannot_be_called(gm: ModelGraph) -> None:
    with gm.graph.inserting_before(list(gm.graph.nodes)[1]):
        gm.graph.call_function(torch.relu, ()).target = "relu"


GENERAL: list[tuple[Callable[[ModelGraph], None], str, str]] = [
    (reads_another_graph, "_0", "it reads %stranger, a node of another graph"),
    (reads_what_comes_later, "_0", "it reads %_1, which is not computed before it"),
    (takes_a_name, "_0", "its name %_0 is taken by an earlier node"),
    (has_two_outputs, "output", "nodes follow the output"),
    (calls_no_module, "_0", "there is no module 0.weight"),
    (calls_a_missing_module, "_0", "there is no module gone.conv"),
    (reads_a_missing_tensor, "_0_scale", "0.scale does not exist"),
    (calls_what_cannot_be_called, "relu", "its target 'relu' cannot be called"),
]


@pytest.mark.parametrize("stage", [ANY, CHOICE, SUPERNET, SUBNET], ids=str)
@pytest.mark.parametrize(
    ("broken", "node", "rule"), GENERAL, ids=lambda v: getattr(v, "__name__", "")
)
def test_rules_of_every_graph(
    broken: Callable[[ModelGraph], None], node: str, rule: str, stage: Stage
) -> None:
    gm = linear_relu()
    verify(gm, stage)
    broken(gm)
    with pytest.raises(VerifyError) as caught:
        verify(gm, stage, "some-pass")
    message = str(caught.value)
    assert message.startswith(
        f"after some-pass: node %{node} breaks a rule of stage {stage}: {rule}"
    )
    (note,) = caught.value.__notes__
    assert [line for line in note.split("\n") if line.startswith("--> ")]


def goes_on_after_the_output(gm: ModelGraph) -> None:
    *_, output = gm.graph.nodes
    with gm.graph.inserting_after(output):
        gm.graph.call_function(torch.relu, (next(iter(gm.graph.nodes)),))


def has_no_output(gm: ModelGraph) -> None:
    gm.graph.erase_node(gm.graph.output_node())


def is_empty(gm: ModelGraph) -> None:
    for node in reversed(gm.graph.nodes):
        gm.graph.erase_node(node)


@pytest.mark.parametrize("broken", [goes_on_after_the_output, has_no_output, is_empty])
def test_a_graph_ends_in_an_output(broken: Callable[[ModelGraph], None]) -> None:
    gm = linear_relu()
    broken(gm)
    nodes = list(gm.graph.nodes)
    with pytest.raises(VerifyError, match="after some-pass: the graph does not end in an output"):
        verify(gm, ANY, "some-pass")
    assert list(gm.graph.nodes) == nodes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")
        candidates = {"deep": nn.Sequential(nn.Linear(2, 2), inner), "skip": nn.Identity()}
        self.block = LayerChoice(candidates, label="block")
        self.pick = InputChoice(2, label="pick")

    def forward(self, x: Tensor) -> Tensor:
        return self.pick([self.block(x), x])


def choice_graph() -> ModelGraph:
    return copy_graph_module(nasfx.trace(Net()).graph_module)


def sampled_graph() -> ModelGraph:
    gm = choice_graph()
    gm._modules["arch"] = ArchState(
        {}, {"block": ("deep", "skip"), "act": ("relu", "tanh"), "pick": None}, 0
    )
    LowerSampledPath()(gm, PassContext())
    return gm


def node(gm: ModelGraph, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def mixes(gm: ModelGraph) -> None:
    with gm.graph.inserting_before(node(gm, "block")):
        gm.graph.call_function(mix, (node(gm, "x"), [node(gm, "x")]))


def reads_alpha(gm: ModelGraph) -> None:
    gm._modules["arch"] = ArchState({"block": torch.zeros(2)}, {}, 0)
    with gm.graph.inserting_before(node(gm, "block")):
        gm.graph.create_node("get_attr", "arch.block")


def draws(gm: ModelGraph) -> None:
    gm._modules["arch"] = ArchState({}, {}, 0)
    with gm.graph.inserting_before(node(gm, "block")):
        gm.graph.create_node("call_module", "arch", ("block",))


def gives_two_tensors(gm: ModelGraph) -> None:
    x = node(gm, "x")
    node(gm, "block").args = (x, x)


def gives_three_inputs(gm: ModelGraph) -> None:
    x = node(gm, "x")
    node(gm, "pick").args = ([x, x, x],)


def gives_no_list(gm: ModelGraph) -> None:
    node(gm, "pick").args = (node(gm, "x"),)


LOWERED = "gates, mixtures and switches belong to a lowered graph"
IN_CHOICE = [
    (mixes, "mix", LOWERED),
    (reads_alpha, "arch_block", LOWERED),
    (draws, "arch", LOWERED),
    (gives_two_tensors, "block", "candidate deep takes 1 tensors, but the call gives 2"),
    (gives_three_inputs, "pick", "an InputChoice takes one list of 2 inputs"),
    (gives_no_list, "pick", "an InputChoice takes one list of 2 inputs"),
]


@pytest.mark.parametrize(
    ("broken", "name", "rule"), IN_CHOICE, ids=lambda v: getattr(v, "__name__", "")
)
def test_rules_of_stage_choice(broken: Any, name: str, rule: str) -> None:
    gm = choice_graph()
    verify(gm, CHOICE)
    broken(gm)
    with pytest.raises(VerifyError) as caught:
        verify(gm, CHOICE)
    assert f"node %{name} breaks a rule of stage CHOICE: {rule}" in str(caught.value)


def forgets_the_draws(gm: ModelGraph) -> None:
    call = node(gm, "block")
    call.args = (*call.args[:3], {})


def has_three_arguments(gm: ModelGraph) -> None:
    call = node(gm, "block")
    call.args = call.args[:3]


def has_gates_that_are_no_dictionary(gm: ModelGraph) -> None:
    call = node(gm, "block")
    call.args = (*call.args[:3], ())


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (forgets_the_draws, "candidate deep needs the draw of 'act'"),
        (has_three_arguments, "a switch takes (drawn, args, kwargs, gates)"),
        (has_gates_that_are_no_dictionary, "a switch takes (drawn, args, kwargs, gates)"),
    ],
)
def test_rules_of_stage_supernet(broken: Callable[[ModelGraph], None], rule: str) -> None:
    gm = sampled_graph()
    verify(gm, SUPERNET)
    broken(gm)
    with pytest.raises(VerifyError) as caught:
        verify(gm, SUPERNET)
    assert f"node %block breaks a rule of stage SUPERNET: {rule}" in str(caught.value)


def test_no_choice_is_left_after_lowering() -> None:
    for stage in (SUPERNET, SUBNET):
        with pytest.raises(VerifyError, match=rf"stage {stage}: choice \w+ must have been lowered"):
            verify(choice_graph(), stage)


def test_nothing_of_the_supernet_is_left_in_a_subnet() -> None:
    with pytest.raises(VerifyError, match=f"stage SUBNET: {LOWERED}"):
        verify(sampled_graph(), SUBNET)
    with pytest.raises(VerifyError, match=f"stage CHOICE: {LOWERED}"):
        verify(sampled_graph(), CHOICE)


@pytest.mark.parametrize("make", [choice_graph, sampled_graph])
def test_graphs_inside_nodes_are_checked_and_their_path_is_named(
    make: Callable[[], ModelGraph],
) -> None:
    gm = make()
    inner = gm.get_submodule("block.deep")
    assert isinstance(inner, ModelGraph)
    node(inner, "_0").target = "9"
    stage = CHOICE if make is choice_graph else SUPERNET
    with pytest.raises(VerifyError, match=r"%_0 of block\.deep breaks .*: there is no module 9"):
        verify(gm, stage)


def test_the_users_place_is_named() -> None:
    gm = linear_relu()
    linear = list(gm.graph.nodes)[1]
    set_provenance(linear, Provenance(site="model.py:7"))
    linear.target = "9"
    with pytest.raises(VerifyError, match=r"\(model\.py:7\)"):
        verify(gm, ANY)
