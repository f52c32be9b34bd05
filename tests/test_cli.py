"""The command line: what it hands on, what it prints, and how it fails."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nasfx.cli import app
from nasfx.costs import profiling
from nasfx.costs.calibration import calibrating
from nasfx.costs.nnmeter import Kernel
from nasfx.costs.profiling import Profile
from nasfx.errors import ProfileError

PRICED = Profile(
    "phone",
    (
        Kernel("conv-relu", ("c", "r"), 30, (8.0, 3.0), 1.5, "", ("a.0", "a.1"), ("b: x", "")),
        Kernel("reshape", ("s",), 0, (), None, "no features", ("",), ("",)),
    ),
)

MODEL = """
from torch import nn
from nasfx import LayerChoice
from helper import WIDTH

def net():
    conv = nn.Conv2d(3, WIDTH, 1)
    return nn.Sequential(LayerChoice({"conv": conv, "skip": nn.Identity()}, label="block"))

made = net()
number = lambda: 3
"""


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of `profile`, which gives `PRICED`."""
    found: list[Any] = []

    def profile(*args: Any, **options: Any) -> Profile:
        found.append((args, options))
        return PRICED

    monkeypatch.setattr(profiling, "profile", profile)
    return found


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper.py").write_text("WIDTH = 3\n")
    (tmp_path / "model.py").write_text(MODEL)
    yield tmp_path / "model.py"
    for name in ("model", "helper", "_inspected"):
        sys.modules.pop(name, None)


def test_profile_prints_the_table(calls: list[Any]) -> None:
    result = run("profile", "net.onnx", "--hardware", "phone")
    assert result.exit_code == 0
    assert result.stdout == f"{PRICED}\n"
    assert calls == [((Path("net.onnx"), "phone"), {"minimum_coverage": 0.9})]


def test_profile_prints_json(calls: list[Any]) -> None:
    result = run("profile", "n.onnx", "--hardware", "p", "--minimum-coverage", "0.5", "--json")
    found = json.loads(result.stdout)
    assert calls[0][1] == {"minimum_coverage": 0.5}
    assert found["hardware"] == "phone"
    assert found["milliseconds"] == 1.5
    assert found["coverage"] == {"kernels": 0.5, "macs": 1.0}
    assert [kernel["milliseconds"] for kernel in found["kernels"]] == [1.5, None]
    assert found["kernels"][0]["choices"] == ["b: x", ""]


def test_profile_lists_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "known_hardware", lambda: ["one", "two"])
    result = run("profile", "--list")
    assert (result.exit_code, result.stdout) == (0, "one\ntwo\n")


def test_errors_are_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ProfileError("There is no such phone.")

    monkeypatch.setattr(profiling, "profile", fail)
    result = run("profile", "net.onnx", "--hardware", "phone")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "nasfx: There is no such phone.\n"


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(profiling, "profile", fail)
    assert isinstance(run("profile", "n", "--hardware", "p").exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ([], {}),
        (["--kernels", "9", "--seed", "0"], {"kernels": 9, "seed": 0}),
        (["--space", "a", "--space", "b"], {"space": [Path("a"), Path("b")]}),
    ],
    ids=["defaults", "numbers", "space"],
)
def test_calibrate_hands_its_options_on(
    monkeypatch: pytest.MonkeyPatch, given: list[str], options: dict[str, Any]
) -> None:
    calls: list[Any] = []

    def calibrate(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return "a report"

    monkeypatch.setattr(calibrating, "calibrate", calibrate)
    result = run("calibrate", "--runtime", "mnn", "--out", "folder", *given)
    assert (result.exit_code, result.stdout) == (0, "a report\n")
    assert calls == [(("mnn", Path("folder")), options)]


def test_calibrate_knows_its_runtimes() -> None:
    result = run("calibrate", "--runtime", "abacus", "--out", "folder")
    assert result.exit_code == 2
    assert "onnxruntime" in result.stderr


@pytest.mark.parametrize("factory", ["model:net", "model:made", "model.py:net"])
def test_inspect_shows_the_space_and_the_costs(model: Path, factory: str) -> None:
    result = run("inspect", factory, "--input", "1,3,4,4")
    assert result.exit_code == 0, result.output
    space, _, table = result.stdout.partition("cost on one sample")
    assert space.rstrip() == "SearchSpace of 2 architectures\n  block: conv, skip"
    assert [cell.strip() for cell in table.splitlines()[-2].split("│")[1:-1]] == [
        "block", "conv", "144", "12", "192",
    ]  # fmt: skip
    assert "cost" not in run("inspect", factory).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["model"], 2, "neither"),
        (["model:none"], 2, "nothing named"),
        (["none:net"], 2, "no module none"),
        (["none.py:net"], 2, "no file none.py"),
        (["model:number"], 2, "gives a int"),
        (["model:net", "--input", "1,three"], 2, "not a shape"),
        (["model:net", "--input", "1,4,4,4"], 1, "nasfx: "),
    ],
)
def test_inspect_says_what_is_wrong(
    model: Path, arguments: list[str], code: int, message: str
) -> None:
    result = run("inspect", *arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())


def test_a_module_that_a_model_lacks_is_its_own_error(model: Path) -> None:
    (model.parent / "helper.py").unlink()
    result = run("inspect", "model:net")
    assert isinstance(result.exception, ModuleNotFoundError)
    assert result.exception.name == "helper"


def test_python_m_nasfx(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nasfx", "profile", "none.onnx", "--hardware", "phone"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("nasfx: The ONNX file none.onnx cannot be read")


def test_help_is_light() -> None:
    code = (
        "import sys, nasfx; before = set(sys.modules); import nasfx.cli; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'torch', 'onnx', 'nn_meter', 'sklearn', 'lightning', 'pandas'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
