import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from nasfx.passes import DeferProducers, LowerSampledPath
from torch import Tensor, nn

import nasfx
from nasfx import InputChoice, LayerChoice, activated
from nasfx.rewriting.graph import ModelGraph
from nasfx.rewriting.printing import format_graph
from tests.passes.conftest import Lower

X = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)


class Net(nn.Module):
    """Modules `a` to `f`, and a forward that is one function."""

    def __init__(self, code: Callable[..., Any], **choices: nn.Module) -> None:
        super().__init__()
        for name in "abcdef":
            self.add_module(name, nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        for name, choice in choices.items():
            self.add_module(name, choice)
        self.code = code
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


def pick(n: int, n_chosen: int | None = 1, label: str = "pick", **options: Any) -> InputChoice:
    return InputChoice(n, n_chosen, label=label, **options)


@contextmanager
def calls(net: nn.Module, names: str = "abcdef") -> Iterator[list[str]]:
    """The names of the modules of `net` that are called, in order."""
    made: list[str] = []
    handles = [
        net.get_submodule(f"{name}.0").register_forward_hook(
            lambda *_, name=name: made.append(name)
        )
        for name in names
        if f"{name}.0" in dict(net.named_modules())
    ]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def one_of_three(m: Net, x: Tensor) -> Tensor:
    return m.pick([m.a(x), m.b(x), m.c(x)])


def chain(m: Net, x: Tensor) -> Tensor:
    return m.pick([m.a(x), m.c(m.b(x) * 2)])


def shared_prefix(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.pick([x, m.b(h), m.c(h)])


def two_choices(m: Net, x: Tensor) -> Tensor:
    a, b, c = m.a(x), m.b(x), m.c(x)
    return m.first([a, b]) * m.second([b, c])


def chained_choices(m: Net, x: Tensor) -> Tensor:
    inner = m.first([m.a(x), m.b(x)])
    return m.second([m.c(x), m.d(inner)])


def choice_as_producer(m: Net, x: Tensor) -> Tensor:
    return m.pick([m.a(x), m.layer(m.b(x))])


def tied(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.first([x, m.b(h)]) * m.second([x, m.c(h)])


def also_read_elsewhere(m: Net, x: Tensor) -> Tensor:
    a, b = m.a(x), m.b(x)
    return m.pick([a, b]) + b


def candidate_that_ignores(m: Net, x: Tensor) -> Tensor:
    return m.layer2(x, m.a(x))


class First(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * 1


class Both(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def layer() -> LayerChoice:
    candidates = {"tanh": nn.Tanh(), "linear": nn.Sequential(nn.Linear(4, 4))}
    return LayerChoice(candidates, label="layer")


# name: (the model, {label: decision} -> the modules that must run)
CASES: dict[str, tuple[Callable[[], Net], Callable[[dict[str, Any]], str]]] = {
    "one of three": (lambda: Net(one_of_three, pick=pick(3)), lambda d: "abc"[d["pick"][0]]),
    "two of three": (
        lambda: Net(one_of_three, pick=pick(3, 2)),
        lambda d: "".join("abc"[i] for i in d["pick"]),
    ),
    "mean": (
        lambda: Net(one_of_three, pick=pick(3, 2, reduction="mean")),
        lambda d: "".join("abc"[i] for i in d["pick"]),
    ),
    "any": (
        # the zeros of an empty subset take their shape from input 0
        lambda: Net(one_of_three, pick=pick(3, None)),
        lambda d: "".join("abc"[i] for i in d["pick"]) or "a",
    ),
    "chain": (lambda: Net(chain, pick=pick(2)), lambda d: ["a", "bc"][d["pick"][0]]),
    "shared prefix": (
        lambda: Net(shared_prefix, pick=pick(3)), lambda d: ["", "ab", "ac"][d["pick"][0]],
    ),
    "two choices": (
        lambda: Net(two_choices, first=pick(2, label="first"), second=pick(2, label="second")),
        lambda d: "".join(sorted({"ab"[d["first"][0]], "bc"[d["second"][0]]})),
    ),
    "chained choices": (
        lambda: Net(chained_choices, first=pick(2, label="first"), second=pick(2, label="second")),
        lambda d: "c" if d["second"] == (0,) else "ab"[d["first"][0]] + "d",
    ),
    "choice as producer": (
        lambda: Net(choice_as_producer, pick=pick(2), layer=layer()),
        lambda d: ["a", "b"][d["pick"][0]],
    ),
    "tied": (
        lambda: Net(tied, first=pick(2), second=pick(2)), lambda d: ["", "abc"][d["pick"][0]],
    ),
    "also read elsewhere": (
        lambda: Net(also_read_elsewhere, pick=pick(2)), lambda d: ["ab", "b"][d["pick"][0]],
    ),
    "candidate that ignores an input": (
        lambda: Net(
            candidate_that_ignores,
            layer2=LayerChoice({"first": First(), "both": Both()}, label="layer2"),
        ),
        lambda d: {"first": "", "both": "a"}[d["layer2"]],
    ),
}  # fmt: skip


def decisions(net: nasfx.Supernet) -> Iterator[dict[str, Any]]:
    """All combinations of decisions, of inactive labels too."""
    labels = [c.label for c in net.space.choices]
    for values in itertools.product(*[list(c.values()) for c in net.space.choices]):
        yield dict(zip(labels, values, strict=True))


def test_golden(lower: Lower) -> None:
    gm, ctx = lower(Net(chain, pick=pick(2)), LowerSampledPath(), strategy="single-path")
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%drawn_pick = call_module[arch]('pick')
%a_0 = call_module[a.0](%x)
%a_1 = call_module[a.1](%a_0)
%b_0 = call_module[b.0](%x)
%b_1 = call_module[b.1](%b_0)
%mul = operator.mul(%b_1, 2)
%c_0 = call_module[c.0](%mul)
%c_1 = call_module[c.1](%c_0)
%pick = call_module[pick](%drawn_pick, [%a_1, %c_1])
return %pick""",
    )
    assert DeferProducers()(gm, ctx).modified is True
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%drawn_pick = call_module[arch]('pick')
%demanded = nasfx.ops.demanded([%drawn_pick], [[(0, (0,))]])
%_deferred = call_module[_deferred](%demanded, %x)
    body(%x):
        %a_0 = call_module[a.0](%x)
        %a_1 = call_module[a.1](%a_0)
        return %a_1
%demanded_1 = nasfx.ops.demanded([%drawn_pick], [[(0, (1,))]])
%_deferred_1 = call_module[_deferred_1](%demanded_1, %x)
    body(%x):
        %b_0 = call_module[b.0](%x)
        %b_1 = call_module[b.1](%b_0)
        %mul = operator.mul(%b_1, 2)
        %c_0 = call_module[c.0](%mul)
        %c_1 = call_module[c.1](%c_0)
        return %c_1
%pick = call_module[pick](%drawn_pick, [%_deferred, %_deferred_1])
return %pick""",
    )


def test_golden_of_a_producer_with_two_readers(lower: Lower) -> None:
    net = Net(two_choices, first=pick(2, label="first"), second=pick(2, label="second"))
    gm, _ = lower(net, LowerSampledPath(), DeferProducers(), strategy="single-path")
    assert_expected_inline(
        format_graph(gm),
        """\
%x = placeholder[x]
%drawn_first = call_module[arch]('first')
%drawn_second = call_module[arch]('second')
%demanded = nasfx.ops.demanded([%drawn_first], [[(0, (0,))]])
%_deferred = call_module[_deferred](%demanded, %x)
    body(%x):
        %a_0 = call_module[a.0](%x)
        %a_1 = call_module[a.1](%a_0)
        return %a_1
%demanded_1 = nasfx.ops.demanded([%drawn_first, %drawn_second], [[(0, (1,))], [(1, (0,))]])
%_deferred_1 = call_module[_deferred_1](%demanded_1, %x)
    body(%x):
        %b_0 = call_module[b.0](%x)
        %b_1 = call_module[b.1](%b_0)
        return %b_1
%demanded_2 = nasfx.ops.demanded([%drawn_second], [[(0, (1,))]])
%_deferred_2 = call_module[_deferred_2](%demanded_2, %x)
    body(%x):
        %c_0 = call_module[c.0](%x)
        %c_1 = call_module[c.1](%c_0)
        return %c_1
%first = call_module[first](%drawn_first, [%_deferred, %_deferred_1])
%second = call_module[second](%drawn_second, [%_deferred_1, %_deferred_2])
%mul = operator.mul(%first, %second)
return %mul""",
    )


@pytest.mark.parametrize("strategy", ["single-path", "proxyless"])
@pytest.mark.parametrize("case", CASES)
def test_producers_of_unchosen_inputs_are_not_run_forward(case: str, strategy: str) -> None:
    make, needed = CASES[case]
    model = make()
    net = nasfx.transform(model, strategy)
    for decided in decisions(net):
        net._arch.state.drawn = dict(decided)
        with calls(net) as made, activated(model, decided):
            with torch.no_grad():
                found = net(X)
            assert "".join(sorted(made)) == needed(decided), decided
            assert torch.equal(found, model(X))


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_active_path_are_the_eager_ones(case: str) -> None:
    model = CASES[case][0]()
    net = nasfx.transform(model, "single-path")
    for decided in decisions(net):
        net._arch.state.drawn = dict(decided)
        (net(X) + X).square().sum().backward()
        found = {k: p.grad for k, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        with activated(model, decided):
            (model(X) + X).square().sum().backward()
        for name, p in model.named_parameters():
            grad = found[name]
            assert (grad is None) == (p.grad is None), (name, decided)
            assert grad is None or torch.equal(grad, p.grad)
        model.zero_grad(set_to_none=True)


def gate_gradients(model: Net, decided: dict[str, Any], net: nasfx.Supernet) -> dict[str, Tensor]:
    """p (b - <p, b>) for every label that is read, from separate eager forward passes."""
    with activated(model, decided):
        values: dict[str, Any] = {}

        def note(choice: Any, args: Any, output: Tensor) -> Tensor:
            own = output * 1  # not the input itself, which others read
            own = own if own.requires_grad else own.requires_grad_()
            values[choice] = args, own
            return own

        handles = [
            choice.register_forward_hook(note)
            for choice in model.modules()
            if isinstance(choice, LayerChoice | InputChoice)
        ]
        loss = (model(X) + X).square().sum()
        for handle in handles:
            handle.remove()
        gradients = {}
        for choice in model.modules():
            if not isinstance(choice, LayerChoice | InputChoice):
                continue
            args, output = values[choice]
            (g,) = torch.autograd.grad(loss, output, retain_graph=True, allow_unused=True)
            if g is None:
                continue
            if isinstance(choice, LayerChoice):
                outputs = [choice._modules[name](*args) for name in choice.candidates]
            else:
                outputs = list(args[0])
                if choice.reduction == "mean":
                    outputs = [o / len(choice.active) for o in outputs]
            b = torch.stack([(o * g).sum() for o in outputs]).detach()
            alpha = net.get_parameter(f"arch.{choice.label}").detach().requires_grad_()
            p = nasfx.ops.inclusion_gate(alpha, choice.n_chosen)
            (grad,) = torch.autograd.grad((p * b).sum(), alpha)
            gradients[choice.label] = gradients.get(choice.label, 0) + grad
    return gradients


@pytest.mark.parametrize("case", CASES)
def test_gates_of_deferred_inputs_get_their_gradient_in_backward(case: str) -> None:
    model = CASES[case][0]()
    net = nasfx.transform(model, "proxyless", seed=3)
    with torch.no_grad():
        for alpha in net.arch_parameters():
            alpha.copy_(torch.randn(len(alpha), dtype=torch.float64))
    for decided in decisions(net):
        expected = gate_gradients(model, decided, net)
        with net.arch_step():
            net._arch.state.drawn = dict(decided)
            net.objective((net(X) + X).square().sum()).backward()
        for label, alpha in net._arch.alpha_parameters().items():
            if label in expected:
                assert alpha.grad is not None, (label, decided)
                torch.testing.assert_close(alpha.grad, expected[label], rtol=1e-10, atol=1e-12)
            else:
                assert alpha.grad is None or not alpha.grad.any(), (label, decided)
            alpha.grad = None
        assert all(p.grad is None for p in net.weight_parameters())


def test_batch_norms_of_deferred_producers_do_not_move() -> None:
    model = Net(one_of_three, pick=pick(3))
    for name in "abc":
        model.add_module(name, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double())
    net = nasfx.transform(model, "proxyless")
    before = {k: (v, v.clone(), v._version) for k, v in model.named_buffers()}
    with net.arch_step():
        net._arch.state.drawn = {"pick": (1,)}
        net.objective(net(X).square().sum()).backward()
    for key, (tensor, value, version) in before.items():
        assert model.get_buffer(key) is tensor
        if key.startswith("b."):
            assert not torch.equal(tensor, value), key
        else:
            assert torch.equal(tensor, value), key
            assert tensor._version == version


# -- what must not be moved ------------------------------------------------------------------------


def write_before_the_reader(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    g = h * 1
    g.add_(3)
    return m.pick([h, m.b(g)])


def write_between_two_readers(m: Net, x: Tensor) -> Tensor:
    h = m.a(x) * 1
    b = m.b(h)
    h.add_(3)
    return m.pick([x, b, m.c(h)])


def read_before_a_needed_write(m: Net, x: Tensor) -> Tensor:
    h = m.a(x) * 1
    b = h * 2
    h.add_(3)
    return m.pick([h, m.b(b), m.c(x)])


def written_after_the_choice(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    h = m.a(x) * 1
    y = m.pick([x, m.b(h), m.c(x)])
    h.add_(3)
    return y, h


@pytest.mark.parametrize("strategy", ["single-path", "proxyless"])
@pytest.mark.parametrize(
    "code",
    [
        write_before_the_reader, write_between_two_readers, read_before_a_needed_write,
        written_after_the_choice,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_writes_in_place_keep_their_order(code: Callable[..., Any], strategy: str) -> None:
    model = Net(code, pick=pick(2 if code is write_before_the_reader else 3))
    net = nasfx.transform(model, strategy)
    for decided in decisions(net):
        net._arch.state.drawn = dict(decided)
        with activated(model, decided), torch.no_grad():
            torch.testing.assert_close(net(X), model(X), rtol=0, atol=0, msg=str(decided))


def test_a_deferred_input_is_computed_from_what_its_producer_would_have_read() -> None:
    model = Net(written_after_the_choice, pick=pick(3))
    net = nasfx.transform(model, "proxyless")
    with net.arch_step():
        net._arch.state.drawn = {"pick": (0,)}
        net.objective(net(X)[0].square().sum()).backward()
    h = model.a(X)
    b = torch.stack([(o * 2 * X).sum() for o in (X, model.b(h * 1), model.c(X))]).detach()
    (alpha,) = net.arch_parameters()
    p = torch.softmax(alpha.detach(), -1)
    torch.testing.assert_close(alpha.grad, p * (b - p @ b), rtol=1e-10, atol=1e-12)


def test_updates_of_buffers_are_always_run() -> None:
    def counted(m: Net, x: Tensor) -> Tensor:
        m.get_buffer("count").add_(1)
        return m.pick([m.a(x), m.b(x)])

    model = Net(counted, pick=pick(2))
    model.register_buffer("count", torch.zeros(()))
    net = nasfx.transform(model, "single-path")
    net(X)
    net(X)
    assert model.get_buffer("count").item() == 2


def test_a_need_that_is_too_long_to_say_is_declined_and_the_node_always_runs() -> None:
    n = 9

    def many(m: Net, x: Tensor) -> Tensor:
        # a is read by every pair of an outer and an inner choice: more than 64 alternatives
        a = m.a(x)
        outer = []
        for i in range(n):
            inner = [m.get_submodule(f"inner{i}{j}")([a, x]) for j in range(n)]
            outer.append(m.get_submodule(f"outer{i}")([*inner]))
        return torch.stack(outer).sum(0)

    choices: dict[str, nn.Module] = {}
    for i in range(n):
        choices[f"outer{i}"] = pick(n, label=f"outer{i}")
        for j in range(n):
            choices[f"inner{i}{j}"] = pick(2, label=f"inner{i}{j}")
    net = nasfx.transform(Net(many, **choices), "single-path")
    record = next(r for r in net.history.records if r.name == "defer-producers")
    assert [s.node for s in record.skips] == ["a_1"]
    assert all("81 alternatives" in s.reason for s in record.skips)
    assert f"{__file__}:" in record.skips[0].site
    net._arch.state.drawn = {c.label: (1,) for c in net.space.choices}
    with calls(net) as made:
        net(X)
    assert made == ["a"]


def test_what_every_path_reads_is_not_deferred(lower: Lower) -> None:
    def always(m: Net, x: Tensor) -> Tensor:
        a = m.a(x)
        return m.layer(m.pick([a, a * 2]))

    net = Net(always, pick=pick(2), layer=layer())
    gm, _ = lower(net, LowerSampledPath(), DeferProducers(), strategy="single-path")
    deferred = [n for n in gm.graph.nodes if str(n.target).startswith("_deferred")]
    assert len(deferred) == 1, "the product alone"
    assert "a_1" in {n.name for n in gm.graph.nodes}


def test_a_weighted_sum_is_left_alone(lower: Lower) -> None:
    gm: ModelGraph
    net = Net(chain, pick=pick(2))
    gm, ctx = lower(net, nasfx.passes.LowerWeightedSum())
    assert DeferProducers()(gm, ctx).modified is False


def test_an_argument_that_a_candidate_reads_for_nothing_does_not_run_its_producer() -> None:
    """The space calls such a producer inactive, so it must not run either."""

    class Idle(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            y * 2  # whose value nobody reads
            return x * 1

    model = Net(
        candidate_that_ignores,
        layer2=LayerChoice({"idle": Idle(), "both": Both()}, label="layer2"),
    )
    net = nasfx.transform(model, "single-path")
    for decision, needed in (("idle", ""), ("both", "a")):
        net._arch.state.drawn = {"layer2": decision}
        with calls(net) as made, torch.no_grad():
            net(X)
        assert "".join(sorted(made)) == needed, decision
