"""What torch.fx offers and nasfx must not use: it loses code or gradients without a word."""

from pathlib import Path

import nasfx.passes
import pytest

import nasfx

ROOTS = [Path(nasfx.__file__).parent, Path(nasfx.passes.__file__).parent]
FILES = sorted({path for root in ROOTS for path in root.rglob("*.py")})

BANNED = {
    "eliminate_dead_code(": "deletes writes in place; use the pass remove-dead-code",
    "delete_all_unused_submodules(": "deletes candidates that are read by get_attr",
    "delete_submodule(": "deletes from dictionaries that other graphs share",
    "fx.wrap(": "protects only callers in the same module; use nasfx.ops.graph_function",
    "from torch.fx import wrap": "as fx.wrap(",
    "fx.Transformer": "loses node.meta",
    "import passes": "installs as nasfx.passes",
    "from passes": "installs as nasfx.passes",
    "raise Exception(": "a user cannot catch it; use an error of nasfx.errors",
}


def test_the_files_are_found() -> None:
    names = {path.name for path in FILES}
    assert {"pipeline.py", "mix.py", "remove_dead_code.py", "supernet.py"} <= names


@pytest.mark.parametrize("banned", BANNED)
def test_banned_calls(banned: str) -> None:
    found = [
        f"{path}:{i}"
        for path in FILES
        for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        if banned in line
    ]
    assert not found, f"{banned!r} {BANNED[banned]}: {found}"


def test_the_library_does_not_print() -> None:
    allowed = {"cli.py"}
    found = [
        f"{path}:{i}"
        for path in FILES
        if path.name not in allowed
        for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        if line.lstrip().startswith("print(")
    ]
    assert not found, found
