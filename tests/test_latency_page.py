"""docs/latency.md runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "latency.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pymoo", reason="pymoo is not installed")
    monkeypatch.chdir(tmp_path)
    fenced = PAGE.read_text(encoding="utf-8").split("```")[1::2]
    code = [text.removeprefix("python\n") for text in fenced if text.startswith("python\n")]
    assert len(code) == 3
    namespace: dict[str, Any] = {"__name__": "page"}
    for text in code:
        exec(compile(text, str(PAGE), "exec"), namespace)
    assert namespace["subnet"].architecture == dict(namespace["best"].architecture)
    assert {path.name for path in tmp_path.iterdir()} == {"table.json", "front.png"}
