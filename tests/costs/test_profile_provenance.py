"""What nasfx.profile shows of where a kernel's nodes come from; nothing reaches the network."""

import json
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import nasfx
from nasfx import LayerChoice
from nasfx.costs import nnmeter
from nasfx.costs.profiling import Profile, profile
from tests.costs.test_nnmeter import RULES

pytestmark = pytest.mark.skipif(find_spec("nn_meter") is None, reason="nn-meter is not installed")


@pytest.fixture(autouse=True)
def _rules_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are split by the rules; without predictors none has a price."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "fusion_rules.json").write_text(json.dumps(RULES))
    monkeypatch.setattr(nnmeter, "predictor_folder", lambda hardware: tmp_path)


@pytest.fixture(scope="module")
def net_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    block = LayerChoice({"conv": nn.Conv2d(8, 8, 3, padding=1), "skip": nn.Identity()}, label="[b]")
    net = nn.Sequential(nn.Conv2d(3, 8, 3), block, nn.ReLU(), nn.MaxPool2d(2))
    subnet = nasfx.finalize(net, {"[b]": "conv"})
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    return nasfx.export_onnx(subnet, path, torch.randn(1, 3, 16, 16))


def titles(result: Profile) -> list[object]:
    return [column.header for column in result.table().columns]


def test_kernels_say_where_their_nodes_come_from(net_path: Path) -> None:
    result = profile(net_path, "any", minimum_coverage=0)
    found = [(k.type, k.modules, k.choices) for k in result.kernels]
    assert found == [
        ("conv", ("0",), ("",)),
        ("conv-relu", ("1.conv", "2"), ("[b]: conv", "")),
        ("maxpool", ("3",), ("",)),
    ]
    assert titles(result)[1:4] == ["ONNX nodes", "module", "choice"]
    assert [*result.table().columns[2].cells][1].plain == "1.conv\n2"
    assert [*result.table().columns[3].cells][1].plain == "[b]: conv"
    assert "[b]: conv" in str(result)
    assert max(map(len, str(result).splitlines())) <= 100


def test_columns_that_would_be_empty_are_left_out(net_path: Path, tmp_path: Path) -> None:
    model = onnx.load(net_path)
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == "nasfx.module"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "net.onnx")
    result = profile(tmp_path / "net.onnx", "any", minimum_coverage=0)
    assert "module" in titles(result)
    assert "choice" not in titles(result)
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, tmp_path / "net.onnx")
    result = profile(tmp_path / "net.onnx", "any", minimum_coverage=0)
    assert not {"module", "choice"} & set(titles(result))
    assert result.kernels[1].modules == result.kernels[1].choices == ("", "")
