"""Every script of the examples starts by itself, and says what its flags are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(
    str(file.relative_to(EXAMPLES))
    for file in EXAMPLES.glob("*/*.py")
    if "__main__" in file.read_text(encoding="utf-8")
)


def test_the_scripts_are_found() -> None:
    assert len(SCRIPTS) == 15


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), "--help"]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "--output" in made.stdout
    assert "default" in made.stdout
