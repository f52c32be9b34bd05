"""Nothing of nasfx looks for the network but nn-Meter's download, and that only when asked for."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# Refuses, and notes, every name that is looked up and every socket that is not a local one.
_REFUSED = """
import socket, sys

ATTEMPTS = []
_Socket = socket.socket


class Refusing(_Socket):
    def __init__(self, family=socket.AF_INET, *args, **kwargs):
        if family in (-1, socket.AF_INET, socket.AF_INET6):
            ATTEMPTS.append(("socket", family))
            raise OSError("the network is refused")
        super().__init__(family, *args, **kwargs)


def refuse(name):
    def call(*args, **kwargs):
        ATTEMPTS.append((name, args))
        raise socket.gaierror("the network is refused")
    return call


socket.socket = Refusing
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, name, refuse(name))


def audit(event, args):  # what goes around the module, by _socket
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        ATTEMPTS.append((event, args))


sys.addaudithook(audit)
"""

_USE = """
import importlib, pathlib, pkgutil, warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nasfx
from nasfx import LayerChoice
from nasfx.costs.tables import LatencyTable

folder = pathlib.Path(sys.argv[1])
for module in pkgutil.walk_packages(nasfx.__path__, "nasfx."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)


def model():
    choice = LayerChoice({"conv": nn.Conv2d(3, 3, 3, padding=1), "skip": nn.Identity()}, label="b")
    return nn.Sequential(choice, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))


torch.manual_seed(0)
x, y = torch.randn(8, 3, 8, 8), torch.randint(2, (8,))
train, valid = (DataLoader(TensorDataset(x, y), batch_size=4) for _ in range(2))
for name in ("darts", "fbnet", "proxyless", "enas", "single-path", "random"):
    net = nasfx.transform(model(), name)
    last = {"single-path": {"generations": 1, "population": 2}, "random": {"best_of": 2}}
    found = nasfx.search(net, train, valid, loss=F.cross_entropy, epochs=1, seed=0,
                         checkpoint_dir=folder / name)
    subnet = nasfx.finalize(net, found.architecture)
    assert subnet(x).shape == (8, 2)
net = nasfx.transform(model(), "proxyless")
table = nasfx.latency_table(net, x[:1], lambda part: 1.0)
table = LatencyTable.load(table.save(folder / "table.json"))
subject = nasfx.Latency(table, target=2.0)
nasfx.transform(model(), "proxyless", objective=subject, example_inputs=x[:1]).expected_cost()
nasfx.export_onnx(nasfx.finalize(net), folder / "net.onnx", x[:1])
nasfx.write_module(nasfx.finalize(net), folder / "source")
assert nasfx.onnxruntime_milliseconds(folder / "net.onnx", repeats=1) > 0
print("ATTEMPTS", ATTEMPTS)
"""

_PROFILE = """
import pathlib, pickle
import urllib3.util.connection
ATTEMPTS.clear()  # it binds a socket to ::1, to see whether there is IPv6
import nasfx, numpy as np
from sklearn.ensemble import RandomForestRegressor

folder = pathlib.Path(sys.argv[1])
device = folder / "device"
device.mkdir()
x = np.random.default_rng(0).random((20, 7))
for name, width in {"conv-bn-relu": 7, "fc": 4, "global-avgpool": 2}.items():
    forest = RandomForestRegressor(2, random_state=0).fit(x[:, :width], x[:, 0])
    (device / f"{name}.pkl").write_bytes(pickle.dumps(forest))
(device / "fusion_rules.json").write_text("{}")
print(nasfx.profile(folder / "net.onnx", device, minimum_coverage=0))
print(nasfx.known_hardware())
print("ATTEMPTS", ATTEMPTS)
try:
    nasfx.profile(folder / "net.onnx", "cortexA76cpu_tflite21")
except nasfx.ProfileError as error:
    print("REFUSED", error)
print("DOWNLOAD", bool(ATTEMPTS))
"""


def _run(program: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _REFUSED + program, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_refusal_notes_an_attempt(tmp_path: Path) -> None:
    program = """
import urllib.request
try:
    urllib.request.urlopen("http://example.com")
except OSError:
    print("ATTEMPTS", ATTEMPTS)
"""
    assert "example.com" in _run(program, tmp_path)


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("network")
    return _run(_USE, folder), folder


@pytest.mark.slow
def test_using_nasfx_makes_no_connection(used: tuple[str, Path]) -> None:
    assert "ATTEMPTS []" in used[0]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("nn_meter") is None, reason="nn-meter is not installed")
def test_only_a_missing_predictor_is_downloaded(used: tuple[str, Path]) -> None:
    said = _run(_PROFILE, used[1])
    assert "ATTEMPTS []" in said
    assert "DOWNLOAD True" in said
    assert "REFUSED The predictors of 'cortexA76cpu_tflite21' could not be downloaded" in said
