"""The classification examples: their recipes by hand, their data, and all scripts at smoke size."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import math
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nasfx
from nasfx.spaces import darts, shufflenet

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = {
    "spos": ("supernet", "search", "evaluation"),
    "proxylessnas": ("main", "retrain"),
    "darts": ("search", "retrain"),
}


@contextmanager
def example(folder: str = "") -> Generator[SimpleNamespace]:
    """The modules of an example and those that all share; others have modules of the same names."""
    names = ("common", "images", "training", *SCRIPTS.get(folder, ()))
    path, before = list(sys.path), {name: sys.modules.pop(name, None) for name in names}
    sys.path[:0] = [str(FOLDER / folder), str(FOLDER)]
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path[:] = path
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture(scope="module")
def shared() -> Iterator[Any]:
    with example() as modules:
        yield modules


@pytest.fixture(scope="module")
def spos() -> Iterator[Any]:
    with example("spos") as modules:
        yield modules


@pytest.fixture(scope="module")
def proxylessnas() -> Iterator[Any]:
    with example("proxylessnas") as modules:
        yield modules


@pytest.fixture(scope="module")
def darts_scripts() -> Iterator[Any]:
    with example("darts") as modules:
        yield modules


def cpu() -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    return fabric


def flags(shared: Any, *given: str) -> argparse.Namespace:
    made = shared.common.parser("", output="unused", epochs=1)
    shared.images.add_data(made)
    return shared.training.parse(made, {"toy": {}}, {}, given)


# -- recipes ---------------------------------------------------------------------------------------


def test_learning_rates(shared: Any) -> None:
    training = shared.training
    linear, cosine = training.linear(0.5, 4), training.cosine(0.5, 4, last=0.1)
    assert [linear(i) for i in range(6)] == pytest.approx([0.5, 0.375, 0.25, 0.125, 0, 0])
    half = 0.2 * math.sqrt(0.5)
    expected = [0.5, 0.3 + half, 0.3, 0.3 - half, 0.1, 0.1]
    assert [cosine(i) for i in range(6)] == pytest.approx(expected, rel=1e-12)
    by_epochs = training.cosine(0.5, 4, every=2)
    assert [by_epochs(i) for i in range(5)] == pytest.approx([0.5, 0.5, 0.25, 0.25, 0])
    powers = training.exponential(0.1, 0.97, every=2)
    assert [powers(i) for i in (0, 1, 2, 5)] == pytest.approx([0.1, 0.1, 0.097, 0.1 * 0.97**2])


def test_the_learning_rate_falls_every_step_and_goes_on_after_a_restart(shared: Any) -> None:
    w = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def made() -> torch.optim.Optimizer:
        groups = [{"params": [w]}, {"params": [nn.Parameter(torch.zeros(1))]}]
        return shared.training.scheduled(torch.optim.SGD(groups), shared.training.linear(1.0, 4))

    def step(optimizer: torch.optim.Optimizer) -> None:
        w.grad = torch.ones_like(w)
        optimizer.step()

    first = made()
    for _ in range(2):
        step(first)
    second = made()
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        step(second)
    assert w.item() == -(1 + 0.75 + 0.5 + 0.25)
    assert [group["lr"] for group in second.param_groups] == [0, 0]


def test_only_weights_decay(shared: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    decayed, others = shared.training.weights_only_decay(net.parameters(), 4e-5)
    assert (decayed["weight_decay"], others["weight_decay"]) == (4e-5, 0)
    assert [*map(id, decayed["params"])] == [id(net[0].weight), id(net[2].weight)]
    assert len(others["params"]) == 4


def test_accuracy_is_the_share_among_the_highest(shared: Any) -> None:
    outputs = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1], [1, 3, 2]])
    target = torch.tensor([0, 1, 2, 2])
    assert [shared.training.accuracy(outputs, target, k) for k in (1, 2, 5)] == [0.25, 0.75, 1]


def test_evaluation_counts_images_and_not_batches(shared: Any) -> None:
    x = torch.eye(10)[[0, 1, 2, 3, 4]]
    y = torch.tensor([0, 1, 9, 3, 9])
    net = nn.Sequential(nn.Identity(), nn.Dropout(0.9))
    top1, top5 = shared.training.evaluate(net, DataLoader(TensorDataset(x, y), 4), cpu())
    assert top1 == pytest.approx(3 / 5)
    assert 3 / 5 <= top5 <= 1
    assert not net.training


# -- flags -----------------------------------------------------------------------------------------


def test_presets_are_defaults_that_flags_override(spos: Any) -> None:
    def parsed(*given: str) -> argparse.Namespace:
        script = spos.supernet
        return spos.training.parse(script.arguments(), script.PRESETS, script.SMOKE, given)

    paper = parsed("--preset", "paper", "--lr", "0.1")
    assert (paper.data, paper.batch, paper.epochs, paper.lr) == ("imagenet", 1024, 120, 0.1)
    assert paper.flops_bins == (290, 360, 10)
    assert parsed("--preset", "paper", "--flops-bins").flops_bins == []
    assert (parsed().data, parsed().repeats) == ("digits", (2, 2, 2))
    smoke = parsed("--smoke", "--limit", "50")
    assert (smoke.limit, smoke.repeats, smoke.stem) == (50, (1, 1), parsed().stem)


@pytest.mark.parametrize("folder", SCRIPTS)
def test_help_shows_every_default(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    with example(folder) as modules:
        for name in SCRIPTS[folder]:
            with pytest.raises(SystemExit) as stop:
                getattr(modules, name).main(["--preset", "paper", "--help"])
            shown = capsys.readouterr().out
            assert stop.value.code == 0
            assert "None" not in shown.split("--held-out", 1)[1].split("--limit", 1)[0]
            for flag in ("--seed", "--device", "--precision", "--output", "--data"):
                assert flag in shown
            assert shown.count("(default:") > 15


def test_an_architecture_is_published_or_a_file(shared: Any, tmp_path: Path) -> None:
    published = {"DARTS_V2": darts.DARTS_V2}
    assert shared.training.architecture_of("DARTS_V2", published) is darts.DARTS_V2
    darts.DARTS_V1.to_json(tmp_path / "a.json")
    assert shared.training.architecture_of(str(tmp_path / "a.json"), published) == darts.DARTS_V1
    with pytest.raises(SystemExit, match="nor one of DARTS_V2"):
        shared.training.architecture_of(str(tmp_path / "b.json"), published)


def test_sources_of_latencies(shared: Any, tmp_path: Path) -> None:
    source = shared.training.latency_source
    assert source("cortexA76cpu_tflite21") == "cortexA76cpu_tflite21"
    assert source("torch").runtime == "torch"
    table = tmp_path / "pixel.yaml"
    table.write_text("Logits-input:1x1x8-output:10:\n  mean: 2.0\n", encoding="utf-8")
    assert source(str(table)).name == "pixel"


# -- data ------------------------------------------------------------------------------------------


def test_held_out_digits_are_no_training_images(shared: Any) -> None:
    def loaded(seed: int) -> Any:
        given = ("--held-out", "100", "--limit", "400", "--size", "8", "--seed", str(seed))
        return shared.images.load(flags(shared, *given))

    def pixels(images: Any) -> list[bytes]:
        return [images[i][0].numpy().tobytes() for i in range(len(images))]

    data, other = loaded(0), loaded(1)
    train, held_out, test = (pixels(part) for part in data[:3])
    assert (len(train), len(held_out), len(test), data.classes) == (300, 100, 360, 10)
    # The images are real and all different.
    assert len({*train, *held_out, *test}) == 760
    assert pixels(other.test) == test
    assert pixels(other.held_out) != held_out


def test_digits_are_what_scikit_learn_has(shared: Any) -> None:
    from sklearn.datasets import load_digits

    data = shared.images.load(flags(shared, "--size", "8"))
    known = {x.tobytes(): int(y) for x, y in zip(*load_digits(return_X_y=True), strict=True)}
    for image, label in (data.test[i] for i in range(20)):
        restored = ((image[0].double() + 1) / 2 * 16).round().reshape(-1)
        assert known[restored.numpy().tobytes()] == label
        assert torch.equal(image[0], image[2])


def test_too_many_are_held_out(shared: Any) -> None:
    with pytest.raises(SystemExit, match="there are 50 training images"):
        shared.images.load(flags(shared, "--held-out", "50", "--limit", "50"))


def test_data_that_is_not_there(shared: Any, tmp_path: Path) -> None:
    for name in ("cifar10", "imagenet"):
        with pytest.raises(SystemExit, match=f"--data {name}: not found in --data-root"):
            shared.images.load(flags(shared, "--data", name, "--data-root", str(tmp_path)))


def test_parquet_rows_become_pixels(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(name: str, columns: Any) -> list[dict[str, Any]]:
        file = io.BytesIO()
        colour = (250, 5, 5) if "train" in name else (5, 5, 250)
        Image.new("RGB", (32, 32), colour).save(file, "JPEG")
        return [{"image": file.getvalue(), "label": 7}] * 3

    monkeypatch.setattr(shared.images, "parquet_rows", rows)
    args = flags(shared, "--data", "cifar10-jpg", "--spos-preprocessing")
    image, label = shared.images.load(args).test[2]
    assert label == 7
    expected = torch.tensor([250.0, 5, 5])[:, None, None].expand(3, 32, 32)  # BGR of blue
    torch.testing.assert_close(image, expected, atol=4, rtol=0)


def test_imagenet_folders(shared: Any, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name, colour in (("apple", (255, 0, 0)), ("pear", (0, 255, 0))):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (50, 40), colour).save(tmp_path / part / name / "1.png")
    given = ("--data", "imagenet", "--data-root", str(tmp_path), "--jitter", "0.4", "0", "0.5")
    data = shared.images.load(flags(shared, *given))
    assert (len(data.train), data.classes) == (2, 2)
    for i in range(2):
        assert data.train[i][0].shape == (3, 32, 32)
    image, label = data.test[1]
    assert label == 1
    # A green pixel, with ImageNet's mean and standard deviation taken out.
    expected = [(0 - 0.485) / 0.229, (1 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    torch.testing.assert_close(image.mean((1, 2)), torch.tensor(expected))


def test_preprocessing_of_spos_is_bgr_up_to_255(shared: Any) -> None:
    image = torch.arange(3 * 4 * 4, dtype=torch.uint8).reshape(3, 4, 4) * 5
    transform = shared.images.transform_of(flags(shared, "--spos-preprocessing"))
    assert torch.equal(transform(image), image[[2, 1, 0]].float())


def test_cutout_zeroes_one_square_that_may_stick_out(shared: Any) -> None:
    torch.manual_seed(0)
    sizes: set[tuple[int, int]] = set()
    for _ in range(300):
        zero = shared.images.Cutout(4)(torch.ones(3, 9, 9)) == 0
        assert torch.equal(zero[0], zero[2])
        rows, columns = zero[0].any(1), zero[0].any(0)
        assert torch.equal(zero[0], rows[:, None] & columns[None])  # a rectangle
        sizes.add((int(rows.sum()), int(columns.sum())))
    assert sizes == {(a, b) for a in (2, 3, 4) for b in (2, 3, 4)}


# -- training a fixed net --------------------------------------------------------------------------


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.Flatten(),
                         nn.Linear(36, 10))  # fmt: skip


def trained(shared: Any, output: Path, *given: str, stop: int = 99) -> tuple[nn.Module, list[Any]]:
    """Three epochs, or an interruption before epoch `stop`."""

    def before_epoch(epoch: int) -> None:
        if epoch == stop:
            raise KeyboardInterrupt

    net = small_net()
    made = shared.common.parser("", output=str(output), epochs=3)
    shared.common.add_resume(made)
    shared.images.add_data(made)
    shared.training.add_recipe(made)
    size = ("--size", "8", "--limit", "96", "--batch", "32", "--cutout", "2")
    args = shared.training.parse(made, {"toy": {}}, {}, (*size, *given))
    fabric = shared.common.start(args)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, args.momentum)
    records = shared.training.retrain(
        net, shared.images.load(args), args, fabric,
        optimizer=shared.training.scheduled(optimizer, shared.training.linear(args.lr, 9)),
        loss=nn.functional.cross_entropy, clip_norm=1.0, before_epoch=before_epoch,
        results={"architecture": {"a": "b"}},
    )  # fmt: skip
    return net, records


def test_a_training_that_was_stopped_goes_on_bit_for_bit(shared: Any, tmp_path: Path) -> None:
    whole, records = trained(shared, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(shared, tmp_path / "parts", stop=2)
    resumed, again = trained(shared, tmp_path / "parts", "--resume")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [(r["loss"], r["top1"], r["lr"]) for r in again] == [
        (r["loss"], r["top1"], r["lr"]) for r in records
    ]
    assert [r["lr"] for r in records] == pytest.approx([0.05, 0.05 * 2 / 3, 0.05 / 3])
    results = json.loads((tmp_path / "parts" / "retrain.json").read_text(encoding="utf-8"))
    assert results["architecture"] == {"a": "b"}
    assert results["top1"] == records[-1]["top1"]
    assert (tmp_path / "parts" / "retrain.png").is_file()


def test_a_training_is_not_overwritten(shared: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(shared, tmp_path, "--resume", stop=1)  # starts where there is none
    with pytest.raises(SystemExit, match="is there, of a training that could go on"):
        trained(shared, tmp_path)


# -- the scripts -----------------------------------------------------------------------------------


def results_of(file: Path) -> dict[str, Any]:
    assert file.with_suffix(".png").is_file()
    return json.loads(file.read_text(encoding="utf-8"))


def test_spos(spos: Any, tmp_path: Path) -> None:
    smoke = ["--smoke", "--output", str(tmp_path), "--device", "cpu"]
    spos.supernet.main(smoke)
    assert len(results_of(tmp_path / "supernet.json")["records"]) == 2
    bounds = ["--max-flops", "0.6", "--latency-filter", "torch", "--latency-limit", "1000"]
    spos.search.main([*smoke, *bounds])
    found = results_of(tmp_path / "search.json")
    assert found["costs"]["flops"] <= 0.6
    assert found["costs"]["flops"] == pytest.approx(found["macs"] / 1e6)
    assert 0 < found["costs"]["latency:torch"] < 1000
    assert len(found["evaluated"]) > 1
    spos.evaluation.main(smoke)
    retrained = results_of(tmp_path / "retrain.json")
    assert retrained["architecture"] == found["architecture"]
    assert retrained["params"] > found["params"]  # affine batch norms
    norm = f"features.0.{found['architecture']['block0']}.branch_main.1.weight"
    assert norm in torch.load(tmp_path / "retrain.pt")


def test_spos_goes_on_and_overwrites_nothing(spos: Any, tmp_path: Path) -> None:
    smoke = ["--smoke", "--output", str(tmp_path), "--device", "cpu"]
    spos.supernet.main(smoke)
    first = torch.load(tmp_path / "supernet.pt")["supernet"]
    spos.supernet.main([*smoke, "--resume"])  # it was finished
    again = torch.load(tmp_path / "supernet.pt")["supernet"]
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(nasfx.CheckpointError, match="is there, of a search that could go on"):
        spos.supernet.main(smoke)
    spos.search.main([*smoke, "--checkpoint-every", "1", "--resume"])  # starts where there is none
    assert list((tmp_path / "search-checkpoints").glob("checkpoint-*.pt"))
    found = results_of(tmp_path / "search.json")
    spos.search.main([*smoke, "--resume"])  # it was finished
    again = results_of(tmp_path / "search.json")
    assert again["records"] == found["records"]  # with the seconds of the first
    assert again["evaluated"] == found["evaluated"]
    with pytest.raises(nasfx.CheckpointError, match="is there, of a search that could go on"):
        spos.search.main(smoke)


def test_the_supernet_of_the_authors_is_read(
    spos: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shufflenet.spos(10, stem=4, widths=(8, 16), repeats=(1, 1), head=16)
    numbers = {name: str(i) for i, name in enumerate(shufflenet.CHOICES)}
    theirs = {
        "module." + ".".join(numbers.get(part, part) for part in name.split(".")): value + 1
        for name, value in model.state_dict().items()
    }
    file = tmp_path / "checkpoint-150000.pth.tar"
    torch.save({"state_dict": theirs}, file)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spos.search.load_weights(model, file, bgr=False)
    assert "--spos-preprocessing" in capsys.readouterr().err
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] + 1)
    spos.search.load_weights(model, file, bgr=True)
    assert not capsys.readouterr().err


def test_spos_needs_a_supernet(spos: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"supernet\.py writes it"):
        spos.search.main(["--smoke", "--output", str(tmp_path)])


@pytest.mark.parametrize("more", [(), ("--reinforce", "--rl-steps", "2")])
def test_proxylessnas(proxylessnas: Any, tmp_path: Path, more: tuple[str, ...]) -> None:
    smoke = ["--smoke", "--output", str(tmp_path), "--device", "cpu"]
    proxylessnas.main.main([*smoke, "--reference-latency", "1e5", "--lr", "0.1", *more])
    found = results_of(tmp_path / "search.json")
    records = found["records"]
    # One epoch of warm-up, then one in which the authors take no arch step either.
    assert [record["arch_loss"] is None for record in records] == [True, True, False]
    assert [record["lr"] for record in records] == pytest.approx([0.1, 0.05, 0], abs=1e-12)
    assert found["costs"]["flops"] == found["macs"]
    if not more:
        proxylessnas.retrain.main(smoke)
        retrained = results_of(tmp_path / "retrain.json")
        assert retrained["architecture"] == found["architecture"]
        assert retrained["macs"] == found["macs"]


def test_rate_of_proxylessnas(proxylessnas: Any) -> None:
    args = SimpleNamespace(warmup=2, warmup_lr=0.05, lr=0.025, epochs=4)
    rate = proxylessnas.main.rate(args, 10)
    assert [rate(i) for i in (0, 10, 20, 40, 60)] == pytest.approx([0.05, 0.025, 0.025, 0.0125, 0])


def test_cost_and_strategy_of_proxylessnas(proxylessnas: Any) -> None:
    script = proxylessnas.main

    def parsed(*given: str) -> argparse.Namespace:
        return proxylessnas.training.parse(script.arguments(), script.PRESETS, {}, given)

    paper = ("--preset", "paper", "--applied-hardware", "cortexA76cpu_tflite21")
    assert script.objective(parsed("--preset", "paper")) is None
    assert script.objective(parsed(*paper)) == nasfx.Latency(
        "cortexA76cpu_tflite21", 80, loss="mul#log", alpha=0.2, beta=0.3
    )
    linear = parsed(*paper, "--grad-reg-loss-type", "add#linear", "--grad-reg-loss-lambda", "0.3")
    assert script.objective(linear) == nasfx.Latency(
        "cortexA76cpu_tflite21", 80, loss="add#linear", lambda_=0.3
    )
    rewarded = parsed("--reinforce", "--reference-latency", "1e6")
    assert script.objective(rewarded) == nasfx.Flops(1e6, loss="mul#power")
    assert script.strategy(rewarded, 1500) == nasfx.Proxyless(estimator="reinforce", arch_every=5)
    assert script.strategy(rewarded, 20).arch_every == 1
    assert script.strategy(parsed("--gate", "two"), 20) == nasfx.Proxyless("two", arch_every=5)


def test_labels_are_smoothed_in_weight_steps_alone(proxylessnas: Any) -> None:
    logits, y = torch.tensor([[2.0, 0, 0]], dtype=torch.float64), torch.tensor([0])
    logs = logits.log_softmax(1)[0]
    plain, smooth = -logs[0], -(0.7 * logs[0] + 0.3 * logs.mean())
    for kind, expected in (("arch", plain), ("weight", smooth)):
        net: Any = SimpleNamespace(step_kind=kind)
        value = proxylessnas.main.loss_of(net, 0.3)(logits, y)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_an_architecture_is_written_every_epoch(darts_scripts: Any, tmp_path: Path) -> None:
    w = nn.Parameter(torch.zeros(1))
    optimizer = darts_scripts.training.scheduled(torch.optim.SGD([w]), lambda done: 0.1)
    net: Any = SimpleNamespace(derive=lambda: nasfx.Architecture({"after": str(int(w.item()))}))
    darts_scripts.search.write_every_epoch(net, optimizer, 3, tmp_path)
    for step in range(7):
        w.data.fill_(step + 1)
        w.grad = torch.zeros(1)
        optimizer.step()
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["epoch_0.json", "epoch_1.json"]
    assert dict(nasfx.Architecture.from_json(tmp_path / "epoch_1.json")) == {"after": "6"}


def test_the_auxiliary_loss_has_its_weight(darts_scripts: Any) -> None:
    x, y = torch.randn(2, 4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    args = SimpleNamespace(label_smoothing=0.0, auxiliary=0.4)
    loss: Callable[..., torch.Tensor] = darts_scripts.retrain.loss_of(args)
    of = nn.functional.cross_entropy
    torch.testing.assert_close(loss((x[0], x[1]), y), of(x[0], y) + 0.4 * of(x[1], y))
    torch.testing.assert_close(loss(x[0], y), of(x[0], y))


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--unrolled",)])
def test_darts_search(darts_scripts: Any, tmp_path: Path, more: tuple[str, ...]) -> None:
    darts_scripts.search.main(["--smoke", "--output", str(tmp_path), "--device", "cpu", *more])
    found = results_of(tmp_path / "search.json")
    assert [record["lr"] for record in found["records"]] == pytest.approx([0.052, 0.004])
    last = nasfx.Architecture.from_json(tmp_path / "epoch_1.json")
    assert last == nasfx.Architecture.from_json(tmp_path / "architecture.json")
    assert (tmp_path / "epoch_0.json").is_file()
    assert {len(p) for p in found["probabilities"].values()} == {8}


@pytest.mark.slow
def test_darts_retrain(darts_scripts: Any, tmp_path: Path) -> None:
    smoke = ["--smoke", "--output", str(tmp_path), "--device", "cpu"]
    darts_scripts.retrain.main([*smoke, "--arc-checkpoint", "DARTS_V2"])
    results = results_of(tmp_path / "retrain.json")
    # Parameters are counted without the auxiliary head, which is trained.
    state = torch.load(tmp_path / "retrain.pt")
    assert any(name.startswith("head.") for name in state)
    without = {n: v for n, v in state.items() if not n.startswith("head.")}
    learnt = [v for n, v in without.items() if n.endswith(("weight", "bias"))]
    assert results["params"] == sum(v.numel() for v in learnt)
    assert len(results["records"]) == 2
