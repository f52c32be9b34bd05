"""Weights as safetensors: what is written, read back, and refused."""

import json
import random
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import nasfx
from nasfx import LayerChoice
from nasfx.errors import ExportError
from nasfx.export import load_weights, save_weights
from tests.fuzz.harness import counts, damaged, loaded


class _Net(nn.Module):
    scale: Tensor

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.block = LayerChoice(
            {"linear": nn.Linear(width, width), "skip": nn.Identity()}, label="block"
        )
        self.norm = nn.BatchNorm1d(width)
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.rand(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.norm(self.block(x)))) * self.scale


def _subnet(name: str = "linear", width: int = 4) -> Any:
    return nasfx.finalize(_Net(width), {"block": name})


def _facts(module: nn.Module) -> dict[str, Tensor]:
    named = [*module.named_parameters(remove_duplicate=False)]
    return dict([*named, *module.named_buffers(remove_duplicate=False)])


def test_all_tensors_come_back(tmp_path: Path) -> None:
    subnet, other = _subnet(), _subnet()
    subnet(torch.randn(8, 4))  # moves the batch norm's buffers
    x = torch.randn(3, 4)
    assert not torch.equal(subnet.eval()(x), other.eval()(x))
    path = save_weights(subnet, tmp_path / "w.safetensors")
    load_weights(other, path)
    wanted, got = _facts(subnet), _facts(other)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert torch.equal(subnet(x), other(x))
    assert other.b.weight is other.a.weight
    assert other.a.weight.requires_grad


def test_what_the_file_says(tmp_path: Path) -> None:
    space = nasfx.search_space(_Net())
    path = save_weights(_subnet(), tmp_path / "w.safetensors", space=space)
    with safetensors.safe_open(path, framework="pt") as file:
        about, names = file.metadata(), set(file.keys())
    assert json.loads(about["architecture"]) == {"block": "linear"}
    assert about["nasfx"] == metadata.version("nasfx")
    assert json.loads(about["tied"]) == {"b.weight": "a.weight"}
    assert about["space"].startswith("sha256:")
    assert "scale" in names
    assert "norm.running_mean" in names
    assert "b.weight" not in names


def test_another_space_is_refused(tmp_path: Path) -> None:
    class Other(_Net):
        def __init__(self) -> None:
            super().__init__()
            self.block = LayerChoice({"linear": nn.Linear(4, 4), "tanh": nn.Tanh()}, label="block")

    space, other = nasfx.search_space(_Net()), nasfx.search_space(Other())
    path = save_weights(_subnet(), tmp_path / "w.safetensors", space=space)
    load_weights(_subnet(), path, space=space)
    with pytest.raises(ExportError, match="its space is 'sha256:"):
        load_weights(_subnet(), path, space=other)


def _untied() -> Any:
    net = _Net()
    net.b.weight = nn.Parameter(torch.rand(4, 4))
    return nasfx.finalize(net, {"block": "linear"})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: _subnet("skip"), "its architecture is"),
        (lambda: _subnet(width=5), r"is torch.float32 of shape \(4,"),
        (lambda: _subnet().double(), "torch.float64"),
        (_untied, "its tied is"),
    ],
    ids=["architecture", "shape", "dtype", "ties"],
)
def test_a_wrong_net_is_refused_and_left_alone(other: Any, words: str, tmp_path: Path) -> None:
    path = save_weights(_subnet(), tmp_path / "w.safetensors")
    net = other()
    before = {name: t.clone() for name, t in _facts(net).items()}
    with pytest.raises(ExportError, match=words):
        load_weights(net, path)
    assert all(torch.equal(before[name], t) for name, t in _facts(net).items())


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    subnet = _subnet()
    with pytest.raises(ExportError, match="cannot be read"):
        load_weights(subnet, tmp_path / "none")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(ExportError, match="no weights that nasfx wrote"):
        load_weights(subnet, tmp_path / "foreign")
    path = save_weights(subnet, tmp_path / "w")
    with safetensors.safe_open(path, framework="pt") as file:
        about = file.metadata()
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "other", about)
    with pytest.raises(ExportError, match="does not fit"):
        load_weights(subnet, tmp_path / "other")
    with pytest.raises(ExportError, match="cannot be written"):
        save_weights(subnet, tmp_path / "no folder" / "w")


@counts
def test_damaged_files(count: int, tmp_path: Path) -> None:
    subnet, path = _subnet(), tmp_path / "w"
    data = save_weights(subnet, path).read_bytes()
    rng, length = random.Random(0), int.from_bytes(data[:8], "little")
    taken = 0
    for i in range(count):
        header = damaged(rng, data[8 : 8 + length], (b'"F64"', b"[99999999999,1]", b'"tied"'))
        rest = data[8 + length :]
        path.write_bytes(
            damaged(rng, data) if i % 2 else len(header).to_bytes(8, "little") + header + rest
        )
        before = {name: t.clone() for name, t in _facts(subnet).items()}

        def load() -> bool:
            load_weights(subnet, path)
            return True

        if loaded(tmp_path, load):
            taken += 1
        else:
            now = _facts(subnet)
            assert all(torch.equal(before[n], t) or bool(t.isnan().any()) for n, t in now.items())
    assert 0 < taken < count
