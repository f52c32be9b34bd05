"""Latency tables: read to rows of milliseconds, or refused."""

import json
import math
import random
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from nasfx.costs.tables import LatencyTable
from nasfx.errors import ProfileError
from tests.fuzz.harness import counts, damaged, explore, loaded

_OWN = {
    "format": "nasfx latency table",
    "version": 1,
    "hardware": "phone",
    "unit": "ms",
    "rows": {"conv 3x3": 1.5, "pool": 0},
}
_YAML = b"""Conv-input:224x224x3-output:112x112x32:
  count: 2
  mean: 5.5
'Logits-input:7x7x1280-output:1000': {mean: 2, std: !!float 0.5, when: 2018-01-01 00:00:00}
"""
_PIECES = (b"&a [*a]", b"<<: *a", b"!!python/object/apply:os.system [ls]", b"!!timestamp x",
           b"!!bool maybe", b"!!int ''", b"1:59:59", b"0x_", b"!!binary |", b"? {a: b}",
           )  # fmt: skip
_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
_values = st.recursive(
    _scalars, lambda s: st.lists(s) | st.dictionaries(st.text(), s), max_leaves=8
)
_tables = st.fixed_dictionaries(
    {},
    optional={
        "format": st.just(_OWN["format"]) | _values,
        "version": st.just(1) | _values,
        "hardware": st.text() | _values,
        "unit": st.just("ms") | _values,
        "rows": st.dictionaries(st.text(), st.floats(0, 10) | _values) | _values,
    },
)
_rows = st.dictionaries(
    st.text() | _scalars, st.fixed_dictionaries({"mean": st.floats(0, 9) | _values}) | _values
)


def _check(folder: Path, name: str, data: bytes) -> bool:
    path = folder / name
    path.write_bytes(data)
    own = name.endswith(".json")
    load = LatencyTable.load if own else LatencyTable.proxyless
    table = loaded(folder, lambda: load(path))
    if table is None:
        return False
    assert all(isinstance(key, str) for key in (*table.rows, table.name))
    assert all(type(v) is float and 0 <= v < math.inf for v in table.rows.values())
    again = LatencyTable.load(table.save(folder / "again.json"))
    assert again.rows == table.rows
    assert again.name == table.name
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@counts
def test_any_json(folder: Path, count: int) -> None:
    explore(
        count,
        _tables | _values,
        lambda value: _check(folder, "table.json", json.dumps(value).encode()),
    )


@counts
def test_any_yaml(folder: Path, count: int) -> None:
    explore(
        count,
        _rows | _values,
        lambda value: _check(
            folder, "table.yaml", yaml.safe_dump(value, allow_unicode=True).encode()
        ),
    )


@counts
@pytest.mark.parametrize(
    ("name", "valid"), [("table.json", json.dumps(_OWN).encode()), ("table.yaml", _YAML)]
)
def test_damaged_files(name: str, valid: bytes, folder: Path, count: int) -> None:
    rng = random.Random(0)
    assert _check(folder, name, valid)
    taken = sum(_check(folder, name, damaged(rng, valid, _PIECES)) for _ in range(count))
    assert 0 < taken < count


def _laughs(merge: str) -> str:
    lines = [f"a0: &a0 {{mean: {'[x]' if not merge else 1}}}"]
    for i in range(1, 40):
        inner = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} {{{merge or 'mean'}: [{inner}]}}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        _laughs(""),
        _laughs("<<"),
        "a: {mean: " + "1:" * 10**6 + "1}",
        "a: {mean: 0x" + "f" * 4000 + "}",
        "[" * 10**5,
        "a: {mean: 1}\n" + "#" * 2**22,
        "? [a]\n: {mean: 1}",
        "1: {mean: 1}",
        "a: {mean: !!python/object/apply:os.system [ls]}",
    ],
    ids=["laughs", "merges", "sixty", "digits", "deep", "large", "list", "number", "python"],
)
def test_yaml_that_asks_for_more(text: str, folder: Path) -> None:
    path = folder / "bomb.yaml"
    path.write_text(text)
    assert loaded(folder, lambda: LatencyTable.proxyless(path)) is None


def test_json_that_asks_for_more(folder: Path) -> None:
    path = folder / "bomb.json"
    for value in ("1" + "0" * 400, "[" * 900 + "]" * 900, '"' + "9" * 10**6 + '"', "-0.1", "1e999"):
        text = json.dumps(_OWN).replace("1.5", value)
        path.write_text(text)
        assert loaded(folder, lambda: LatencyTable.load(path)) is None, value[:9]
    path.write_bytes(b" " * (2**24 + 1))
    with pytest.raises(ProfileError, match="larger than 16 MiB"):
        LatencyTable.load(path)
