"""Calibrating predictors: what is written, who reads it, and that nothing stays without a price."""

import json
import math
import os
import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from torch import nn

from nasfx.costs import nnmeter
from nasfx.costs.predictors import predict, read_predictor
from nasfx.costs.profiling import known_hardware, profile
from nasfx.errors import ProfileError
from nasfx.export.onnx import export_onnx

pytestmark = pytest.mark.skipif(find_spec("nn_meter") is None, reason="nn-meter is not installed")
ensemble = pytest.importorskip("sklearn.ensemble", reason="scikit-learn is not installed")

from nasfx.costs.calibration import calibrate, mnn_nodes, node_milliseconds  # noqa: E402
from nasfx.costs.calibration.accuracy import Calibration, accuracy, scale_to  # noqa: E402
from nasfx.costs.calibration.builder import Builder  # noqa: E402
from nasfx.costs.calibration.chains import build_chains, draw_chains  # noqa: E402
from nasfx.costs.calibration.folder import (  # noqa: E402
    check_folder,
    register_predictor,
    write_folder,
)
from nasfx.costs.calibration.fusions import fusion_rules  # noqa: E402
from nasfx.costs.calibration.nets import FAMILIES, random_net  # noqa: E402
from nasfx.costs.calibration.nodes import Graph, share_copies  # noqa: E402
from nasfx.costs.calibration.regressor import LatencyRegressor, fit  # noqa: E402

needs_mnn = pytest.mark.skipif(find_spec("MNN") is None, reason="MNN is not installed")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(path))
        yield path


def tiny(runtime: str, folder: Path, **options) -> Calibration:
    return calibrate(runtime, folder, kernels=1, seconds=0.1, nets=2, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory, home) -> Calibration:
    return tiny("onnxruntime", tmp_path_factory.mktemp("calibrated") / "here")


class Blocks(nn.Module):
    """One of everything that the blocks of mobile nets hold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 5, 1, 2, groups=16), nn.ReLU6())
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1)
        )
        self.grouped = nn.Sequential(nn.Conv2d(16, 16, 1, groups=4), nn.ReLU())
        self.branch = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Sequential(nn.Linear(16, 32), nn.Hardswish(), nn.Linear(32, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depthwise(x)
        x = x + y * torch.nn.functional.hardsigmoid(self.squeeze(y))
        x = torch.nn.functional.silu(x) + torch.sigmoid(self.squeeze(x)) * x
        x = self.grouped(x)
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = nn.functional.max_pool2d(x, 3, 2, 1) + nn.functional.avg_pool2d(x, 3, 2, 1)
        x = torch.relu(self.norm(x))
        return self.head(torch.relu(x + 1 * self.grouped(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("blocks") / "blocks.onnx"
    return export_onnx(Blocks().eval(), path, torch.randn(1, 3, 32, 32))


def meta(folder: Path) -> dict:
    return yaml.safe_load((folder / "meta.yaml").read_text())


def test_the_folder_is_that_of_an_nn_meter_predictor(made):
    entry = meta(made.folder)
    assert entry["name"] == made.name == "here"
    assert entry["package_location"] == str(made.folder.absolute())
    files = {path.name for path in made.folder.iterdir()}
    listed = {f"{kernel}.pkl" for kernel in entry["kernel_predictors"]}
    assert files == listed | {"fusion_rules.json", "meta.yaml"}
    assert set(made.kernels) == set(entry["kernel_predictors"])
    assert {"conv-bn-relu", "dwconv-bn-relu", "fc", "maxpool", "avgpool", "concat", "add"} <= set(
        made.kernels
    )
    rules = json.loads((made.folder / "fusion_rules.json").read_text())
    assert rules["BF_conv_relu"]["obey"] is True


def theirs(folder: Path):
    nn_meter = nnmeter.import_nnmeter()
    from nn_meter.predictor.utils import loading_customized_predictor

    return nn_meter, *loading_customized_predictor(meta(folder))


def test_nn_meter_itself_reads_the_predictors_and_agrees(made):
    _, predictors, rules = theirs(made.folder)
    assert rules == str(made.folder.absolute() / "fusion_rules.json")
    assert set(predictors) == set(made.kernels)
    widths = {"conv-bn-relu": 7, "dwconv-bn-relu": 7, "nasfx-gconv": 6, "fc": 4, "concat": 6}
    widths |= {"maxpool": 5, "avgpool": 5, "add": 3, "addrelu": 3}
    rng = np.random.default_rng(0)
    for kernel, predictor in predictors.items():
        rows = rng.integers(1, 64, (20, widths.get(kernel, 2))).astype(float)
        values = predict(made.folder / f"{kernel}.pkl", rows.tolist())
        np.testing.assert_array_equal(values, predictor.predict(rows.tolist()))
        assert all(math.isfinite(value) and value > 0 for value in values)


def test_nn_meter_itself_predicts_the_same_for_a_net(made, tmp_path):
    # Of kernels that nn-Meter has features for, and describes as they are.
    net = Builder()
    x = net.conv(net.input(1, 3, 32, 32), 16, 3, 2, act="relu")
    y = net.conv(net.conv(x, 16, 3, groups=16, act="relu6"), 16)
    x = net.pool(net.add(x, y), "MaxPool", 2, 2)
    x = net.concat(net.conv(x, 8), net.conv(x, 24, 5))
    net.output(net.conv(x, 4))
    onnx.save(net.model(), tmp_path / "net.onnx")
    nn_meter, predictors, rules = theirs(made.folder)
    expected = nn_meter.nnMeterPredictor(predictors, rules).predict(
        onnx.load(tmp_path / "net.onnx"), "onnx"
    )
    result = profile(tmp_path / "net.onnx", str(made.folder))
    assert result.coverage == (1, 1)
    assert result.milliseconds == pytest.approx(expected, rel=1e-12)


def test_nothing_is_left_without_a_price(made, blocks):
    result = profile(blocks, str(made.folder))
    assert [(k.type, k.nodes, k.reason) for k in result.kernels if k.milliseconds is None] == []
    assert {"dwconv", "maxpool", "avgpool", "concat", "split", "channelshuffle", "fc"} <= {
        kernel.type.split("-")[0] for kernel in result.kernels
    }
    assert all(k.milliseconds > 0 and math.isfinite(k.milliseconds) for k in result.kernels)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_nets_are_valid_and_priced(made, tmp_path, family):
    model = random_net(family, 3)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "net.onnx")
    result = profile(tmp_path / "net.onnx", str(made.folder))
    assert result.coverage == (1, 1)
    assert model.SerializeToString() == random_net(family, 3).SerializeToString()
    assert model.SerializeToString() != random_net(family, 4).SerializeToString()


def test_a_grouped_convolution_has_a_price_of_its_own(made, tmp_path):
    prices = []
    for groups in (1, 4):
        net = Builder()
        net.output(net.conv(net.input(1, 16, 8, 8), 16, 3, groups=groups))
        onnx.save(net.model(), tmp_path / "net.onnx")
        (kernel,) = profile(tmp_path / "net.onnx", str(made.folder)).kernels
        prices.append((kernel.features, kernel.reason))
    assert prices[0] == ((8, 16, 16, 3, 1, 8 * 8 * 16 * 145 / 1e6, 16 * 145 / 1e6), "")
    assert prices[1] == ((8, 16, 16, 3, 1, 4), "")


def test_the_report(made):
    text = str(made)
    assert [row.estimate for row in made.accuracies] == [
        "predicted",
        "MACs x a constant",
        "measured again",
    ]
    assert all(row.count == 2 for row in made.accuracies)
    assert "Spearman" in text
    assert "random nets" in text
    assert str(sum(made.kernels.values())) in text
    assert max(map(len, text.splitlines())) <= 100


def test_accuracy_of_known_numbers():
    row = accuracy("nets", "estimate", [1.0, 2.0, 4.0, 3.0], [1.0, 2.1, 3.0, 6.0])
    # Ranks 1 2 4 3 against 1 2 3 4: one swap of neighbours is 1 - 6 * 2 / (4 * 15).
    assert row.spearman == pytest.approx(0.8)
    assert row.mape == pytest.approx((0 + 0.1 / 2.1 + 1 / 3 + 0.5) / 4)
    assert row.within_10_percent == 0.5
    assert scale_to([1, 2, 10], [3, 6, 10]) == 3
    assert accuracy("nets", "constant", [1.0, 1.0], [1.0, 2.0]).spearman == 0


@pytest.mark.slow
def test_subnets_of_a_space_give_a_scale(tmp_path, blocks):
    folder = tmp_path / "scaled"
    result = tiny("onnxruntime", folder, space=[blocks] * 4, name="scaled-laptop", register=True)
    assert profile(blocks, "scaled-laptop").hardware == "scaled-laptop"
    assert [row.count for row in result.accuracies] == [2] * 6
    assert result.scale > 0
    assert read_predictor(folder / "fc.pkl").factor == result.scale
    with pytest.raises(ProfileError, match="at least four"):
        tiny("onnxruntime", folder, space=[blocks] * 3)


def test_a_registered_calibration_is_known_by_its_name(blocks, made):
    register_predictor(made.folder)
    register_predictor(made.folder)
    assert known_hardware().count("here") == 1
    assert "cortexA76cpu_tflite21" in known_hardware()
    by_name, by_path = profile(blocks, "here"), profile(blocks, str(made.folder))
    assert by_name.milliseconds == by_path.milliseconds


def test_an_incomplete_folder_is_an_error(tmp_path, made, blocks):
    folder = tmp_path / "part"
    folder.mkdir()
    with pytest.raises(ProfileError, match=r"there is no fusion_rules\.json"):
        profile(blocks, str(folder))
    for path in made.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert nnmeter.predictor_folder(folder) == folder
    (folder / "fc.pkl").unlink()
    with pytest.raises(ProfileError, match=r"there is no fc\.pkl"):
        profile(blocks, str(folder))
    (folder / "meta.yaml").write_text("- 3")
    with pytest.raises(ProfileError, match=r"meta\.yaml is damaged"):
        profile(blocks, str(folder))


# What is refused.


def test_wrong_arguments(tmp_path):
    with pytest.raises(ProfileError, match="'onnxruntime', 'mnn'; got 'tflite'"):
        calibrate("tflite", tmp_path / "x")  # type: ignore[arg-type]
    for wrong in ({"kernels": 0}, {"seconds": 0}, {"nets": 1}):
        with pytest.raises(ProfileError, match="at least"):
            calibrate("onnxruntime", tmp_path / "x", **wrong)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ProfileError, match=r"thesis\.tex"):
        calibrate("onnxruntime", tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    (tmp_path / "thesis.tex").rename(tmp_path / "weights.pkl")
    with pytest.raises(ProfileError, match=r"weights\.pkl"):
        calibrate("onnxruntime", tmp_path)


def test_an_earlier_calibration_is_replaced(tmp_path, made):
    (tmp_path / "fusion_rules.json").write_text("{}")
    (tmp_path / "meta.yaml").write_text("name: old")
    (tmp_path / "old.pkl").write_bytes(b"")
    check_folder(tmp_path)
    predictor = read_predictor(made.folder / "fc.pkl")
    write_folder(tmp_path, "new", "mnn", {"MON": {"obey": 0}}, {"fc": predictor})
    assert {path.name for path in tmp_path.iterdir()} == {
        "fusion_rules.json",
        "meta.yaml",
        "fc.pkl",
    }
    assert meta(tmp_path)["name"] == "new"


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_calibrated_predictor_is_refused_and_not_run(tmp_path, made):
    good = pickle.loads((made.folder / "fc.pkl").read_bytes())
    path, touched = tmp_path / "fc.pkl", tmp_path / "touched"
    for part in ("kind", "weights", "forest", "factor"):
        evil = LatencyRegressor(good.kind, good.weights, good.forest)
        setattr(evil, part, Touch(touched))
        path.write_bytes(pickle.dumps(evil))
        with pytest.raises(ProfileError, match=r"asks for (posix|nt)\.system"):
            read_predictor(path)
    assert not touched.exists()
    pickle.loads(path.read_bytes())
    assert touched.exists()  # so the pickle was able to


def test_a_damaged_calibrated_predictor_is_refused(tmp_path, made):
    good = pickle.loads((made.folder / "fc.pkl").read_bytes())
    other = pickle.loads((made.folder / "conv-bn-relu.pkl").read_bytes())
    path = tmp_path / "fc.pkl"
    damaged = [
        LatencyRegressor("fc", good.weights[:-1], good.forest),
        LatencyRegressor("fc", good.weights, other.forest),
        LatencyRegressor("conv-bn-relu", good.weights, good.forest),
        LatencyRegressor("fc", good.weights, "forest"),
        LatencyRegressor(3, good.weights, good.forest),  # type: ignore[arg-type]
    ]
    for wrong in damaged:
        path.write_bytes(pickle.dumps(wrong))
        with pytest.raises(ProfileError, match="damaged"):
            read_predictor(path)


# Fitting.


def conv_rows(rng: np.random.Generator, count: int) -> np.ndarray:
    h = rng.integers(5, 60, count)
    cin, cout = 8 * rng.integers(1, 40, (2, count))
    k, s = rng.choice([1, 3, 5, 7], count), rng.choice([1, 2], count)
    weights = cout * (k * k * cin + 1)
    return np.stack([h, cin, cout, k, s, (h / s) ** 2 * weights / 1e6, weights / 1e6], 1)


def known_latency(rows: np.ndarray) -> np.ndarray:
    """A roofline of a made-up runtime that works in vectors of 16 and is slow at stride 2."""
    h, cin, cout, k, s = rows[:, :5].T
    macs = np.ceil(h / s) ** 2 * k * k * 16 * np.ceil(cin / 16) * 16 * np.ceil(cout / 16)
    moved = 4 * (h * h * cin + np.ceil(h / s) ** 2 * cout + k * k * cin * cout)
    return 2e-3 + np.maximum(macs / 5e7, moved / 1e7) * np.where(s == 2, 1.2, 1.0)


def test_the_regressor_recovers_a_known_function():
    rng = np.random.default_rng(0)
    rows, unseen = conv_rows(rng, 600), conv_rows(rng, 200)
    noise = np.exp(rng.normal(0, 0.02, 600))
    predictor = fit("conv-bn-relu", rows.tolist(), (known_latency(rows) * noise).tolist())
    errors = np.abs(predictor.predict(unseen.tolist()) / known_latency(unseen) - 1)
    # 0.9 % and 2.1 %; without the forest 1.8 % and 4.4 %, without whole vectors 3.3 % and 5.8 %.
    assert np.median(errors) < 0.013
    assert np.mean(errors) < 0.03


def test_the_regressor_extrapolates():
    rng = np.random.default_rng(1)
    rows = conv_rows(rng, 600)
    predictor = fit("conv-bn-relu", rows.tolist(), known_latency(rows).tolist())
    large = np.array([[112, 512, 512, 3, 1, 0, 0], [112, 512, 256, 1, 1, 0, 0]], float)
    assert np.all(np.abs(predictor.predict(large.tolist()) / known_latency(large) - 1) < 0.3)


@pytest.mark.parametrize("kind", ["maxpool", "fc", "concat", "add", "relu", "nasfx-mul"])
def test_every_kind_is_fitted_to_its_features(kind):
    rng = np.random.default_rng(2)
    width = {"maxpool": 5, "fc": 4, "concat": 6, "add": 3}.get(kind, 2)
    rows = 16 * rng.integers(1, 12, (200, width)).astype(float)
    if kind == "maxpool":
        rows[:, 2], rows[:, 3:] = rows[:, 1], rng.integers(1, 4, (200, 2))
    # A time that grows with what is worked on, and a constant.
    channels = rows[:, 2 if kind == "concat" else 1 :].sum(1)
    size = {"fc": rows[:, 0] * rows[:, 1], "nasfx-mul": rows[:, 0]}.get(kind)
    times = 0.01 + 1e-4 * (rows[:, 0] ** 2 * channels if size is None else size)
    predictor = fit(kind, rows[:150].tolist(), times[:150].tolist())
    errors = np.abs(predictor.predict(rows[150:].tolist()) / times[150:] - 1)
    assert np.median(errors) < 0.15


def test_times_of_zero_are_fitted_and_predicted_as_nearly_nothing():
    rows = [[float(n), float(n)] for n in range(1, 40)]
    predictor = fit("nasfx-reshape", rows, [0.0] * len(rows))
    values = predictor.predict(rows)
    assert np.all((values > 0) & (values < 1e-3))
    np.testing.assert_allclose(predictor.scaled(3.0).predict(rows), 3 * values, rtol=1e-12)


# Times of nodes.


def chain() -> Builder:
    net = Builder()
    x = net.conv(net.input(1, 16, 16, 16), 32, act="relu")
    x = net.shuffle(net.concat(x, net.conv(x, 32)), 2)
    net.output(net.conv(x, 16))
    return net


def test_every_node_has_a_time_and_fused_ones_have_none():
    model = chain().model()
    took = node_milliseconds(model, "onnxruntime", repeats=2)
    assert list(took) == [node.name for node in model.graph.node]
    assert took["0.Conv"] > 0
    assert took["1.Relu"] == 0
    assert all(value >= 0 for value in took.values())


def test_what_a_runtime_splits_up_is_the_time_of_its_node():
    # ONNX Runtime runs this HardSwish as two operators without a name, after a concatenation.
    net = Builder()
    x = net.input(1, 16, 64, 64)
    x = net.act(net.concat(net.conv(x, 64), net.conv(x, 64)), "hswish")
    net.output(net.conv(net.act(net.conv(x, 64), "swish"), 16))
    model = net.model()
    took = node_milliseconds(model, "onnxruntime", repeats=4)
    kinds = {node.op_type: node.name for node in model.graph.node}
    assert took[kinds["HardSwish"]] > 0
    assert took[kinds["Sigmoid"]] > 0  # the first of the two that are one operator there
    assert took[kinds["Mul"]] == 0


def test_node_milliseconds_refuses_what_it_cannot_name():
    model = chain().model()
    with pytest.raises(ProfileError, match="repeats is at least 1"):
        node_milliseconds(model, "onnxruntime", repeats=0)
    with pytest.raises(ProfileError, match="got 'tvm'"):
        node_milliseconds(model, "tvm")  # type: ignore[arg-type]
    model.graph.node[1].name = model.graph.node[0].name
    with pytest.raises(ProfileError, match="unique"):
        node_milliseconds(model, "onnxruntime")


def test_copies_are_shared_among_the_nodes_that_ask_for_them():
    graph = Graph.of(chain().model())
    names = list(graph.nodes)
    assert names[3:7] == ["3.Concat", "4.Reshape", "5.Transpose", "6.Reshape"]
    times = dict.fromkeys(names, 0.0)
    share_copies(graph, "7.Conv", 2.0, times, {"0.Conv": 1, "2.Conv": 1, "7.Conv": 1})
    assert {n: t for n, t in times.items() if t} == {"3.Concat": 1.0, "5.Transpose": 1.0}
    share_copies(graph, "0.Conv", 0.5, times, {})
    assert times["0.Conv"] == 0.5


def test_operators_of_mnn_are_assigned_to_nodes():
    graph = Graph.of(chain().model())
    row = [
        ["0.Conv.out0_raster_0", "Raster", [3.0] * 8],
        ["0.Conv.out0", "Convolution", [5.0] * 8],
        ["2.Conv.out0__group__1", "Convolution", [4.0] * 8],
        ["7.Conv.out0_raster_0", "Raster", [2.0] * 8],
        ["BinaryOp13", "BinaryOp", [7.0] * 8],
        ["7.Conv.out0", "Convolution", [6.0, 90.0, 6.0, 6.0, 50.0, 6.0, 6.0, 6.0]],
    ]
    times = mnn_nodes._assign(graph, row, 1.0)
    expected = {"0.Conv": 2 + 4, "2.Conv": 3, "3.Concat": 0.5, "5.Transpose": 0.5, "7.Conv": 6 + 5}
    assert {name: took for name, took in times.items() if took} == expected


def test_chains_are_valid_and_of_every_kind():
    kinds = draw_chains(0, 60)
    assert len(kinds) == 60
    assert min(kinds.count(kind) for kind in set(kinds)) >= 3
    model = build_chains(0, kinds[:13])
    onnx.checker.check_model(model, full_check=True)
    assert len(draw_chains(0, 1)) == 3 * len(set(kinds))


def test_onnx_runtime_is_found_to_fuse_what_it_fuses():
    rules = fusion_rules("onnxruntime")
    assert rules["BF_conv_relu"]["obey"]
    assert rules["BF_conv_add"]["obey"]
    assert not rules["BF_add_relu"]["obey"]


@needs_mnn
@pytest.mark.slow
def test_mnn_is_calibrated_too(tmp_path, blocks):
    result = tiny("mnn", tmp_path / "mnn")
    priced = profile(blocks, str(result.folder))
    assert [(k.type, k.reason) for k in priced.kernels if k.milliseconds is None] == []
    took = node_milliseconds(chain().model(), "mnn", repeats=2)
    assert took["1.Relu"] == 0
    assert took["0.Conv"] > 0
