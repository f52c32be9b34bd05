"""The public surface: names, what importing costs, docstrings and their examples."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import nasfx

# Heavy, optional, or not for everybody: imported when first used.
LAZY = (
    "lightning_fabric", "onnx", "onnxruntime", "onnxscript", "onnxsim", "MNN", "nn_meter",
    "matplotlib", "torchvision", "sklearn", "pymoo", "typer",
)  # fmt: skip
_FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
ROOT = Path(__file__).parent.parent


def _modules() -> list[str]:
    return ["nasfx", *(m.name for m in pkgutil.walk_packages(nasfx.__path__, "nasfx."))]


def _python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("name", nasfx.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(nasfx, name)
    assert value.__module__.startswith("nasfx.")
    assert value.__name__ == name


def test_the_list_of_names_is_sorted_and_whole() -> None:
    assert list(nasfx.__all__) == sorted(nasfx.__all__)
    assert len(set(nasfx.__all__)) == len(nasfx.__all__)
    public = {n for n, v in vars(nasfx).items() if not n.startswith("_")}
    stray = {
        n for n in public - set(nasfx.__all__)
        if not isinstance(getattr(nasfx, n), ModuleType) and n not in ("Any", "TYPE_CHECKING")
    }  # fmt: skip
    assert not stray
    promised = {
        "LayerChoice", "InputChoice", "trace", "search_space", "Architecture", "transform",
        "finalize", "search", "export_onnx", "export_mnn", "profile", "explain", "Darts",
        "Proxyless", "SinglePath", "NasfxError", "TraceError", "VerifyError", "PassError",
        "SpaceError", "SearchError", "CheckpointError", "ExportError", "ProfileError",
    }  # fmt: skip
    assert promised <= set(nasfx.__all__)


def test_a_star_import_gives_all_names(tmp_path: Path) -> None:
    done = _python("from nasfx import *; print(search.__name__, LayerChoice.__name__)", tmp_path)
    assert done.stdout == "search LayerChoice\n", done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'nasfx' has no attribute 'serach'"):
        _ = nasfx.serach  # type: ignore[attr-defined]


def test_every_error_is_a_nasfx_error() -> None:
    errors = [getattr(nasfx, n) for n in nasfx.__all__ if n.endswith("Error")]
    assert len(errors) == 9
    assert all(issubclass(e, nasfx.NasfxError) for e in errors)
    assert issubclass(nasfx.VerifyError, nasfx.PassError)


def test_importing_nasfx_imports_nothing_heavy(tmp_path: Path) -> None:
    code = f"import nasfx, sys; print([n for n in {LAZY!r} if n in sys.modules])"
    done = _python(code, tmp_path)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_the_main_job_before_search_imports_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import sys, torch, nasfx
from torch import nn
model = nn.Sequential(nasfx.LayerChoice([nn.ReLU(), nn.Tanh()], label="x"))
net = nasfx.transform(model, "proxyless")
nasfx.finalize(net, {{"x": "1"}})
print([n for n in {LAZY!r} if n in sys.modules])
nasfx.search
print("lightning_fabric" in sys.modules, "onnx" in sys.modules, "MNN" in sys.modules)
"""
    done = _python(code, tmp_path)
    assert done.stdout == "[]\nTrue False False\n", done.stdout + done.stderr


@pytest.mark.parametrize("module", ["passes", "passes.canonicalize"])
def test_importing_the_folder_of_passes_is_refused(module: str) -> None:
    done = _python(f"import {module}", ROOT)
    assert done.returncode != 0
    assert "ImportError: import nasfx.passes; the folder passes/" in done.stderr


@pytest.mark.parametrize("name", _modules())
def test_every_module_has_a_docstring_and_imports_on_its_own(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, name
    assert module.__doc__.strip().split("\n")[0].endswith((".", ":")), name


def _public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if (
            name.startswith("_")
            or not own
            or not (inspect.isclass(value) or inspect.isfunction(value))
        ):
            continue
        yield name, value
        if not inspect.isclass(value):
            continue
        for attribute, member in vars(value).items():
            function = member.fget if isinstance(member, property) else member
            function = getattr(function, "__func__", function)
            if inspect.isfunction(function) and not attribute.startswith("_"):
                yield f"{name}.{attribute}", function


@pytest.mark.parametrize("name", _modules())
def test_everything_public_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    missing = []
    for path, value in _public(module):
        doc = value.__doc__ or ""
        generated = inspect.isclass(value) and doc.startswith(f"{value.__name__}(")
        if not doc.strip() or generated:
            missing.append(path)
    assert not missing, f"{name}: {missing}"


@pytest.mark.parametrize("name", [n for n in nasfx.__all__ if not n.endswith("Error")])
def test_public_functions_show_an_example(name: str) -> None:
    value = getattr(nasfx, name)
    if inspect.isfunction(value):
        assert "Example:" in (value.__doc__ or ""), name


def _with_examples() -> list[str]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = []
    for name in _modules():
        tests = finder.find(importlib.import_module(name), name)
        if any(_runs(test) for test in tests):
            names.append(name)
    return names


def _runs(test: doctest.DocTest) -> bool:
    """Whether it holds more than comments and examples marked as not to be run."""
    return any(
        not e.source.lstrip().startswith("#") and not e.options.get(doctest.SKIP)
        for e in test.examples
    )


@pytest.mark.parametrize("name", _with_examples())
def test_examples_in_docstrings_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, optionflags=_FLAGS)
    assert tried > 0
    assert failed == 0


def test_there_are_examples_to_run() -> None:
    assert len(_with_examples()) >= 5
    assert "nasfx.transforming" in _with_examples()
