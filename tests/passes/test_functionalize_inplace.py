import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from nasfx.passes import FunctionalizeInplace
from torch import Tensor, nn

import nasfx
from nasfx import LayerChoice, TraceError, activated
from nasfx.rewriting.passes import PassContext
from nasfx.rewriting.printing import format_graph
from tests.passes.conftest import Lower


class Net(nn.Module):
    """A choice between a candidate that writes to its input and one that reads it."""

    def __init__(self, candidate: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.block = LayerChoice({"inplace": candidate, "pure": nn.Linear(4, 4)}, label="block")

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


class Code(nn.Module):
    def __init__(self, code: Callable[..., Tensor]) -> None:
        super().__init__()
        self.code = code
        self.relu = nn.ReLU(inplace=True)
        self.tanh = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def test_an_activation_becomes_its_function(lower: Lower) -> None:
    gm, _ = lower(Net(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))))
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%stem = call_module[stem](%x)
%block = call_module[block](%stem)
    inplace(%x):
        %_0 = call_module[0](%x)
        %_1 = call_module[1](%_0)
        return %_1
    pure: Linear
return %block""",
    )
    assert FunctionalizeInplace()(gm, PassContext()).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%stem = call_module[stem](%x)
%block = call_module[block](%stem)
    inplace(%x):
        %relu = torch.nn.functional.relu(%x)
        %_1 = call_module[1](%relu)
        return %_1
    pure: Linear
return %block""",
    )
    assert FunctionalizeInplace()(gm, PassContext()).modified is False


def test_another_write_goes_to_a_clone(lower: Lower) -> None:
    gm, _ = lower(Net(Code(lambda m, x: x.add_(1) * x)))
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%stem = call_module[stem](%x)
%block = call_module[block](%stem)
    inplace(%x):
        %add_ = call_method[add_](%x, 1)
        %mul = operator.mul(%add_, %x)
        return %mul
    pure: Linear
return %block""",
    )
    assert FunctionalizeInplace()(gm, PassContext()).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%stem = call_module[stem](%x)
%block = call_module[block](%stem)
    inplace(%x):
        %clone = torch.clone(%x)
        %add_ = call_method[add_](%clone, 1)
        %mul = operator.mul(%add_, %clone)
        return %mul
    pure: Linear
return %block""",
    )


def test_a_candidate_that_is_one_module_gets_a_graph(lower: Lower) -> None:
    gm, _ = lower(Net(nn.LeakyReLU(0.3, inplace=True)))
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%stem = call_module[stem](%x)
%block = call_module[block](%stem)
    inplace: LeakyReLU
    pure: Linear
return %block""",
    )
    assert FunctionalizeInplace()(gm, PassContext()).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%stem = call_module[stem](%x)
%block = call_module[block](%stem)
    inplace(%x):
        %leaky_relu = torch.nn.functional.leaky_relu(%x, 0.3)
        return %leaky_relu
    pure: Linear
return %block""",
    )
    assert FunctionalizeInplace()(gm, PassContext()).modified is False


def test_a_write_to_a_value_of_the_candidates_own_stays(lower: Lower) -> None:
    gm, ctx = lower(Net(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))))
    assert FunctionalizeInplace()(gm, ctx).modified is False
    assert [(s.node, s.reason) for s in ctx.skips] == [("_1", "it writes to a value of its own")]


def test_a_write_to_a_buffer_stays(lower: Lower) -> None:
    candidate = Code(lambda m, x: (m.get_buffer("calls").add_(1), x * 2)[1])
    candidate.register_buffer("calls", torch.zeros(()))
    gm, ctx = lower(Net(candidate))
    assert FunctionalizeInplace()(gm, ctx).modified is False
    assert ctx.skips == []


def two_writes(m: Code, x: Tensor) -> Tensor:
    x.add_(1)
    x.mul_(2)
    return x


def two_writes_chained(m: Code, x: Tensor) -> Tensor:
    return x.add_(1).mul_(2) - x


def read_after_the_write(m: Code, x: Tensor) -> Tensor:
    before = x * 3
    y = m.relu(x)
    return before + m.tanh(x) + y


def view_written(m: Code, x: Tensor) -> Tensor:
    m.relu(x.view(-1))
    return x * 1


def view_taken_before_the_write(m: Code, x: Tensor) -> Tensor:
    v = x.view(x.shape)
    m.relu(x)
    return v * 1


def keyword(m: Code, x: Tensor) -> Tensor:
    return F.hardtanh(input=x, min_val=-0.5, max_val=0.25, inplace=True) + x


def positional(m: Code, x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.4, True) + x


IN_PLACE = [
    nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
]  # fmt: skip
CANDIDATES: dict[str, Callable[[], nn.Module]] = {
    **{cls.__name__: lambda cls=cls: cls(inplace=True) for cls in IN_PLACE},
    "LeakyReLU": lambda: nn.LeakyReLU(0.3, True),
    "ELU": lambda: nn.ELU(0.7, True),
    "CELU": lambda: nn.CELU(0.7, True),
    "Hardtanh": lambda: nn.Hardtanh(-0.5, 0.25, inplace=True),
    "Threshold": lambda: nn.Threshold(0.1, -3.0, inplace=True),
    "RReLU": lambda: nn.RReLU(0.25, 0.25, inplace=True),
    "first": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)),
    "two modules": lambda: nn.Sequential(nn.ReLU6(True), nn.Hardtanh(-1, 0.3, inplace=True)),
    "Dropout": lambda: nn.Sequential(nn.Dropout(0.0, inplace=True), nn.ReLU(inplace=True)),
    "nested": lambda: LayerChoice({"r": nn.ReLU(inplace=True), "skip": nn.Identity()}, label="i"),
    "nested deeper": lambda: nn.Sequential(
        LayerChoice({"r": nn.ReLU(True), "skip": nn.Identity()}, label="i"), nn.Linear(4, 4)
    ),
    **{
        code.__name__: lambda code=code: Code(code)
        for code in (
            two_writes, two_writes_chained, read_after_the_write, view_written,
            view_taken_before_the_write, keyword, positional,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CANDIDATES)
def test_candidates_compute_bitwise_what_they_did_and_their_input_stays(
    name: str, training: bool, lower: Lower
) -> None:
    net = Net(CANDIDATES[name]()).double().train(training)
    structure = str(net)
    gm, ctx = lower(copy.deepcopy(net))
    x = torch.randn(5, 4, dtype=torch.float64)
    h = net.stem(x).detach()
    with activated(net, {"block": "inplace"}):
        leaf = h.clone().requires_grad_()
        expected = net.block(leaf * 1)
        (expected_grad,) = torch.autograd.grad(expected.square().sum(), leaf)
    try:
        assert FunctionalizeInplace()(gm, ctx).modified is True
    except TraceError:
        assert name.startswith("view"), "only a write to a view may be refused"
        return
    block = gm.get_submodule("block")
    assert isinstance(block, LayerChoice)
    block.active = "inplace"
    block.train(training)
    leaf = h.clone().requires_grad_()
    moved = leaf * 1
    version = moved._version
    got = block(moved)
    assert torch.equal(got, expected)
    # ELU and its like take their gradient from the result where they wrote in place, and CELU
    # then computes with a scale in float32.
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), leaf)[0], expected_grad, rtol=1e-12, atol=2e-8
    )
    assert moved._version == version
    assert str(net) == structure


def test_the_users_modules_are_not_touched() -> None:
    net = Net(nn.Sequential(nn.ReLU(inplace=True)))
    relu = net.block.get_submodule("inplace.0")
    nasfx.transform(net, "darts")
    assert isinstance(relu, nn.ReLU)
    assert relu.inplace
    assert net.block.get_submodule("inplace.0") is relu
    h = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    net.block(h)
    assert h.tolist() == [0, 1, 0, 1]


# -- refusals ------------------------------------------------------------------------------------


class ReadAgain(nn.Module):
    def __init__(self, block: LayerChoice, code: Callable[..., Tensor]) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.block = block
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, self.stem(x))


def added(m: ReadAgain, h: Tensor) -> Tensor:
    return m.block(h) + h


def returned(m: ReadAgain, h: Tensor) -> tuple[Tensor, Tensor]:
    return m.block(h), h


def view_read_later(m: ReadAgain, h: Tensor) -> Tensor:
    v = h.flatten(1)
    return m.block(h) + v


def base_of_a_view_read_later(m: ReadAgain, h: Tensor) -> Tensor:
    return m.block(h.view(h.shape)) + h


def called_twice(m: ReadAgain, h: Tensor) -> Tensor:
    g = m.block(h) * 2
    return m.block(g) + g


def one_module() -> LayerChoice:
    return LayerChoice({"r": nn.ReLU(inplace=True), "pure": nn.Tanh()}, label="block")


def sequence() -> LayerChoice:
    candidate = nn.Sequential(nn.ReLU(inplace=True), nn.Tanh())
    return LayerChoice({"r": candidate, "pure": nn.Tanh()}, label="block")


def nested() -> LayerChoice:
    return LayerChoice({"outer": one_module(), "pure": nn.Tanh()}, label="outer")


def nested_in_a_graph() -> LayerChoice:
    return LayerChoice({"outer": nn.Sequential(one_module()), "pure": nn.Tanh()}, label="outer")


@pytest.mark.parametrize(
    "code",
    [added, returned, view_read_later, base_of_a_view_read_later, called_twice],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize(
    "block", [one_module, sequence, nested, nested_in_a_graph], ids=lambda f: f.__name__
)
def test_an_input_that_is_read_again_is_refused_with_both_places(
    block: Callable[[], LayerChoice], code: Callable[..., Tensor], lower: Lower
) -> None:
    gm, ctx = lower(ReadAgain(block(), code))
    with pytest.raises(TraceError) as caught:
        FunctionalizeInplace()(gm, ctx)
    message = str(caught.value)
    assert re.search(r"candidate '\w+' writes to its input in place", message)
    assert "read again at" in message
    read = code.__code__.co_firstlineno + (1 if code in (added, returned) else 2)
    if code is not base_of_a_view_read_later:
        assert f"{__file__}:{read}" in message
    assert "Use an operation that is not in place" in message
    assert "while running pass functionalize-inplace" in caught.value.__notes__


def test_a_view_in_place_is_refused_where_no_function_is_known(lower: Lower) -> None:
    gm, ctx = lower(Net(Code(lambda m, x: (x.view(-1).add_(1), x)[1])))
    with pytest.raises(
        TraceError, match=r"test_functionalize_inplace\.py:\d+: .*through another view of it"
    ):
        FunctionalizeInplace()(gm, ctx)


class Stateful(nn.Module):
    inplace = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.weight)


def test_one_module_with_parameters_is_refused() -> None:
    traced = nasfx.trace(Net(Stateful()), leaf_modules=[Stateful])
    with pytest.raises(TraceError, match=r"candidate 'inplace' \(Stateful\).* set inplace=False"):
        FunctionalizeInplace()(traced.graph_module, PassContext())
