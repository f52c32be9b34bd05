"""Checkpoints of a search: what is in them, and how they are written and read.

A checkpoint is one file of tensors and plain data, which `torch.load(weights_only=True)` reads. It
is written under another name and renamed when it is on the disk, so a file under its own name is
whole, whenever the process or the machine stops.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nasfx.errors import CheckpointError
from nasfx.searching.archives import check_entries, check_pickle

FORMAT = 1
"""Of the files; it changes whenever older ones cannot be read any more."""

Plain = dict[str, Any]
"""Tensors and plain data."""

_NAME = re.compile(r"checkpoint-(\d{12,})\.pt")
_PARTS = {
    "format", "versions", "of", "net", "hidden", "optimizers", "scheduler", "precision", "run",
    "ranks",
}  # fmt: skip


class DamagedError(CheckpointError):
    """A file is cut short, or its bytes are not those that were written."""


# -- one file --------------------------------------------------------------------------------------


def read(file: Path) -> Plain:
    """The content of a checkpoint; nothing in it runs code.

    Raises:
        DamagedError: the file is not whole.
        CheckpointError: there is none, or it is something else.
    """
    try:
        content = read_tensors(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {file}") from error
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise DamagedError(f"{file} is damaged, or cut short: {error}") from error
    except Exception as error:  # what is no checkpoint can make the reader raise anything
        text = str(error).split("\n", 1)[0]
        raise CheckpointError(f"{file} is no checkpoint of a search: {text}") from error
    if not isinstance(content, dict) or set(content) != _PARTS:
        raise CheckpointError(
            f"{file} is no checkpoint of a search: nasfx.search writes others; give the folder, or "
            "a file, that it wrote"
        )
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{file} has the format {content['format']!r}, and this nasfx reads {FORMAT}: finish "
            f"the search with the versions that wrote it, {content['versions']}"
        )
    return content


def read_tensors(file: Path) -> Any:
    """What `torch.save` wrote, of tensors and plain data, which fits into the file's own size.

    Raises:
        DamagedError: a checksum is wrong.
        Exception: whatever else a file that is none makes its readers raise.
    """
    with zipfile.ZipFile(file) as archive:
        size = file.stat().st_size
        check_entries(archive, size)
        if (broken := archive.testzip()) is not None:
            raise DamagedError(f"{file} is damaged: the checksum of {broken} is wrong")
        check_pickle(archive, size)
    return torch.load(file, map_location="cpu", weights_only=True)


def _write(content: Plain, file: Path) -> None:
    """Write the file whole, or not at all."""
    temporary = file.with_name(f".{file.name}.part")
    try:
        with open(temporary, "wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
        _sync(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    if not hasattr(os, "O_DIRECTORY"):  # not on Windows
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(value: Any, where: str = "") -> Any:
    """`value` as tensors and plain data; numbers of other libraries become Python's.

    Raises:
        CheckpointError: something is neither; it is named by its path.
    """
    if isinstance(value, Mapping):
        return {k: plain(v, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        made = [plain(v, f"{where}.{i}") for i, v in enumerate(value)]
        return made if isinstance(value, list) else tuple(made)
    if isinstance(value, Tensor):
        return value.detach()
    if value is None or isinstance(value, bool | str | torch.dtype | torch.device):
        return value
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, and a checkpoint holds tensors and plain data only: "
        "numbers, texts, lists and dictionaries"
    )


# -- a folder --------------------------------------------------------------------------------------


class CheckpointFolder:
    """The last checkpoints of one search, named by the steps taken, and the best, `best.pt`."""

    def __init__(self, path: str | Path, keep: int) -> None:
        """Make the folder if there is none, and clear what a stopped process left half written.

        Raises:
            CheckpointError: it cannot be made.
        """
        self.path, self.keep = Path(path), keep
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for left in self.path.glob(".*.pt.part"):
                left.unlink()
        except OSError as error:
            raise CheckpointError(f"checkpoint_dir={str(path)!r} is no folder: {error}") from error

    def files(self) -> list[Path]:
        """The checkpoints but the best, newest first."""
        found = [file for file in self.path.iterdir() if _NAME.fullmatch(file.name)]
        return sorted(found, key=_steps, reverse=True)

    def write(self, content: Plain, steps: int, *, best: bool) -> Path:
        """Write a checkpoint, then delete those that are too many.

        Args:
            content: tensors and plain data.
            steps: how many steps of the search it holds.
            best: keep it as the best, too.

        Raises:
            CheckpointError: it cannot be written. Those that were there before are as they were.
        """
        file = self.path / f"checkpoint-{steps:012d}.pt"
        try:
            _write(content, file)
            if best:
                self._keep_as_best(file)
            for old in self.files()[self.keep :]:
                old.unlink()
        except (OSError, RuntimeError) as error:
            before = next((f for f in self.files() if f != file), None)
            raise CheckpointError(
                f"{file} could not be written: {_reason(error)}; "
                + (f"the last whole checkpoint is {before}; " if before else "there is none yet; ")
                + f"make room for {self.keep + 2} checkpoints, and search again with the same "
                "arguments to go on"
            ) from error
        return file

    def _keep_as_best(self, file: Path) -> None:
        temporary = self.path / ".best.pt.part"
        temporary.unlink(missing_ok=True)
        try:
            try:
                os.link(file, temporary)
            except OSError:  # a file system without links
                shutil.copyfile(file, temporary)
            os.replace(temporary, self.path / "best.pt")
            _sync(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def newest(self) -> tuple[Path, Plain, list[str]] | None:
        """The newest whole checkpoint, and a message for each newer one that is not whole.

        Those are renamed to `.damaged`. None where there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, and none of them is whole.
        """
        damaged: list[tuple[Path, str]] = []
        for file in self.files():
            try:
                content = read(file)
            except DamagedError as error:
                damaged.append((file, str(error)))
                continue
            for broken, _ in damaged:
                broken.rename(broken.with_suffix(".damaged"))
            return file, content, [message for _, message in damaged]
        if damaged:
            raise CheckpointError(
                "; ".join(message for _, message in damaged)
                + f": no checkpoint in {self.path} is whole; restore one from a copy, or delete "
                "them to search from the beginning"
            )
        return None


def _steps(file: Path) -> int:
    match = _NAME.fullmatch(file.name)
    return int(match[1]) if match else -1


def _reason(error: BaseException) -> str:
    """The operating system's reason; torch puts one of its own in front of it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return str(seen)
        seen = seen.__cause__ or seen.__context__
    return str(error).split("\n", 1)[0]


def to_resume(
    folder: CheckpointFolder | None, resume: bool | str | Path
) -> tuple[Path, Plain, list[str]] | None:
    """The checkpoint that a search goes on from; None to start from the beginning.

    Args:
        folder: where the search writes its own; None for nowhere.
        resume: see `nasfx.search`.

    Raises:
        CheckpointError: it cannot be read, there is none, or others would be mistaken for it later.
    """
    there = folder.files() if folder is not None else []
    if resume is True or resume == "auto":
        found = folder.newest() if folder is not None else None
        if found is None and resume is True:
            where = f"no checkpoint in {folder.path}" if folder else "no checkpoint_dir"
            raise CheckpointError(f"resume=True, and there is {where}; resume='auto' starts then")
        return found
    if resume is False:
        if folder is not None and there:
            raise CheckpointError(
                f"resume=False, and {there[0]} is there, of a search that could go on: give "
                "another checkpoint_dir, or delete its checkpoints"
            )
        return None
    file = Path(resume)
    content = read(file)
    inside = folder is not None and file.resolve().parent == folder.path.resolve()
    if newer := [f for f in there if not inside or _steps(f) > int(content["run"]["steps"])]:
        raise CheckpointError(
            f"resume={str(file)!r}, and {newer[0]} would be taken for its continuation: give "
            "another checkpoint_dir, or delete it"
        )
    return file, content, []
