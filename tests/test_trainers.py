"""The trainers with NNI's names: every parameter has an effect, every trainer finds."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import nasfx
from nasfx import CheckpointError, InputChoice, LayerChoice, ProfileError, SearchError, SpaceError
from nasfx.costs import FunctionSource
from nasfx.strategies import Darts, Enas, FBNet, Proxyless, SinglePath
from nasfx.trainers import (
    BaseOneShotTrainer,
    DartsTrainer,
    EnasTrainer,
    FBNetTrainer,
    LookUpTable,
    NASConfig,
    ProxylessTrainer,
    SinglePathTrainer,
    replace_input_choice,
    replace_layer_choice,
)

N = 12  # samples


class Net(nn.Module):
    """Three channels in, any size; convolutions of two costs or none, and some of the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = LayerChoice(
            {
                "conv3": nn.Conv2d(4, 4, 3, padding=1),
                "conv1": nn.Conv2d(4, 4, 1),
                "skip": nn.Identity(),
            },
            label="block",
        )
        self.input = InputChoice(2, 1, label="input")
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(self.input([self.block(y), y]).mean((2, 3)))


class Layers(nn.Module):
    """Layer choices alone, each with convolutions only."""

    def __init__(self) -> None:
        super().__init__()

        def choice(label: str) -> LayerChoice:
            convs = {"conv3": nn.Conv2d(3, 3, 3, padding=1), "conv1": nn.Conv2d(3, 3, 1)}
            return LayerChoice(convs, label=label)

        self.a, self.b, self.head = choice("a"), choice("b"), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.relu(self.a(x))).mean((2, 3)))


@pytest.fixture
def data() -> TensorDataset:
    torch.manual_seed(0)
    x = torch.randn(N, 3, 5, 5)
    return TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())


def accuracy(logits: Tensor, target: Tensor) -> dict[str, float]:
    right = (logits.argmax(1) == target).float().mean()
    return {"acc": float(right), "n": float(len(target))}


def reward(logits: Tensor, target: Tensor) -> float:
    return accuracy(logits, target)["acc"]


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr)


def made(cls: Any, data: Any, model: nn.Module | None = None, **options: Any) -> Any:
    """A trainer of two epochs, batches of 4 and no processes, unless `options` say otherwise."""
    torch.manual_seed(0)
    model = Net() if model is None else model
    given: dict[str, Any] = {
        "loss": F.cross_entropy, "metrics": accuracy, "optimizer": sgd(model), "num_epochs": 2,
        "batch_size": 4, "workers": 0, "device": "cpu",
    }  # fmt: skip
    if cls is SinglePathTrainer:
        given |= {"dataset_train": data, "dataset_valid": data}
    else:
        given["dataset"] = data
    if cls is EnasTrainer:
        given["reward_function"] = reward
    return cls(model, **(given | options))


TRAINERS = (DartsTrainer, EnasTrainer, ProxylessTrainer, SinglePathTrainer)
HALVED = (DartsTrainer, EnasTrainer, ProxylessTrainer)


def weights(trainer: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.net.weight_parameters()])


def alphas(trainer: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.net.arch_parameters()])


# -- signatures ------------------------------------------------------------------------------------

COMMON = {"batch_size": 64, "workers": 4, "device": None, "log_frequency": None}
REQUIRED = ["model", "loss", "metrics", "optimizer", "num_epochs", "dataset"]
SIGNATURES: dict[Any, tuple[list[str], dict[str, Any]]] = {
    DartsTrainer: (
        REQUIRED,
        {"grad_clip": 5.0, "learning_rate": 0.0025}
        | COMMON
        | {"arc_learning_rate": 0.0003, "unrolled": False},
    ),
    EnasTrainer: (
        ["model", "loss", "metrics", "reward_function", "optimizer", "num_epochs", "dataset"],
        COMMON
        | {
            "grad_clip": 5.0, "entropy_weight": 0.0001, "skip_weight": 0.8,
            "baseline_decay": 0.999, "ctrl_lr": 0.00035, "ctrl_steps_aggregate": 20,
            "ctrl_kwargs": None, "ctrl_steps": None,
        },
    ),
    ProxylessTrainer: (
        REQUIRED,
        {"warmup_epochs": 0}
        | COMMON
        | {
            "arc_learning_rate": 0.001, "grad_reg_loss_type": None, "grad_reg_loss_params": None,
            "applied_hardware": None, "dummy_input": (1, 3, 224, 224), "ref_latency": 65.0,
        },
    ),
    SinglePathTrainer: ([*REQUIRED[:-1], "dataset_train", "dataset_valid"], COMMON),
    FBNetTrainer: (
        [
            "model", "model_optim", "criterion", "device", "device_ids", "lookup_table",
            "train_loader", "valid_loader",
        ],
        {"n_epochs": 300, "load_ckpt": False, "arch_path": None, "logger": None},
    ),
    NASConfig: (
        [],
        {
            "perf_metric": "flops", "lut_load": False, "lut_load_format": "json",
            "model_dir": None, "nas_lr": 0.01, "nas_weight_decay": 5e-4, "mode": "mul",
            "alpha": 0.25, "beta": 0.6, "start_epoch": 50, "init_temperature": 5.0,
            "exp_anneal_rate": math.exp(-0.045), "search_space": None,
        },
    ),
    replace_layer_choice: (["root_module", "init_fn"], {"modules": None}),
    replace_input_choice: (["root_module", "init_fn"], {"modules": None}),
}  # fmt: skip


@pytest.mark.parametrize("what", SIGNATURES, ids=lambda w: w.__name__)
def test_names_order_and_defaults_are_those_of_the_documentation(what: Any) -> None:
    required, defaults = SIGNATURES[what]
    parameters = inspect.signature(what).parameters.values()
    assert [p.name for p in parameters if p.default is p.empty] == required
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert list(found.items()) == list(defaults.items())
    assert [p.name for p in parameters][: len(required)] == required


def test_a_trainer_without_fit_and_export_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        BaseOneShotTrainer()  # type: ignore[abstract]


def test_train_is_fit() -> None:
    class Counting(BaseOneShotTrainer):
        calls = 0

        def fit(self) -> None:
            self.calls += 1

        def export(self, file: Any = None) -> dict[str, Any]:
            return {"calls": self.calls}

    trainer = Counting()
    trainer.train()
    assert trainer.export() == {"calls": 1}


# -- common ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", TRAINERS)
def test_each_trainer_finds_and_exports(cls: Any, data: Any, tmp_path: Path) -> None:
    trainer = made(cls, data)
    before = weights(trainer)
    with pytest.raises(SearchError, match=r"call fit\(\) before export"):
        trainer.export()
    assert trainer.fit() is None
    found = trainer.export(tmp_path / "arch.json")
    assert trainer.net.space.validate(found) == trainer.result.architecture
    assert json.loads((tmp_path / "arch.json").read_text()) == found
    assert nasfx.Architecture.from_json(tmp_path / "arch.json") == trainer.result.architecture
    assert not torch.equal(before, weights(trainer))


@pytest.mark.parametrize("cls", TRAINERS)
def test_a_search_is_repeated_by_the_seed_of_torch(cls: Any, data: Any) -> None:
    first, second = made(cls, data), made(cls, data)
    torch.rand(3)
    first.fit()
    second.fit()
    assert torch.equal(weights(first), weights(second))


@pytest.mark.parametrize("cls", TRAINERS)
def test_the_optimizer_trains_the_users_own_parameters(cls: Any, data: Any) -> None:
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.stem.parameters(), 0.1)
    made(cls, data, model, optimizer=optimizer, num_epochs=1).fit()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"stem.weight", "stem.bias"}


@pytest.mark.parametrize("cls", HALVED)
def test_the_first_half_trains_weights_and_the_second_the_architecture(cls: Any, data: Any) -> None:
    trainer = made(cls, data)
    halves = [
        torch.cat([x for x, _ in loader]).sum((1, 2, 3)).sort().values
        for loader in (trainer.train_loader, trainer.valid_loader)
    ]
    x = data.tensors[0].sum((1, 2, 3))
    assert torch.equal(halves[0], x[: N // 2].sort().values)
    assert torch.equal(halves[1], x[N // 2 :].sort().values)
    assert not torch.equal(torch.cat([b for b, _ in trainer.train_loader]), data.tensors[0][:6])


def test_single_path_trains_on_one_data_set_and_compares_on_the_other(data: Any) -> None:
    other = TensorDataset(torch.randn(5, 3, 5, 5), torch.zeros(5, dtype=torch.long))
    trainer = made(SinglePathTrainer, data, dataset_valid=other)
    assert sum(len(x) for x, _ in trainer.train_loader) == N
    assert torch.equal(torch.cat([x for x, _ in trainer.valid_loader]), other.tensors[0])


@pytest.mark.parametrize("cls", HALVED)
def test_a_data_set_that_cannot_be_halved_is_refused(cls: Any) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    for dataset in (Stream(), TensorDataset(torch.zeros(1, 3), torch.zeros(1))):
        with pytest.raises(SearchError, match="dataset must have a length of at least 2"):
            made(cls, dataset)


@pytest.mark.parametrize("cls", TRAINERS)
def test_batch_size_workers_and_device(cls: Any, data: Any) -> None:
    trainer = made(cls, data, batch_size=3, workers=1, device=torch.device("cpu"))
    assert [loader.batch_size for loader in (trainer.train_loader, trainer.valid_loader)] == [3, 3]
    assert [w.num_workers for w in (trainer.train_loader, trainer.valid_loader)] == [1, 1]
    assert trainer.fabric.device == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert made(cls, data, device=None).fabric.device.type == expected


@pytest.mark.parametrize("cls", TRAINERS)
def test_num_epochs_and_metrics_make_the_records(cls: Any, data: Any) -> None:
    trainer = made(cls, data, num_epochs=3, batch_size=4)
    with pytest.raises(SearchError, match="call fit"):
        _ = trainer.records
    trainer.fit()
    assert [record["epoch"] for record in trainer.records] == [0, 1, 2]
    sizes = [len(y) for _, y in trainer.valid_loader]
    for record in trainer.records:
        assert record["metrics"]["acc"] == pytest.approx(record["metric"], abs=1e-12)
        mean_size = sum(n * n for n in sizes) / sum(sizes)
        assert record["metrics"]["n"] == pytest.approx(mean_size, abs=1e-12)


@pytest.mark.parametrize("cls", TRAINERS)
@pytest.mark.parametrize("value", [0.5, {}])
def test_metrics_that_are_no_dict_are_refused(cls: Any, value: Any, data: Any) -> None:
    trainer = made(cls, data, metrics=lambda logits, target: value)
    with pytest.raises(SearchError, match="must return a dict of figures"):
        trainer.fit()


def test_a_figure_that_is_no_number_is_refused(data: Any) -> None:
    metrics = lambda logits, target: {"acc": 0.5, "top": logits}  # noqa: E731
    with pytest.raises(SearchError, match="top must be a number"):
        made(DartsTrainer, data, metrics=metrics).fit()


@pytest.mark.parametrize("cls", TRAINERS)
def test_the_loss_is_what_is_minimised(cls: Any, data: Any) -> None:
    trainer = made(cls, data, loss=lambda logits, target: 0 * F.cross_entropy(logits, target))
    before = weights(trainer)
    trainer.fit()
    assert torch.equal(before, weights(trainer))


@pytest.mark.parametrize("cls", TRAINERS)
def test_log_frequency_counts_training_batches(cls: Any, data: Any, capsys: Any) -> None:
    made(cls, data, batch_size=1).fit()
    assert capsys.readouterr() == ("", "")
    trainer = made(cls, data, batch_size=1, log_frequency=4)
    trainer.fit()
    n = len(trainer.train_loader)
    lines = capsys.readouterr().err.strip().splitlines()
    expected = [divmod(i, n) for i in range(3, 2 * n, 4)]
    assert [line.split(" training")[0] for line in lines] == [
        f"epoch {epoch} batch {batch}" for epoch, batch in expected
    ]
    assert all(math.isfinite(float(line.split()[-1])) for line in lines)
    with pytest.raises(SearchError, match="log_frequency=0"):
        made(cls, data, log_frequency=0)


def test_log_frequency_counts_no_batch_twice_when_unrolled(data: Any, capsys: Any) -> None:
    made(DartsTrainer, data, batch_size=1, log_frequency=1, unrolled=True).fit()
    assert len(capsys.readouterr().err.strip().splitlines()) == N


@pytest.mark.parametrize("cls", [DartsTrainer, EnasTrainer])
def test_grad_clip_bounds_the_weights_step_and_zero_disables_it(cls: Any, data: Any) -> None:
    def moved(grad_clip: float) -> float:
        loss = lambda logits, target: 1e3 * F.cross_entropy(logits, target)  # noqa: E731
        model = Net()
        options = {"optimizer": sgd(model, 1e-3), "loss": loss, "num_epochs": 1, "batch_size": 6}
        trainer = made(cls, data, model, grad_clip=grad_clip, **options)
        before = weights(trainer)
        trainer.fit()
        return float((weights(trainer) - before).norm())

    # One step of learning rate 1e-3.
    assert moved(5.0) == pytest.approx(5e-3, rel=1e-3)
    assert moved(1.0) == pytest.approx(1e-3, rel=1e-3)
    assert moved(0) > 6e-3
    with pytest.raises(SearchError, match="grad_clip=-1"):
        moved(-1)


@pytest.mark.parametrize("cls", TRAINERS)
def test_what_is_no_optimizer_of_the_model_is_refused(cls: Any, data: Any) -> None:
    with pytest.raises(SearchError, match="holds no parameter of Net"):
        made(cls, data, optimizer=sgd(nn.Linear(1, 1)))
    with pytest.raises(SearchError, match=r"must be a torch\.optim\.Optimizer"):
        made(cls, data, optimizer="sgd")
    if cls is not DartsTrainer:
        with pytest.raises(SearchError, match=r"must be a torch\.optim\.Optimizer"):
            made(cls, data, optimizer=None)


# -- DARTS -----------------------------------------------------------------------------------------


def test_learning_rate_is_that_of_the_default_optimizer(data: Any) -> None:
    for given, expected in (({}, 0.0025), ({"learning_rate": 0.5}, 0.5)):
        model = Net()
        (group,) = (
            made(DartsTrainer, data, model, optimizer=None, **given).optimizers[0].param_groups
        )
        assert group["lr"] == expected
        assert group["momentum"] == 0.9
        assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}


def test_learning_rate_must_not_contradict_the_optimizer(data: Any) -> None:
    made(DartsTrainer, data, learning_rate=0.1)  # that of the optimizer
    with pytest.raises(SearchError, match=r"learning_rate=0\.3 beside an optimizer"):
        made(DartsTrainer, data, learning_rate=0.3)


@pytest.mark.parametrize("cls", [DartsTrainer, ProxylessTrainer])
def test_arc_learning_rate_is_that_of_the_architecture(cls: Any, data: Any) -> None:
    options = {"num_epochs": 1, "batch_size": 6}  # one step of Adam: every alpha moves by the rate
    trainer = made(cls, data, arc_learning_rate=0.25, **options)
    before = alphas(trainer)
    trainer.fit()
    assert float((alphas(trainer) - before).abs().max()) == pytest.approx(0.25, rel=1e-2)


def test_the_optimizers_of_the_architecture_keep_the_papers_constants(data: Any) -> None:
    darts = made(DartsTrainer, data).optimizers[1].param_groups[0]
    assert (darts["lr"], darts["betas"], darts["weight_decay"]) == (3e-4, (0.5, 0.999), 1e-3)
    proxyless = made(ProxylessTrainer, data).optimizers[1].param_groups[0]
    assert (proxyless["lr"], proxyless["betas"]) == (1e-3, (0.0, 0.999))


def test_unrolled_is_second_order(data: Any) -> None:
    first, second = made(DartsTrainer, data), made(DartsTrainer, data, unrolled=True)
    assert first.net.strategy == Darts()
    assert second.net.strategy == Darts(unrolled="finite-difference")
    first.fit()
    second.fit()
    assert not torch.equal(alphas(first), alphas(second))


# -- ENAS ------------------------------------------------------------------------------------------


def test_options_of_the_controller_reach_the_strategy(data: Any) -> None:
    assert made(EnasTrainer, data).net.strategy == Enas(grad_clip=5.0)
    trainer = made(
        EnasTrainer, data, entropy_weight=0.1, skip_weight=0.2, baseline_decay=0.3, ctrl_lr=0.4,
        ctrl_steps_aggregate=5, ctrl_steps=6, grad_clip=0, ctrl_kwargs={"hidden": 7},
    )  # fmt: skip
    assert trainer.net.strategy == Enas(
        entropy_weight=0.1, skip_weight=0.2, baseline_decay=0.3, learning_rate=0.4, aggregate=5,
        steps=6, grad_clip=None, hidden=7,
    )  # fmt: skip
    assert trainer.optimizers[1].param_groups[0]["lr"] == 0.4


@pytest.mark.parametrize("name", ["lstm_layers", "skip_weight"])
def test_ctrl_kwargs_of_another_name_are_refused(name: str, data: Any) -> None:
    with pytest.raises(SearchError, match=f"ctrl_kwargs has '{name}'"):
        made(EnasTrainer, data, ctrl_kwargs={name: 1})


def test_the_controller_learns_from_the_reward_and_not_from_the_metrics(data: Any) -> None:
    asked: list[bool] = []
    trainer: Any = None

    def counted(logits: Tensor, target: Tensor) -> float:
        asked.append(trainer.net.in_step)
        return 1.0 if "skip" in trainer.net.path.values() else 0.0

    trainer = made(
        EnasTrainer, data, reward_function=counted, ctrl_steps=40, ctrl_steps_aggregate=5,
        ctrl_lr=0.05, num_epochs=1,
        metrics=lambda logits, target: {"stepping": float(trainer.net.in_step)},
        baseline_decay=0.5,
    )  # fmt: skip
    before = float(trainer.net.probabilities()["block"][2])
    trainer.fit()
    assert asked.count(True) == 40 * 5
    assert float(trainer.net.probabilities()["block"][2]) > max(0.6, before)
    assert trainer.records[0]["metrics"] == {"stepping": 0.0}  # evaluations alone


# -- ProxylessNAS ----------------------------------------------------------------------------------


def test_warmup_epochs_train_the_weights_alone(data: Any) -> None:
    trainer = made(ProxylessTrainer, data, warmup_epochs=2, num_epochs=3)
    trainer.fit()
    assert [record["arch_loss"] is None for record in trainer.records] == [True, True, False]
    assert trainer.net.strategy == Proxyless()


def test_applied_hardware_is_what_the_regulariser_expects(data: Any) -> None:
    options: dict[str, Any] = {
        "grad_reg_loss_type": "add#linear", "grad_reg_loss_params": {"lambda": 0.5},
        "dummy_input": (1, 3, 64, 64), "ref_latency": 3.0,
    }  # fmt: skip
    phone = FunctionSource(lambda part: float(len(part.paths)), "phone")
    trainer = made(ProxylessTrainer, data, applied_hardware=phone, **options)
    (objective,) = trainer.net.objectives
    assert objective == nasfx.Latency(phone, 3.0, loss="add#linear", lambda_=0.5)
    with pytest.raises(ProfileError, match="no predictor named 'cortexA76'"):
        made(ProxylessTrainer, data, applied_hardware="cortexA76", **options)
    with pytest.raises(SearchError, match="no effect without grad_reg_loss_type"):
        made(ProxylessTrainer, data, applied_hardware=phone)


SIZE = 512 * 512
REGULARISED = [
    (
        "mul#log", {"alpha": 0.4, "beta": 0.5},
        lambda l, e: l * 0.4 * (math.log(e) / math.log(20)) ** 0.5,
    ),
    ("add#linear", {"lambda": 0.7}, lambda l, e: l + 0.7 * (e - 20) / 20),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "params", "expected"), REGULARISED)
def test_the_regulariser_is_that_of_the_expected_macs(
    kind: str, params: dict[str, float], expected: Callable[..., float], data: Any
) -> None:
    trainer = made(
        ProxylessTrainer, data, grad_reg_loss_type=kind, grad_reg_loss_params=params,
        dummy_input=(1, 3, 512, 512), ref_latency=20.0,
    )  # fmt: skip
    net = trainer.net
    p, q = net.probabilities()["block"].tolist(), net.probabilities()["input"].tolist()[0]
    # Stem, the block's two convolutions where it is among the inputs, head; in millions.
    macs = (3 * 4 * 9 * SIZE + q * SIZE * (4 * 4 * 9 * p[0] + 4 * 4 * p[1]) + 4 * 2) / 1e6
    with net.arch_step():
        loss = F.cross_entropy(net(data.tensors[0]), data.tensors[1])
        value = net.objective(loss)
        assert value.item() == pytest.approx(expected(loss.item(), macs), rel=1e-5)
        value.backward()
    trainer.fit()
    assert trainer.export()


def test_the_regulariser_makes_the_search_choose_cheaper_candidates(data: Any) -> None:
    trainer = made(
        ProxylessTrainer, data, grad_reg_loss_type="add#linear",
        grad_reg_loss_params={"lambda": 1e3}, dummy_input=(1, 3, 64, 64), ref_latency=1.0,
        num_epochs=8, arc_learning_rate=0.1, model=Layers(),
    )  # fmt: skip
    trainer.fit()
    assert trainer.export() == {"a": "conv1", "b": "conv1"}


def test_parameters_of_the_regulariser_are_exactly_its_own(data: Any) -> None:
    for kind, params in (
        ("mul#log", {"alpha": 1.0}),
        ("mul#log", None),
        ("add#linear", {"alpha": 1.0, "lambda": 0.1}),
        (None, {"lambda": 0.1}),
    ):
        with pytest.raises(SearchError, match="needs exactly"):
            made(ProxylessTrainer, data, grad_reg_loss_type=kind, grad_reg_loss_params=params)
    with pytest.raises(SearchError, match="grad_reg_loss_type='mul' must be one of"):
        made(ProxylessTrainer, data, grad_reg_loss_type="mul")


def test_a_dummy_input_that_the_model_does_not_take_is_named(data: Any) -> None:
    options: dict[str, Any] = {"grad_reg_loss_type": "add#linear"}
    options |= {"grad_reg_loss_params": {"lambda": 0.1}, "dummy_input": (1, 5, 8, 8)}
    with pytest.raises(nasfx.NasfxError) as caught:
        made(ProxylessTrainer, data, **options)
    assert caught.value.__notes__[-1] == "costs are counted for dummy_input=(1, 5, 8, 8)"


# -- SPOS ------------------------------------------------------------------------------------------


def test_single_path_evolves_to_the_best_architecture(data: Any) -> None:
    trainer: Any = None

    def metrics(logits: Tensor, target: Tensor) -> dict[str, float]:
        arch = trainer.net._forced[-1]
        return {"score": float(arch["block"] == "conv1") if "block" in arch else 0.0}

    trainer = made(SinglePathTrainer, data, metrics=metrics, num_epochs=1)
    trainer.fit()
    assert trainer.net.strategy == SinglePath()
    assert trainer.export() == {"block": "conv1", "input": [0]}
    assert trainer.result.best_metric == 1


# -- FBNet -----------------------------------------------------------------------------------------

MACS = {"conv3": 3.0 * 3 * 9 * 25, "conv1": 3.0 * 3 * 25}


def fbnet(data: Any, config: NASConfig, model: Any = None, **options: Any) -> FBNetTrainer:
    torch.manual_seed(0)
    model = Layers() if model is None else model
    table = options.pop("table", None) or LookUpTable(config, ("conv3", "conv1"))
    given: dict[str, Any] = {
        "model_optim": sgd(model), "criterion": F.cross_entropy, "device": "cpu",
        "device_ids": None, "lookup_table": table, "train_loader": DataLoader(data, 4),
        "valid_loader": DataLoader(data, 4), "n_epochs": 3,
    }  # fmt: skip
    return FBNetTrainer(model, **(given | options))


def test_fbnet_counts_searches_and_writes(data: Any, tmp_path: Path) -> None:
    config = NASConfig(model_dir=tmp_path / "run", start_epoch=2)
    trainer = fbnet(data, config, arch_path=tmp_path / "arch.json")
    table = json.loads((tmp_path / "run" / "lut" / "lut.json").read_text())
    assert table == {"a": MACS, "b": MACS}
    assert trainer.net.strategy == FBNet()
    trainer.fit()
    assert [record["arch_loss"] is None for record in trainer.records] == [True, True, False]
    assert json.loads((tmp_path / "arch.json").read_text()) == trainer.export()
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("mode", ["mul", "add"])
def test_the_loss_of_fbnet_is_that_of_the_mode(mode: str, data: Any) -> None:
    net = fbnet(data, NASConfig(mode=mode, alpha=0.3, beta=0.4, start_epoch=0)).net
    with net.arch_step():
        loss = F.cross_entropy(net(data.tensors[0]), data.tensors[1])
        cost = net.expected_cost()["flops"].item()
        lowest, highest = 2 * MACS["conv1"], 2 * MACS["conv3"]
        assert lowest < cost < highest
        l = loss.item()
        expected = l * 0.3 * math.log(cost) ** 0.4 if mode == "mul" else l + 0.3 * cost**0.4
        assert net.objective(loss).item() == pytest.approx(expected, rel=1e-5)
        net.objective(loss).backward()


@pytest.mark.parametrize("mode", ["mul", "add"])
def test_a_table_of_too_low_costs_is_an_error_that_says_what_helps(mode: str, data: Any) -> None:
    def trainer(fixed: float) -> FBNetTrainer:
        table = LookUpTable(NASConfig(mode=mode, start_epoch=0))
        table.costs = {"block": {"conv3": 9.0, "conv1": 1.0, "skip": 0.001}}
        table.fixed = fixed
        return fbnet(data, table.config, Net(), table=table)

    with pytest.raises(SearchError, match="of the cost, which must be above") as error:
        trainer(0.0)
    (note,) = [text for text in error.value.__notes__ if "lookup table" in text]
    assert "`fixed`" in note
    trainer(1.5)


def test_constants_of_the_config_reach_the_search(data: Any) -> None:
    config = NASConfig(
        nas_lr=0.5, nas_weight_decay=0.25, init_temperature=2.0, exp_anneal_rate=0.5, start_epoch=1
    )
    trainer = fbnet(data, config)
    assert isinstance(trainer.optimizers[1], torch.optim.AdamW)
    group = trainer.optimizers[1].param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    trainer.fit()
    temperature = trainer.net.get_buffer("arch.state.temperature")
    assert float(temperature) == pytest.approx(2.0 * 0.5**2)


def test_the_learning_rate_follows_a_cosine_and_comes_back(data: Any) -> None:
    model = Layers()
    optimizer = sgd(model, 0.1)
    trainer = fbnet(data, NASConfig(start_epoch=0), model, model_optim=optimizer, n_epochs=4)
    rates: list[float] = []
    hook = optimizer.register_step_pre_hook(
        lambda *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    trainer.fit()
    hook.remove()
    expected = [0.1 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert rates[:: len(trainer.train_loader)] == pytest.approx(expected, rel=1e-6)
    assert len(rates) == 4 * len(trainer.train_loader)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_load_ckpt_goes_on_without_the_first_epochs(data: Any, tmp_path: Path) -> None:
    config = NASConfig(model_dir=tmp_path, start_epoch=1)
    first = fbnet(data, config)
    first.fit()
    torch.manual_seed(5)
    second = fbnet(data, config, Layers(), load_ckpt=True)
    assert torch.equal(weights(first), weights(second))
    assert torch.equal(alphas(first), alphas(second))
    temperatures = [t.net.get_buffer("arch.state.temperature").item() for t in (first, second)]
    assert temperatures == pytest.approx([5 * math.exp(-0.045) ** 2] * 2, rel=1e-6)
    assert second.optimizers[0].param_groups[0]["lr"] == 0.1
    state = second.optimizers[1].state_dict()["state"]
    assert state
    assert state.keys() == first.optimizers[1].state_dict()["state"].keys()
    second.fit()
    assert [record["arch_loss"] is None for record in second.records] == [False, False]
    assert not torch.equal(weights(first), weights(second))


def test_a_checkpoint_that_cannot_be_loaded_is_named(data: Any, tmp_path: Path) -> None:
    config = NASConfig(model_dir=tmp_path, start_epoch=0)
    with pytest.raises(CheckpointError, match="is no checkpoint of this search"):
        fbnet(data, config, load_ckpt=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is no checkpoint of this search"):
        fbnet(data, config, load_ckpt=True)
    with pytest.raises(SearchError, match="load_ckpt=True needs"):
        fbnet(data, NASConfig(start_epoch=0), load_ckpt=True)


def test_the_logger_of_fbnet_is_given_a_line_for_every_epoch(data: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "fbnet"):
        fbnet(data, NASConfig(start_epoch=0), logger=logging.getLogger("fbnet")).fit()
    assert [record.message.split(" batch")[0] for record in caplog.records] == [
        "epoch 0", "epoch 1", "epoch 2",
    ]  # fmt: skip


def test_one_process_drives_one_device(data: Any) -> None:
    with pytest.raises(SearchError, match="one process drives one device"):
        fbnet(data, NASConfig(), device_ids=[0, 1])
    with pytest.raises(SearchError, match="on the CPU, which has none"):
        fbnet(data, NASConfig(), device_ids=[0])
    assert fbnet(data, NASConfig(), device_ids=[]).fabric.device.type == "cpu"


# -- the table -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "name"), [("json", "lut.json"), ("numpy", "lut.npy")])
def test_a_table_is_saved_and_loaded(form: str, name: str, data: Any, tmp_path: Path) -> None:
    table = LookUpTable(NASConfig(model_dir=tmp_path, lut_load_format=form))
    table.count(Layers(), data.tensors[0])
    table.costs["a"]["conv1"] = 7.5
    assert table.save() == tmp_path / "lut" / name
    config = NASConfig("latency", True, form, tmp_path, start_epoch=0)
    loaded = LookUpTable(config, ["conv1", "conv3"])
    assert loaded.costs == {"a": MACS | {"conv1": 7.5}, "b": MACS}
    net = fbnet(data, config, table=loaded).net
    assert net.space.costs["latency"]({"a": "conv1", "b": "conv3"}) == 7.5 + MACS["conv3"]


def test_costs_of_no_multiplication_and_of_shared_labels(data: Any) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            conv = lambda: nn.Conv2d(3, 3, 1)  # noqa: E731
            self.a = LayerChoice({"conv": conv(), "skip": nn.Identity()}, label="a")
            self.b = LayerChoice({"conv": conv(), "skip": nn.ReLU()}, label="a")

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.pad(self.a(x), (0, 5)))

    table = LookUpTable(NASConfig())
    table.count(Twice(), data.tensors[0])
    assert table.costs == {"a": {"conv": 9 * (25 + 50) / 2, "skip": 0.001}}


def test_fixed_costs_count_beside(data: Any) -> None:
    config = NASConfig(start_epoch=0)
    table = LookUpTable(config)
    table.fixed = 1000.0
    net = fbnet(data, config, table=table).net
    cost = net.space.costs["flops"]({"a": "conv1", "b": "conv1"})
    assert cost == 1000 + 2 * MACS["conv1"]


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    config = NASConfig(lut_load=True, model_dir=tmp_path)
    (tmp_path / "lut").mkdir()
    for text in (None, "{", "[1]", '{"a": 1}', '{"a": {"b": "x"}}'):
        if text is not None:
            (tmp_path / "lut" / "lut.json").write_text(text)
        with pytest.raises(SearchError, match="cannot be read as a table of costs"):
            LookUpTable(config)
    held = np.array([{"a": 1}], dtype=object)
    np.save(tmp_path / "lut" / "lut.npy", held, allow_pickle=True)
    with pytest.raises(SearchError, match="cannot be read as a table of costs"):
        LookUpTable(NASConfig(lut_load=True, model_dir=tmp_path, lut_load_format="numpy"))
    with pytest.raises(SearchError, match="has no file"):
        LookUpTable(NASConfig()).save()


def test_primitives_and_search_space_name_the_candidates(data: Any) -> None:
    stages = {"stages": ["s"], "s": {"ops": ["conv3", "conv1"], "layer_num": 2}}
    config = NASConfig(search_space=stages, start_epoch=0)
    assert config.operations() == ("conv3", "conv1")
    fbnet(data, config)
    with pytest.raises(SearchError, match="'conv1' of search_space is not among the primitives"):
        LookUpTable(config, {"conv3": None})
    with pytest.raises(SearchError, match="'conv1' of the table is not among the primitives"):
        LookUpTable(NASConfig(), ["conv3"]).count(Layers(), data.tensors[0])
    narrow = NASConfig(search_space={"stages": ["s"], "s": {"ops": ["conv3"]}})
    with pytest.raises(SearchError, match="'conv1' is in no stage"):
        LookUpTable(narrow).count(Layers(), data.tensors[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "max"}, "mode='max'"),
        ({"lut_load_format": "npy"}, "lut_load_format='npy'"),
        ({"start_epoch": -1}, "start_epoch=-1"),
        ({"lut_load": True}, "needs model_dir"),
        ({"perf_metric": "latency"}, "only 'flops' are counted"),
        ({"search_space": {"stages": ["s"]}}, "search_space"),
    ],
)
def test_a_config_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        NASConfig(**options)


# -- replacing -------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """What replaces a choice: holds its candidates, or the choice itself."""

    def __init__(self, choice: Any, keep: bool = False) -> None:
        super().__init__()
        self.inner = choice if keep else nn.ModuleDict(dict(choice.named_children()))


def nested() -> nn.Module:
    act = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")
    free = LayerChoice([nn.ReLU()])
    outer = LayerChoice({"seq": nn.Sequential(act, free), "direct": act}, label="outer")
    return nn.ModuleDict({"first": outer, "again": outer, "input": InputChoice(2, label="in")})


@pytest.mark.parametrize("keep", [False, True])
def test_nested_choices_are_replaced_in_what_replaced_theirs(keep: bool) -> None:
    root = nested()
    outer: Any = root["first"]
    act = outer.direct
    found = replace_layer_choice(root, lambda choice: Mixed(choice, keep))
    assert [label for label, _ in found] == ["outer", "act", "first/seq/1"]
    news = dict(found)
    assert all(isinstance(new, Mixed) for new in news.values())
    assert root["first"] is root["again"] is news["outer"]
    candidates = news["outer"].inner._modules
    assert candidates["direct"] is news["act"]
    assert candidates["seq"][0] is news["act"]
    assert candidates["seq"][1] is news["first/seq/1"]
    left = [m for m in root.modules() if isinstance(m, LayerChoice)]
    assert (left[:2] == [outer, act] and len(left) == 3) if keep else left == []
    assert isinstance(root["input"], InputChoice)


def test_input_choices_are_replaced() -> None:
    root = nested()
    made_of: list[Any] = []

    def identity(choice: Any) -> nn.Module:
        made_of.append(choice)
        return nn.Identity()

    modules: dict[str, nn.Module] = {}
    found = replace_input_choice(root, identity, modules)
    assert found == [("in", root["input"])]
    assert modules == {"in": root["input"]}
    assert isinstance(made_of[0], InputChoice)
    assert isinstance(root["first"], LayerChoice)


def pair(first: nn.Module, second: nn.Module) -> nn.Module:
    return nn.Sequential(first, second)


def layer(*names: str, label: str = "x", **options: Any) -> LayerChoice:
    return LayerChoice({name: nn.ReLU() for name in names}, label=label, **options)


def test_choices_of_one_label_and_equal_candidates_are_each_replaced() -> None:
    root = pair(layer("a", "b"), layer("a", "b"))
    modules: dict[str, nn.Module] = {}
    found = replace_layer_choice(root, Mixed, modules)
    assert [label for label, _ in found] == ["x", "x"]
    assert found[0][1] is not found[1][1]
    assert modules == {"x": found[0][1]}


@pytest.mark.parametrize(
    "second", [layer("a", "c"), layer("b", "a"), layer("a", "b", relaxed_only=["b"])]
)
def test_one_label_for_other_candidates_is_refused_before_anything_changes(second: Any) -> None:
    first = layer("a", "b")
    root = pair(first, second)
    with pytest.raises(SpaceError, match=r"label 'x' is also that of choice x .*test_trainers"):
        replace_layer_choice(root, Mixed)
    assert list(root) == [first, second]
    with pytest.raises(SpaceError, match="label 'in'"):
        replace_input_choice(
            pair(InputChoice(2, label="in"), InputChoice(3, label="in")), lambda _: nn.Identity()
        )


def test_a_duplicate_that_a_replacement_brings_is_refused() -> None:
    def new(choice: Any) -> nn.Module:
        return nn.Sequential(layer("other")) if "a" in choice.candidates else nn.Identity()

    with pytest.raises(SpaceError, match="label 'x' is also"):
        replace_layer_choice(pair(layer("a"), nn.ReLU()), new)


def test_a_label_of_an_earlier_call_is_refused() -> None:
    modules: dict[str, nn.Module] = {}
    replace_layer_choice(nested(), Mixed, modules)
    with pytest.raises(SpaceError, match="from another call"):
        replace_layer_choice(nested(), Mixed, modules)


def test_what_cannot_be_replaced_is_refused() -> None:
    with pytest.raises(SpaceError, match="root_module is itself a LayerChoice"):
        replace_layer_choice(layer("a"), Mixed)
    with pytest.raises(SpaceError, match="init_fn returned a int"):
        replace_layer_choice(nested(), lambda _: 3)  # type: ignore[arg-type, return-value]
