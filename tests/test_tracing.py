import collections
import copy
import inspect
import pickle
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import nasfx
from nasfx import InputChoice, LayerChoice, activated, search_space, trace
from nasfx.errors import SpaceError, TraceError
from nasfx.tracing import TracedModel
from tests.models import MODELS, RandomModel, example, random_models
from tests.strategies.nets import STRATEGIES

Watch = Callable[[nn.Module], nn.Module]


class Made(nn.Module):
    """A module whose forward and attributes are given."""

    def __init__(self, forward: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.body = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def two(label: str | None = None) -> LayerChoice:
    return LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label=label)


def rows(seed: int = 0) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


def line_of(function: Callable[..., Any], text: str) -> str:
    """The `file:line` of the line of `function` that holds `text`."""
    lines, start = inspect.getsourcelines(function)
    (at,) = [i for i, line in enumerate(lines) if text in line]
    return f"{__file__}:{start + at}"


def assert_same(found: Any, expected: Any) -> None:
    a, b = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    assert a[1] == b[1]
    assert b[0]
    for f, e in zip(a[0], b[0], strict=True):
        assert torch.equal(f, e) if isinstance(e, Tensor) else f == e


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    x = x.clone().requires_grad_()
    leaves = pytree.tree_leaves(model(x))
    torch.stack([leaf.square().sum() for leaf in leaves]).sum().backward()
    found = {"input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    model.zero_grad()
    return found


# -- what a traced model computes ------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_candidate_computes_what_the_model_computes(name: str, untouched: Watch) -> None:
    torch.manual_seed(0)
    model = untouched(MODELS[name]())
    traced = trace(model)
    generator = torch.Generator().manual_seed(0)
    oracle = copy.deepcopy(model)
    x = example()
    for seed in range(12):
        arch = search_space(traced).sample(generator)
        with activated(oracle, arch), activated(traced, arch):
            assert_same(traced.eval()(x), oracle.eval()(x))
            trained = copy.deepcopy(traced).train()
            torch.manual_seed(seed)
            found = gradients(trained, x)
            expected = gradients(copy.deepcopy(oracle).train(), x)
            assert found.keys() == expected.keys()
            assert expected["input"] is not None
            for key, gradient in expected.items():
                other = found[key]
                assert (other is None) == (gradient is None)
                assert other is None or torch.equal(other, gradient)
    traced.train(model.training)
    assert list(traced.state_dict()) == list(model.state_dict())


@settings(max_examples=60)
@given(random_models())
def test_random_models_compute_what_they_compute_eagerly(model: RandomModel) -> None:
    traced = trace(model)
    space = search_space(traced)
    generator = torch.Generator().manual_seed(0)
    x = example()
    for _ in range(3):
        arch = space.sample(generator)
        with activated(model, arch), activated(traced, arch):
            assert_same(traced.eval()(x), model.eval()(x))
            traced.train(), model.train()
            moved = copy.deepcopy(model)
            assert_same(traced(x), moved(x))  # and moves the batch norms as the model does
        assert_same(dict(model.named_buffers()) or 0, dict(moved.named_buffers()) or 0)


def test_choices_are_one_node_a_call_and_candidates_graphs_of_their_own() -> None:
    traced = trace(MODELS["repeated"]())
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["block", "block", "block"]
    conv = traced.block.conv
    assert isinstance(conv, fx.GraphModule)
    assert [n.target for n in conv.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    assert isinstance(traced.block.tanh, nn.Tanh)
    assert list(traced.graph_modules) == ["train"]


class Pair(NamedTuple):
    first: Tensor
    second: dict[str, Tensor]


def test_structured_outputs_keep_their_types() -> None:
    model = Made(lambda s, x: (Pair(s.act(x), {"z": x + 1}), [x, 3, None]), act=two())
    traced = trace(model)
    found = traced(rows())
    assert_same(found, model(rows()))
    assert type(found[0]) is Pair
    assert isinstance(found[1], list)
    assert found[1][1:] == [3, None]


def test_arguments_by_keyword_and_defaults() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, factor: float = 2.0, *, shift: float = 1.0) -> Tensor:
            return x * factor + shift if factor else x

    model, x = Model(), rows()
    traced = trace(model)
    assert torch.equal(traced(x), x * 2.0 + 1.0)
    assert torch.equal(traced(x=x), x * 2.0 + 1.0)
    with pytest.raises(TypeError):
        traced(x, 3.0)  # fixed at its default: not an input of the graph


def test_an_example_makes_a_default_an_input_that_keeps_its_default() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, factor: float = 2.0, power: int = 1) -> Tensor:
            return x * factor if power == 1 else x

    model, x = Model(), rows()
    traced = trace(model, (x, 5.0))
    assert torch.equal(traced(x, 7.0), model(x, 7.0))
    assert torch.equal(traced(x), model(x))


def test_a_keyword_without_a_default_is_an_input() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
            return x + shift

    class WithDefault(nn.Module):
        def forward(self, x: Tensor, factor: float = 2.0, *, shift: Tensor) -> Tensor:
            return x * factor + shift

    x, y = rows(), rows(1)
    assert torch.equal(trace(Model())(x, shift=y), x + y)
    assert torch.equal(trace(WithDefault())(x, shift=y), x * 2.0 + y)
    assert torch.equal(trace(WithDefault(), (x, 3.0))(x, 3.0, shift=y), x * 3.0 + y)


def test_variable_arguments() -> None:
    class Model(nn.Module):
        def forward(self, *xs: Tensor, **named: Tensor) -> Tensor:
            return xs[0] + xs[1] * named["z"]

    x, y = rows(), rows(1)
    assert torch.equal(trace(Model())(x, y, z=x), x + y * x)


def test_constants_and_plain_tensors_add_no_keys_and_are_read_by_name() -> None:
    table = torch.arange(4.0)
    model = Made(
        lambda s, x: s.act(x * s.scale + s.offset + torch.ones(4) + s.tables[0]),
        act=two(),
        scale=torch.tensor([2.0]),
        tables=[table],
    )
    model.register_buffer("offset", torch.tensor([0.5]))
    model.register_buffer("temporary", torch.zeros(2), persistent=False)
    traced = trace(model)
    assert_same(traced(rows()), model(rows()))
    assert list(traced.state_dict()) == list(model.state_dict()) == ["offset"]
    read = [n.target for n in traced.graph.nodes if n.op == "get_attr"]
    assert {"scale", "offset"} <= set(read)


def test_tensors_of_a_model_are_read_where_they_are_also_inside_a_candidate() -> None:
    """A candidate that holds a module from elsewhere in a list, to share its weight."""
    shared = linear()
    tied = Made(lambda s, x: F.linear(x, s.others[0].weight), others=[shared])
    model = nn.Sequential(shared, LayerChoice({"tied": tied, "tanh": nn.Tanh()}, label="c"))
    try:
        traced = trace(model)
    except TraceError as error:
        assert "weight" in str(error)  # noqa: PT017 - refusing it is as good
        return
    x = rows()
    assert_same(traced(x), model(x))
    found = gradients(traced, x)
    expected = gradients(model, x)
    assert torch.equal(found["0.weight"], expected["0.weight"])


def test_shared_modules_keep_one_target_and_tied_parameters_one_tensor() -> None:
    shared = linear()
    other = linear()
    other.weight = shared.weight
    model = nn.Sequential(shared, two(), shared, other)
    traced = trace(model)
    targets = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    assert targets == ["0", "1", "0", "3"]
    assert traced.get_submodule("0") is traced.get_submodule("2")
    x = rows()
    for name, gradient in gradients(model, x).items():
        assert torch.equal(gradients(traced, x)[name], gradient)
    assert list(traced.state_dict()) == list(model.state_dict())


def test_one_module_as_two_candidates() -> None:
    shared = nn.Sequential(linear(), two("inner"))
    model = nn.Sequential(LayerChoice({"a": shared, "b": shared}, label="outer"))
    x = rows()
    for arch in ({"outer": "a", "inner": "tanh"}, {"outer": "b", "inner": "tanh"}):
        subnet = nasfx.finalize(model, arch, example_inputs=x)
        assert torch.equal(subnet(x), shared[0](x).tanh())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("where", ["model", "candidate"])
def test_plain_tensor_attributes_survive_lowering(strategy: str, where: str) -> None:
    scaled = Made(lambda s, x: x * s.scale, scale=torch.tensor(2.0))
    if where == "candidate":
        model: nn.Module = nn.Sequential(LayerChoice({"a": scaled, "b": scaled}, label="c"))
    else:
        model = Made(
            lambda s, x: s.c(x) * s.scale,
            scale=torch.tensor(2.0),
            c=LayerChoice([nn.ReLU(), nn.ReLU()]),
        )
    x = rows()
    assert torch.equal(nasfx.transform(model, strategy, example_inputs=x)(x), model(x))


def test_constants_made_in_forward_are_arguments_of_a_choice_as_tensors() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask

    mask = torch.tensor([1.0, 0.0, 2.0, 1.0])
    model = Made(
        lambda s, x: s.c(s.c(x, torch.tensor([1.0, 0.0, 2.0, 1.0])), torch.ones(4)),
        c=LayerChoice({"a": Masked(), "b": Masked()}, label="c"),
    )
    x = rows()
    assert torch.equal(trace(model)(x), x * mask)
    assert torch.equal(nasfx.finalize(model, {"c": "b"}, example_inputs=x)(x), x * mask)


@pytest.mark.parametrize("how", ["+=", "add_", "setitem"])
def test_a_write_to_a_tensor_made_in_forward_is_refused(how: str) -> None:
    """In a graph it would be one constant for all calls."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        total = torch.zeros(3, 4)
        if how == "+=":
            total += x
        elif how == "add_":
            total.add_(x)
        else:
            total[:, 0] = x[:, 1]
        return total * 2

    with pytest.raises(TraceError, match=r"test_tracing.py:\d+: a tensor that forward made") as e:
        trace(Made(forward))
    assert "new_zeros" in str(e.value)


def test_tracing_again_what_was_traced() -> None:
    model = nn.Sequential(linear(), two("act"))
    again = trace(trace(model))
    with activated(model, {"act": "tanh"}), activated(again, {"act": "tanh"}):
        assert torch.equal(again(rows()), model(rows()))
    assert search_space(again).size == 2


@pytest.mark.parametrize(
    "name", ["opaque", "graph", "code", "meta", "origin", "example_inputs", "leaf_modules"]
)
def test_children_with_a_name_that_the_graph_needs_are_refused(name: str) -> None:
    model = Made(lambda s, x: s.act(s._modules[name](x)), act=two("c"), **{name: linear()})
    with pytest.raises(SpaceError, match=f"the model .* has a child or tensor '{name}'"):
        trace(model)


@pytest.mark.parametrize("name", ["graph", "code", "meta"])
def test_inner_children_with_a_name_of_fx_are_refused(name: str) -> None:
    inner = Made(lambda s, x: s._modules[name](x), **{name: linear()})
    with pytest.raises(SpaceError, match=f"1 .* has a child or tensor '{name}'"):
        trace(nn.Sequential(two("c"), inner))


@pytest.mark.parametrize("name", ["path", "space", "forward_", "label"])
def test_children_may_have_any_other_name(name: str) -> None:
    model = Made(lambda s, x: s.act(s._modules[name](x)), act=two("c"), **{name: linear()})
    x = rows()
    traced = trace(model)
    assert torch.equal(traced(x), model(x))
    assert f"{name}.weight" in traced.state_dict()
    assert torch.equal(nasfx.finalize(model, {"c": "tanh"})(x), model._modules[name](x).tanh())


@pytest.mark.parametrize("name", ["space", "strategy", "histories", "history"])
def test_children_with_a_name_that_the_supernet_needs_are_refused(name: str) -> None:
    model = Made(lambda s, x: s.act(s._modules[name](x)), act=two("c"), **{name: linear()})
    with pytest.raises(SpaceError, match=f"the model .* has a child or tensor '{name}'"):
        nasfx.transform(model, "single-path")


@pytest.mark.parametrize("label", ["decisions", "generator"])
def test_labels_may_be_any_name(label: str) -> None:
    net = nasfx.transform(nn.Sequential(two(label)), "darts")
    assert net.probabilities()[label].tolist() == pytest.approx([0.5, 0.5], abs=0.01)


# -- modes -----------------------------------------------------------------------------------------


def test_functional_dropout_follows_the_mode_and_keeps_one_graph() -> None:
    model = Made(lambda s, x: s.act(F.dropout(x, 0.5, s.training)), act=two())
    traced = trace(model)
    assert list(traced.graph_modules) == ["train"]
    assert traced.opaque == {}
    x = torch.randn(64, 4)
    for mode in (True, False, True):
        traced.train(mode), model.train(mode)
        torch.manual_seed(0)
        found = traced(x)
        torch.manual_seed(0)
        assert torch.equal(found, model(x))
        assert torch.equal(found, x.relu()) != mode


def test_functional_dropout_is_off_when_a_model_in_eval_mode_was_traced() -> None:
    model = Made(lambda s, x: s.act(F.dropout(x, 0.5, s.training)), act=two("c")).eval()
    x = torch.randn(64, 4)
    traced = trace(model)
    assert not traced.training
    assert torch.equal(traced(x), x.relu())
    assert all(not module.training for module in traced.modules())
    net = nasfx.transform(model, "single-path")
    with net.forced({"c": "relu"}):
        assert torch.equal(net(x), x.relu())
    assert torch.equal(nasfx.finalize(model, {"c": "relu"})(x), x.relu())


def test_dropout_that_does_not_follow_the_mode_stays_as_it_is() -> None:
    always = trace(Made(lambda s, x: F.dropout(x, 0.5, True))).eval()
    never = trace(Made(lambda s, x: F.dropout(x, 0.5, False))).train()
    inverted = trace(Made(lambda s, x: s.act(F.dropout(x, 0.5, not s.training)), act=two()))
    x = torch.ones(64, 4)
    assert not torch.equal(always(x), x)
    assert torch.equal(never(x), x)
    assert torch.equal(inverted.train()(x), x)
    assert not torch.equal(inverted.eval()(x), x)


@pytest.mark.parametrize("positional", [True, False])
def test_a_module_that_differs_by_mode_becomes_one_opaque_node(positional: bool) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if positional:
            return torch.dropout(self.linear(x), 0.5, self.training)
        return self.linear(x) * 2 if self.training else self.linear(x) + 1

    model = nn.Sequential(Made(forward, linear=linear()), two())
    traced = trace(model)
    assert list(traced.opaque) == ["0"]
    assert traced.opaque["0"].startswith("behaves differently in train() and eval(): ")
    assert list(traced.graph_modules) == ["train"]
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1"]
    x = rows()
    for mode in (False, True):
        torch.manual_seed(0)
        found = traced.train(mode)(x)
        torch.manual_seed(0)
        assert torch.equal(found, model.train(mode)(x))


def differs_in_code(self: nn.Module, x: Tensor) -> Any:
    y = self.act(self.norm(x))
    return (y, y * 2) if self.training else y


def differs_in_wiring(self: nn.Module, x: Tensor) -> Any:
    y = self.act(self.norm(x))
    return torch.cat([x, x, y] if self.training else [x, y, y])


def differs_in_order(self: nn.Module, x: Tensor) -> Any:
    y = self.act(self.norm(x))
    return x - y if self.training else y - x


def differs_in_constant(self: nn.Module, x: Tensor) -> Any:
    return self.act(self.norm(x)) + (torch.ones(4) if self.training else torch.zeros(4))


@pytest.mark.parametrize(
    "forward", [differs_in_code, differs_in_wiring, differs_in_order, differs_in_constant]
)
def test_a_root_that_differs_keeps_two_graphs(
    forward: Callable[..., Any], untouched: Watch
) -> None:
    model = untouched(Made(forward, norm=nn.BatchNorm1d(4), act=two()))
    traced = trace(model)
    oracle = copy.deepcopy(model)
    assert list(traced.graph_modules) == ["train", "eval"]
    x = rows()
    for mode in (False, True, False):
        copied = copy.deepcopy(traced).train(mode)
        assert copied.graph is copied.graph_modules["train" if mode else "eval"].graph
        assert_same(copied(x), copy.deepcopy(oracle).train(mode)(x))


def test_the_space_holds_what_is_active_in_either_mode() -> None:
    """In train mode `aux` is read only while input 0 is chosen, in eval mode always."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        aux = self.aux(x)
        y = self.pick([aux, self.main(x)])
        return y if self.training else y + aux

    model = Made(
        forward, aux=two("aux"), main=two("main"), pick=InputChoice(2, label="pick")
    ).eval()
    space = search_space(model)
    assert all("aux" in arch for arch in space.enumerate())
    subnet = nasfx.finalize(model, {"pick": [1], "main": "relu", "aux": "tanh"})
    assert torch.equal(subnet(rows()), rows().relu() + rows().tanh())


def test_modes_of_the_model_and_of_the_traced_model_are_independent(untouched: Watch) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), two())
    model[0].eval()
    untouched(model)
    traced = trace(model)
    assert traced.training
    assert not traced.get_submodule("0").training
    traced.train()
    assert traced.get_submodule("0").training
    traced.eval()
    assert model.training


class Frozen(nn.Module):
    """Keeps its batch norm and the one inside a candidate in eval mode, whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.choice = LayerChoice(
            {"a": nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), "b": nn.Dropout(0.5)}, label="c"
        )

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.norm.eval()
        self.choice.a[0].eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.choice(F.dropout(self.norm(x), 0.5, self.norm.training))


@pytest.mark.parametrize("made", [trace, lambda m: nasfx.transform(m, "single-path")])
@pytest.mark.parametrize("inside", [False, True])
def test_the_users_own_train_is_honoured(
    made: Callable[[nn.Module], nn.Module], inside: bool
) -> None:
    model = nn.Sequential(Frozen()) if inside else Frozen()
    prefix = "0." if inside else ""
    net = made(model)
    for mode in (False, True):
        net.train(mode)
        assert net.training == mode
        modes = {path: module.training for path, module in net.named_modules()}
        assert not modes[f"{prefix}norm"]
        assert not modes[f"{prefix}choice.a.0"]
        assert modes[f"{prefix}choice.b"] == mode
    before = net.get_buffer(f"{prefix}norm.running_mean").clone()
    net(rows() + 5)
    assert torch.equal(net.get_buffer(f"{prefix}norm.running_mean"), before)


# -- opaque modules --------------------------------------------------------------------------------


def by_value(self: nn.Module, x: Tensor) -> Tensor:
    y = self.linear(x)
    if y.sum() > 0:  # the line
        return y
    return -y


def by_shape(self: nn.Module, x: Tensor) -> Tensor:
    return self.linear(x) * len(x)  # the line


def without_gradients(self: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return self.linear(x)  # the line


def in_inference_mode(self: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return self.linear(x)  # the line


def in_autocast(self: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.linear(x)  # the line


UNTRACEABLE = [by_value, by_shape, without_gradients, in_inference_mode, in_autocast]


@pytest.mark.parametrize("forward", UNTRACEABLE)
@pytest.mark.parametrize("candidate", [False, True])
def test_what_cannot_be_traced_becomes_opaque_with_the_line_as_the_reason(
    forward: Callable[..., Any], candidate: bool
) -> None:
    inner: nn.Module = nn.Sequential(Made(forward, linear=linear()))
    path = "0.0"
    if candidate:
        inner, path = LayerChoice({"x": inner, "y": nn.ReLU()}), "0.x.0"
    model = nn.Sequential(inner, two())
    traced = trace(model)
    assert list(traced.opaque) == [path]
    assert line_of(forward, "# the line") in traced.opaque[path]
    x = rows()
    found, expected = traced(x), model(x)
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype
    assert found.requires_grad == expected.requires_grad
    assert list(traced.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("forward", UNTRACEABLE)
@pytest.mark.parametrize("where", ["root", "child", "candidate"])
def test_what_cannot_be_traced_around_a_choice_is_refused_with_line_and_advice(
    forward: Callable[..., Any], where: str, untouched: Watch
) -> None:
    model: nn.Module = Made(forward, linear=nn.Sequential(linear(), two()))
    if where == "child":
        model = nn.Sequential(model)
    elif where == "candidate":
        model = nn.Sequential(LayerChoice({"x": model, "y": nn.ReLU()}))
    with pytest.raises(TraceError) as error:
        trace(untouched(model))
    message = str(error.value)
    # By-value code fails at its own line, a context at the first node made under it.
    if forward in (by_value, by_shape):
        assert line_of(forward, "# the line") in message
        assert "leaf_modules" in message
        assert "torch.where" in message
        assert {"root": "the model", "child": "0 (Made)", "candidate": "0.x (Made)"}[
            where
        ] in message
    else:
        assert line_of(forward, "# the line") in message
        assert "autocast" in message


def test_tracing_under_no_grad_itself_is_fine() -> None:
    model = nn.Sequential(linear(), two())
    with torch.no_grad():
        traced = trace(model)
    assert traced(rows()).requires_grad
    assert traced.opaque == {}


class SignThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 3


@pytest.mark.parametrize("candidate", [False, True])
def test_an_autograd_function_keeps_its_backward(candidate: bool) -> None:
    function: nn.Module = Made(lambda s, x: SignThrough.apply(x))
    if candidate:
        function = LayerChoice({"sign": function, "relu": nn.ReLU()})
    traced = trace(nn.Sequential(function))
    x = rows().requires_grad_()
    y = traced(x)
    y.sum().backward()
    assert torch.equal(y, x.sign())
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    assert list(traced.opaque) == ["0.sign" if candidate else "0"]


def test_leaf_modules_by_path_and_by_class() -> None:
    model = nn.Sequential(nn.Sequential(linear()), Made(lambda s, x: s.l(x), l=linear()))
    assert [n.target for n in trace(model).graph.nodes][1:-1] == ["0.0", "1.l"]
    traced = trace(model, leaf_modules=["0", Made])
    assert [n.target for n in traced.graph.nodes][1:-1] == ["0", "1"]
    assert torch.equal(traced(rows()), model(rows()))
    assert traced.opaque == {}


def test_leaf_modules_that_hold_a_choice_or_do_not_exist_are_refused() -> None:
    model = nn.Sequential(nn.Sequential(two()))
    with pytest.raises(TraceError, match="0 is among leaf_modules but holds a choice"):
        trace(model, leaf_modules=["0"])
    with pytest.raises(TraceError, match="typo"):
        trace(model, leaf_modules=["typo"])


def test_modules_held_in_a_plain_list_are_the_traced_models_own(untouched: Watch) -> None:
    """The list names modules that are also children, as many models do."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return x

    norm, first = nn.BatchNorm1d(4), linear()
    model = nn.Sequential(Made(forward, norm=norm, first=first, order=[first, norm]), two())
    traced = trace(untouched(model)).eval()
    oracle = copy.deepcopy(model).eval()
    x = rows() + 3
    assert torch.equal(traced(x), oracle(x))


def test_modules_held_in_a_plain_list_beside_a_choice() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return x

    act, first = two("act"), linear()
    model = Made(forward, act=act, first=first, order=[first, act])
    traced = trace(model)
    assert [n.target for n in traced.graph.nodes][1:-1] == ["first", "act"]


def test_a_module_that_is_no_submodule_is_named_with_the_line() -> None:
    outside = linear()

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return outside(x)  # the line

    with pytest.raises(TraceError, match="a Linear is called that is no submodule") as error:
        trace(Made(forward))
    assert line_of(forward, "# the line") in str(error.value)


@pytest.mark.parametrize("where", ["root", "child"])
def test_a_forward_set_on_the_instance_is_used(where: str) -> None:
    inner = nn.Sequential(linear())
    inner.forward = lambda x: x * 2  # type: ignore[method-assign]
    model = inner if where == "root" else nn.Sequential(inner)
    assert torch.equal(trace(model)(rows()), rows() * 2)


# -- hooks -----------------------------------------------------------------------------------------


def test_hooks_of_leaf_modules_and_of_the_root_run_once_a_call(untouched: Watch) -> None:
    seen: list[str] = []
    model = nn.Sequential(linear(), two())
    model[0].register_forward_hook(lambda *_: seen.append("leaf"))
    model.register_forward_hook(lambda m, args, out: seen.append("root") or out * 2)
    model.register_forward_pre_hook(lambda m, args: (seen.append("before"), (args[0] + 1,))[1])
    traced = trace(untouched(model))
    assert seen == []
    found = traced(rows())
    assert seen == ["before", "leaf", "root"]
    assert torch.equal(found, model(rows()))


def test_hooks_of_the_root_with_keywords() -> None:
    model = nn.Sequential(linear())
    model.register_forward_pre_hook(lambda m, args, kw: ((args[0] + 1,), kw), with_kwargs=True)
    model.register_forward_hook(lambda m, args, kw, out: out * 2, with_kwargs=True)
    assert torch.equal(trace(model)(rows()), model(rows()))


def test_backward_hooks_of_the_root_run() -> None:
    seen: list[int] = []
    model = nn.Sequential(linear())
    model.register_full_backward_hook(lambda *_: seen.append(1))
    trace(model)(rows().requires_grad_()).sum().backward()
    assert seen == [1]


def test_a_container_with_hooks_stays_one_node_and_says_why() -> None:
    seen: list[int] = []
    inner = nn.Sequential(linear())
    inner.register_forward_hook(lambda m, args, out: seen.append(1) or out * 100)
    model = nn.Sequential(inner, two())
    traced = trace(model)
    assert seen == []
    assert "hooks" in traced.opaque["0"]
    assert torch.equal(traced(rows()), model(rows()))
    assert seen == [1, 1]


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda m, args, out: out * 2),
    "before": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["choice", "around", "candidate that holds a choice"])
def test_hooks_that_a_graph_would_lose_are_refused(kind: str, where: str) -> None:
    choice = two("inner")
    around = nn.Sequential(choice)
    outer = LayerChoice({"x": around, "y": nn.ReLU()}) if "candidate" in where else around
    HOOKS[kind](choice if where == "choice" else around)
    with pytest.raises(TraceError, match="hooks"):
        trace(nn.Sequential(outer))


def test_hooks_of_candidates_without_choices_run() -> None:
    deep, flat = nn.Sequential(linear()), linear()
    deep.register_forward_hook(lambda m, args, out: out * 2)
    flat.register_forward_hook(lambda m, args, out: out * 3)
    model = nn.Sequential(LayerChoice({"deep": deep, "flat": flat}, label="c"))
    traced, x = trace(model), rows()
    for name in ("deep", "flat"):
        with activated(model, {"c": name}), activated(traced, {"c": name}):
            assert torch.equal(traced(x), model(x))


# -- random numbers --------------------------------------------------------------------------------


def torch_noise(self: nn.Module, x: Tensor) -> Tensor:
    return self.act(x) + torch.rand(4)


def python_noise(self: nn.Module, x: Tensor) -> Tensor:
    return self.act(x) * random.random()


def numpy_noise(self: nn.Module, x: Tensor) -> Tensor:
    return self.act(x) * float(np.random.rand())


def generator_noise(self: nn.Module, x: Tensor) -> Tensor:
    return self.act(x) + torch.rand(4, generator=self.generator)


NOISES = [torch_noise, python_noise, numpy_noise, generator_noise]


def noisy(noise: Callable[..., Any], act: nn.Module) -> Made:
    return Made(noise, act=act, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("where", ["root", "child", "candidate"])
def test_random_numbers_around_a_choice_are_refused(noise: Callable[..., Any], where: str) -> None:
    model: nn.Module = noisy(noise, two())
    if where == "child":
        model = nn.Sequential(model)
    elif where == "candidate":
        model = nn.Sequential(LayerChoice({"x": model, "y": nn.ReLU()}))
    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    with pytest.raises(TraceError, match="random numbers"):
        trace(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert repr(np.random.get_state()) == states[2]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("candidate", [False, True])
def test_a_module_that_draws_random_numbers_becomes_opaque(
    noise: Callable[..., Any], candidate: bool
) -> None:
    inner: nn.Module = noisy(noise, nn.Tanh())
    generator = inner.generator
    state = generator.get_state()
    if candidate:
        inner = LayerChoice({"x": inner, "y": nn.ReLU()})
    path = "0.x" if candidate else "0"
    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    traced = trace(nn.Sequential(inner, two()))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert repr(np.random.get_state()) == states[2]
    assert torch.equal(generator.get_state(), state)
    assert "random numbers" in traced.opaque[path]
    assert not torch.equal(traced(rows()), traced(rows()))


def test_random_operations_on_an_input_are_in_the_graph() -> None:
    model = Made(lambda s, x: s.act(x + torch.rand_like(x)), act=two())
    traced = trace(model)
    torch.manual_seed(3)
    found = traced(rows())
    torch.manual_seed(3)
    assert torch.equal(found, model(rows()))
    assert not torch.equal(found, traced(rows()))
    assert traced.opaque == {}


# -- what tracing must not change ------------------------------------------------------------------


def in_place(self: nn.Module, x: Tensor) -> Tensor:
    self.count.add_(1)
    return x * self.count


def plus_equals(self: nn.Module, x: Tensor) -> Tensor:
    self.count += 1
    return x * self.count


def assigned(self: nn.Module, x: Tensor) -> Tensor:
    self.count = self.count * 0.5 + x.detach().mean()
    return x * self.count


def through_the_dictionary(self: nn.Module, x: Tensor) -> Tensor:
    self._buffers["count"].add_(1)
    return x * self.count


def copied_into(self: nn.Module, x: Tensor) -> Tensor:
    self.count.copy_(x.detach().mean().reshape(1))
    return x * self.count


@pytest.mark.parametrize(
    "forward", [in_place, plus_equals, assigned, through_the_dictionary, copied_into]
)
@pytest.mark.parametrize("where", ["child", "candidate"])
def test_buffers_updated_in_forward_are_moved_by_calls_and_not_by_tracing(
    forward: Callable[..., Any], where: str
) -> None:
    counting = Made(forward)
    counting.register_buffer("count", torch.zeros(1))
    inner = nn.Sequential(counting)
    model = nn.Sequential(inner if where == "child" else LayerChoice([inner, nn.ReLU()]))
    path = "0.0.count" if where == "child" else "0.0.0.count"
    oracle = copy.deepcopy(model)
    traced = trace(model)
    assert counting.count.tolist() == [0.0]
    for seed in (1, 2):
        assert torch.equal(traced(rows(seed)), oracle(rows(seed)))
        assert torch.equal(traced.get_buffer(path), oracle.get_buffer(path))


@pytest.mark.parametrize("forward", [plus_equals, assigned])
def test_a_buffer_assigned_in_a_forward_that_must_be_traced_is_not_lost(
    forward: Callable[..., Any],
) -> None:
    model = Made(lambda s, x: s.act(forward(s, x)), act=two())
    model.register_buffer("count", torch.zeros(1))
    try:
        traced = trace(model)
    except TraceError as error:
        assert "count" in str(error)  # noqa: PT017 - refusing it is as good
        return
    oracle = copy.deepcopy(model)
    traced(rows()), oracle(rows())
    assert torch.equal(traced.get_buffer("count"), oracle.count)


@pytest.mark.parametrize(
    "store", [list, dict, set, collections.deque, lambda: {"a": []}, lambda: [[]]]
)
def test_what_forward_stores_in_its_attributes_stays_out_of_the_users_model(
    store: Callable[[], Any],
) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        self.last = x
        kept = self.kept
        if isinstance(kept, dict) and "a" in kept:
            kept = kept["a"]
        elif isinstance(kept, list) and kept:
            kept = kept[0]
        if isinstance(kept, dict):
            kept["x"] = x
        elif isinstance(kept, set):
            kept.add(x)
        else:
            kept.append(x)
        return self.act(x)

    model = Made(forward, act=two(), kept=store())
    trace(model)
    assert model.kept == store()
    assert not hasattr(model, "last")


def test_parameters_written_through_data_are_not_moved_by_tracing() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        for p in self.linear.parameters():
            p.data.mul_(0.5)
        return self.linear(x)

    model = nn.Sequential(Made(forward, linear=linear()))
    before = model[0].linear.weight.clone()
    trace(model)
    assert torch.equal(model[0].linear.weight, before)


@pytest.mark.parametrize("name", MODELS)
def test_tracing_and_transforming_leave_the_model_as_it_is(name: str, untouched: Watch) -> None:
    model = MODELS[name]()
    next(iter(model.parameters())).requires_grad_(False)
    next(iter(model.children())).eval()
    untouched(model)
    state = torch.get_rng_state()
    trace(model, example())
    nasfx.transform(model, "single-path", example_inputs=example())
    nasfx.finalize(model, search_space(model).sample(torch.Generator()), example_inputs=example())
    assert torch.equal(torch.get_rng_state(), state)


# -- whose tensors ---------------------------------------------------------------------------------


def test_tensors_are_the_models_own_and_rebinding_is_seen_by_both() -> None:
    model = nn.Sequential(nn.Sequential(linear(), nn.BatchNorm1d(4)), two())
    traced = trace(model)
    assert all(p is model.get_parameter(name) for name, p in traced.named_parameters())
    assert all(b is model.get_buffer(name) for name, b in traced.named_buffers())
    model[0][0].weight = nn.Parameter(torch.zeros(4, 4))
    assert traced.get_parameter("0.0.weight") is model[0][0].weight
    traced.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)
    x = rows()
    assert torch.equal(model[0][0].weight, torch.ones(4, 4))
    assert torch.equal(copy.deepcopy(traced)(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("mover", ["model", "traced"])
def test_double_moves_both(mover: str) -> None:
    model = MODELS["inputs"]()
    traced = trace(model)
    (model if mover == "model" else traced).double()
    for module in (model, traced, traced.origin):
        assert {p.dtype for p in module.parameters()} == {torch.float64}
    x = example(dtype=torch.float64)
    assert torch.equal(traced.eval()(x), model.eval()(x))


def test_training_one_trains_the_other() -> None:
    model = nn.Sequential(linear(), two())
    traced = trace(model)
    optimizer = torch.optim.SGD(traced.parameters(), 0.1)
    before = model[0].weight.clone()
    traced(rows()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    assert torch.equal(traced(rows()), model(rows()))


def plain(self: nn.Module, x: Tensor) -> Tensor:
    return self.act(self.norm(x) * self.scale)


@pytest.mark.parametrize("forward", [plain, differs_in_code])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_traced_model_are_independent_and_complete(
    again: Callable[[TracedModel], TracedModel], forward: Callable[..., Any]
) -> None:
    model = Made(forward, norm=nn.BatchNorm1d(4), act=two("act"), scale=torch.tensor([2.0]))
    traced = trace(model)
    copied = again(traced)
    x = rows()
    weights = {id(t) for t in (*traced.parameters(), *traced.buffers())}
    assert not weights & {id(t) for t in (*copied.parameters(), *copied.buffers())}
    for mode in (False, True):
        with activated(traced, {"act": "tanh"}), activated(copied, {"act": "tanh"}):
            assert_same(copied.train(mode)(x), traced.train(mode)(x))
    with torch.no_grad():
        copied.norm.weight.fill_(5.0)
    assert torch.equal(model.norm.weight, torch.ones(4))
    assert copied.origin.norm.weight is copied.norm.weight  # and shared inside the copy
    for gm in copied.graph_modules.values():
        assert gm.norm.weight is copied.norm.weight
    assert list(copied.state_dict()) == list(traced.state_dict())
    assert search_space(copied).choices == search_space(traced).choices
    assert str(copied.graph) == str(traced.graph)


# -- choices that are wrong ------------------------------------------------------------------------


def message_of(error: type[Exception], model: nn.Module) -> str:
    with pytest.raises(error) as raised:
        trace(model)
    return str(raised.value)


def test_a_choice_that_is_never_called() -> None:
    choice = two("lost")
    message = message_of(SpaceError, Made(lambda s, x: x, inner=nn.Sequential(choice)))
    assert "lost" in message
    assert "inner.0 is never called" in message
    assert choice.site in message


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_choice_called_in_one_mode_only(mode: str) -> None:
    choice = two("aux")
    model = Made(lambda s, x: s.act(x) if s.training == (mode == "train") else x, act=choice)
    message = message_of(SpaceError, model)
    assert f"aux ({choice.site}) is called in {mode} mode only" in message


def test_one_label_with_different_candidates() -> None:
    others = [
        LayerChoice({"tanh": nn.Tanh(), "relu": nn.ReLU()}, label="same"),
        LayerChoice({"relu": nn.ReLU()}, label="same"),
        LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="same", relaxed_only=["relu"]),
    ]
    for other in others:
        first = two("same")
        message = message_of(SpaceError, nn.Sequential(first, other))
        assert "choices with label 'same' differ" in message
        assert first.site in message
        assert other.site in message


def test_one_label_for_input_choices_that_differ_in_more_than_their_candidates() -> None:
    for a, b in [
        (InputChoice(2, 1, label="i"), InputChoice(2, 2, label="i")),
        (InputChoice(2, 1, label="i"), InputChoice(2, None, label="i")),
        (InputChoice(2, 1, label="i"), InputChoice(3, 1, label="i")),
    ]:
        model = Made(
            lambda s, x: s.a([x] * s.a.n_candidates) + s.b([x] * s.b.n_candidates), a=a, b=b
        )
        assert "differ" in message_of(SpaceError, model)


def test_an_explicit_label_that_is_another_choices_default_label() -> None:
    model = nn.Sequential(two("1/0"), nn.Sequential(two()))
    message = message_of(SpaceError, model)
    assert "'1/0'" in message
    assert "give one of them another label" in message


def test_labels_are_paths_and_the_same_every_time() -> None:
    def build() -> nn.Module:
        return nn.ModuleDict(
            {"a": two(), "b": nn.Sequential(two(), LayerChoice([nn.Sequential(two())]))}
        )

    def labels() -> list[str]:
        inner = build()
        model = Made(lambda s, x: s.inner["b"](s.inner["a"](x)), inner=inner)
        return [choice.label for choice in search_space(model).choices]

    assert labels() == labels()
    assert set(labels()) == {"inner/a", "inner/b/0", "inner/b/1", "inner/b/1/0/0"}


def test_a_choice_called_with_another_structure_or_constant() -> None:
    class Power(nn.Module):
        def forward(self, x: Tensor, k: Any = 1, **more: Any) -> Tensor:
            return x * 1

    calls: list[Callable[[nn.Module, Tensor], Tensor]] = [
        lambda s, x: s.c(x, 1) + s.c(x, 2),
        lambda s, x: s.c(x, 1) + s.c(x, 1.0),
        lambda s, x: s.c(x, 1) + s.c(x, True),
        lambda s, x: s.c(x) + s.c(x, 1),
        lambda s, x: s.c(x, x) + s.c(x, 1),
        lambda s, x: s.c(x, 1) + s.c(x, k=1),
        lambda s, x: s.c(x, [x, x]) + s.c(x, (x, x)),
        lambda s, x: s.c(x, {"a": x}) + s.c(x, {"b": x}),
    ]
    for call in calls:
        model = Made(call, c=LayerChoice([Power(), Power()], label="power"))
        message = message_of(TraceError, model)
        assert "power" in message
        assert "called again with other arguments" in message
        assert f"{__file__}:{inspect.getsourcelines(call)[1]}" in message


def test_calls_of_one_structure_may_differ_in_their_tensors() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, k: int, other: list[Tensor]) -> Tensor:
            return x * k + other[0]

    model = Made(lambda s, x: s.c(s.c(x, 2, [x]), 2, [x + 1]), c=LayerChoice([Scaled(), Scaled()]))
    x = rows()
    assert torch.equal(trace(model)(x), (x * 2 + x) * 2 + (x + 1))


def test_input_choices_called_wrongly() -> None:
    def one(self: nn.Module, x: Tensor) -> Any:
        return self.pick(x)  # the line

    def unpacked(self: nn.Module, x: Tensor) -> Any:
        return self.pick(x, x)  # the line

    def fewer(self: nn.Module, x: Tensor) -> Any:
        return self.pick([x])  # the line

    for call, kind in ((one, TraceError), (unpacked, TraceError), (fewer, SpaceError)):
        message = message_of(kind, Made(call, pick=InputChoice(2, label="pick")))
        assert "pick" in message
        assert line_of(call, "# the line") in message


def test_an_input_choice_cannot_be_a_candidate_itself() -> None:
    message = message_of(TraceError, nn.Sequential(LayerChoice({"a": InputChoice(2)})))
    assert "wrap it in a module" in message


@pytest.mark.parametrize("choice", [two("top"), InputChoice(2, label="top")])
def test_a_choice_alone_is_no_model(choice: nn.Module) -> None:
    with pytest.raises((TraceError, SpaceError), match="choice top"):
        trace(choice)


def test_a_candidate_called_past_its_choice_leaves_the_choice_uncalled() -> None:
    model = Made(lambda s, x: s.act.tanh(x), act=two("past"))
    assert "past" in message_of(SpaceError, model)
    model = Made(lambda s, x: s.act.forward(x), act=two("past"))
    assert "past" in message_of(SpaceError, model)


def test_errors_name_places_of_the_user_only() -> None:
    message = message_of(TraceError, Made(by_value, linear=nn.Sequential(linear(), two())))
    files = re.findall(r"(\S+\.py):\d+", message)
    assert set(files) == {__file__}


def test_a_result_kept_in_an_attribute_does_not_hinder_tracing() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.linear(x)
            return self.last.relu()

    model = nn.Sequential(Keeping(), two("act"))
    before = model(rows())
    kept = model[0].last
    assert not kept.is_leaf
    traced = trace(model)
    assert torch.equal(traced(rows()), before)
    assert model[0].last is kept


def test_a_model_without_storage_is_traced() -> None:
    with torch.device("meta"):
        model = nn.Sequential(LayerChoice([nn.BatchNorm2d(4), nn.Identity()], label="c"))
    assert nasfx.search_space(model).size == 2
