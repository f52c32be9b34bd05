"""`finalize`: the subnet equals the eager model and stands alone; what the certificate says."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import nasfx
from nasfx import LayerChoice, NasfxError, SearchError, SpaceError, VerifyError
from nasfx.choice import named_choices
from tests.models import CHANNELS, RandomModel, Step, conv, example, random_steps, real_module
from tests.strategies.nets import (
    STRATEGIES,
    WIDTH,
    Cell,
    Chain,
    Nested,
    Norms,
    Skips,
    batch,
    built,
    dense,
    loss_of,
    spread,
)

KINDS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "nested": Nested,
    "norms": Norms,
    "skips": Skips,
    "any skips": lambda: Skips(None),
    "mean": lambda: Skips(3, "mean"),
    "cell": Cell,
}
ARCH = {"first": "deep", "second": "bn"}


# -- random models --------------------------------------------------------------------------------


class Drop(nn.Module):
    """A functional dropout that follows the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), 0.3, training=self.training)


def _make(dropout: bool) -> Callable[[str, str], nn.Module]:
    """Modules for a random model: in-place ones, and dropouts of both kinds if wished."""

    def make(kind: str, name: str) -> nn.Module:
        if kind == "conv" and dropout:
            return Drop()
        if kind == "bn":
            return nn.Sequential(conv(1), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True))
        if kind == "relu":
            return nn.Dropout(0.2) if dropout else nn.Tanh()
        return real_module(kind, name)

    return make


def _same(
    model: nn.Module,
    subnet: nn.Module,
    arch: Any,
    x: Tensor,
    *,
    training: bool,
    buffers: bool = True,
) -> None:
    """Outputs, gradients and buffers of copies of both are equal bit for bit."""
    eager, static = copy.deepcopy(model), copy.deepcopy(subnet)
    outputs = []
    for module in (eager, static):
        module.train(training)
        module.zero_grad()
        with torch.random.fork_rng(), nasfx.activated(eager, arch):
            torch.manual_seed(11)
            outputs.append(module(x))
            if outputs[-1].requires_grad:
                ((outputs[-1] - 0.2) ** 2).mean().backward()
    assert torch.equal(*outputs)
    parameters = dict(eager.named_parameters())
    for name, p in static.named_parameters():
        a, b = p.grad, parameters[name].grad
        assert (a is None) == (b is None), name
        assert a is None or (b is not None and torch.equal(a, b)), name
    if buffers:
        expected = dict(eager.named_buffers())
        for name, value in static.named_buffers():
            assert torch.equal(value, expected[name]), name


def _check(model: nn.Module, strategy: str, x: Tensor, seed: int, *, buffers: bool = True) -> None:
    net = nasfx.transform(model, strategy, example_inputs=x)
    spread(net, seed)
    archs = list(net.space.enumerate()) if net.space.size <= 8 else []
    generator = torch.Generator().manual_seed(seed)
    for arch in archs or [net.space.sample(generator) for _ in range(5)]:
        state = {k: v.clone() for k, v in model.state_dict().items()}
        subnet = nasfx.finalize(net, arch)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        _same(model, subnet, arch, x, training=False)
        _same(model, subnet, arch, x, training=True, buffers=buffers)
        for key, value in subnet.state_dict().items():
            assert torch.equal(value, state[key]), key
        kinds = {type(m) for m in subnet.modules()}
        assert not any(kind.__module__.startswith("nasfx") for kind in kinds)
        assert subnet.architecture == dict(arch)
        certificate = dict(subnet.certificate)
        loose = certificate.pop("supernet_exactness")
        assert all(isinstance(text, str) for text in loose)
        assert 0 <= certificate.pop("supernet_difference") < 1e-11
        assert certificate == {"structure": "passed", "tensors": "passed", "outputs": "passed"}


@settings(max_examples=40)
@given(random_steps(), st.sampled_from(STRATEGIES), st.integers(0, 1000))
def test_random_models(steps: tuple[Step, ...], strategy: str, seed: int) -> None:
    # Eagerly, what feeds only inputs that are not chosen, or not read, runs all the same: it draws
    # dropout masks, and moves the buffers of a module that is called twice. A subnet leaves it out.
    demanded = any(step.kind in ("input", "pair") for step in steps)
    model = built(lambda: RandomModel(steps, _make(not demanded)), seed)
    _check(model, strategy, example(dtype=torch.float64), seed, buffers=not demanded)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_subnets_equal_the_eager_model(kind: str, strategy: str) -> None:
    _check(built(KINDS[kind]), strategy, batch()[0], 1)


@pytest.mark.parametrize("reduction", ["concat", "none"])
def test_reductions_of_sampled_strategies(reduction: str) -> None:
    _check(built(lambda: Skips(2, reduction)), "single-path", batch()[0], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_can_be_finalized_without_a_net(kind: str) -> None:
    model = built(KINDS[kind])
    for arch in list(nasfx.search_space(model).enumerate())[:8]:
        subnet = nasfx.finalize(model, arch, example_inputs=batch()[0])
        _same(model, subnet, arch, batch()[0], training=True)
        assert subnet.certificate["outputs"] == "passed"
        assert subnet.certificate["supernet_difference"] == "not run: no supernet"


def test_only_what_the_subnet_uses_is_in_it() -> None:
    model = built(Nested)
    subnet = nasfx.finalize(model, {"outer": "holds", "inner": "1", "tied": "v"})
    assert set(subnet.state_dict()) == {
        "stem.weight", "stem.bias", "outer.holds.1.weight", "outer.holds.1.bias",
        "two.v.weight", "two.v.bias", "head.weight", "head.bias",
    }  # fmt: skip
    assert len(subnet.graph.find_nodes(op="call_module")) < 9
    assert type(subnet) is not nasfx.Supernet
    assert isinstance(subnet, fx.GraphModule)


def test_inactive_decisions_are_dropped_from_the_architecture() -> None:
    net = nasfx.transform(built(Nested), "darts")
    subnet = nasfx.finalize(net, {"outer": "plain", "inner": "1", "direct": "a", "tied": "v"})
    assert subnet.architecture == {"outer": "plain", "tied": "v"}
    assert type(subnet.architecture) is dict
    assert type(subnet.certificate) is dict


def test_without_an_architecture_the_derived_one_is_taken() -> None:
    for strategy in ("darts", "proxyless"):
        net = nasfx.transform(built(Chain), strategy)
        spread(net)
        assert nasfx.finalize(net).architecture == net.derive()


# -- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_copies_are_independent(strategy: str) -> None:
    model = built(Chain)
    net = nasfx.transform(model, strategy)
    subnet = nasfx.finalize(net, ARCH)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(subnet.parameters(), 0.1)
    subnet.train()
    loss_of(subnet, *batch()).backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    moved = [k for k, v in subnet.state_dict().items() if not torch.equal(v, before[k])]
    assert {"stem.weight", "second.bn.1.running_mean", "second.bn.1.num_batches_tracked"} <= set(
        moved
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shared_tensors_are_trained_together(strategy: str) -> None:
    model = built(Chain).float()
    net = nasfx.transform(model, strategy)
    subnet = nasfx.finalize(net, ARCH, copy=False)
    own = dict(model.named_parameters())
    assert all(p is own[n] for n, p in subnet.named_parameters())
    subnet.train()
    x, y = batch()
    loss_of(subnet, x.float(), y.float()).backward()
    torch.optim.SGD(subnet.parameters(), 0.1).step()
    mean = net.state_dict()["second.bn.1.running_mean"]
    assert mean.any()
    assert torch.equal(mean, subnet.get_buffer("second.bn.1.running_mean"))
    for move in (net.double, model.float, subnet.double):
        move()
        dtypes = {t.dtype for m in (net, model, subnet) for n, t in m.state_dict().items()
                  if t.is_floating_point() and n in subnet.state_dict()}  # fmt: skip
        assert len(dtypes) == 1, move
        for name, tensor in subnet.state_dict().items():
            assert tensor.data_ptr() == model.state_dict()[name].data_ptr(), (move, name)
    _same(model, subnet, ARCH, batch()[0], training=True)
    with torch.no_grad():
        net.get_parameter("head.weight").zero_()
    assert subnet.get_parameter("head.weight").eq(0).all()


class OwnTensors(nn.Module):
    """Parameters and buffers that the graph reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.block = LayerChoice({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}, label="block")
        self.gain = nn.Parameter(torch.ones(2))
        self.register_buffer("shift", torch.full((2,), 0.5))
        self.register_buffer("hidden", torch.full((2,), 0.25), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * self.gain + self.shift + self.hidden


@pytest.mark.parametrize("share", [True, False])
def test_tensors_that_the_graph_reads_itself(share: bool) -> None:
    model = built(OwnTensors)
    net = nasfx.transform(model, "single-path")
    subnet = nasfx.finalize(net, {"block": "b"}, copy=not share)
    assert set(subnet.state_dict()) == {"block.b.weight", "block.b.bias", "gain", "shift"}
    assert "hidden" in dict(subnet.named_buffers())
    net.float()
    expected = torch.float32 if share else torch.float64
    assert {t.dtype for t in (*subnet.parameters(), *subnet.buffers())} == {expected}
    with torch.no_grad():
        model.gain.zero_()
    assert bool(subnet.gain.eq(0).all()) is share
    assert model.gain.dtype == torch.float32


def test_frozen_parameters_and_modes_are_kept() -> None:
    model = built(Chain)
    model.stem.requires_grad_(False)
    model.second.bn[1].eval()
    net = nasfx.transform(model, "darts")
    subnet = nasfx.finalize(net, ARCH)
    flags = {n: p.requires_grad for n, p in subnet.named_parameters()}
    assert flags == {n: not n.startswith("stem") for n in flags}
    assert subnet.training
    assert subnet.get_submodule("second.bn.1").training is False
    assert subnet.get_submodule("second.bn.0").training is True
    net.eval()
    assert not any(m.training for m in nasfx.finalize(net, ARCH).modules())
    assert all(p.requires_grad for n, p in nasfx.finalize(net, ARCH).named_parameters() if flags[n])


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.block = LayerChoice([nn.Linear(3, 3), nn.Tanh()], label="block")
            self.b = nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.block(self.a(x)))

    subnet = nasfx.finalize(built(Tied), {"block": "1"})
    assert subnet.get_parameter("b.weight") is subnet.get_parameter("a.weight")
    assert len(list(subnet.parameters())) == 3


# -- a module of its own --------------------------------------------------------------------------

_READ = """
import importlib.abc, pickle, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nasfx", "passes"):
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
with open(sys.argv[1], "rb") as f:
    subnet, x, expected = pickle.load(f)
assert torch.equal(subnet(x), expected)
assert subnet.architecture == {"first": "deep", "second": "bn"}, subnet.architecture
assert subnet.certificate["structure"] == "passed"
assert not [name for name in sys.modules if name.split(".")[0] == "nasfx"]
try:
    import nasfx
except ModuleNotFoundError:
    print("read without nasfx")
"""


@pytest.mark.parametrize("strategy", [*STRATEGIES, None])
def test_a_subnet_unpickles_where_nasfx_is_not_installed(
    strategy: str | None, tmp_path: Path
) -> None:
    model = built(Chain)
    net = model if strategy is None else nasfx.transform(model, strategy, example_inputs=batch()[0])
    subnet = nasfx.finalize(net, ARCH).eval()
    x, _ = batch()
    data = pickle.dumps((subnet, x, subnet(x)))
    assert b"nasfx" not in data
    path = tmp_path / "subnet.pkl"
    path.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", _READ, str(path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == "read without nasfx\n", done.stderr


def test_torch_save_keeps_the_subnet() -> None:
    subnet = nasfx.finalize(built(Chain), ARCH, example_inputs=batch()[0])
    buffer = io.BytesIO()
    torch.save(subnet, buffer)
    assert b"nasfx" not in buffer.getvalue()
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x, _ = batch()
    assert torch.equal(again.eval()(x), subnet.eval()(x))
    assert again.architecture == ARCH


@pytest.mark.parametrize("kind", KINDS)
def test_export_and_compile_take_a_subnet(kind: str) -> None:
    torch._dynamo.reset()
    model = built(KINDS[kind])
    net = nasfx.transform(model, "single-path")
    arch = net.space.sample(torch.Generator().manual_seed(3))
    subnet = nasfx.finalize(net, arch).eval()
    x, _ = batch()
    exported = torch.export.export(subnet, (x,))
    assert torch.equal(exported.module()(x), subnet(x))
    compiled = torch.compile(subnet, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), subnet(x))
    assert torch.equal(fx.symbolic_trace(subnet)(x), subnet(x))


def test_deepcopy_keeps_architecture_and_certificate() -> None:
    subnet = nasfx.finalize(built(Chain), ARCH, example_inputs=batch()[0])
    for twin in (copy.deepcopy(subnet), copy.deepcopy(copy.deepcopy(subnet))):
        assert twin.architecture == subnet.architecture == ARCH
        assert twin.certificate == subnet.certificate
        x, _ = batch()
        assert torch.equal(twin.eval()(x), copy.deepcopy(subnet).eval()(x))
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in subnet.parameters()}


# -- the certificate ------------------------------------------------------------------------------


def test_what_was_not_run_is_said() -> None:
    net = nasfx.transform(built(Chain), "darts")
    certificate = nasfx.finalize(net, ARCH).certificate
    assert certificate == {
        "structure": "passed",
        "tensors": "passed",
        "outputs": "not run: no example inputs",
        "supernet_difference": "not run: no example inputs",
    }
    ran = nasfx.finalize(net, ARCH, example_inputs=batch()[0]).certificate
    assert ran["outputs"] == "passed"
    assert ran["supernet_difference"] < 1e-13
    assert any("lower-weighted-sum" in text for text in ran["supernet_exactness"])


def test_the_certificate_leaves_state_modes_and_seeds_alone(
    untouched: Callable[[nn.Module], nn.Module],
) -> None:
    model = built(Chain)
    net = nasfx.transform(model, "proxyless", example_inputs=batch()[0])
    untouched(model)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    seed = torch.get_rng_state()
    nasfx.finalize(net, ARCH)
    assert torch.equal(torch.get_rng_state(), seed)
    assert [m.training for m in net.modules()] == modes
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in state.items())


def _break_collapse(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[fx.GraphModule], None]
) -> None:
    import nasfx.subnet

    right = nasfx.subnet.collapsed

    def wrong(*args: Any) -> Any:
        gm = right(*args)
        change(gm)
        return gm

    monkeypatch.setattr(nasfx.subnet, "collapsed", wrong)


def _other_module(gm: fx.GraphModule) -> None:
    (node,) = (n for n in gm.graph.nodes if n.target == "second.bn.0")
    node.target = "second.wide.0"


def _other_constant(gm: fx.GraphModule) -> None:
    (node,) = (n for n in gm.graph.nodes if n.target is torch.tanh)
    node.target = torch.sigmoid


def _additional_node(gm: fx.GraphModule) -> None:
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_function(torch.neg, output.args),)


@pytest.mark.parametrize("change", [_other_module, _other_constant, _additional_node])
@pytest.mark.parametrize("example", [None, batch()[0]])
def test_a_wrong_collapse_is_found(
    change: Callable[[fx.GraphModule], None],
    example: Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = nasfx.transform(built(Chain), "darts", example_inputs=example)
    nasfx.finalize(net, ARCH)
    _break_collapse(monkeypatch, change)
    with pytest.raises(VerifyError, match=r"differs from an independent trace") as error:
        nasfx.finalize(net, ARCH)
    assert any(note.startswith("collapsed: ") for note in error.value.__notes__)


def test_wrong_tensors_and_outputs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import nasfx.subnet

    net = nasfx.transform(built(Chain), "darts", example_inputs=batch()[0])
    right = nasfx.subnet._static

    def wrong_tensor(*args: Any, **kwargs: Any) -> Any:
        subnet = right(*args, **kwargs)
        with torch.no_grad():
            subnet.get_parameter("head.bias")[1] = torch.nextafter(
                subnet.get_parameter("head.bias")[1], torch.tensor(9.0, dtype=torch.float64)
            )
        return subnet

    monkeypatch.setattr(nasfx.subnet, "_static", wrong_tensor)
    with pytest.raises(VerifyError, match=r"tensor head\.bias of the subnet differs"):
        nasfx.finalize(net, ARCH)

    def wrong_graph(*args: Any, **kwargs: Any) -> Any:
        subnet = right(*args, **kwargs)
        _other_constant(subnet)
        subnet.recompile()
        return subnet

    monkeypatch.setattr(nasfx.subnet, "_static", wrong_graph)
    with pytest.raises(VerifyError, match=r"output 0 of the subnet differs from the eager"):
        nasfx.finalize(net, ARCH)


def test_the_difference_to_the_supernet_is_measured() -> None:
    """The figure is no constant: a supernet that computes something else shows it."""
    net = nasfx.transform(built(Chain), "darts", example_inputs=batch()[0])
    gm = net.graph_module
    for node in gm.graph.nodes:
        if node.target is torch.tanh:
            node.target = torch.sigmoid
    gm.recompile()
    found = nasfx.finalize(net, ARCH).certificate
    assert found["outputs"] == "passed"
    assert found["supernet_difference"] > 1e-3


# -- errors ---------------------------------------------------------------------------------------


def test_errors() -> None:
    with pytest.raises(SpaceError, match=r"Linear has no choices.*its own subnet"):
        nasfx.finalize(nn.Linear(2, 2))
    with pytest.raises(SearchError, match=r"no architecture of its own.*finalize\(model, arch\)"):
        nasfx.finalize(built(Chain))
    for target in (built(Chain), nasfx.transform(built(Chain), "darts")):
        with pytest.raises(SpaceError, match=r"no choice has the label 'third'.*'first', 'second'"):
            nasfx.finalize(target, {**ARCH, "third": "x"})
        with pytest.raises(SpaceError, match=r"no decision for 'second', which is active"):
            nasfx.finalize(target, {"first": "lin"})
        with pytest.raises(SpaceError, match=r"'second' has no candidate 'lin'"):
            nasfx.finalize(target, {**ARCH, "second": "lin"})
        with pytest.raises(SpaceError, match=r"'first'"):
            nasfx.finalize(target, {**ARCH, "first": [0]})
    with pytest.raises(SpaceError, match=r"has 1 inputs, n_chosen is 2"):
        nasfx.finalize(built(Skips), {"pick": [1], "block": "lin"})
    arch: dict[str, Any] = dict.fromkeys(("1<-0", "1<-1", "2<-0", "2<-1"), "lin")
    arch |= {"1<-0": "none", "node1": [0, 1], "node2": [0, 1]}
    with pytest.raises(SpaceError, match=r"relaxed_only and cannot be chosen"):
        nasfx.finalize(built(Cell), arch)


def test_an_error_leaves_the_model_with_its_active_candidates() -> None:
    model = built(Chain)
    model.first.active = "skip"
    net = nasfx.transform(model, "darts", example_inputs=batch()[0])
    nasfx.finalize(net, ARCH)
    assert {c.label or p: c.active for p, c in named_choices(model)}["first"] == "skip"


# -- two modes ------------------------------------------------------------------------------------


class TwoModes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.block = LayerChoice({"a": dense(norm=True), "b": nn.Tanh()}, label="block")
        self.auxiliary = nn.Linear(WIDTH, 2)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        return self.head(x) + self.auxiliary(x) if self.training else self.head(x)


@pytest.mark.parametrize("strategy", [*STRATEGIES, None])
def test_a_subnet_follows_the_mode_where_the_code_does(strategy: str | None) -> None:
    model = built(TwoModes)
    net = model if strategy is None else nasfx.transform(model, strategy)
    x, y = batch()
    for name in ("a", "b"):
        subnet = nasfx.finalize(net, {"block": name}, example_inputs=x)
        assert subnet.certificate["structure"] == subnet.certificate["outputs"] == "passed"
        for training in (True, False, True, False):
            eager = copy.deepcopy(model).train(training)
            subnet.train(training)
            static = nasfx.finalize(net, {"block": name}).train(training)
            with nasfx.activated(eager, {"block": name}):
                expected = eager(x)
            assert torch.equal(static(x), expected)
        assert subnet.eval()(x).shape == y.shape
        assert set(subnet.state_dict()) <= set(model.state_dict())
        assert "auxiliary.weight" in subnet.state_dict()


def test_the_certificate_leaves_the_subnet_with_the_code_of_its_mode() -> None:
    model = built(TwoModes)
    x, _ = batch()
    subnet = nasfx.finalize(model, {"block": "b"}, example_inputs=x)
    assert subnet.training
    with nasfx.activated(model, {"block": "b"}):
        assert torch.equal(subnet(x), model(x))


@pytest.mark.parametrize("when", ["before transform", "after transform"])
def test_a_net_in_eval_mode_gives_a_subnet_in_eval_mode_with_its_code(when: str) -> None:
    model = built(TwoModes).train(when == "after transform")
    net = nasfx.transform(model, "darts").eval()
    model.eval()
    subnet = nasfx.finalize(net, {"block": "b"})
    x, _ = batch()
    with nasfx.activated(model, {"block": "b"}):
        assert torch.equal(subnet(x), model(x))
    assert not subnet.training


def test_a_subnet_of_two_modes_refuses_to_lose_one() -> None:
    subnet = nasfx.finalize(built(TwoModes), {"block": "a"})
    with pytest.raises(NasfxError, match=r"pickle keeps one graph.*fx\.GraphModule\(subnet"):
        pickle.dumps(subnet)
    with pytest.raises(NasfxError, match=r"finalize again"):
        copy.deepcopy(subnet)
    x, _ = batch()
    subnet.eval()
    static = fx.GraphModule(subnet, subnet.graph)
    static.eval()
    again = pickle.loads(pickle.dumps(static))
    assert torch.equal(again(x), subnet(x))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_modes_of_all_that_a_net_holds_return_after_the_certificate(strategy: str) -> None:
    """Measuring switches to eval: net, traced model and the user's classes must come back."""
    model = nn.Sequential(
        nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)),
        LayerChoice({"a": nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "b": nn.Tanh()}, label="act"),
    )
    net = nasfx.transform(model, strategy, example_inputs=torch.zeros(2, 3))
    held = [net, net.traced, net.traced.origin]
    before = [[m.training for m in module.modules()] for module in held]
    assert all(map(all, before))
    nasfx.finalize(net, {"act": "a"})
    assert [[m.training for m in module.modules()] for module in held] == before
