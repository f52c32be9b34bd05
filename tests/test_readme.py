"""The README's code runs, and the graphs that it shows are those that nasfx prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import nasfx

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in `language`, in order."""
    fenced = README.read_text(encoding="utf-8").split("```")[1::2]
    return [text.partition("\n")[2] for text in fenced if text.partition("\n")[0] == language]


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return {"__name__": "readme"}


def test_the_example_runs(namespace: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("MNN", reason="the example exports to MNN")
    (code,) = blocks("python")
    exec(compile(code, str(README), "exec"), namespace)
    assert namespace["subnet"].certificate["outputs"] == "passed"
    assert set(namespace["subnet"].architecture) == {"block"}
    names = {path.name for path in tmp_path.iterdir()}
    assert {"subnet.onnx", "subnet.mnn", "subnet"} <= names


def test_the_graphs_shown_are_those_printed(namespace: dict[str, Any]) -> None:
    (code,) = blocks("python")
    exec(compile(code.split("model = Net()")[0], str(README), "exec"), namespace)
    model = namespace["Net"]()
    shown = [block.rstrip() for block in blocks("") if block.startswith("%")]
    printed = []
    for strategy, after in [("darts", "as traced"), ("darts", "lower-w"), ("proxyless", "lower-b")]:
        text = nasfx.explain(nasfx.transform(model, strategy), "block")
        section = next(part for part in text.split("\n\n") if after in part)
        printed.append("\n".join(line[2:] for line in section.split("\n")[1:]))
    assert shown == printed
