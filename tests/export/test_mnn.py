import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasfx.costs import runtimes
from nasfx.costs.runtimes import (
    mnn_milliseconds,
    onnxruntime_session,
    random_inputs,
    run_mnn,
    run_onnxruntime,
)
from nasfx.errors import ExportError, ProfileError
from nasfx.export import mnn as exporter
from nasfx.export.mnn import export_mnn
from nasfx.export.onnx import export_onnx

needs_mnn = pytest.mark.skipif(find_spec("MNN") is None, reason="MNN is not installed")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor, scale: Tensor) -> dict[str, Tensor]:
        features = self.body(image) * scale
        logits = self.head(features.mean((2, 3)))
        return {"features": features, "logits": logits, "best": logits.argmax(1)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    inputs = (torch.randn(2, 3, 12, 12), torch.randn(2, 1, 1, 1))
    return export_onnx(Net(), path, inputs, dynamic_batch=True)


@needs_mnn
@pytest.mark.parametrize(
    ("precision", "share", "size"), [("fp32", 2e-3, 1.0), ("fp16", 5e-3, 0.5), ("w8", 3e-2, 0.25)]
)
def test_precisions(
    tmp_path: Path, exported: Path, precision: Any, share: float, size: float
) -> None:
    path = export_mnn(exported, tmp_path / "net.mnn", precision=precision)
    assert list(tmp_path.iterdir()) == [path]
    session = onnxruntime_session(exported)
    inputs = random_inputs(session, seed=5)
    want = run_onnxruntime(session, inputs)
    got, _ = run_mnn(path, inputs, list(want))
    for name in ("features", "logits"):
        largest = np.abs(want[name]).max()
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=share * largest)
    weights = 4 * sum(p.numel() for p in Net().parameters())
    # Beside the weights stand some kilobytes of graph.
    assert size * weights * 0.9 < path.stat().st_size < size * weights * 1.1 + 4096
    # Rounded weights that round nothing are not rounded.
    off = np.abs(got["logits"] - want["logits"]).max() / np.abs(want["logits"]).max()
    assert (off < 1e-4) == (precision == "fp32")


@needs_mnn
def test_inputs_go_by_name(tmp_path: Path, exported: Path) -> None:
    path = export_mnn(exported, tmp_path / "net.mnn")
    session = onnxruntime_session(exported)
    inputs = random_inputs(session)
    want = run_onnxruntime(session, inputs)
    swapped = dict(reversed(inputs.items()))
    got, _ = run_mnn(path, swapped, ["logits"])
    np.testing.assert_allclose(got["logits"], want["logits"], rtol=0, atol=1e-4)


@needs_mnn
def test_a_difference_is_an_error(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(session: Any, inputs: Any) -> Any:
        outputs = run_onnxruntime(session, inputs)
        outputs["features"][0, 1, 2, 3] += 5
        return outputs

    monkeypatch.setattr(exporter, "run_onnxruntime", other)
    with pytest.raises(ExportError, match=r"largest difference is 5.*'features'"):
        export_mnn(exported, tmp_path / "net.mnn")
    assert not list(tmp_path.iterdir())


@needs_mnn
def test_integer_outputs(tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(session: Any, inputs: Any) -> Any:
        outputs = run_onnxruntime(session, inputs)
        outputs["best"][0] += 1
        return outputs

    monkeypatch.setattr(exporter, "run_onnxruntime", other)
    with pytest.raises(ExportError, match=r"largest difference is 1, in output 'best'"):
        export_mnn(exported, tmp_path / "net.mnn")
    export_mnn(exported, tmp_path / "net.mnn", precision="w8")


def aborts(folder: str) -> None:
    import os

    print("the converter says why", flush=True)
    os.abort()


@needs_mnn
def test_native_abort(tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "_converter_program", aborts)
    (tmp_path / "net.mnn").write_text("an older file")
    with pytest.raises(ExportError, match=r"SIGABRT[^$]*the converter says why"):
        export_mnn(exported, tmp_path / "net.mnn")
    assert (tmp_path / "net.mnn").read_text() == "an older file"


@needs_mnn
def test_wrong_arguments(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(ExportError, match="'fp32', 'fp16', 'w8'; got 'int8'"):
        export_mnn(exported, tmp_path / "net.mnn", precision="int8")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"no file .*none\.onnx"):
        export_mnn(tmp_path / "none.onnx", tmp_path / "net.mnn")
    junk = tmp_path / "junk.onnx"
    junk.write_text("not a model")
    with pytest.raises(ExportError, match="ONNX Runtime cannot load"):
        export_mnn(junk, tmp_path / "net.mnn")
    assert list(tmp_path.iterdir()) == [junk]


def test_without_mnn(tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install nasfx\[mnn\]"):
        export_mnn(exported, tmp_path / "net.mnn")


# Imported by every Python that starts: reports each process and connection it asks for.
WATCH = """
import os, sys
mark = {mark!r}
def watch(event, args):
    if event.startswith("socket.") or event in (
        "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn"
    ):
        with open(os.path.join(mark, "event"), "a") as file:
            file.write(f"{{event}} {{args}}\\n")
open(os.path.join(mark, "watching"), "w").close()
sys.addaudithook(watch)
"""


@needs_mnn
def test_neither_pip_nor_network(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, folder = tmp_path / "mark", tmp_path / "path"
    mark.mkdir()
    folder.mkdir()
    for name in ("pip", "pip3", "python", "python3", "mnnconvert", "curl"):
        fake = folder / name
        fake.write_text(f"#!/bin/sh\ntouch {mark}/{name}\n")
        fake.chmod(0o755)
    (folder / "sitecustomize.py").write_text(WATCH.format(mark=str(mark)))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    others = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{others}")
    for precision in ("fp32", "fp16", "w8"):
        export_mnn(exported, tmp_path / "net.mnn", precision=precision)  # type: ignore[arg-type]
    assert [path.name for path in mark.iterdir()] == ["watching"]


def test_forbidden_tools_are_never_named() -> None:
    for folder in ("export", "costs"):
        for path in (Path(runtimes.__file__).parents[1] / folder).glob("*.py"):
            text = path.read_text()
            assert not re.search(r"MNN\.tools|mnnquant|from MNN import tools|shell=True", text), (
                path
            )
            # In process only: the function, and the name it wants as the first argument.
            calls = set(re.findall(r"\S*mnnconvert\S*", text))
            assert calls <= {'_tools.mnnconvert(["mnnconvert",'}, path
            if "MNN" in text:
                for command in re.findall(r"subprocess\.run\(\s*(.*)", text):
                    assert command.startswith("[sys.executable"), path


@needs_mnn
def test_runs_where_files_shadow_libraries(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "MNN.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    path = export_mnn(exported, "net.mnn")
    assert path == Path("net.mnn")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["MNN.py", "net.mnn"]
    assert "MNN" not in sys.modules


# Counts threads whenever the time is asked for, which is around each inference.
COUNT = """
import os, time
def counting(clock=time.perf_counter):
    with open({mark!r}, "a") as file:
        file.write(f"{{len(os.listdir('/proc/self/task'))}} ")
    return clock()
time.perf_counter = counting
"""


@needs_mnn
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_threads(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    path = export_mnn(exported, tmp_path / "net.mnn")
    (tmp_path / "sitecustomize.py").write_text(COUNT.format(mark=str(tmp_path / "mark")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    mnn_milliseconds(path, threads=threads, repeats=3)
    assert max(map(int, (tmp_path / "mark").read_text().split())) == threads


@needs_mnn
def test_milliseconds(tmp_path: Path, exported: Path) -> None:
    small = export_mnn(exported, tmp_path / "small.mnn")
    inputs = (torch.randn(1, 3, 160, 160), torch.randn(1, 1, 1, 1))
    large = export_mnn(export_onnx(Net(), tmp_path / "l.onnx", inputs), tmp_path / "large.mnn")
    times = [mnn_milliseconds(path, repeats=9, warmup=2) for path in (small, large)]
    assert 0 < times[0] < times[1] < 5000  # 170 times the work
    with pytest.raises(ProfileError, match="threads=0"):
        mnn_milliseconds(small, threads=0)
    with pytest.raises(ProfileError, match="no file"):
        mnn_milliseconds(tmp_path / "none.mnn")
    (tmp_path / "junk.mnn").write_text("junk")
    with pytest.raises(ProfileError, match="MNN cannot run"):
        mnn_milliseconds(tmp_path / "junk.mnn")
