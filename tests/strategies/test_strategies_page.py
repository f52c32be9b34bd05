"""docs/strategies.md runs and prints what it says; the GDAS that it builds is what it says."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import pickle
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import nasfx
from nasfx import InputChoice, LayerChoice, SearchError, SpaceError, Supernet, TraceError
from nasfx.ops import ArchState, Demanded, InputSwitch, Switch, graph_function
from nasfx.strategies import STRATEGIES
from tests.strategies.nets import (
    WIDTH,
    Chain,
    Nested,
    Skips,
    batch,
    built,
    drawn,
    gate_gradients,
    loss_of,
    on_path,
    spread,
    with_gradient,
)

PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"
NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "nested and tied": Nested,
    "one input": lambda: Skips(1),
    "mean of one": lambda: Skips(1, "mean"),
}


def blocks() -> list[tuple[str, str]]:
    """The fenced blocks of the page: (language, text)."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in found]


def test_the_code_of_the_page_runs_and_prints_what_it_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    printed = ""
    languages: list[str] = []
    for language, text in blocks():
        languages.append(language)
        if language == "python":
            assert not printed, "every output is shown"
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(text, PAGE.name, "exec", dont_inherit=True), namespace)
            printed = output.getvalue()
        else:
            assert (language, text) == ("text", printed)
            printed = ""
    assert not printed, "every output is shown"
    assert languages.count("python") >= 12
    assert not list(tmp_path.iterdir())


def test_every_strategy_has_a_section_that_names_its_options() -> None:
    sections = dict(
        re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.M | re.S)
    )
    for name, strategy in STRATEGIES.items():
        named = " ".join(re.findall(r"`[^`\n]+`", sections[name]))
        assert not [f.name for f in fields(strategy) if not re.search(rf"\b{f.name}\b", named)]


# -- GDAS --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gdas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The page's GDAS, as the one file that it is."""
    (code,) = [text for _, text in blocks() if "class Gdas(" in text]
    path = tmp_path_factory.mktemp("page") / "gdas_of_the_page.py"
    path.write_text(code, "utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


def made(
    gdas: ModuleType, kind: Callable[[], nn.Module], **options: Any
) -> tuple[nn.Module, Supernet]:
    """A model, and a net of a copy of it with alphas that are far from equal."""
    model = built(kind)
    net = nasfx.transform(copy.deepcopy(model), gdas.Gdas(epochs=5), **options)
    spread(net)
    return model, net


def arch_of(net: Supernet) -> ArchState:
    arch = net.get_submodule("arch")
    assert isinstance(arch, ArchState)
    return arch


@pytest.mark.parametrize("name", NETS)
def test_the_gradient_of_alpha_is_that_of_the_drawn_candidate_alone(
    gdas: ModuleType, name: str
) -> None:
    model, net = made(gdas, NETS[name])
    arch, temperature = arch_of(net), 0.7
    arch.state.get_buffer("temperature").fill_(temperature)
    x, y = batch()
    seen: Counter[Any] = Counter()
    for _ in range(40):
        net.zero_grad()
        with net.arch_step():
            noise = dict(arch.state.fresh["noise"])
            net.objective(loss_of(net, x, y)).backward()
        decisions = drawn(net)
        b = gate_gradients(model, decisions, x, y)
        for label, alpha in arch.alpha_parameters().items():
            choice, decision = net.space[label], decisions[label]
            k = choice.choosable.index(decision if choice.kind == "layer" else decision[0])
            # The largest of alpha + noise is drawn.
            assert k == int(torch.argmax(alpha.detach() + noise[label]))
            if label not in b:  # not on the path
                assert alpha.grad is None or not alpha.grad.any()
                continue
            e = torch.exp((alpha.detach() + noise[label]) / temperature)
            p = e / e.sum()
            expected = b[label][k] * p[k] * ((torch.arange(len(p)) == k).double() - p) / temperature
            assert alpha.grad is not None
            torch.testing.assert_close(alpha.grad, expected, rtol=1e-9, atol=1e-12)
            seen[label] += bool(alpha.grad.any())
    assert set(seen) == set(arch.alpha_parameters())


class Two(nn.Module):
    """Two choices of three linear layers, which show in hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.first, self.second = (
            LayerChoice({k: nn.Linear(WIDTH, WIDTH) for k in "abc"}, label=label)
            for label in ("first", "second")
        )
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(torch.tanh(self.stem(x))))))


def step(net: Supernet, kind: str) -> None:
    """Forward and backward of one step."""
    x, y = batch()
    with net.arch_step() if kind == "arch" else net.weight_step():
        value = loss_of(net, x, y)
        (net.objective(value) if kind == "arch" else value).backward()


@pytest.mark.parametrize("kind", ["weight", "arch"])
def test_exactly_one_candidate_of_each_choice_runs(gdas: ModuleType, kind: str) -> None:
    calls: Counter[str] = Counter()
    _, net = made(gdas, Two)
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    paths: set[Any] = set()
    for _ in range(12):
        calls.clear()
        step(net, kind)
        ran = {"stem", "head", *(f"{label}.{name}" for label, name in net.path.items())}
        assert calls == Counter(ran)  # each once, forward and backward together
        paths.add(net.path)
    assert len(paths) > 2


def test_what_feeds_only_inputs_that_were_not_drawn_does_not_run(gdas: ModuleType) -> None:
    calls: Counter[str] = Counter()
    _, net = made(gdas, lambda: Skips(1))
    with torch.no_grad():
        arch_of(net).alpha_parameters()["pick"].zero_()
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    picked: set[int] = set()
    for _ in range(20):
        calls.clear()
        step(net, "arch")
        (index,) = net.path["pick"]
        picked.add(index)
        ran = {name.split(".0")[0] for name in calls} - {"stem", "head"}
        block = {"lin": {"block.lin"}, "deep": {"block.deep"}, "skip": set[str]()}
        assert (
            ran
            == (
                set(),
                block[net.path["block"]] if index == 1 else None,
                {"layers"},
                {"layers.1"},
            )[index]
        )
    assert picked == {0, 1, 2, 3}


@pytest.mark.parametrize("name", NETS)
def test_a_step_gives_gradients_to_its_own_parameters_on_the_path(
    gdas: ModuleType, name: str
) -> None:
    model, net = made(gdas, NETS[name])
    arch = {f"arch.{label}" for label in arch_of(net).alpha_parameters()}
    for _ in range(5):
        net.zero_grad()
        step(net, "weight")
        assert with_gradient(net)[1] == on_path(model, net.path)[1]
        net.zero_grad()
        step(net, "arch")
        assert with_gradient(net)[1] <= arch


@pytest.mark.parametrize("name", NETS)
def test_a_step_computes_the_drawn_subnet(gdas: ModuleType, name: str) -> None:
    model, net = made(gdas, NETS[name])
    x, _ = batch()
    for _ in range(5):
        with net.arch_step():
            out = net(x)
        with nasfx.activated(model.train(), net.path):
            assert torch.equal(out, model(x))
    x, _ = batch(1)
    subnet: Any = nasfx.finalize(net, example_inputs=x)
    certificate = subnet.certificate
    assert certificate["outputs"] == "passed"
    assert certificate["supernet_difference"] == 0


def test_draws_follow_the_softmax_of_alpha_at_any_temperature(gdas: ModuleType) -> None:
    _, net = made(gdas, Two)
    arch = arch_of(net)
    n = 4000
    for temperature in (10.0, 0.1):
        arch.state.get_buffer("temperature").fill_(temperature)
        counts = Counter(net.sample()["first"] for _ in range(n))
        p = torch.softmax(arch.alpha_parameters()["first"].detach(), 0).tolist()
        for name, chance in zip("abc", p, strict=True):
            assert abs(counts[name] / n - chance) < 5 * (chance * (1 - chance) / n) ** 0.5


def test_sampling_leaves_the_step_as_it_is(gdas: ModuleType) -> None:
    _, net = made(gdas, Two)
    x, y = batch()
    grads: list[list[Tensor | None]] = []
    for sampling in (False, True):
        net.seed(3)
        net.zero_grad()
        with net.arch_step():
            if sampling:
                path = net.path
                assert len({net.sample() for _ in range(20)}) > 1
                assert net.path == path
            net.objective(loss_of(net, x, y)).backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in net.arch_parameters()])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_the_temperature_falls_linearly_and_stays(gdas: ModuleType) -> None:
    net = nasfx.transform(built(Two), gdas.Gdas(epochs=4))
    temperature = arch_of(net).state.get_buffer("temperature")
    found = [temperature.item()]
    for _ in range(4):
        net.end_epoch()
        found.append(temperature.item())
    assert found == pytest.approx([10.0, 6.7, 3.4, 0.1, 0.1], abs=1e-12)


def trained(net: Supernet, steps: int, optimizers: Any) -> list[Any]:
    """The paths of some steps of both kinds, and an epoch's end."""
    paths: list[Any] = []
    for _ in range(steps):
        for kind, optimizer in zip(("arch", "weight"), optimizers, strict=True):
            step(net, kind)
            paths.append(drawn(net))
            optimizer.step()
            optimizer.zero_grad()
    net.end_epoch()
    return paths


def optimizers_of(net: Supernet) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    return net.arch_optimizer(lr=0.05), torch.optim.SGD(net.weight_parameters(), 0.05, 0.9)


def test_a_search_that_was_saved_goes_on_as_if_it_had_not_been(gdas: ModuleType) -> None:
    _, net = made(gdas, Nested)
    optimizers = optimizers_of(net)
    trained(net, 3, optimizers)
    saved = io.BytesIO()
    torch.save([net.state_dict(), *(o.state_dict() for o in optimizers)], saved)
    paths, after = trained(net, 4, optimizers), net.state_dict()

    other = nasfx.transform(built(Nested, 1), gdas.Gdas(epochs=5), seed=7)
    again = optimizers_of(other)
    saved.seek(0)
    state, *states = torch.load(saved, weights_only=True)
    other.load_state_dict(state)
    for optimizer, of_optimizer in zip(again, states, strict=True):
        optimizer.load_state_dict(of_optimizer)
    assert set(other.state_dict()) == set(state)
    assert "arch.state.temperature" in state
    assert trained(other, 4, again) == paths
    for key, value in other.state_dict().items():
        assert torch.equal(value, after[key]), key


def test_an_objective_weighs_the_cost_by_the_law_of_the_draws(gdas: ModuleType) -> None:
    x, _ = batch()
    objective = nasfx.Flops(target=40, lambda_=0.3)
    _, net = made(gdas, Chain, example_inputs=x, objective=objective)
    alphas = arch_of(net).alpha_parameters()
    # By hand: stem 3 x 4 and head 4 x 2; a linear layer has 4 x 4.
    costs = {"first": [16.0, 16.0, 0.0], "second": [16.0, 16.0, 0.0]}
    leaves = {label: alphas[label].detach().clone().requires_grad_() for label in costs}
    expected = torch.tensor(20.0, dtype=torch.float64)
    for label, leaf in leaves.items():
        expected = expected + (torch.softmax(leaf, 0) * torch.tensor(costs[label])).sum()
    (0.3 * (expected - 40) / 40).backward()
    with net.arch_step():
        assert net.expected_cost()["flops"].item() == pytest.approx(expected.item(), rel=1e-12)
        net.objective(net(x).sum() * 0).backward()
    for label, leaf in leaves.items():
        torch.testing.assert_close(alphas[label].grad, leaf.grad, rtol=1e-12, atol=1e-15)


def test_search_keeps_the_bound(gdas: ModuleType) -> None:
    x, y = batch()
    bound = nasfx.Flops(target=36, max=36)
    _, net = made(gdas, Chain, example_inputs=x, objective=bound)
    with torch.no_grad():  # the most probable architecture costs 52
        for alpha in net.arch_parameters():
            alpha.copy_(torch.tensor([1.0, 2.0, 0.0]))
    data = [(x, y)] * 3
    result = nasfx.search(net, data, data, loss=nn.functional.mse_loss, epochs=3)
    assert net.space.costs["flops"](result.architecture) <= 36
    assert result.architecture == net.derive()
    assert arch_of(net).state.get_buffer("temperature").item() == pytest.approx(10 - 3 * 9.9 / 4)


def test_choices_without_a_rule_are_refused(gdas: ModuleType) -> None:
    for n_chosen in (2, None):
        with pytest.raises(SpaceError, match=r"choice pick .*GDAS draws one input; use n_chosen=1"):
            nasfx.transform(built(lambda n=n_chosen: Skips(n)), gdas.Gdas())
    with pytest.raises(SearchError, match=r"Gdas\(epochs=1\): it must be at least 2"):
        gdas.Gdas(epochs=1)


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, ArchState | Demanded | InputSwitch | Switch)
        return ours or super().is_leaf_module(m, module_qualified_name)


def test_the_gate_survives_retracing_and_switches_refuse_it(gdas: ModuleType) -> None:
    _, net = made(gdas, Two)
    x, y = batch()
    with pytest.raises(TraceError, match="GdasSwitch is one node"):
        fx.symbolic_trace(net.graph_module)
    graph = Tracer().trace(net.graph_module)
    assert len(graph.find_nodes(op="call_function", target=gdas.gdas_gate)) == 2
    again = fx.GraphModule(net.graph_module, graph)
    with net.arch_step():
        net.objective(loss_of(net, x, y)).backward()
        grads = [p.grad for p in net.arch_parameters()]
        net.zero_grad()
        net.objective(loss_of(again, x, y)).backward()
    torch.testing.assert_close([p.grad for p in net.arch_parameters()], grads, rtol=0, atol=0)
    assert all(grad is not None and grad.any() for grad in grads)


class Inputs(nn.Module):
    """An input choice behind an input of another, so that the gate of one is part of a need."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.inner = InputChoice(2, n_chosen=1, label="inner")
        self.outer = InputChoice(2, n_chosen=1, label="outer")
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner([layer(x) for layer in self.layers])
        return self.head(self.outer([x, inner]))


def test_the_gates_of_inner_inputs_stay_where_needs_read_them(gdas: ModuleType) -> None:
    _, net = made(gdas, Inputs)
    gates = net.graph.find_nodes(op="call_function", target=gdas.gdas_gate)
    assert [node.kwargs["label"] for node in gates] == ["inner", "outer"]


@graph_function
def doubled(x: Tensor) -> Tensor:
    return 2 * x


def test_graph_functions_of_others_pickle() -> None:
    assert pickle.loads(pickle.dumps(doubled)) is doubled


def test_a_net_with_a_gate_of_its_own_pickles(gdas: ModuleType) -> None:
    _, net = made(gdas, Inputs)
    x, _ = batch()
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))
