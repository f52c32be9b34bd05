from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from nasfx.passes import RemoveDeadCode
from torch import Tensor, nn

import nasfx
from nasfx import LayerChoice
from nasfx.rewriting.graph import ModelGraph
from nasfx.rewriting.passes import PassContext
from nasfx.rewriting.printing import format_graph


class Net(nn.Module):
    counter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        torch.relu(self.unused(x))
        self.counter.add_(1)
        return self.used(x)


def test_unused_nodes_go_and_updates_of_buffers_stay() -> None:
    net = Net()
    gm = nasfx.trace(net).graph_module
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%unused = call_module[unused](%x)
%relu = torch.relu(%unused)
%counter = get_attr[counter]
%add_ = call_method[add_](%counter, 1)
%used = call_module[used](%x)
return %used""",
    )
    assert RemoveDeadCode()(gm, PassContext()).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%counter = get_attr[counter]
%add_ = call_method[add_](%counter, 1)
%used = call_module[used](%x)
return %used""",
    )
    assert RemoveDeadCode()(gm, PassContext()).modified is False
    gm(torch.zeros(1, 3))
    gm(torch.zeros(1, 3))
    assert net.counter.item() == 2


def test_candidates_are_swept_too() -> None:
    gm = nasfx.trace(nn.Sequential(LayerChoice({"net": Net(), "id": nn.Identity()}))).graph_module
    assert RemoveDeadCode()(gm, PassContext()).modified is True
    assert "unused" not in format_graph(gm)
    assert "call_method[add_]" in format_graph(gm)


class Code(nn.Module):
    """A model whose forward is one function, with a buffer and a parameter to write to."""

    def __init__(self, code: Callable[..., Tensor]) -> None:
        super().__init__()
        self.code = code
        self.register_buffer("buffer", torch.ones(2, 2))
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.inplace = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def local_read_later(m: Code, x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1)
    return y


def local_read_later_through_a_module(m: Code, x: Tensor) -> Tensor:
    y = x - 2
    m.inplace(y)
    return y


def view_written_base_read(m: Code, x: Tensor) -> Tensor:
    y = x * 2
    y.view(-1)[1:].mul_(3)
    return y


def base_written_earlier_view_read(m: Code, x: Tensor) -> Tensor:
    y = x * 2
    v = y.view(-1)
    y.add_(1)
    return v


def one_view_written_another_read(m: Code, x: Tensor) -> Tensor:
    y = x * 2
    v, w = y.view(-1), y.t()
    w.add_(1)
    return v


def out_argument(m: Code, x: Tensor) -> Tensor:
    y = x * 2
    torch.add(x, 1, out=y)
    return y


def function_in_place(m: Code, x: Tensor) -> Tensor:
    y = x - 2
    nn.functional.relu(y, inplace=True)
    nn.functional.relu(y - 1, True)
    torch.relu_(y)
    return y


def keyword_input(m: Code, x: Tensor) -> Tensor:
    y = x - 2
    nn.functional.relu(input=y, inplace=True)
    return y


@pytest.mark.parametrize(
    "code",
    [
        local_read_later, local_read_later_through_a_module, view_written_base_read,
        base_written_earlier_view_read, one_view_written_another_read, out_argument,
        function_in_place, keyword_input,
    ],
    ids=lambda code: code.__name__,
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_a_write_that_is_observed_later_is_kept(
    code: Callable[..., Tensor], training: bool
) -> None:
    net = Code(code).train(training)
    gm = nasfx.trace(net).graph_module
    x = torch.randn(2, 2)
    expected = net(x.clone())
    RemoveDeadCode()(gm, PassContext())
    assert torch.equal(gm(x.clone()), expected)


def parameter_written(m: Code, x: Tensor) -> Tensor:
    m.weight.detach().add_(1)
    return x * 1


def buffer_written_through_a_view(m: Code, x: Tensor) -> Tensor:
    m.buffer.view(-1)[0].zero_()
    return x * 1


def input_written(m: Code, x: Tensor) -> Tensor:
    x.add_(1)
    return x.new_zeros(1)


@pytest.mark.parametrize(
    "code",
    [parameter_written, buffer_written_through_a_view, input_written],
    ids=lambda code: code.__name__,
)
def test_a_write_that_outlives_the_graph_is_kept(code: Callable[..., Tensor]) -> None:
    results = []
    for swept in (False, True):
        net = Code(code)
        gm = nasfx.trace(net).graph_module
        if swept:
            RemoveDeadCode()(gm, PassContext())
        x = torch.ones(2, 2)
        gm(x)
        results.append([x, net.buffer, net.weight.detach()])
    before, after = results
    assert not all(torch.equal(t, torch.ones(2, 2)) for t in before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_assertion_is_kept_and_its_condition_with_it() -> None:
    def code(m: Code, x: Tensor) -> Tensor:
        torch._assert((x > 0).all(), "positive")
        return x

    gm = nasfx.trace(Code(code)).graph_module
    assert RemoveDeadCode()(gm, PassContext()).modified is False
    with pytest.raises(AssertionError, match="positive"):
        gm(-torch.ones(2, 2))


def unobserved_write(m: Code, x: Tensor) -> Tensor:
    y = x * 2
    z = y + 1
    y.add_(1)
    return z


def test_a_write_that_nobody_observes_goes() -> None:
    gm: ModelGraph = nasfx.trace(Code(unobserved_write)).graph_module
    assert RemoveDeadCode()(gm, PassContext()).modified is True
    assert "add_" not in format_graph(gm)
