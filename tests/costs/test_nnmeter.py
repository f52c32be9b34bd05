"""nasfx.profile on predictors made here, in nn-Meter's own format; nothing reaches the network."""

import importlib.resources
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxsim
import pytest
import requests
import torch
import yaml
from onnx import TensorProto, helper
from torch import nn

from nasfx.costs import nnmeter
from nasfx.costs.predictors import predict, read_predictor
from nasfx.costs.profiling import Profile, known_hardware, profile
from nasfx.errors import ProfileError

pytestmark = pytest.mark.skipif(find_spec("nn_meter") is None, reason="nn-meter is not installed")
ensemble = pytest.importorskip("sklearn.ensemble", reason="scikit-learn is not installed")

A76 = "cortexA76cpu_tflite21"
WIDTHS = {
    "conv-bn-relu": 7,
    "dwconv-bn-relu": 7,
    "fc": 4,
    "maxpool": 5,
    "avgpool": 5,
    "concat": 6,
    "add": 3,
    "addrelu": 3,
    **dict.fromkeys(["global-avgpool", "hswish", "relu", "se", "split", "channelshuffle"], 2),
    **dict.fromkeys(["bn", "bnrelu"], 2),
}
# The schema of nn-Meter's rule files: fusions that were measured ("latency") and found ("obey").
RULES = {
    "RBC": {"latency": {}, "obey": None},
    "MON": {"latency": {}, "obey": None},
    "RT": {"obey": False},
    "BF_conv_bn_relu": {"obey": True},
    "BF_conv_relu": {
        "latency": {"conv": "7080.23 +- 49.0", "block": "6997.2 +- 658.0"},
        "obey": True,
    },
    "BF_conv_hswish": {"obey": True},
    "BF_dwconv_relu": {"obey": True},
    "BF_add_relu": {"obey": True},
    "BF_relu_conv": {"latency": {}, "obey": False},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU6())
        self.pointwise = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(16 * 8 * 8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.pointwise(self.depthwise(x)))
        return self.fc(self.pool(x).flatten(1))


def export(net: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and onnxscript's own
        torch.onnx.export(
            net.eval(),
            (torch.randn(1, 3, 32, 32),),
            path,
            dynamo=True,
            opset_version=18,
            external_data=False,
            verbose=False,
        )
    model, same = onnxsim.simplify(onnx.load(path))
    assert same
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module", autouse=True)
def _module_home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def net_path(tmp_path_factory) -> Path:
    return export(Net(), tmp_path_factory.mktemp("onnx") / "net.onnx")


@pytest.fixture(scope="module")
def forests():
    generator = np.random.default_rng(0)
    made = {}
    for name, width in WIDTHS.items():
        x = generator.random((40, width)) * 50
        made[name] = ensemble.RandomForestRegressor(5, random_state=0).fit(x, x.sum(1) / 10)
    return made


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    def no_network(url, **_):
        raise requests.ConnectionError(f"no route to {url}")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(requests, "get", no_network)
    return tmp_path


def write_predictors(folder: Path, forests) -> Path:
    folder.mkdir(parents=True)
    (folder / "fusion_rules.json").write_text(json.dumps(RULES))
    for name, forest in forests.items():
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(forest))
    return folder


@pytest.fixture
def folder(home, forests) -> Path:
    return write_predictors(home / ".nn_meter" / "data" / "predictor" / A76, forests)


def save(path: Path, nodes, shape_in, shape_out, weights=None) -> Path:
    """An ONNX file of one input "x" and one output "y"; weights by name and shape."""
    initializers = [
        helper.make_tensor(name, TensorProto.FLOAT, shape, np.ones(int(np.prod(shape))))
        for name, shape in (weights or {}).items()
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape_in)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape_out)],
        initializers,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


def by_type(result: Profile):
    return {kernel.type: kernel for kernel in result.kernels}


def conv_features(height, cin, cout, size, stride, *, depthwise=False):
    # As nn-Meter publishes them: millions of FLOPs (halved) and of parameters, with the bias.
    weights = cout * (size * size * (1 if depthwise else cin) + 1)
    flops = 2 * (height / stride) ** 2 * weights
    return [height, cin, cout, size, stride, flops / 2e6, weights / 1e6]


def test_the_sum_is_that_of_the_predictors(folder, forests, net_path):
    result = profile(net_path, A76)
    rows = {
        "conv-relu": ("conv-bn-relu", conv_features(32, 3, 16, 3, 2)),
        "dwconv-relu": ("dwconv-bn-relu", conv_features(16, 16, 16, 3, 1, depthwise=True)),
        "conv": ("conv-bn-relu", conv_features(16, 16, 16, 1, 1)),
        "add-relu": ("addrelu", [16, 16, 16]),
        "maxpool": ("maxpool", [16, 16, 16, 2, 2]),
        "fc": ("fc", [1024, 10, 2049 * 10 / 2e6, 2049 * 10 / 1e6]),
    }
    kernels = by_type(result)
    assert set(kernels) == {*rows, "reshape"}
    total = 0.0
    for name, (predictor, row) in rows.items():
        expected = float(forests[predictor].predict([row])[0])
        assert kernels[name].features == pytest.approx(row)
        assert kernels[name].milliseconds == expected
        total += expected
    assert result.milliseconds == pytest.approx(total, rel=1e-12)


def test_every_node_is_in_one_kernel_with_its_macs(folder, net_path):
    result = profile(net_path, A76)
    nodes = [node for kernel in result.kernels for node in kernel.nodes]
    assert sorted(nodes) == sorted(n.name for n in onnx.load(net_path).graph.node)
    kernels = by_type(result)
    assert kernels["conv-relu"].macs == 16 * 16 * 16 * 27
    assert kernels["dwconv-relu"].macs == 16 * 16 * 16 * 9
    assert kernels["conv"].macs == 16 * 16 * 16 * 16
    assert kernels["fc"].macs == 1024 * 10
    assert kernels["reshape"].milliseconds is None
    assert "no features" in kernels["reshape"].reason
    assert result.coverage == (pytest.approx(6 / 7), 1.0)
    assert result.hardware == A76


def test_agrees_with_nn_meter_where_nn_meter_is_right(folder, forests, net_path):
    nn_meter = nnmeter.import_nnmeter()
    theirs = nn_meter.nnMeterPredictor(dict(forests), str(folder / "fusion_rules.json"))
    expected = theirs.predict(onnx.load(net_path), "onnx")
    assert profile(net_path, A76).milliseconds == pytest.approx(expected, rel=1e-12)


def test_prints_a_table_of_kernels(folder, net_path):
    text = str(profile(net_path, A76))
    assert A76 in text
    assert "a prediction" in text
    assert "85.7 % of 7 kernels" in text
    assert all(node.name in text for node in onnx.load(net_path).graph.node)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text


def test_a_missing_predictor_lowers_the_coverage(folder, net_path):
    full = profile(net_path, A76)
    (folder / "dwconv-bn-relu.pkl").unlink()
    result = profile(net_path, A76, minimum_coverage=0.5)
    macs = sum(kernel.macs for kernel in full.kernels)
    kernel = by_type(result)["dwconv-relu"]
    assert kernel.milliseconds is None
    assert kernel.reason == "no dwconv-bn-relu.pkl among the predictors"
    assert result.coverage == (pytest.approx(5 / 7), pytest.approx(1 - kernel.macs / macs))
    lost = by_type(full)["dwconv-relu"].milliseconds
    assert result.milliseconds == pytest.approx(full.milliseconds - lost)


def test_too_little_coverage_is_an_error(folder, net_path):
    (folder / "conv-bn-relu.pkl").unlink()
    with pytest.raises(ProfileError) as caught:
        profile(net_path, A76)
    message = str(caught.value)
    assert "the 90.0 % asked for" in message
    assert "conv-relu (" in message
    assert "no conv-bn-relu.pkl" in message
    threshold = float(message.rsplit("minimum_coverage=", 1)[1].rstrip("."))
    assert profile(net_path, A76, minimum_coverage=threshold).coverage.macs < 0.9


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_the_threshold_is_a_fraction(net_path, threshold):
    with pytest.raises(ProfileError, match="fraction from 0 to 1"):
        profile(net_path, A76, minimum_coverage=threshold)


def test_unknown_hardware_names_the_known_and_the_nearest(net_path):
    with pytest.raises(ProfileError, match=f"Did you mean '{A76}'") as caught:
        profile(net_path, "cortexA76_tflite")
    assert all(name in str(caught.value) for name in known_hardware())
    assert "adreno640gpu_tflite21" in known_hardware()


def test_offline_says_where_the_files_belong(home, net_path):
    with pytest.raises(ProfileError, match="ConnectionError") as caught:
        profile(net_path, A76)
    message = str(caught.value)
    assert str(home / ".nn_meter" / "data" / "predictor" / A76) in message
    assert "conv-bn-relu.pkl" in message
    assert "fusion_rules.json" in message
    assert "https://github.com/microsoft/nn-Meter/releases" in message


def answer(monkeypatch, body: bytes) -> None:
    response = SimpleNamespace(headers={}, iter_content=lambda size: [body])
    monkeypatch.setattr(requests, "get", lambda url, **_: response)


def test_a_download_that_works_is_used(home, tmp_path, forests, net_path, monkeypatch):
    source = write_predictors(tmp_path / "published" / A76, forests)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for path in source.iterdir():
            file.write(path, f"{A76}/{path.name}")
    (home / ".nn_meter" / "config").mkdir(parents=True)
    settings = home / ".nn_meter" / "config" / "settings.yaml"
    settings.write_text(yaml.safe_dump({"data_folder": str(tmp_path / "elsewhere")}))
    answer(monkeypatch, archive.getvalue())
    assert profile(net_path, A76).milliseconds > 0
    assert (tmp_path / "elsewhere" / "predictor" / A76 / "fc.pkl").is_file()


def test_a_download_of_something_else_leaves_nothing(home, net_path, monkeypatch):
    answer(monkeypatch, b"<html>404</html>")
    with pytest.raises(ProfileError, match="BadZipFile"):
        profile(net_path, A76)
    assert not list((home / ".nn_meter" / "data" / "predictor").iterdir())


def register(home: Path, monkeypatch, meta: dict) -> None:
    nnmeter.import_nnmeter()
    from nn_meter.utils.nn_meter_cli import registry

    config = home / ".nn_meter" / "config"
    config.mkdir(parents=True, exist_ok=True)
    packaged = importlib.resources.files("nn_meter") / "configs" / "predictors.yaml"
    (config / "predictors.yaml").write_text(packaged.read_text())
    (home / "meta.yaml").write_text(yaml.safe_dump(meta))
    monkeypatch.setattr(registry, "__user_config_folder__", str(config))
    registry.register_predictor(str(home / "meta.yaml"))


def test_a_registered_predictor_is_used(home, forests, net_path, monkeypatch):
    folder = write_predictors(home / "mine", forests)
    meta = {"name": "my_phone", "version": 1.0, "category": "cpu"}
    meta |= {"package_location": str(folder), "kernel_predictors": list(WIDTHS)}
    register(home, monkeypatch, meta)
    assert known_hardware()[-1] == "my_phone"
    assert profile(net_path, "my_phone").milliseconds > 0
    (folder / "fusion_rules.json").unlink()
    with pytest.raises(ProfileError, match=r"is not in its folder .*mine"):
        profile(net_path, "my_phone")


@pytest.mark.parametrize("content", ["- name: [", "{}", "- 3", "- {version: 1}"])
def test_a_damaged_list_of_predictors_is_an_error(home, content):
    (home / ".nn_meter" / "config").mkdir(parents=True)
    (home / ".nn_meter" / "config" / "predictors.yaml").write_text(content)
    with pytest.raises(ProfileError, match=r"predictors\.yaml"):
        known_hardware()


@pytest.mark.parametrize("content", ["{", "[]", '{"BF_conv_relu": {}}', '{"BF_conv_relu": 1}'])
def test_damaged_fusion_rules_are_an_error(folder, net_path, content):
    (folder / "fusion_rules.json").write_text(content)
    with pytest.raises(ProfileError, match=r"fusion rules .*fusion_rules\.json are damaged"):
        profile(net_path, A76)


# What nn-Meter gets wrong.


def test_hard_swish_and_global_pooling_are_priced(folder, forests, tmp_path):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    path = export(nn.Sequential(*net, nn.Linear(8, 4)), tmp_path / "n.onnx")
    kernels = by_type(profile(path, A76))
    assert set(kernels) == {"conv-hswish", "gap", "fc"}
    assert kernels["gap"].features == (16, 8)  # nn-Meter asks for (1, 8)
    expected = float(forests["global-avgpool"].predict([[16, 8]])[0])
    assert kernels["gap"].milliseconds == expected


def test_a_grouped_convolution_is_priced_as_dense_and_says_so(folder, tmp_path):
    nodes = [
        helper.make_node(
            "Conv", ["x", "w"], ["c"], "c", group=4, pads=[1] * 4, kernel_shape=[3, 3]
        ),
        helper.make_node("Relu", ["c"], ["y"], "r"),
    ]
    path = save(tmp_path / "g.onnx", nodes, [1, 16, 8, 8], [1, 16, 8, 8], {"w": [16, 4, 3, 3]})
    (kernel,) = profile(path, A76).kernels
    assert kernel.macs == 16 * 4 * 9 * 64
    assert kernel.milliseconds is not None
    assert kernel.reason == "priced as if it had 147,456 MACs"


def test_a_convolution_of_one_channel_is_not_depthwise(folder, tmp_path):
    nodes = [
        helper.make_node(
            "Conv", ["x", "w"], ["c"], "c", group=1, pads=[1] * 4, kernel_shape=[3, 3]
        ),
        helper.make_node("Relu", ["c"], ["y"], "r"),
    ]
    path = save(tmp_path / "g.onnx", nodes, [1, 1, 8, 8], [1, 16, 8, 8], {"w": [16, 1, 3, 3]})
    assert [kernel.type for kernel in profile(path, A76).kernels] == ["conv-relu"]


def test_a_matrix_product_of_many_rows_has_no_price(folder, tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "m"),
        helper.make_node("Relu", ["m"], ["y"], "r"),
    ]
    path = save(tmp_path / "m.onnx", nodes, [1, 50, 16], [1, 50, 4], {"w": [16, 4]})
    with pytest.raises(ProfileError, match="for one of 64 MACs only"):
        profile(path, A76)


def test_a_lone_node_is_not_lost(folder, tmp_path):
    node = helper.make_node("Conv", ["x", "w"], ["y"], "c", kernel_shape=[1, 1])
    path = save(tmp_path / "c.onnx", [node], [1, 16, 8, 8], [1, 4, 8, 8], {"w": [4, 16, 1, 1]})
    (kernel,) = profile(path, A76).kernels
    assert (kernel.type, kernel.nodes, kernel.macs) == ("conv", ("c",), 4096)
    assert kernel.milliseconds is not None


def test_nodes_without_names_or_shapes_are_listed(folder, tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "same;name"),
        helper.make_node("Identity", ["r"], ["i"], "same;name"),
        helper.make_node("Shape", ["i"], ["s"]),
        helper.make_node("Reshape", ["i", "s"], ["y"]),
    ]
    path = save(tmp_path / "c.onnx", nodes, [1, 16, 8, 8], [1, 4, 8, 8], {"w": [4, 16, 1, 1]})
    result = profile(path, A76)
    assert [(k.type, k.nodes) for k in result.kernels] == [
        ("conv-relu", ("Conv_0", "same;name")),
        ("identity", ("same;name",)),
        ("reshape", ("Reshape_4",)),
        ("shape", ("Shape_3",)),
    ]
    assert result.kernels[-1].reason == "nn-Meter's graph leaves it out"


def test_slices_of_one_tensor_stay_connected(folder, tmp_path):
    constants = {
        name: helper.make_tensor(name, TensorProto.INT64, [1], [value])
        for name, value in {"zero": 0, "two": 2, "four": 4, "axis": 1}.items()
    }
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "r"),
        helper.make_node("Slice", ["r", "zero", "two", "axis"], ["a"], "first"),
        helper.make_node("Slice", ["r", "two", "four", "axis"], ["b"], "second"),
        helper.make_node("Conv", ["b", "w"], ["c"], "c", kernel_shape=[1, 1]),
        helper.make_node("Concat", ["a", "c"], ["y"], "cat", axis=1),
    ]
    path = save(tmp_path / "s.onnx", nodes, [1, 4, 8, 8], [1, 4, 8, 8], {"w": [2, 2, 1, 1]})
    model = onnx.load(path)
    model.graph.initializer.extend(constants.values())
    onnx.save(model, path)
    result = profile(path, A76)
    assert [k.type for k in result.kernels] == ["relu", "split", "conv", "concat"]
    kernels = by_type(result)
    assert kernels["split"].nodes == ("first", "second")
    assert kernels["split"].milliseconds is not None
    assert kernels["concat"].features == (8, 2, 2, 2, 0, 0)


def test_an_operator_unknown_to_nn_meter_counts_against_the_coverage(folder, tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "r"),
        helper.make_node("ConvTranspose", ["r", "w"], ["y"], "up", strides=[2, 2]),
    ]
    path = save(tmp_path / "t.onnx", nodes, [1, 4, 8, 8], [1, 6, 16, 16], {"w": [4, 6, 2, 2]})
    result = profile(path, A76, minimum_coverage=0)
    assert by_type(result)["ConvTranspose"].macs == 4 * 8 * 8 * 6 * 2 * 2
    assert result.coverage == (0.5, 0)
    with pytest.raises(ProfileError, match=r"Only 0\.0 % of the MACs"):
        profile(path, A76)


def test_a_mean_over_channels_is_not_a_pooling(folder, tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "r"),
        helper.make_node("ReduceMean", ["r", "axes"], ["y"], "mean"),
    ]
    path = save(tmp_path / "m.onnx", nodes, [1, 4, 8, 8], [1, 1, 8, 8])
    model = onnx.load(path)
    model.graph.initializer.append(helper.make_tensor("axes", TensorProto.INT64, [1], [1]))
    onnx.save(model, path)
    kernel = by_type(profile(path, A76, minimum_coverage=0))["reducemean"]
    assert kernel.milliseconds is None


# What is refused.


@pytest.mark.parametrize("content", [None, b"", b"not an onnx file at all"])
def test_a_file_that_is_no_model_is_an_error(tmp_path, content):
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProfileError, match=r"broken\.onnx"):
        profile(path, A76)


@pytest.mark.parametrize(
    ("batch", "message"), [("N", "dynamic shape"), (None, "dynamic shape"), (8, "batch size 8")]
)
def test_a_batch_other_than_one_is_an_error(tmp_path, batch, message):
    shape = [batch, 4, 8, 8]
    path = save(tmp_path / "n.onnx", [helper.make_node("Relu", ["x"], ["y"], "r")], shape, shape)
    with pytest.raises(ProfileError, match=message):
        profile(path, A76)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_prediction_that_is_no_latency_is_an_error(folder, forests, net_path, value):
    forest = pickle.loads(pickle.dumps(forests["fc"]))
    for tree in forest.estimators_:
        tree.tree_.value[:] = value
    (folder / "fc.pkl").write_bytes(pickle.dumps(forest))
    with pytest.raises(ProfileError, match=r"fc\.pkl predicts (-1\.0|nan|inf) ms"):
        profile(net_path, A76)


def test_a_predictor_of_other_features_is_an_error(folder, forests, net_path):
    (folder / "fc.pkl").write_bytes(pickle.dumps(forests["add"]))
    with pytest.raises(ProfileError, match=r"fc\.pkl does not take its features"):
        profile(net_path, A76)


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_predictor_is_refused_and_not_run(folder, forests, net_path, tmp_path):
    touched = tmp_path / "touched"
    forest = pickle.loads(pickle.dumps(forests["fc"]))
    forest.estimators_.append(Touch(touched))
    for evil in (forest, Touch(touched)):
        (folder / "fc.pkl").write_bytes(pickle.dumps(evil))
        with pytest.raises(ProfileError, match=r"asks for (posix|nt)\.system"):
            profile(net_path, A76)
    assert not touched.exists()
    pickle.loads(pickle.dumps(Touch(touched)))
    assert touched.exists()  # so the pickle was able to


def test_a_pickle_cannot_change_scikit_learn(tmp_path):
    # BUILD with a pair as state sets attributes on whatever object is on the stack: here a class.
    path = tmp_path / "fc.pkl"
    path.write_bytes(
        b"\x80\x04csklearn.ensemble._forest\nRandomForestRegressor\n"
        b"N}(\x8c\x07predict\x8c\x04evilu\x86b."
    )
    with pytest.raises(ProfileError, match="damaged"):
        read_predictor(path)
    assert callable(ensemble.RandomForestRegressor.predict)


@pytest.mark.parametrize("value", [{"a": 1}, [1.0], np.zeros(3), "forest"])
def test_a_pickle_of_something_else_is_an_error(tmp_path, value):
    path = tmp_path / "fc.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(ProfileError, match="not a regressor"):
        read_predictor(path)


def test_a_truncated_or_missing_predictor_is_an_error(tmp_path, forests):
    whole = pickle.dumps(forests["fc"])
    path = tmp_path / "fc.pkl"
    for length in np.linspace(0, len(whole) - 1, 40).astype(int):
        path.write_bytes(whole[:length])
        with pytest.raises(ProfileError, match=r"fc\.pkl is damaged"):
            read_predictor(path)
    path.unlink()
    with pytest.raises(ProfileError, match="cannot be read"):
        read_predictor(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("left_child", 0), ("right_child", 10**6), ("feature", 99), ("feature", -1)],
)
def test_a_tree_that_would_read_foreign_memory_is_refused(tmp_path, forests, field, value):
    forest = pickle.loads(pickle.dumps(forests["fc"]))
    tree = forest.estimators_[0].tree_
    state = tree.__getstate__()
    state["nodes"] = state["nodes"].copy()
    state["nodes"][field][0] = value
    tree.__setstate__(state)
    path = tmp_path / "fc.pkl"
    path.write_bytes(pickle.dumps(forest))
    with pytest.raises(ProfileError, match="do not form a tree"):
        read_predictor(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "kind", ["RandomForestRegressor", "ExtraTreesRegressor", "DecisionTreeRegressor"]
)
def test_predictors_of_todays_scikit_learn_load(tmp_path, kind, protocol):
    from sklearn import tree

    generator = np.random.default_rng(1)
    x, z = generator.random((60, 4)), generator.random((30, 4))
    made = getattr(ensemble, kind, None) or getattr(tree, kind)
    forest = made(random_state=0, criterion="absolute_error").fit(x, x.sum(1))
    path = tmp_path / "fc.pkl"
    path.write_bytes(pickle.dumps(forest, protocol))
    np.testing.assert_array_equal(predict(path, z.tolist()), forest.predict(z))


def test_a_forest_of_scikit_learn_0_23_1_predicts_as_it_did_there():
    data = os.environ.get("NASFX_DATA")
    if not data or not (Path(data) / "sklearn_0_23_1_forest.pkl").is_file():
        pytest.skip("NASFX_DATA does not name the folder with sklearn_0_23_1_forest.pkl")
    with np.load(Path(data) / "sklearn_0_23_1_forest_io.npz") as known:
        inputs, outputs = known["inputs"], known["outputs"]
    forest = read_predictor(Path(data) / "sklearn_0_23_1_forest.pkl")
    np.testing.assert_array_equal(forest.predict(inputs), outputs)


# What nn-Meter does to its surroundings.


def test_without_nn_meter_the_error_says_what_to_install(net_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nn_meter", None)
    with pytest.raises(ProfileError, match=r"pip install nasfx\[latency\]"):
        profile(net_path, A76)


def test_nn_meter_leaves_no_trace_outside_its_folder(folder, home, net_path):
    code = f"""
import logging, sys
before = "pkg_resources" in sys.modules, list(logging.getLogger().handlers)
from nasfx.costs.profiling import profile
assert "nn_meter" not in sys.modules
profile({str(net_path)!r}, {A76!r})
assert before == ("pkg_resources" in sys.modules, list(logging.getLogger().handlers))
logging.getLogger("nn-Meter").warning("nn-Meter itself still speaks")
"""
    run = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code],
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "(nn-Meter) nn-Meter itself still speaks\n"
    assert [path.name for path in home.iterdir()] == [".nn_meter"]
    assert {path.name for path in (home / ".nn_meter").iterdir()} == {"config", "data"}
