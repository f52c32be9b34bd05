"""Subnets at once give the bits that each gives alone, with less work; else they run alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import nasfx
from nasfx import Architecture, LayerChoice, SearchError
from nasfx.searching import prefixes
from nasfx.searching.prefixes import Runner
from nasfx.searching.recalibration import Judge, Recalibration
from nasfx.searching.repeatable import loader_obstacle
from nasfx.spaces import shufflenet
from tests.searching.test_evolution import Own, everything
from tests.strategies.nets import WIDTH, Cell, Chain, Nested, Norms, Skips, batch, built, dense

TRAIN = [batch(i, 5 + i) for i in range(3)]  # batches of several sizes
VALID = [batch(50), batch(51, 3)]


def metric(outputs: Tensor, target: Tensor) -> Tensor:
    """Any other bit of an output gives another score."""
    outputs = outputs.double()
    return (outputs * torch.linspace(1, 2, outputs.numel()).double().view_as(outputs)).sum()


def Linear() -> nn.Linear:  # noqa: N802
    return nn.Linear(WIDTH, WIDTH)


def blocks(*candidates: Callable[[], nn.Module], n: int = 3) -> list[LayerChoice]:
    return [
        LayerChoice({f"c{k}": make() for k, make in enumerate(candidates)}, label=f"block{i}")
        for i in range(n)
    ]


class Net(nn.Sequential):
    """A stem, choices of these candidates, and a head."""

    def __init__(self, *candidates: Callable[[], nn.Module], tail: Any = nn.Identity) -> None:
        super().__init__(
            nn.Linear(3, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), *blocks(*candidates), tail(),
            nn.Linear(WIDTH, 2),
        )  # fmt: skip


def inplace() -> nn.Module:
    return nn.Sequential(Linear(), nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True), Linear())


class AddInPlace(nn.Module):
    """Writes to values of its own, through views, and reads them between."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = Linear(), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        z = self.norm(y)
        y[:, :2].mul_(0.5)
        y += x
        return y * z


class Modes(nn.Module):
    """Another graph in eval mode, in which the norms come in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.a, self.b = blocks(lambda: dense(norm=True), lambda: dense(norm=True), Linear, n=2)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.a(self.norm(self.b(x))) if self.training else self.norm(self.b(self.a(x)))
        return self.head(x)


class Frozen(Net):
    """The first norm stays in eval mode."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self[1].eval()
        return self


KINDS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain, "nested": Nested, "skips": Skips, "free skips": lambda: Skips(None),
    "concat": lambda: Skips(2, "concat"), "cell": Cell, "norms": Norms, "modes": Modes,
    "net": lambda: Net(lambda: dense(norm=True), Linear, nn.Identity),
    "in place": lambda: Net(inplace, lambda: nn.ReLU(inplace=True), AddInPlace),
    "frozen": lambda: Frozen(lambda: dense(norm=True), Linear),
    "dropout at the end": lambda: Net(lambda: dense(norm=True), Linear, tail=nn.Dropout),
    "no norms": lambda: nn.Sequential(nn.Linear(3, WIDTH), *blocks(Linear, nn.Tanh, n=4)),
}  # fmt: skip


def trained(kind: Callable[[], nn.Module]) -> nasfx.Supernet:
    """A net whose batch norms have statistics over several paths."""
    net = nasfx.transform(built(kind), "single-path", seed=1)
    for x, _ in TRAIN:
        with net.weight_step(), torch.no_grad():
            net(x)
    return net


def some(net: nasfx.Supernet, n: int = 12) -> list[Architecture]:
    """Different architectures, relatives among them."""
    generator = torch.Generator().manual_seed(0)
    first = net.space.sample(generator)
    made = [first, *(net.space.mutate(first, 0.2, generator) for _ in range(n))]
    made += [net.space.sample(generator) for _ in range(n)]
    return list(dict.fromkeys(made))[:n]


def judge(net: nasfx.Supernet, batches: int | None = 4, **options: Any) -> Judge:
    how = None if batches is None else Recalibration(options.pop("train", TRAIN), batches)
    return Judge(net, options.pop("valid", VALID), metric, how, 3, **options)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The steps that are run at once within the block."""
    steps: list[Any] = []
    call = Runner._call

    def counting(self: Runner, step: Any, *args: Any) -> Any:
        steps.append(step)
        return call(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_call", counting)
        yield steps


# -- the same bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [4, None])
@pytest.mark.parametrize("kind", KINDS)
def test_the_scores_are_those_of_one_by_one(
    kind: str, batches: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = trained(KINDS[kind])
    archs = some(net)
    expected = [judge(net, batches).evaluate(arch, "alone") for arch in archs]
    assert len(set(expected)) > len(archs) * 2 // 3  # some give the same by nature
    before = everything(net)
    for limit in (2**30, 400, 0):
        monkeypatch.setattr(prefixes, "KEPT_BYTES", limit)
        with counted(monkeypatch) as steps:
            assert judge(net, batches).evaluate_all(archs, "at once") == expected, limit
        assert steps, "they were not run at once"
    assert everything(net) == before
    assert judge(net, batches).evaluate_all(archs[::-1], "at once") == expected[::-1]


def test_a_space_of_convolutions() -> None:
    """Float32, channels that are views of one memory, and dropout before the classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = shufflenet.spos(5, stem=4, widths=(8, 16), repeats=(2, 2), head=16)
        images = [(torch.randn(4, 3, 32, 32), torch.zeros(4)) for _ in range(4)]
    net = nasfx.transform(model, "single-path")
    archs = some(net, 20)
    given: dict[str, Any] = {"train": images[:2], "valid": images[2:]}
    expected = [judge(net, 3, **given).evaluate(arch, "alone") for arch in archs]
    made = judge(net, 3, **given)
    assert not made.obstacle(archs)
    assert made.evaluate_all(archs, "at once") == expected
    assert len(set(expected)) > len(archs) // 2


@pytest.mark.parametrize("shuffle", [True, False])
def test_loaders_over_tensors_in_memory(shuffle: bool) -> None:
    net = trained(Norms)
    archs = list(net.space.enumerate())
    data = TensorDataset(*batch(8, 23))
    given: dict[str, Any] = {
        "train": DataLoader(data, 4, shuffle=shuffle), "valid": DataLoader(data, 5)
    }  # fmt: skip
    made = judge(net, 5, **given)
    assert not made.obstacle(archs)
    assert made.evaluate_all(archs, "now") == [made.evaluate(arch, "now") for arch in archs]


def test_evolve_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> nasfx.SearchResult:
        net = trained(KINDS["net"])
        return nasfx.evolve(
            net, VALID, metric=metric, recalibrate=(TRAIN, 4), population=6, generations=3
        )

    with counted(monkeypatch) as steps:
        at_once = found()
    assert steps
    monkeypatch.setattr(Judge, "obstacle", lambda self, archs: "as it is")
    alone = found()
    assert list(at_once.evaluated.items()) == list(alone.evaluated.items())
    assert at_once.architecture == alone.architecture


def test_the_context_of_a_call_is_entered() -> None:
    net = trained(Norms)
    archs = list(net.space.enumerate())

    def around() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    net.float()
    data = [(x.float(), y) for x, y in TRAIN]
    given: dict[str, Any] = {"train": data, "valid": data}
    low = judge(net, 4, around=around, **given)
    with_it, alone = low.evaluate_all(archs, ""), [low.evaluate(arch, "") for arch in archs]
    assert with_it == alone
    assert with_it != judge(net, 4, **given).evaluate_all(archs, "")


# -- less work, bounded memory ---------------------------------------------------------------------


def chain(limit: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[int]]:
    """What runs, and what is kept, for all 16 subnets of four choices of two."""
    net = nasfx.transform(built(KINDS["no norms"]), "single-path")
    monkeypatch.setattr(prefixes, "KEPT_BYTES", limit)
    kept: list[int] = []
    visit = Runner._visit

    def watched(self: Runner, tree: Any, entry: Any, held: int) -> None:
        kept.append(held)
        visit(self, tree, entry, held)

    monkeypatch.setattr(Runner, "_visit", watched)
    with counted(monkeypatch) as steps:
        judge(net, valid=[batch()]).evaluate_all(list(net.space.enumerate()), "now")
    return [step for step in steps if step.op == "call_module"], kept


SIZE = 6 * WIDTH * 8  # of an activation in bytes


@pytest.mark.parametrize(
    ("limit", "calls", "kept"),
    [
        (4 * SIZE, 1 + 2 + 4 + 8 + 16, 4 * SIZE),
        (3 * SIZE, 1 + 2 + 4 + 8 + 8 + 16, 3 * SIZE),  # the third choice is run again
        (2 * SIZE, 1 + 2 + 4 + 3 * 16 - 4, 2 * SIZE),
        (SIZE, 1 + 2 + 16 * 4 - 2, SIZE),
        (0, 16 * 5, 0),  # the stem, too
    ],
)
def test_common_prefixes_run_once_within_the_memory_allowed(
    limit: int, calls: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, held = chain(limit, monkeypatch)
    assert max(held) == kept
    assert len(steps) == calls


def test_groups_hold_neighbours() -> None:
    net = nasfx.transform(built(KINDS["no norms"]), "single-path")
    archs = list(net.space.enumerate())
    shuffled = archs[1::2] + archs[::2]
    made = judge(net)
    (whole,) = made.groups(shuffled)
    assert whole == sorted(archs, key=lambda arch: list(arch.values()))
    assert made.groups(shuffled, 6) == [whole[:6], whole[6:12], whole[12:]]
    assert made.groups(shuffled, 1) == [[arch] for arch in shuffled]
    stopped = judge(net, train=iter(TRAIN))
    assert stopped.groups(shuffled) == [[arch] for arch in shuffled]


# -- what is in the way ----------------------------------------------------------------------------


class Noise(nn.Module):
    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.norm(x)))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls


def instance_norm() -> nn.Module:
    norm = nn.InstanceNorm1d(1, track_running_stats=True)
    return nn.Sequential(nn.Unflatten(1, (1, WIDTH)), norm, nn.Flatten())


def functional(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (lambda: nn.Sequential(nn.Dropout(0.5), Linear()), r"c1\.0 draws random numbers"),
        (lambda: Noise(lambda x: F.dropout(x, 0.5, training=True)), r"random"),
        (lambda: Noise(lambda x: x + torch.rand_like(x)), r"rand_like is not known"),
        (lambda: Noise(lambda x: x * torch.bernoulli(x.sigmoid())), r"bernoulli is not known"),
        (lambda: Noise(lambda x: F.gumbel_softmax(x)), r"is not known"),
        (lambda: Noise(functional), r"batch_norm is not known"),
        (lambda: nn.RReLU(), r"draws random numbers"),
        (Twice, r"c1\.norm is a batch norm that is called twice"),
        (Counter, r"writes to an input, or to a tensor of the model"),
        (lambda: Own(WIDTH), r"is a Own, whose code is not known"),
        (instance_norm, r"c1\.1 has buffers"),
    ],
)
def test_what_could_differ_is_evaluated_alone(
    candidate: Callable[[], nn.Module], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = trained(lambda: Net(lambda: dense(norm=True), candidate, tail=lambda: dense(norm=True)))
    archs = some(net, 6)
    made = judge(net)
    expected = [made.evaluate(arch, "alone") for arch in archs]
    with counted(monkeypatch) as steps:
        assert made.evaluate_all(archs, "now") == expected
    assert not steps
    assert made.groups(archs) == [[arch] for arch in archs]
    assert re.search(message, made.obstacle(archs))


class AlwaysDropping(Net):
    def train(self, mode: bool = True) -> AlwaysDropping:
        super().train(mode)
        self[6].train()
        return self


def test_dropout_that_stays_on_in_evaluation_is_in_the_way() -> None:
    for kind, message in ((Net, ""), (AlwaysDropping, "6 draws random numbers")):
        net = trained(lambda: kind(lambda: dense(norm=True), Linear, tail=nn.Dropout))  # noqa: B023
        assert judge(net).obstacle(some(net, 4)) == message


def test_hooks_and_a_function_that_runs_the_net_are_in_the_way() -> None:
    net = trained(Norms)
    archs = some(net, 3)
    assert "function of the caller's" in judge(net, run=lambda inputs: net(*inputs)).obstacle(archs)
    handle = net.get_submodule("head").register_forward_hook(lambda *_: None)
    assert "hooks" in judge(net).obstacle(archs)
    handle.remove()
    assert not judge(net).obstacle(archs)


class Drawing(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        return torch.randn(3), torch.zeros(2)


DATA = TensorDataset(*batch(1, 16))


@pytest.mark.parametrize(
    ("loader", "batches", "fixed"),
    [
        ([], None, True), ((), None, True), (iter(VALID), None, False), (range(3), None, False),
        (DataLoader(DATA, 4), None, True), (DataLoader(DATA, 4), 99, True),
        (DataLoader(Subset(Subset(DATA, [3, 1, 2]), [0, 1])), None, True),
        (DataLoader([(torch.ones(3), torch.ones(2))]), None, True),
        (DataLoader(DATA, 4, shuffle=True), None, False),
        (DataLoader(DATA, 4, shuffle=True), 4, True),
        (DataLoader(DATA, 4, shuffle=True), 5, False),
        (DataLoader(DATA, 4, shuffle=True, generator=torch.Generator()), 4, False),
        (DataLoader(DATA, 4, generator=torch.Generator()), None, False),
        (DataLoader(DATA, 4, collate_fn=lambda rows: rows), None, False),
        (DataLoader(DATA, 4, worker_init_fn=print), None, False),
        (DataLoader(Drawing(), 4), None, False), (DataLoader(Subset(Drawing(), [1])), 1, False),
    ],
)  # fmt: skip
def test_which_loaders_give_the_same_again(loader: Any, batches: int | None, fixed: bool) -> None:
    assert (loader_obstacle(loader, batches) == "") is fixed


# -- errors ----------------------------------------------------------------------------------------


def test_an_error_is_the_one_of_the_architecture_alone() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x - 100.0)

    net = nasfx.transform(built(lambda: Net(lambda: dense(norm=True), Log)), "single-path")
    archs = list(net.space.enumerate())
    before = everything(net)
    with pytest.raises(SearchError) as at_once:
        judge(net).evaluate_all(archs, "there")
    broken = next(arch for arch in archs if "c1" in arch.values())
    with pytest.raises(SearchError) as alone:
        judge(net).evaluate(broken, f"there, for the architecture {dict(broken)}")
    assert str(at_once.value) == str(alone.value)
    assert everything(net) == before
    with pytest.raises(SearchError, match=r"recalibrate gave no batch"):
        judge(net, train=[]).evaluate_all(archs, "there")
    with pytest.raises(TypeError, match=r"positional argument"):
        judge(net, valid=[((*VALID[0], VALID[0][0]), VALID[0][1])]).evaluate_all(archs, "there")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_the_net_is_as_it_was_after_an_error(error: type[BaseException]) -> None:
    net = trained(KINDS["net"])
    before = everything(net)
    left = 5

    def failing(outputs: Tensor, target: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if not left:
            raise error
        return metric(outputs, target)

    made = Judge(net, VALID, failing, Recalibration(TRAIN, 4), 0)
    with pytest.raises(error):
        made.evaluate_all(some(net), "now")
    assert everything(net) == before
