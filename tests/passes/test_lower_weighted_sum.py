from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from nasfx.passes import InferShapes, LowerWeightedSum
from torch import Tensor, nn

import nasfx
from nasfx import InputChoice, LayerChoice, SpaceError
from nasfx.ops import SUPERNET, inclusion_gate
from nasfx.rewriting.graph import ModelGraph
from nasfx.rewriting.printing import format_graph
from nasfx.rewriting.verifier import verify
from tests.passes.conftest import Lower

X = torch.randn(3, 4, dtype=torch.float64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")
        candidates = {
            "seq": nn.Sequential(nn.Linear(4, 4), inner),
            "linear": nn.Linear(4, 4),
            "skip": nn.Identity(),
        }
        self.block = LayerChoice(candidates, label="block")
        self.side = nn.Linear(4, 4)
        self.pick = InputChoice(3, 2, label="pick")

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return self.pick([x, y, self.side(y)])


def test_golden(lower: Lower) -> None:
    gm, _ = lower(Net(), LowerWeightedSum())
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%arch_block = get_attr[arch.block]
%gate_block = nasfx.ops.softmax_gate(%arch_block, label='block')
%arch_pick = get_attr[arch.pick]
%gate_pick = nasfx.ops.inclusion_gate(%arch_pick, 2, False, label='pick')
%arch_act = get_attr[arch.act]
%gate_act = nasfx.ops.softmax_gate(%arch_act, label='act')
%block_seq_0 = call_module[block.seq.0](%x)
%block_seq_1_relu = call_module[block.seq.1.relu](%block_seq_0)
%block_seq_1_tanh = call_module[block.seq.1.tanh](%block_seq_0)
%block_seq_1 = nasfx.ops.mix(%gate_act, [%block_seq_1_relu, %block_seq_1_tanh], label='act')
%block_linear = call_module[block.linear](%x)
%block = nasfx.ops.mix(%gate_block, [%block_seq_1, %block_linear, %x], label='block')
%side = call_module[side](%block)
%pick = nasfx.ops.mix(%gate_pick, [%x, %block, %side], label='pick')
return %pick""",
    )
    verify(gm, SUPERNET)


def test_golden_of_edges_without_weights_of_their_own(lower: Lower) -> None:
    class Edges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.edges = nn.ModuleList(
                LayerChoice({"tanh": nn.Tanh(), "skip": nn.Identity()}, label=f"edge{i}")
                for i in range(3)
            )
            self.pick = InputChoice(3, 2, label="pick", reduction="mean")

        def forward(self, x: Tensor) -> Tensor:
            return self.pick([edge(x) for edge in self.edges])

    gm, _ = lower(Edges(), LowerWeightedSum(frozenset({"pick"})))
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%arch_edge0 = get_attr[arch.edge0]
%gate_edge0 = nasfx.ops.softmax_gate(%arch_edge0, label='edge0')
%arch_edge1 = get_attr[arch.edge1]
%gate_edge1 = nasfx.ops.softmax_gate(%arch_edge1, label='edge1')
%arch_edge2 = get_attr[arch.edge2]
%gate_edge2 = nasfx.ops.softmax_gate(%arch_edge2, label='edge2')
%edges_0_tanh = call_module[edges.0.tanh](%x)
%edges_0 = nasfx.ops.mix(%gate_edge0, [%edges_0_tanh, %x], label='edge0')
%edges_1_tanh = call_module[edges.1.tanh](%x)
%edges_1 = nasfx.ops.mix(%gate_edge1, [%edges_1_tanh, %x], label='edge1')
%edges_2_tanh = call_module[edges.2.tanh](%x)
%edges_2 = nasfx.ops.mix(%gate_edge2, [%edges_2_tanh, %x], label='edge2')
%add = operator.add(%edges_0, %edges_1)
%add_1 = operator.add(%add, %edges_2)
%truediv = operator.truediv(%add_1, 3)
return %truediv""",
    )


def gradients(loss: Tensor, gm: ModelGraph) -> dict[str, Tensor | None]:
    named = dict(gm.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


def agree(gm: ModelGraph, mixture: Callable[[dict[str, Tensor]], Tensor], x: Tensor = X) -> None:
    """Outputs and all gradients of the graph are those of the hand-written mixture."""
    alphas = {k.removeprefix("arch."): p for k, p in gm.named_parameters() if k.startswith("arch.")}
    with torch.no_grad():
        for alpha in alphas.values():
            alpha.copy_(torch.randn(len(alpha), dtype=torch.float64))
    found, expected = gm(x), mixture(alphas)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ours = gradients(found.square().sum(), gm)
    theirs = gradients(expected.square().sum(), gm)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-10, atol=1e-12, msg=name)
    assert all(theirs[f"arch.{label}"] is not None for label in alphas)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nested_choices_and_inputs(training: bool, lower: Lower) -> None:
    net = Net().double().train(training)
    gm, _ = lower(net, LowerWeightedSum())
    seq = net.block.get_submodule("seq")

    def mixture(alpha: dict[str, Tensor]) -> Tensor:
        block, act = alpha["block"].softmax(0), alpha["act"].softmax(0)
        h = seq[0](X)
        h = act[0] * h.relu() + act[1] * h.tanh()
        y = block[0] * h + block[1] * net.block.get_submodule("linear")(X) + block[2] * X
        w = torch.exp(alpha["pick"])
        pairs = torch.stack([w[0] * w[1], w[0] * w[2], w[1] * w[2]])
        p = pairs / pairs.sum()
        inputs = [X, y, net.side(y)]
        inclusion = [p[0] + p[1], p[0] + p[2], p[1] + p[2]]
        return sum(q * v for q, v in zip(inclusion, inputs, strict=True))  # type: ignore[return-value]

    agree(gm, mixture)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("n_chosen", [1, 2, 3, None])
def test_inputs(n_chosen: int | None, reduction: str, lower: Lower) -> None:
    class Inputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pick = InputChoice(3, n_chosen, label="pick", reduction=reduction)

        def forward(self, x: Tensor) -> Tensor:
            return self.pick([x, x.tanh(), x * 2])

    gm, _ = lower(Inputs().double(), LowerWeightedSum())

    def mixture(alpha: dict[str, Tensor]) -> Tensor:
        p = inclusion_gate(alpha["pick"], n_chosen)
        if reduction == "mean":
            p = p / p.sum()
        return p[0] * X + p[1] * X.tanh() + p[2] * (X * 2)

    agree(gm, mixture)


def test_one_label_is_one_gate_wherever_it_stands(lower: Lower) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = LayerChoice({"lin": nn.Linear(4, 4), "tanh": nn.Tanh()}, label="op")
            self.b = LayerChoice({"lin": nn.Linear(4, 4), "tanh": nn.Tanh()}, label="op")

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(self.a(x)))

    net = Tied().double()
    gm, _ = lower(net, LowerWeightedSum())
    assert len(gm.graph.find_nodes(op="call_function", target=nasfx.ops.softmax_gate)) == 1

    def mixture(alpha: dict[str, Tensor]) -> Tensor:
        p, x = alpha["op"].softmax(0), X
        for module in (net.a, net.b, net.a):
            x = p[0] * module.get_submodule("lin")(x) + p[1] * x.tanh()
        return x

    agree(gm, mixture)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        return self.linear(x) * scale, {"y": y, "z": self.linear(y)}


@pytest.mark.parametrize("leaf", [False, True], ids=["traced", "leaf"])
def test_several_arguments_keywords_and_structures(leaf: bool, lower: Lower) -> None:
    class Structured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = LayerChoice({"a": Pair(), "b": Pair()}, label="block")

        def forward(self, x: Tensor) -> Tensor:
            first, rest = self.block(x, y=x * 2, scale=3.0)
            return first + rest["y"] * rest["z"]

    net = Structured().double()
    traced = nasfx.trace(net, leaf_modules=[Pair] if leaf else [])
    gm = traced.graph_module
    arch = nasfx.Darts().arch_state(nasfx.search_space(net), 0, torch.float64)
    gm._modules["arch"] = arch
    LowerWeightedSum()(gm, nasfx.rewriting.passes.PassContext())

    def mixture(alpha: dict[str, Tensor]) -> Tensor:
        p = alpha["block"].softmax(0)
        a, b = (net.block._modules[k](X, y=X * 2, scale=3.0) for k in "ab")
        y, z = (p[0] * a[1][k] + p[1] * b[1][k] for k in "yz")
        return p[0] * a[0] + p[1] * b[0] + y * z

    agree(gm, mixture)


def test_relaxed_only_candidates_take_part(lower: Lower) -> None:
    net = nn.Sequential(
        LayerChoice(
            {"tanh": nn.Tanh(), "none": nn.Threshold(9.0, 0.0)}, label="op", relaxed_only=["none"]
        )
    ).double()
    gm, _ = lower(net, LowerWeightedSum())
    agree(gm, lambda alpha: alpha["op"].softmax(0)[0] * X.tanh() + 0 * alpha["op"].softmax(0)[1])


def test_an_identity_called_by_keyword(lower: Lower) -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = LayerChoice({"lin": nn.Linear(4, 4), "skip": nn.Identity()}, label="block")

        def forward(self, x: Tensor) -> Tensor:
            return self.block(input=x)

    net = Keyword().double()
    gm, _ = lower(net, LowerWeightedSum())

    def mixture(alpha: dict[str, Tensor]) -> Tensor:
        p = alpha["block"].softmax(0)
        return p[0] * net.block.get_submodule("lin")(X) + p[1] * X

    agree(gm, mixture)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook",
                                      "register_full_backward_hook"])  # fmt: skip
def test_a_skip_candidate_with_hooks_keeps_them(register: str, lower: Lower) -> None:
    skip = nn.Identity()
    called: list[int] = []
    getattr(skip, register)(lambda *_: called.append(1))
    gm, _ = lower(
        nn.Sequential(nn.Linear(4, 4), LayerChoice({"skip": skip, "tanh": nn.Tanh()}, label="op")),
        LowerWeightedSum(),
    )
    gm(torch.randn(2, 4)).sum().backward()
    assert called == [1]


class Scaled(nn.Module):
    """Reads a tensor that is a plain attribute, neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(3.0)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ScaledModel(Scaled):
    def __init__(self, choice: LayerChoice) -> None:
        super().__init__()
        self.op = choice

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.op(x))


@pytest.mark.parametrize("strategy", ["darts", "proxyless", "single-path"])
@pytest.mark.parametrize("place", ["model", "candidate"])
def test_plain_tensor_attributes_are_found(place: str, strategy: str) -> None:
    scaled = place == "candidate"
    candidates = {name: Scaled() if scaled else nn.Tanh() for name in "st"}
    choice = LayerChoice(candidates, label="op")
    net = nn.Sequential(choice) if scaled else ScaledModel(choice)
    x = torch.randn(2, 4)
    torch.testing.assert_close(nasfx.transform(net, strategy)(x), net(x))


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["concat", "none"])
def test_reductions_without_a_weighted_form_are_refused(reduction: str, lower: Lower) -> None:
    class Inputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pick = InputChoice(2, label="pick", reduction=reduction)

        def forward(self, x: Tensor) -> Any:
            return self.pick([x, x])

    line = Inputs.__init__.__code__.co_firstlineno + 2
    with pytest.raises(SpaceError, match=f"reduction '{reduction}' has no weighted sum") as caught:
        lower(Inputs(), LowerWeightedSum())
    assert f"choice pick ({__file__}:{line})" in str(caught.value)
    assert "while running pass lower-weighted-sum" in caught.value.__notes__


def test_candidates_of_unlike_shapes_are_refused_where_shapes_are_known(lower: Lower) -> None:
    net = nn.Sequential(LayerChoice({"a": nn.Linear(4, 4), "b": nn.Linear(4, 5)}, label="op"))
    with pytest.raises(SpaceError, match=r"candidate 1 differs: \(3, 4\), \(3, 5\)") as caught:
        lower(net, InferShapes(), LowerWeightedSum(), example_inputs=(X.float(),))
    assert "choice 'op'" in str(caught.value)
    lower(net, InferShapes(), LowerWeightedSum())  # not known: an error of the first step instead


class InDict(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, width)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"y": self.linear(x), "all": [x]}


@pytest.mark.parametrize("leaf", [False, True], ids=["traced", "leaf"])
def test_structures_of_unlike_shapes_are_refused_and_of_like_ones_taken(leaf: bool) -> None:
    class Structured(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.op = LayerChoice({"a": InDict(4), "b": InDict(width)}, label="op")

        def forward(self, x: Tensor) -> Tensor:
            return self.op(x)["y"]

    options: dict[str, Any] = {"leaf_modules": [InDict] if leaf else []}
    nasfx.transform(Structured(4), "darts", example_inputs=X.float(), **options)
    with pytest.raises(SpaceError, match="candidate 1 differs"):
        nasfx.transform(Structured(5), "darts", example_inputs=X.float(), **options)
