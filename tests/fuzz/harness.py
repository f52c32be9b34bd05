"""What the fuzz tests share: how many inputs, damage to bytes, and what a reader must not do.

`NASFX_FUZZ=100000 pytest tests/fuzz -m slow` runs that many inputs in each test by hand.
"""

import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis.strategies import SearchStrategy

from nasfx.errors import NasfxError

QUICK = 200
COUNT = int(os.environ.get("NASFX_FUZZ", "2000"))
counts = pytest.mark.parametrize(
    "count",
    [pytest.param(QUICK, id="quick"), pytest.param(COUNT, id="full", marks=pytest.mark.slow)],
)
_SECONDS = 20  # an input that takes longer hangs
_MEMORY = 512 * 2**10  # KiB by which one input may raise the most memory ever held
_INTERESTING = (
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x00" * 8,
    b"R",
    b".",
)
# What is called to run code, to reach other machines or to change files.
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen",
    "socket.connect", "socket.getaddrinfo", "os.remove", "os.rename", "os.rmdir", "os.mkdir",
    "os.chmod", "os.link", "os.symlink", "os.truncate", "shutil.rmtree", "ctypes.dlopen",
)  # fmt: skip


def explore(count: int, strategy: SearchStrategy[Any], check: Callable[[Any], Any]) -> None:
    """Call `check` with so many of the strategy's values; a failing one is made small."""

    @hypothesis.settings(
        max_examples=count, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(strategy)
    def run(value: Any) -> None:
        check(value)

    run()


class _Watch:
    """Notes what is opened and called while it is on; an audit hook cannot be taken away."""

    folder: Path | None = None
    notes: tuple[str, ...] = ()

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in _FORBIDDEN:
            self.notes += (f"{event}{args}",)
        if event == "open" and isinstance(args[0], str | bytes):
            path = Path(os.fsdecode(args[0]))
            # Python itself reads its own files: modules imported late, sources for tracebacks.
            own = str(path).startswith((sys.prefix, sys.base_prefix, "<"))
            own = own or path.suffix in (".py", ".pyc") or str(path) == os.devnull
            if not own and self.folder not in (path.absolute(), *path.absolute().parents):
                self.notes += (f"open {path}",)


_WATCH = _Watch()
_INSTALLED: list[_Watch] = []


class Hang(BaseException):
    """An input takes too long; nothing that a reader catches."""


def _hang(*_: Any) -> None:
    raise Hang(f"more than {_SECONDS} s")


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Within the block only files of `folder` are opened, memory is bounded, and time."""
    if not _INSTALLED:
        sys.addaudithook(_WATCH)
        _INSTALLED.append(_WATCH)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = signal.signal(signal.SIGALRM, _hang)
    signal.alarm(_SECONDS)
    _WATCH.notes, _WATCH.folder = (), folder.absolute()
    try:
        yield
    finally:
        _WATCH.folder = None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not _WATCH.notes, _WATCH.notes
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most
    assert more < _MEMORY, f"{more >> 10} MiB more memory"


def loaded(folder: Path, load: Callable[[], Any]) -> Any:
    """What `load` gives, or None where it raises an error of nasfx's own, with a message."""
    with guarded(folder):
        try:
            return load()
        except NasfxError as error:
            said = str(error)
    assert said.strip()
    return None


def damaged(rng: random.Random, data: bytes, others: tuple[bytes, ...] = ()) -> bytes:
    """`data` with some of its bytes changed, taken out, doubled or replaced by others'."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(made) + 1)
        end = min(len(made), at + rng.choice((1, 1, 2, 4, 8, 64, len(made))))
        kind = rng.randrange(7)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(made):
            made[at] = rng.randrange(256)
        elif kind == 2:
            piece = rng.choice(_INTERESTING)
            made[at : at + len(piece)] = piece
        elif kind == 3:
            del made[at:end]
        elif kind == 4:
            made[at:at] = made[at : min(end, at + 256)]
        elif kind == 5 and rng.random() < 0.3:
            del made[at:]
        elif kind == 6 and others:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            made[at:end] = other[start : start + end - at]
    return bytes(made)


class Canary:
    """Unpickled without care, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "it ran")
