"""When a search saves itself, and what it does where a signal asks it to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from nasfx.errors import SearchError
from nasfx.searching.checkpoint import CheckpointFolder, Plain, to_resume
from nasfx.searching.distributed import Ranks
from nasfx.searching.nonfinite import check_parameters
from nasfx.searching.resuming import Resumable, versions

_SHARE = 20  # an evaluation at the end is saved where that takes less than 1/20 of the time

Resume = bool | Literal["auto"] | str | Path


class Interrupted(Exception):  # noqa: N818  # no error, and it never leaves the search
    """A signal has asked the search to stop."""


class Saving:
    """Saves a search in a folder; without one it does nothing."""

    def __init__(
        self,
        checkpoint_dir: str | Path | None,
        resume: Resume,
        every: int | None,
        keep: int,
        console: Console,
        ranks: Ranks | None = None,
    ) -> None:
        """See `nasfx.search` for the arguments; of several processes the first one writes.

        Raises:
            SearchError: one of them is wrong.
            CheckpointError: the folder cannot be made.
        """
        if not isinstance(resume, bool | str | Path):
            raise SearchError(f"resume={resume!r} must be 'auto', True, False or a path")
        if every is not None and every < 1:
            raise SearchError(
                f"checkpoint_every={every} must be at least 1, or None for the ends of epochs"
            )
        self.resume, self.every, self.console = resume, every, console
        if keep < 1:
            raise SearchError(f"keep={keep} must be at least 1, the newest checkpoint")
        self.folder = None if checkpoint_dir is None else CheckpointFolder(checkpoint_dir, keep)
        self.ranks = ranks
        self.request = StopRequest()
        self.held: Plain | None = None
        self.saved_steps = 0
        self.saved_at = self.took = 0.0

    def open(self, search: Resumable) -> None:
        """Go on from a checkpoint, if the search is to.

        Raises:
            CheckpointError: a checkpoint cannot be read, or belongs to something else.
        """
        self.search = search
        found = self._found()
        if self.folder is not None:
            search.check()
        if found is None:
            return
        file, content, notices = found
        self._together(lambda: search.load(file, content))
        self.saved_steps = search.run.steps
        for notice in notices:
            self._say(f"{notice}; the one before it is used")
        if (wrote := content["versions"]) != versions():
            self._say(f"{file} was written with {wrote}, and these are {versions()}: the same "
                      "bits as without a stop are not promised")  # fmt: skip
        self._say(f"going on from {file}: {search.run}")

    def _found(self) -> tuple[Path, Plain, list[str]] | None:
        """What to go on from; the first process chooses, since it may set damaged files aside."""
        ranks = self.ranks
        if ranks is None or ranks.count == 1:
            return to_resume(self.folder, self.resume)
        chosen = ranks.lead(lambda: to_resume(self.folder, self.resume))
        return chosen

    def _together(self, call: Callable[[], Any]) -> None:
        """Run on all processes; where it fails on one of them, all raise."""
        call() if self.ranks is None else self.ranks.together(call)

    def _asked(self) -> bool:
        """Whether a signal has asked one of the processes to stop."""
        if self.ranks is not None and self.folder is not None:
            self.request.number = self.ranks.largest(self.request.number)
        return bool(self.request.number)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    # -- when --------------------------------------------------------------------------------------

    def after_step(self) -> None:
        """Save after so many steps; stop where that is asked for."""
        if self._asked():
            raise Interrupted
        if self.every is not None and self.search.run.steps - self.saved_steps >= self.every:
            self._save()

    def after_epoch(self) -> None:
        """Save; stop where that is asked for."""
        self._save(best=self.search.run.best_is_last)
        if self._asked():
            raise Interrupted

    @contextmanager
    def evaluating(self) -> Generator[None, None, None]:
        """Within the block an evaluation runs; where it is stopped, its start is what is saved.

        Nothing but random generators and buffers moves in it.
        """
        if self.folder is None:
            yield
            return
        self.held = self.search.randomness.state()
        buffers = [(b, b.clone()) for b in self.search.net.buffers()]
        try:
            yield
        except Interrupted:
            for b, value in buffers:
                b.copy_(value)
            raise
        self.held = None

    def check_evaluation(self) -> None:
        """Stop an evaluation where that is asked for."""
        # Of several processes none may leave the others waiting: they stop after the evaluation.
        alone = self.ranks is None or self.ranks.count == 1
        if alone and self.held is not None and self.request.number:
            raise Interrupted

    def after_evaluation(self) -> None:
        """Save an evaluation of the conclusion where it took long; stop where that is asked for."""
        if self._asked():
            raise Interrupted
        late = time.perf_counter() - self.saved_at >= _SHARE * self.took
        if late if self.ranks is None else self.ranks.largest(late):
            self._save()

    def after_end(self) -> None:
        """Save the result."""
        self._save()

    def _save(self, *, best: bool = False) -> None:
        steps = self.search.run.steps
        if self.folder is None or steps == self.saved_steps:
            return
        start = time.perf_counter()
        check_parameters(self.search.net, f"at {self.search.run}")
        folder, content = self.folder, self.search.content(self.held)
        if self.ranks is None or self.ranks.count == 1:
            folder.write(content, steps, best=best)
        else:
            first = self.ranks.first
            self._together(lambda: folder.write(content, steps, best=best) if first else None)
        self.saved_steps = steps
        self.saved_at = time.perf_counter()
        self.took = self.saved_at - start

    # -- stopping ----------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Generator[None, None, None]:
        """Within the block SIGTERM and Ctrl-C save the search; errors name the last checkpoint.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: with code 143 after SIGTERM.
        """
        if self.folder is None:
            yield
            return
        with stop_requests() as self.request:
            try:
                yield
            except Interrupted:
                self._save()
            except Exception as error:
                error.add_note(
                    f"the last checkpoint is {files[0]}: search again with the same arguments to "
                    "go on from there" if (files := self.folder.files())
                    else "there is no checkpoint yet"
                )  # fmt: skip
                raise
            if self.request.number:
                self._leave()

    def _leave(self) -> None:
        name = signal.Signals(self.request.number).name
        assert self.folder is not None
        message = (
            f"{name}: stopped at {self.search.run}, saved in {self.folder.path}; search again with "
            "the same arguments to go on"
        )
        self._say(message)
        if self.request.number == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(128 + self.request.number)


@dataclass
class StopRequest:
    """The signal that asked the search to stop; 0 for none."""

    number: int = 0


@contextmanager
def stop_requests() -> Generator[StopRequest, None, None]:
    """Within the block SIGTERM and Ctrl-C are noted; a second one acts as it did before.

    In other threads than the main one, which get no signals, nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            # None: one that was not set from Python, and cannot be put back.
            with contextlib.suppress(TypeError):
                signal.signal(number, handler)

    def note(number: int, _: Any) -> None:
        if request.number:
            restore()
            signal.raise_signal(number)
        request.number = number

    try:
        for number in numbers:
            signal.signal(number, note)
        yield request
    finally:
        restore()
