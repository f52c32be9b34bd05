"""Reading files that others have written: bounded, and running nothing that is in them."""

from __future__ import annotations

import io
import json
import pickle
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

TEXT_LIMIT = 16 * 2**20
"""Bytes of a text file that is read; parsed, JSON takes some twenty times as much memory."""

YAML_LIMIT = 4 * 2**20
"""Bytes of a YAML file that is read: its parser is slow."""

_SCALAR_LIMIT = 4096  # characters; YAML's numbers to the base 60 take time quadratic in theirs


def shown(value: Any) -> str:
    """`repr(value)` for a message, shortened, however large or deep the value is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 120
    try:
        return short.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"<{type(value).__name__}>"


def read_text(path: str | Path, limit: int = TEXT_LIMIT) -> str:
    """The text of a UTF-8 file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no UTF-8, or larger than `limit` bytes.
    """
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit >> 20} MiB")
    return data.decode("utf-8")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, nested too deep, or larger than `TEXT_LIMIT`.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file of plain data, without aliases.

    Aliases are refused since a few lines of them stand for any amount of memory.

    Raises:
        ImportError: pyyaml is missing.
        OSError: it cannot be read.
        ValueError: it is no such YAML, nested too deep, or larger than `YAML_LIMIT`.
    """
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it holds an alias (*name): write out what it stands for")
            if self.check_event(yaml.ScalarEvent) and len(self.peek_event().value) > _SCALAR_LIMIT:
                raise ValueError(f"a value in it has more than {_SCALAR_LIMIT} characters")
            return super().compose_node(parent, index)

    text = read_text(path, YAML_LIMIT)
    try:
        return yaml.load(text, Plain)
    except Exception as error:  # SafeLoader lets through what its own constructors raise
        raise ValueError(f"{type(error).__name__}: {error}") from error


# -- pickles ---------------------------------------------------------------------------------------


class Refused(pickle.UnpicklingError):
    """A pickle asks for something that the kind of file has no need of."""


def _check_key(key: Any) -> None:
    if key is not None and not isinstance(key, str | bytes | int | float):
        raise Refused(f"its pickle has a {type(key).__name__} as the key of a dictionary")


_BASE: Any = pickle._Unpickler


def _setitem(reader: Any) -> None:
    _check_key(reader.stack[-2])
    _BASE.load_setitem(reader)


def _setitems(reader: Any) -> None:
    for key in reader.stack[::2]:
        _check_key(key)
    _BASE.load_setitems(reader)


def _dict(reader: Any) -> None:
    for key in reader.stack[::2]:
        _check_key(key)
    _BASE.load_dict(reader)


def _bytearray(reader: Any) -> None:
    # As it is in the file: the base makes one of any length first, and then reads.
    reader.append(bytearray(reader.read(int.from_bytes(reader.read(8), "little"))))


def _set(reader: Any) -> None:
    raise Refused("its pickle holds a set")


# Python's own implementation, not the one in C: that one fills a table as long as the largest
# number that a file gives to an object, up to 64 GiB for five bytes.
class PlainUnpickler(pickle._Unpickler):
    """An unpickler whose whole world is the names that it is given.

    Keys of dictionaries are texts and numbers: the hash of nested tuples may take forever.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **_BASE.dispatch,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.DICT[0]: _dict,
        pickle.BYTEARRAY8[0]: _bytearray,
        pickle.ADDITEMS[0]: _set,
        pickle.FROZENSET[0]: _set,
    }

    def __init__(self, data: bytes, allowed: Mapping[tuple[str, str], Any]) -> None:
        """Read `data`, in which `allowed` says what a module and name stand for."""
        super().__init__(io.BytesIO(data))
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        """What the name stands for.

        Raises:
            Refused: it is not allowed.
        """
        if (module, name) not in self.allowed:
            raise Refused(f"its pickle asks for {module[:99]}.{name[:99]}. Nothing of it was run")
        return self.allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Nothing.

        Raises:
            Refused: always.
        """
        raise Refused("its pickle refers to objects outside of it")

    def get_extension(self, code: int) -> Any:
        """Nothing.

        Raises:
            Refused: always.
        """
        raise Refused("its pickle uses the extension registry")
