import pytest
import torch
from expecttest import assert_expected_inline
from nasfx.passes import InferShapes
from torch import Tensor, nn

import nasfx
from nasfx import InputChoice, LayerChoice, TraceError
from nasfx.rewriting.graph import ModelGraph, graphs
from nasfx.rewriting.passes import PassContext
from nasfx.rewriting.printing import format_graph


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))
        candidates = {
            "strided": nn.Sequential(nn.Conv2d(4, 4, 1, stride=2), nn.BatchNorm2d(4)),
            "wide": nn.Conv2d(4, 6, 1),
        }
        self.block = LayerChoice(candidates, label="block")
        self.pick = InputChoice(2, label="pick")

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.block(self.pick([h, h * 2]))


def shapes(gm: ModelGraph) -> str:
    rows = []
    for path, inner in graphs(gm):
        for node in inner.graph.nodes:
            rows.append(f"{path or 'model'} %{node.name} {list(node.meta['shape'])}")
            for name, shape in node.meta.get("candidate_shapes", {}).items():
                rows.append(f"  {name} {list(shape)}")
    return "\n".join(rows)


X = torch.zeros(3, 2, 4, 4)


def test_every_node_and_every_candidate_gets_its_shape() -> None:
    gm = nasfx.trace(Net()).graph_module
    before = format_graph(gm)
    assert InferShapes()(gm, PassContext(example_inputs=(X,))).modified is False
    assert format_graph(gm) == before
    assert_expected_inline(
        shapes(gm),
        """\
block.strided %x [3, 4, 4, 4]
block.strided %_0 [3, 4, 2, 2]
block.strided %_1 [3, 4, 2, 2]
block.strided %output [3, 4, 2, 2]
model %x [3, 2, 4, 4]
model %stem_0 [3, 4, 4, 4]
model %stem_1 [3, 4, 4, 4]
model %mul [3, 4, 4, 4]
model %pick [3, 4, 4, 4]
model %block [3, 4, 2, 2]
  strided [3, 4, 2, 2]
  wide [3, 6, 4, 4]
model %output [3, 4, 2, 2]""",
    )


def test_shapes_of_structures() -> None:
    net = nn.Sequential(LayerChoice({"a": nn.GRU(3, 5), "b": nn.LSTM(3, 5)}, label="block"))
    gm = nasfx.trace(net).graph_module
    InferShapes()(gm, PassContext(example_inputs=(torch.zeros(7, 2, 3),)))
    (call,) = gm.graph.find_nodes(op="call_module")
    state = torch.Size([1, 2, 5])
    assert call.meta["candidate_shapes"] == {
        "a": (torch.Size([7, 2, 5]), state),
        "b": (torch.Size([7, 2, 5]), (state, state)),
    }


def test_without_example_inputs_nothing_is_noted() -> None:
    gm = nasfx.trace(Net()).graph_module
    InferShapes()(gm, PassContext())
    assert all("shape" not in node.meta for node in gm.graph.nodes)


@pytest.mark.parametrize("training", [True, False])
def test_no_tensor_of_the_model_moves(training: bool) -> None:
    net = Net().train(training)
    gm = nasfx.trace(net).graph_module
    before = {k: (v, v.clone(), v._version) for k, v in net.state_dict(keep_vars=True).items()}
    rng = torch.get_rng_state()
    InferShapes()(gm, PassContext(example_inputs=(X.clone().requires_grad_(),)))
    after = net.state_dict(keep_vars=True)
    for key, (tensor, value, version) in before.items():
        assert after[key] is tensor
        assert type(tensor) in (nn.Parameter, Tensor)
        assert torch.equal(tensor, value)
        assert tensor._version == version
    assert torch.equal(torch.get_rng_state(), rng)
    gm(X)


class Reading(nn.Module):
    """Its code reads values, so it cannot be traced and its shape cannot be inferred."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "branch":
            return x * 2 if x.sum() > 0 else x
        if self.how == "numpy":
            return x * float(x.detach().numpy().sum())
        if self.how == "list":
            return x * x.flatten().tolist()[0]
        return x.flatten()[x.flatten().nonzero()[:, 0]]


@pytest.mark.parametrize("how", ["branch", "numpy", "list", "mask"])
@pytest.mark.parametrize("place", ["before", "candidate", "inside a candidate"])
def test_a_shape_that_depends_on_values_is_declined(how: str, place: str) -> None:
    reading: nn.Module = Reading(how)
    if place == "inside a candidate":
        reading = nn.Sequential(nn.ReLU(), reading)
    if place == "before":
        net = nn.Sequential(reading, LayerChoice({"a": nn.ReLU(), "b": nn.Tanh()}, label="act"))
    else:
        net = nn.Sequential(nn.ReLU(), LayerChoice({"a": reading, "b": nn.Tanh()}, label="act"))
    gm = nasfx.trace(net, leaf_modules=[Reading]).graph_module
    ctx = PassContext(example_inputs=(X,))
    InferShapes()(gm, ctx)
    (skip,) = ctx.skips
    assert skip.reason.startswith("its shape depends on values")
    placeholder, *_ = gm.graph.nodes
    assert placeholder.meta["shape"] == X.shape


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ((torch.zeros(3, 5, 4, 4),), "to have 2 channels, but got 5 channels"),
        ((), "x"),
        ((X, X), "2"),
    ],
    ids=["channels", "none", "too many"],
)
def test_example_inputs_that_do_not_run_are_an_error(
    inputs: tuple[Tensor, ...], reason: str
) -> None:
    gm = nasfx.trace(Net()).graph_module
    with pytest.raises(TraceError, match="the example inputs do not run") as caught:
        InferShapes()(gm, PassContext(example_inputs=inputs))
    assert reason in str(caught.value)


def test_a_candidate_that_does_not_run_is_named_with_its_place() -> None:
    net = nn.Sequential(
        nn.ReLU(), LayerChoice({"fits": nn.Conv2d(2, 2, 1), "wrong": nn.Conv2d(7, 2, 1)}, label="b")
    )
    gm = nasfx.trace(net).graph_module
    with pytest.raises(TraceError) as caught:
        InferShapes()(gm, PassContext(example_inputs=(X,)))
    assert "wrong" in str(caught.value)
    assert "to have 7 channels" in str(caught.value)


def test_candidates_of_unlike_shapes_are_refused_at_transform_where_shapes_are_known() -> None:
    with pytest.raises(nasfx.SpaceError, match=r"choice 'block'.*test_infer_shapes\.py:\d+"):
        nasfx.transform(Net(), "darts", example_inputs=X)
    nasfx.transform(Net(), "single-path", example_inputs=X)
