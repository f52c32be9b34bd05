"""`search`: the loop, its records, its progress and its errors, on scikit-learn's digits."""

from __future__ import annotations

import inspect
import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nasfx
from nasfx import InputChoice, LayerChoice, RandomSearch, SearchError
from tests.strategies.nets import STRATEGIES, Chain, Nested, batch, built, loss_of

Batches = list[tuple[Any, Any]]


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.block = LayerChoice(
            {
                "conv": nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
                "skip": nn.Identity(),
            },
            label="block",
        )
        self.act = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.avg_pool2d(self.act(self.block(self.stem(x))), 2).flatten(1))


@pytest.fixture(scope="module")
def digits() -> tuple[TensorDataset, TensorDataset]:
    images, targets = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 - 0.5
    y = torch.tensor(targets)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return (
        TensorDataset(x[order[:512]], y[order[:512]]),
        TensorDataset(x[order[512:768]], y[order[512:768]]),
    )


def accuracy(outputs: Tensor, target: Tensor) -> float:
    return float((outputs.argmax(1) == target).float().mean())


def _digit_net(strategy: str) -> nasfx.Supernet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nasfx.transform(Digits(), strategy)


def _toy(strategy: Any = "proxyless", kind: Callable[[], nn.Module] = Chain) -> nasfx.Supernet:
    return nasfx.transform(built(kind), strategy)


def _batches(n: int = 3, seed: int = 0) -> Batches:
    return [batch(seed + i) for i in range(n)]


def _search(net: nasfx.Supernet, **options: Any) -> nasfx.SearchResult:
    given: dict[str, Any] = {
        "train": _batches(), "valid": _batches(2, 50), "loss": F.mse_loss, "epochs": 2,
    }  # fmt: skip
    given |= options
    return nasfx.search(net, given.pop("train"), given.pop("valid"), **given)


def _arch(net: nasfx.Supernet) -> list[Tensor]:
    return [p.detach().clone() for p in net.arch_parameters()]


def _state(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


# -- end to end -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_digits_are_learned(
    strategy: str,
    digits: tuple[TensorDataset, TensorDataset],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    net = _digit_net(strategy)
    train = DataLoader(digits[0], 32, shuffle=True, generator=torch.Generator().manual_seed(0))
    valid = DataLoader(digits[1], 64)
    result = nasfx.search(
        net, train, valid, loss=F.cross_entropy, epochs=3, metric=accuracy, seed=0,
        optimizers=(torch.optim.SGD(net.weight_parameters(), 0.05, 0.9), net.arch_optimizer()),
    )  # fmt: skip
    assert capsys.readouterr() == ("", "")
    assert len(result.records) == 3
    for i, record in enumerate(result.records):
        assert list(record) == [
            "epoch", "train_loss", "arch_loss", "metric", "entropy", "lr", "seconds",
        ]  # fmt: skip
        assert record["epoch"] == i
        assert all(
            isinstance(v, float) for k, v in record.items() if k not in ("epoch", "arch_loss")
        )
        assert isinstance(record["arch_loss"], float) == bool(net.arch_parameters())
        assert 0 <= record["metric"] <= 1
        assert 0 < record["entropy"] <= math.log(2) + 1e-6
        assert record["lr"] == 0.05
        assert record["seconds"] > 0
    losses = [record["train_loss"] for record in result.records]
    assert losses[-1] < 0.7 * losses[0]
    assert result.best_metric > 0.6
    assert net.space.validate(result.architecture) == result.architecture
    assert result.architecture in set(net.space.enumerate())

    # The metric is that of the finalized subnet, in eval mode, a mean over the batches.
    subnet = nasfx.finalize(net, result.architecture).eval()
    with torch.no_grad():
        values = [accuracy(subnet(x), y) for x, y in valid]
    assert result.best_metric == pytest.approx(sum(values) / len(values), abs=1e-12)

    assert result.plot(tmp_path / "search.png") == tmp_path / "search.png"
    data = (tmp_path / "search.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 5000
    text = str(result)
    assert "train_loss" in text
    assert f"best metric {result.best_metric:.4f} with {dict(result.architecture)}" in text
    assert all(f"{record['metric']:.4g}" in text for record in result.records)
    assert result.table().row_count == 3
    assert "\x1b" not in text


@pytest.mark.parametrize("strategy", ["darts", "proxyless", "single-path"])
def test_an_epoch_takes_an_arch_step_and_a_weight_step_for_every_batch(strategy: str) -> None:
    net = _toy(strategy)
    steps: list[str] = []
    seen: list[float] = []
    for name in ("weight", "arch"):
        method = getattr(net, f"{name}_step")

        def counted(name: str = name, method: Any = method) -> Any:
            steps.append(name)
            return method()

        setattr(net, f"{name}_step", counted)

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        seen.append(float(target[0, 0]))
        return F.mse_loss(outputs, target)

    train, valid = _batches(3), _batches(2, 50)
    _search(net, train=train, valid=valid, loss=loss, epochs=2, metric=lambda o, t: 0.0)
    learns = strategy != "single-path"
    assert steps == (["arch", "weight"] if learns else ["weight"]) * 6
    t, v = ([float(y[0, 0]) for _, y in data] for data in (train, valid))
    # Validation batches go on where the last epoch left off.
    expected = [t[0], t[1], t[2]] * 2
    if learns:
        expected = [v[0], t[0], v[1], t[1], v[0], t[2], v[1], t[0], v[0], t[1], v[1], t[2]]
    assert seen == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_seed_gives_the_same_search(strategy: str) -> None:
    runs = []
    for seed in (5, 5, 6):
        net = _toy(strategy, Nested)
        result = _search(net, seed=seed)
        records = [{k: v for k, v in r.items() if k != "seconds"} for r in result.records]
        runs.append((records, dict(result.architecture), result.best_metric, _state(net)))
    (a, arch_a, best_a, state_a), (b, arch_b, best_b, state_b), (c, *_, state_c) = runs
    assert (a, arch_a, best_a) == (b, arch_b, best_b)
    assert all(torch.equal(v, state_b[k]) for k, v in state_a.items())
    if strategy != "darts":
        assert a != c
        assert not torch.equal(state_a["stem.weight"], state_c["stem.weight"])


def test_without_a_seed_the_net_goes_on_with_its_own_generator() -> None:
    one, two = _toy("single-path"), _toy("single-path")
    two.seed(17)
    one.seed(17)
    assert _search(one).records[-1]["train_loss"] == _search(two).records[-1]["train_loss"]


# -- what is recorded -----------------------------------------------------------------------------


def test_the_default_metric_is_minus_the_loss() -> None:
    net = _toy("darts")
    valid = _batches(2, 50)
    result = _search(net, valid=valid)
    net.eval()
    with net.forced(result.architecture), torch.no_grad():
        expected = -sum(float(loss_of(net, x, y)) for x, y in valid) / 2
    assert result.best_metric == pytest.approx(expected, rel=1e-12)
    assert result.records[-1]["metric"] == pytest.approx(expected, rel=1e-12)


def test_losses_are_means_over_the_epoch() -> None:
    net = _toy("darts")
    losses: list[float] = []

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        value = F.mse_loss(outputs, target)
        losses.append(float(value.detach()))
        return value

    (record,) = _search(net, loss=loss, epochs=1, metric=lambda o, t: 0.0).records
    assert record["arch_loss"] == pytest.approx(sum(losses[0::2]) / 3)
    assert record["train_loss"] == pytest.approx(sum(losses[1::2]) / 3)


def test_the_entropy_is_that_of_the_decisions() -> None:
    net = _toy("proxyless")
    with torch.no_grad():
        for p, values in zip(
            net.arch_parameters(), ([0.0, 0.0, 40.0], [0.0, 0.0, -40.0]), strict=True
        ):
            p.copy_(torch.tensor(values))
    frozen = torch.optim.SGD(net.arch_parameters(), 0.0)
    weights = torch.optim.SGD(net.weight_parameters(), 0.01)
    (record,) = _search(net, optimizers=(weights, frozen), epochs=1).records
    assert record["entropy"] == pytest.approx((0 + math.log(2)) / 2, abs=1e-9)


def test_the_learning_rate_follows_a_cosine_by_default() -> None:
    rates = [r["lr"] for r in _search(_toy("darts"), epochs=4).records]
    assert rates == pytest.approx([0.0125 * (1 + math.cos(math.pi * i / 4)) for i in range(4)])


def test_default_optimizers_are_momentum_sgd_and_the_papers() -> None:
    """One epoch of the search is this plain loop."""
    one, two = _toy("darts"), _toy("darts")
    train, valid = _batches(3), _batches(3, 50)
    _search(one, train=train, valid=valid, epochs=1)
    weights = torch.optim.SGD(two.weight_parameters(), 0.025, 0.9)
    arch = two.arch_optimizer()
    for (x, y), (xv, yv) in zip(train, valid, strict=True):
        with two.arch_step():
            two.objective(F.mse_loss(two(xv), yv)).backward()
        arch.step()
        arch.zero_grad()
        with two.weight_step():
            F.mse_loss(two(x), y).backward()
        weights.step()
        weights.zero_grad()
    expected = two.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in one.state_dict().items())


def test_given_optimizers_are_used_and_not_scheduled() -> None:
    net = _toy("proxyless")
    before = _state(net)
    weights = torch.optim.SGD(net.weight_parameters(), 0.0)
    arch = torch.optim.SGD(net.arch_parameters(), 1.0)
    result = _search(net, optimizers=(weights, arch))
    after = net.state_dict()
    for name, _ in net.named_parameters():
        assert torch.equal(after[name], before[name]) != name.startswith("arch."), name
    assert [r["lr"] for r in result.records] == [0.0, 0.0]


def test_clipping_bounds_the_gradients_norm() -> None:
    def moved(clip: float | None) -> float:
        net = _toy("darts")
        before = [p.detach().clone() for p in net.weight_parameters()]
        optimizers = (torch.optim.SGD(net.weight_parameters(), 1.0), net.arch_optimizer())
        _search(net, train=_batches(1), epochs=1, optimizers=optimizers, clip_norm=clip)
        pairs = zip(net.weight_parameters(), before, strict=True)
        return float(sum(((p.detach() - b) ** 2).sum() for p, b in pairs)) ** 0.5

    assert moved(None) > 0.01
    assert moved(0.001) == pytest.approx(0.001, rel=1e-3)


# -- warm-up --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "warm"), [(1, 1), (2, 2), (0.5, 2), (0.25, 1), (0, 0)])
def test_in_warm_up_epochs_only_weights_are_trained(warmup: float, warm: int) -> None:
    net = _toy("proxyless")
    start = _arch(net)
    after: list[bool] = []

    def metric(outputs: Tensor, target: Tensor) -> float:
        pairs = zip(_arch(net), start, strict=True)
        after.append(all(torch.equal(a, b) for a, b in pairs))
        return 0.0

    result = _search(net, epochs=4, warmup=warmup, metric=metric, valid=_batches(1, 50))
    assert [r["arch_loss"] is None for r in result.records] == [i < warm for i in range(4)]
    assert after[:4] == [i < warm for i in range(4)]
    assert all(r["train_loss"] > 0 for r in result.records)
    assert "-" in str(result) or warm == 0


@pytest.mark.parametrize("warmup", [2, 3, 1.0 * 2, 0.9, -1, -0.5])
def test_a_warm_up_leaves_some_epochs_for_the_search(warmup: float) -> None:
    with pytest.raises(SearchError, match=rf"warmup={warmup!r} must leave some of the 2 epochs"):
        _search(_toy(), warmup=warmup)


def test_a_plot_of_a_search_without_arch_losses(tmp_path: Path) -> None:
    result = _search(_toy("single-path"))
    assert result.plot(str(tmp_path / "p.png")).read_bytes().startswith(b"\x89PNG")


# -- the end of single-path -----------------------------------------------------------------------


def test_single_path_returns_the_best_that_it_evaluated() -> None:
    net = _toy("single-path")
    valid = _batches(2, 50)
    result = _search(net, valid=valid)
    net.eval()
    scores = {}
    for arch in net.space.enumerate():
        with net.forced(arch), torch.no_grad():
            scores[arch] = -sum(float(loss_of(net, x, y)) for x, y in valid) / 2
    assert len(scores) == 9
    assert len(set(scores.values())) == 9
    assert result.architecture == max(scores, key=scores.__getitem__)
    assert result.best_metric == pytest.approx(max(scores.values()), rel=1e-12)


def test_random_search_evaluates_no_more_than_it_is_told() -> None:
    net = _toy(RandomSearch(final_samples=4))
    calls = []
    result = _search(
        net,
        valid=_batches(1, 50),
        epochs=1,
        metric=lambda o, t: calls.append(1) or float(len(calls)),
    )
    assert len(calls) == 1 + 4  # one at the end of the epoch
    assert result.best_metric == 5.0


def test_the_mode_of_the_net_is_kept() -> None:
    for training in (True, False):
        net = _toy("proxyless").train(training)
        modes: list[bool] = []
        before = {k: v.clone() for k, v in net.named_buffers()}
        _search(net, metric=lambda o, t, net=net, m=modes: m.append(net.training) or 0.0)
        assert net.training is training
        assert modes
        assert not any(modes)
        assert any(not torch.equal(v, before[k]) for k, v in net.named_buffers())


def test_the_mode_of_the_net_is_kept_after_an_error_too() -> None:
    net = _toy("proxyless").eval()
    with pytest.raises(SearchError, match="valid gave no batch"):
        _search(net, valid=[])
    assert not net.training


# -- progress -------------------------------------------------------------------------------------


def test_progress_shows_losses_metric_entropy_and_time_left() -> None:
    stream = io.StringIO()
    console = Console(force_terminal=True, file=stream, width=200)
    result = _search(_toy("proxyless"), console=console, epochs=3)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    last = [line for line in re.split(r"[\r\n]+", text) if line.strip()][-1]
    assert "search" in last
    assert "epoch 2 loss " in last
    assert f"metric {result.records[1]['metric']:.4f}" in last
    assert f"entropy {result.records[2]['entropy']:.3f}" in last
    assert re.search(r"0:00:0\d\s+left\s+0:00:00", last)


def test_a_loader_without_a_length_is_fine() -> None:
    class Endless:
        def __iter__(self) -> Iterator[Any]:
            return iter(_batches(2))

    stream = io.StringIO()
    console = Console(force_terminal=True, file=stream, width=200)
    result = _search(_toy("darts"), train=Endless(), valid=Endless(), console=console)
    assert len(result.records) == 2
    assert "loss" in stream.getvalue()


# -- batches --------------------------------------------------------------------------------------


def test_inputs_may_be_tuples() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = LayerChoice([nn.Linear(3, 2), nn.Linear(3, 2)], label="block")

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.block(x) * scale

    for wrap in (tuple, list):
        data = [(wrap((x, torch.full((6, 1), 2.0, dtype=x.dtype))), y) for x, y in _batches()]
        result = _search(_toy("proxyless", Two), train=data, valid=data)
        assert set(result.architecture) == {"block"}


def test_targets_may_be_any_structure() -> None:
    data = [(x, {"y": y, "weight": 2.0}) for x, y in _batches()]

    def loss(outputs: Tensor, target: dict[str, Any]) -> Tensor:
        return target["weight"] * F.mse_loss(outputs, target["y"])

    _search(_toy("darts"), train=data, valid=data, loss=loss)


@pytest.mark.parametrize("which", ["train", "valid"])
def test_an_empty_loader_is_an_error(which: str) -> None:
    for strategy in STRATEGIES:
        with pytest.raises(SearchError, match=rf"{which} gave no batch"):
            _search(_toy(strategy), **{which: []})
    with pytest.raises(SearchError, match=rf"{which} gave no batch; an iterator that is used up"):
        _search(_toy(), **{which: iter(_batches())})


@pytest.mark.parametrize("which", ["train", "valid"])
@pytest.mark.parametrize(
    "bad", [torch.zeros(6, 3), (torch.zeros(6, 3),), [1, 2, 3], {"x": 1, "y": 2}]
)
def test_a_batch_is_a_pair(which: str, bad: Any) -> None:
    with pytest.raises(SearchError, match=rf"a batch of {which} must be \(inputs, target\)"):
        _search(_toy(), **{which: [bad]})


def test_wrong_arguments() -> None:
    with pytest.raises(SearchError, match=r"needs a net from nasfx\.transform, not a Chain"):
        _search(built(Chain))  # type: ignore[arg-type]
    with pytest.raises(SearchError, match=r"epochs=0 must be at least 1"):
        _search(_toy(), epochs=0)
    net = _toy()
    one = torch.optim.SGD(net.weight_parameters(), 0.1)
    for optimizers in ((one,), (one, one, one), ()):
        with pytest.raises(SearchError, match=r"optimizers must be two"):
            _search(net, optimizers=optimizers)


@pytest.mark.parametrize(
    "loss", [lambda o, t: (o - t) ** 2, lambda o, t: 1.0], ids=["a tensor of many", "a float"]
)
def test_a_loss_is_a_tensor_of_one_number(loss: Any) -> None:
    with pytest.raises(SearchError, match=r"loss"):
        _search(_toy(), loss=loss)


def test_a_metric_is_a_number() -> None:
    with pytest.raises(SearchError, match=r"metric"):
        _search(_toy(), metric=lambda o, t: None)


# -- what is not finite ---------------------------------------------------------------------------


class Root(nn.Module):
    """Not finite for negative inputs, and small ones below."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x - 100.0)


class Fragile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.block = LayerChoice(
            {"fine": nn.Linear(4, 4), "tanh": nn.Tanh(), "broken": Root()}, label="block"
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


def _line(of: Any, text: str) -> str:
    lines, start = inspect.getsourcelines(of)
    return f"test_search.py:{start + next(i for i, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_candidate_that_gives_nan_is_named(strategy: str) -> None:
    net = _toy(strategy, Fragile)
    with pytest.raises(SearchError) as error:
        _search(net, epochs=6, seed=0)
    message = str(error.value)
    assert re.match(r"the (training|validation) loss became nan in epoch \d, batch \d: ", message)
    assert "log" in message
    assert "candidate 'broken' of choice 'block'" in message
    assert _line(Root, "torch.log") in message
    assert "{'block': 'broken'}" in message


def test_in_a_weight_step_the_drawn_candidate_is_named() -> None:
    net = _toy("single-path", Fragile)
    with pytest.raises(SearchError, match=r"the training loss became nan.*candidate 'broken'"):
        _search(net, epochs=6)
    assert net.path == {"block": "broken"}
    assert all(p.requires_grad for p in net.parameters())


def test_in_an_arch_step_an_inactive_candidate_is_named_too() -> None:
    net = _toy("proxyless", Fragile)
    with torch.no_grad():
        net.arch_parameters()[0].copy_(torch.tensor([0.0, 0.0, -30.0]))  # it is never drawn
    before = _arch(net)
    with pytest.raises(SearchError) as error:
        _search(net, seed=0)
    message = str(error.value)
    assert message.startswith("the architecture's gradient became not finite in epoch 0, batch 0: ")
    assert "candidate 'broken' of choice 'block'" in message
    assert _line(Root, "torch.log") in message
    assert net.path["block"] != "broken"
    assert torch.equal(_arch(net)[0], before[0])  # no step was taken with it


def test_a_value_that_is_only_nan_in_train_mode_is_found() -> None:
    """Batch statistics give values around zero, the running ones do not."""

    class Centred(Fragile):
        def __init__(self) -> None:
            super().__init__()
            norm = nn.BatchNorm1d(4, momentum=0.0, affine=False)
            norm.running_mean.fill_(-1000.0)
            self.block = LayerChoice({"broken": nn.Sequential(norm, Root())}, label="block")

    for strategy in STRATEGIES:
        with pytest.raises(SearchError, match=r"candidate 'broken' of choice 'block'"):
            _search(_toy(strategy, Centred))


def test_a_batch_that_is_not_finite_is_named() -> None:
    x, y = batch()
    x[2, 1] = float("nan")
    with pytest.raises(
        SearchError, match=r"the training loss became nan in epoch 0, batch 1: the batch"
    ):
        _search(_toy(), train=[batch(), (x, y)])
    with pytest.raises(
        SearchError, match=r"the validation loss became nan in epoch 0, batch 0: the batch"
    ):
        _search(_toy(), valid=[(x, y)])


def test_a_target_that_is_not_finite_is_no_fault_of_a_candidate() -> None:
    x, y = batch()
    y[0, 0] = float("inf")
    with pytest.raises(SearchError, match=r"loss became inf.*every subnet's output is finite"):
        _search(_toy("single-path"), train=[(x, y)])


def test_parameters_that_are_not_finite_are_named() -> None:
    net = _toy("darts")
    optimizers = (torch.optim.SGD(net.weight_parameters(), float("inf")), net.arch_optimizer())
    with pytest.raises(SearchError, match=r"parameters are not finite any more.*learning rate"):
        _search(net, epochs=4, optimizers=optimizers)


def test_a_metric_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(SearchError, match=r"the metric became nan"):
        _search(_toy(), metric=lambda o, t: float("nan"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_nested_candidate_is_named(strategy: str) -> None:
    class Nested(Fragile):
        def __init__(self) -> None:
            super().__init__()
            inner = LayerChoice({"fine": nn.Tanh(), "broken": Root()}, label="inner")
            middle = LayerChoice(
                {"fine": nn.Tanh(), "deep": nn.Sequential(nn.Tanh(), inner)}, label="middle"
            )
            candidates = {"deep": middle, "a": nn.Tanh(), "b": nn.Identity()}
            self.block = LayerChoice(candidates, label="block")

    for seed in range(3):
        with pytest.raises(SearchError, match=r"candidate 'broken' of choice 'inner'") as error:
            _search(_toy(strategy, Nested), epochs=20, seed=seed)
        decisions = "{'block': 'deep', 'middle': 'deep', 'inner': 'broken'}"
        assert f"in the architecture {decisions}" in str(error.value)


def test_what_only_an_unlikely_input_needs_is_named() -> None:
    class Inputs(Fragile):
        def __init__(self) -> None:
            super().__init__()
            self.block = LayerChoice({"fine": nn.Tanh(), "broken": Root()}, label="block")
            self.pick = InputChoice(4, 2, label="pick")

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.pick([x, x + 1, x + 2, self.block(x)]))

    with pytest.raises(SearchError, match=r"candidate 'broken' of choice 'block'"):
        _search(_toy("darts", Inputs))


def test_a_mixture_whose_candidates_are_finite_is_named() -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full_like(x, 3e38) + 0 * x

    class Mixture(Fragile):
        def __init__(self) -> None:
            super().__init__()
            pick = {"a": Large(), "b": Large()}
            self.block = nn.Sequential(
                LayerChoice(pick, label="block"), LayerChoice(dict(pick), label="next")
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(self.stem(x))
            return self.head(x - x.detach() + torch.where(x == 3e38, 0.0, torch.inf))

    with pytest.raises(SearchError, match="in the mixture of all candidates"):
        _search(_toy("darts", Mixture))


def test_a_derivative_that_is_not_finite_is_no_fault_of_the_loss() -> None:
    class Steep(Fragile):
        def __init__(self) -> None:
            super().__init__()
            self.block = LayerChoice({"a": nn.Tanh(), "b": nn.Identity()}, label="block")

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.sqrt(0 * self.block(self.stem(x))))

    with pytest.raises(SearchError, match=r"gradient became not finite.*so a derivative is not"):
        _search(_toy("darts", Steep))


def test_a_part_of_no_choice_is_named() -> None:
    class Outside(Fragile):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(torch.log(self.stem(x) - 100)))

    net = _toy("single-path", Outside)
    with pytest.raises(SearchError, match=r"a part that belongs to no choice") as error:
        _search(net)
    assert _line(Outside, "torch.log") in str(error.value)


def test_batches_of_the_metric_count_by_their_size() -> None:
    net = nasfx.transform(nn.Sequential(LayerChoice([nn.Linear(2, 2), nn.Tanh()])), "darts")
    x, y = torch.zeros(6, 2), torch.zeros(6, dtype=torch.long)
    result = nasfx.search(
        net, [(x, y)], [(x[:4], y[:4]), (x[:1], y[:1])], loss=F.cross_entropy, epochs=1,
        metric=lambda outputs, target: float(len(target)),
    )  # fmt: skip
    assert result.best_metric == pytest.approx((4 * 4.0 + 1 * 1.0) / 5)


def test_paths_without_weights_train_nothing_and_end_no_search() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choice = LayerChoice({"lin": nn.Linear(3, 3), "skip": nn.Identity()}, label="c")

        def forward(self, x: Tensor) -> Tensor:
            return self.choice(x)

    data = [(torch.randn(4, 3), torch.randn(4, 3))] * 8
    net = nasfx.transform(Plain(), "single-path", seed=0)
    before = net.weight_parameters()[0].detach().clone()
    result = nasfx.search(net, data, data, loss=F.mse_loss, epochs=1)
    assert len(result.records) >= 1
    assert not torch.equal(before, net.weight_parameters()[0])


class Scaling(MixedPrecision):
    """Scaled losses as under 16-mixed, on a CPU and in float32."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    def forward_context(self) -> Any:
        return nullcontext()


def test_gradients_of_scaled_losses_are_clipped_as_those_of_others() -> None:
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    found: list[Tensor] = []
    for plugins in ([], [Scaling()]):
        fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins)
        fabric.launch()
        net = nasfx.transform(built(Chain).float(), "darts", seed=0)
        nasfx.search(
            net, [(x, y)] * 3, [(x, y)], loss=F.mse_loss, epochs=1, clip_norm=0.01, fabric=fabric
        )
        found.append(torch.cat([p.detach().flatten() for p in net.weight_parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
