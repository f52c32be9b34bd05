"""The sources that go by ONNX: what is searched is what `profile` says of the exported subnet."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import nasfx
from nasfx import Latency, LayerChoice, ProfileError, Supernet
from nasfx.costs import Measured, NnMeter, calibration
from tests.costs.test_nnmeter import RULES, WIDTHS

pytestmark = pytest.mark.skipif(find_spec("nn_meter") is None, reason="nn-meter is not installed")
ensemble = pytest.importorskip("sklearn.ensemble", reason="scikit-learn is not installed")

X = torch.zeros(2, 3, 16, 16)


def conv(channels: int, kernel: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel, 1, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class Residual(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Net(nn.Module):
    """Nested and repeated choices; whatever a runtime merges stands within one part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        inner = LayerChoice({"conv3": conv(8, 3), "pool": nn.MaxPool2d(3, 1, 1)}, label="inner")
        self.block = LayerChoice(
            {
                "dense": conv(8, 5),
                "residual": Residual(inner),
                "depthwise": nn.Sequential(conv(8, 3, groups=8), conv(8, 1)),
                "skip": nn.Identity(),
            },
            label="block",
        )
        self.again = LayerChoice(
            {"dense": conv(8, 5), "pool": nn.AvgPool2d(3, 1, 1)}, label="again"
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.block(self.stem(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictors in nn-Meter's format, of made-up latencies."""
    folder = tmp_path_factory.mktemp("made") / "phone"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, width in WIDTHS.items():
        x = generator.random((40, width)) * 50
        forest = ensemble.RandomForestRegressor(5, random_state=0).fit(x, x.sum(1) / 10)
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(forest))
    (folder / "fusion_rules.json").write_text(json.dumps(RULES))
    return folder


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def priced(source: Any) -> Supernet:
    return nasfx.transform(
        Net(), "single-path", example_inputs=X, objective=Latency(source, max=1e9)
    )


def exported(net: Supernet, folder: Path) -> dict[nasfx.Architecture, Path]:
    return {
        arch: nasfx.export_onnx(nasfx.finalize(net, arch), folder / f"{i}.onnx", X[:1])
        for i, arch in enumerate(net.space.enumerate())
    }


def test_nnmeter_prices_a_subnet_as_profile_does(folder: Path, tmp_path: Path) -> None:
    net = priced(str(folder))
    assert net.objectives[0].name == "latency:phone"
    for arch, path in exported(net, tmp_path).items():
        profile = nasfx.profile(path, folder)
        assert net.space.costs["latency:phone"](arch) == pytest.approx(
            profile.milliseconds, rel=1e-9
        ), arch


def test_a_measurement_counts_every_node_of_the_subnet_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_each(model: Any, runtime: str, *, repeats: int) -> Mapping[str, float]:
        assert (runtime, repeats) == ("mnn", 7)
        return {node.name: 1.0 for node in model.graph.node}

    monkeypatch.setattr(calibration, "node_milliseconds", one_each)
    net = priced(Measured("mnn", repeats=7))
    for arch, path in exported(net, tmp_path).items():
        assert net.space.costs["latency:mnn"](arch) == len(onnx.load(path).graph.node), arch


def test_what_has_no_price_is_named(folder: Path, tmp_path: Path) -> None:
    poor = tmp_path / "poor"
    poor.mkdir()
    for file in folder.iterdir():
        if file.name != "maxpool.pkl":
            (poor / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ProfileError) as caught:
        priced(NnMeter(str(poor)))
    assert "block.residual.block.pool (candidate 'pool' of choice 'inner'" in str(caught.value)
    assert "no maxpool.pkl" in str(caught.value)
    net = priced(NnMeter(str(poor), minimum_coverage=0.0))
    known = priced(str(folder))
    with_pool = {"block": "residual", "inner": "pool", "again": "dense"}
    less, more = (n.space.costs[n.objectives[0].name](with_pool) for n in (net, known))
    assert less < more


def test_a_truncated_predictor(folder: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in folder.iterdir():
        (cut / file.name).write_bytes(file.read_bytes())
    whole = (cut / "conv-bn-relu.pkl").read_bytes()
    (cut / "conv-bn-relu.pkl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ProfileError, match="is damaged"):
        priced(str(cut))


def test_hardware_that_nobody_knows() -> None:
    with pytest.raises(
        ProfileError, match=r"no predictor named 'cortexA76cpu_tflite2'.*Did you mean"
    ):
        priced("cortexA76cpu_tflite2")


class Unexportable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x.double()).real.to(x.dtype).unsqueeze(-1) + x


def test_a_part_that_cannot_be_exported_is_named(folder: Path) -> None:
    model = nn.Sequential(
        LayerChoice({"odd": Unexportable(), "plain": nn.ReLU()}, label="act"), nn.Conv2d(3, 3, 1)
    )
    with pytest.raises(ProfileError, match="candidate 'odd' of choice 'act'"):
        nasfx.latency_table(model, X, str(folder))
