"""Checkpoints of a search: read to tensors and plain data, or refused before torch makes them."""

import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from nasfx.errors import CheckpointError
from nasfx.searching.checkpoint import _PARTS, FORMAT, read
from tests.fuzz.harness import Canary, counts, damaged, explore, loaded


def _content() -> dict[str, Any]:
    weight = torch.arange(6.0).reshape(2, 3)
    content: dict[str, Any] = {name: {} for name in sorted(_PARTS)}
    return content | {
        "format": FORMAT,
        "versions": {"nasfx": "0.1.0"},
        "net": {"values": {"a": weight, "tied": weight, "half": weight[0].half(), "n": (1, None)}},
        "ranks": [{"torch": torch.zeros(9, dtype=torch.uint8), "type": torch.float64}],
    }


def _saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


_VALID = _saved(_content())


def _entries(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _packed(entries: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _with_pickle(change: Callable[[bytes], bytes]) -> bytes:
    entries = _entries(_VALID)
    return _packed({n: change(d) if n.endswith(".pkl") else d for n, d in entries.items()})


def _size(value: Any) -> int:
    """The bytes of the tensors in a content, all of which are touched."""
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    return value.clone().nbytes if isinstance(value, torch.Tensor) else 0


def _check(folder: Path, data: bytes) -> bool:
    path = folder / "checkpoint.pt"
    path.write_bytes(data)
    content = loaded(folder, lambda: read(path))
    if content is None:
        return False
    assert set(content) == _PARTS
    assert _size(content) < 2**27
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@counts
def test_damaged_files(folder: Path, count: int) -> None:
    rng = random.Random(0)
    assert _check(folder, _VALID)
    for _ in range(count):
        _check(folder, damaged(rng, _VALID, (b"PK\x01\x02", b"PK\x05\x06")))


@counts
def test_damaged_entries_with_right_checksums(folder: Path, count: int) -> None:
    rng = random.Random(1)
    entries = _entries(_VALID)
    names = list(entries)
    pickled = next(name for name in names if name.endswith("data.pkl"))
    pieces = (b"ctorch\nTensor\n", b"cbuiltins\nbytearray\n", b"cos\nsystem\n", b"R", b"(t\x81b")
    taken = 0
    for _ in range(count):
        made = dict(entries)
        if rng.random() < 0.2:
            a, b = rng.sample(names, 2)
            made[a], made[b] = made[b], made[a]
        name = pickled if rng.random() < 0.8 else rng.choice(names)
        made[name] = damaged(rng, made[name], pieces)
        taken += _check(folder, _packed(made))
    assert 0 < taken < count


_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(),
    lambda s: st.lists(s) | st.dictionaries(st.text(max_size=5), s) | st.tuples(s, s),
    max_leaves=8,
)


@counts
def test_other_contents(folder: Path, count: int) -> None:
    parts = st.fixed_dictionaries(dict.fromkeys(sorted(_PARTS), _plain))
    contents = _plain | parts | parts.map(lambda content: content | {"format": FORMAT})
    explore(count, contents, lambda value: _check(folder, _saved(value)))


def _numbers(data: bytes) -> bytes:
    return data.replace(b"K\x06t", b"J\x00\x00\x00\x10t")


def _shape(data: bytes) -> bytes:
    old = b"K\x00K\x02K\x03\x86q"
    assert old in data
    at = data.index(old)
    strides = data.index(b"K\x03K\x01\x86q", at)
    data = data[:strides] + b"K\x00K\x00\x86q" + data[strides + 6 :]
    return data[:at] + b"K\x00J\x00\x00\x01\x00J\x00\x00\x01\x00\x86q" + data[at + len(old) :]


def _program(code: bytes) -> bytes:
    return _with_pickle(lambda _: b"\x80\x02" + code + b".")


def _laughs() -> bytes:
    """A key of tuples of tuples, whose hash takes longer than the world lasts."""
    return b"}" + b"K\x01\x85q\x00" + b"0".join(
        b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(99)
    ) + b"K\x01s"  # fmt: skip


def _overlapping() -> bytes:
    """Ten thousand entries that are all the same megabyte."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data/0", bytes(2**20))
        for i in range(1, 10_000):
            entry = zipfile.ZipInfo(f"archive/data/{i}")
            first = archive.filelist[0]
            entry.file_size = entry.compress_size = first.file_size
            entry.CRC, entry.header_offset = first.CRC, 0
            archive.filelist.append(entry)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (_with_pickle(_numbers), "is to have 1073741824 bytes, and has 24"),
        (_with_pickle(_shape), "takes more memory than the file"),
        (_program(b"cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R"), "asks for builtins.bytearray"),
        (_program(b"ctorch\nTensor\nJ\x00\x00\x00\x7f\x85R"), "asks for torch.Tensor"),
        (_program(b"\x8e" + b"\xff" * 7 + b"\x0f"), "is no checkpoint"),
        (_program(b"\x96" + b"\xff" * 5 + b"\x00" * 3), "is no checkpoint"),
        (_program(b"}r\xff\xff\xff\xff"), "nasfx.search writes others"),
        (_program(_laughs()), "tuple as the key"),
        (_packed({"archive/data.pkl": bytes(2**26)}, zipfile.ZIP_DEFLATED), "it is compressed"),
        (_overlapping(), "larger than the file"),
        (_packed({"a/data.pkl": b"N.", "b/data.pkl": b"N."}), "no data.pkl"),
        (b"PK\x05\x06" + b"\xff" * 18, "damaged|no checkpoint"),
    ],
    ids=["storage", "expanded", "bytearray", "tensor", "bytes8", "bytearray8", "memo", "hash",
         "compressed", "overlapping", "two", "end"],
)  # fmt: skip
def test_files_that_ask_for_more(data: bytes, words: str, folder: Path) -> None:
    assert not _check(folder, data)
    with pytest.raises(CheckpointError, match=words):
        read(folder / "checkpoint.pt")


def test_a_file_that_runs_code_is_not_run(folder: Path) -> None:
    canary = folder / "canary"
    for protocol in range(2, 6):
        evil = pickle.dumps(_content() | {"net": Canary(canary)}, protocol)
        for data in (evil, _with_pickle(lambda _, evil=evil: evil)):
            assert not _check(folder, data)
            assert not canary.exists()
    pickle.loads(evil)
    assert canary.exists()
