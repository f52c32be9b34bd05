"""What is in a checkpoint file, looked at before torch reads it.

`torch.load(weights_only=True)` runs no foreign code, but it makes whatever a file asks for: a few
bytes can ask for all the memory there is.
"""

from __future__ import annotations

import math
import zipfile
from collections import OrderedDict
from typing import Any

import torch

from nasfx.reading import PlainUnpickler, Refused

_SLACK = 64 * 2**20  # bytes by which tensors may take more than their file, as expanded ones do
_STORAGES = {
    "BFloat16Storage": 2, "BoolStorage": 1, "ByteStorage": 1, "CharStorage": 1,
    "ComplexDoubleStorage": 16, "ComplexFloatStorage": 8, "DoubleStorage": 8, "FloatStorage": 4,
    "HalfStorage": 2, "IntStorage": 4, "LongStorage": 8, "ShortStorage": 2, "UntypedStorage": 1,
}  # fmt: skip
_LARGEST = 16  # bytes of an element


def check_entries(archive: zipfile.ZipFile, size: int) -> None:
    """Check that the entries fit into their file, each under a name of its own.

    Args:
        archive: the file.
        size: its bytes.

    Raises:
        Refused: they do not.
    """
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Refused("it is compressed")
    if sum(entry.file_size for entry in entries) > size:
        raise Refused("its entries are larger than the file")
    if len({entry.filename for entry in entries}) < len(entries):
        raise Refused("two of its entries have one name")


def check_pickle(archive: zipfile.ZipFile, size: int) -> None:
    """Check that the pickle holds plain data, and tensors whose memory is in the file.

    Args:
        archive: the file, whose entries were checked.
        size: its bytes.

    Raises:
        Refused: it holds something else, or tensors that take far more memory than the file.
        Exception: whatever a pickle that is none makes the reader raise.
    """
    names = [e.filename for e in archive.infolist() if e.filename.count("/") == 1]
    names = [name for name in names if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise Refused("it has no data.pkl")
    prefix = names[0].removesuffix("data.pkl") + "data/"
    records = {
        e.filename.removeprefix(prefix): e.file_size
        for e in archive.infolist()
        if e.filename.startswith(prefix)
    }
    try:
        _Scan(archive.read(names[0]), records, 4 * size + _SLACK).load()
    except EOFError as error:  # of the pickle: the entry is whole
        raise Refused("its pickle has no end") from error


class _Storage:
    """A kind of storage, with the bytes of an element."""

    def __init__(self, itemsize: int) -> None:
        self.itemsize = itemsize


class _Scan(PlainUnpickler):
    """Reads the pickle with nothing in the place of tensors, and adds up what they take."""

    def __init__(self, data: bytes, records: dict[str, int], allowed_bytes: int) -> None:
        dtypes = {
            ("torch", name): value
            for name, value in vars(torch).items()
            if isinstance(value, torch.dtype)
        }
        storages = {
            (module, name): _Storage(itemsize)
            for name, itemsize in _STORAGES.items()
            for module in ("torch", "torch.storage")
        }
        super().__init__(
            data,
            {
                **dtypes,
                **storages,
                ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
                ("torch._utils", "_rebuild_tensor_v3"): self._tensor,
                ("torch", "device"): torch.device,
                ("collections", "OrderedDict"): OrderedDict,
            },
        )
        self.records, self.left = records, allowed_bytes
        self.seen: set[tuple[Any, ...]] = set()

    def persistent_load(self, pid: Any) -> Any:
        """The record of a storage, which must be as long as the pickle says."""
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise Refused("its pickle refers to something other than tensors")
        if self.records.get(key) != count * storage.itemsize:
            raise Refused(
                f"its storage {key!s:.99} is to have {count * storage.itemsize} bytes, and has "
                f"{self.records.get(key, 'no record')}"
            )
        return key, storage.itemsize

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> None:
        key, itemsize = storage
        tensor = key, int(offset), tuple(map(int, shape)), tuple(map(int, stride))
        if tensor in self.seen:  # one that is tied
            return
        self.seen.add(tensor)
        # Of an untyped storage the elements' size is that of a dtype that comes later.
        itemsize = _LARGEST if len(more) > 3 else itemsize
        self.left -= math.prod(tensor[2]) * itemsize
        if self.left < 0 or min(tensor[2], default=0) < 0:
            raise Refused(f"a tensor of shape {tensor[2]!s:.99} takes more memory than the file")
