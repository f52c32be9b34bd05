"""Architecture files: read to what they say, or refused."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import nasfx
from nasfx import Architecture, InputChoice, LayerChoice
from nasfx.errors import SpaceError
from tests.fuzz.harness import counts, damaged, explore, loaded


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = LayerChoice({"tanh": nn.Tanh(), "skip": nn.Identity()}, label="block")
        self.skips = InputChoice(3, 2, label="skips")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.skips([x, self.block(x), 2 * x])


_SPACE = nasfx.search_space(_Net())
_VALID = b'{\n "block": "tanh",\n "skips": [\n  0,\n  1\n ]\n}\n'
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
_decisions = st.sampled_from(["tanh", "skip"]) | st.lists(st.integers(-2, 4)) | _values
_files = st.dictionaries(st.sampled_from(["block", "skips"]) | st.text(), _decisions)


def _check(folder: Path, data: bytes) -> bool:
    """Read a file of these bytes; whether the space takes it."""
    path = folder / "arch.json"
    path.write_bytes(data)
    arch = loaded(folder, lambda: Architecture.from_json(path))
    if arch is None:
        return False
    arch.to_json(path)
    again = Architecture.from_json(path)
    assert again == arch
    assert hash(again) == hash(arch)
    valid = loaded(folder, lambda: _SPACE.validate(arch))
    assert valid is None or _SPACE.validate(valid) == valid
    return valid is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@counts
def test_any_json(folder: Path, count: int) -> None:
    explore(count, _files | _values, lambda value: _check(folder, json.dumps(value).encode()))


@counts
def test_damaged_files(folder: Path, count: int) -> None:
    rng = random.Random(0)
    assert _check(folder, _VALID)
    taken = sum(_check(folder, damaged(rng, _VALID, (b'[{"a":1e999}]',))) for _ in range(count))
    assert 0 < taken < count


@pytest.mark.parametrize(
    "text",
    [
        '{"block": ' + "[" * 900 + "]" * 900 + "}",
        '{"block": [' + "1" * 5000 + "]}",
        '{"block": "' + "a" * 10**6 + '", "skips": [' + "0," * 10**6 + "1]}",
        '{"a": 1}' + " " * 2**24,
    ],
    ids=["deep", "digits", "long", "large"],
)
def test_large_files(text: str, folder: Path) -> None:
    path = folder / "large.json"
    path.write_text(text)

    def load() -> None:
        _SPACE.validate(Architecture.from_json(path))

    assert loaded(folder, load) is None
    with pytest.raises(SpaceError):
        load()
