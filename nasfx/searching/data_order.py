"""The order of the data: random generators, and passes over loaders whose place can be saved."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from nasfx.errors import CheckpointError
from nasfx.searching.checkpoint import Plain
from nasfx.searching.evaluation import Batch, batches


class Randomness:
    """The random generators that a search reads: the global ones, and those of its loaders."""

    def __init__(self, *loaders: Any) -> None:
        self.loaders = loaders
        found = [generator for loader in loaders for generator in _generators(loader)]
        self.generators = list({id(generator): generator for generator in found}.values())

    def state(self) -> Plain:
        """Where they stand: torch, CUDA, Python, NumPy, and the loaders' own."""
        version, numbers, gauss = random.getstate()
        legacy: Any = np.random.get_state(legacy=True)
        kind, keys, *rest = legacy
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return {
            "torch": torch.get_rng_state(),
            "cuda": cuda,
            "python": (version, torch.tensor(numbers), gauss),
            "numpy": (str(kind), torch.tensor(keys.tolist()), *(float(value) for value in rest)),
            "loaders": [generator.get_state() for generator in self.generators],
            "passes": [getattr(loader, "_num_iter_calls", 0) for loader in self.loaders],
        }

    def load_state(self, state: Plain) -> None:
        """Put them where they stood."""
        torch.set_rng_state(state["torch"])
        for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value, device)
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers.tolist()), gauss))
        kind, keys, place, has_gauss, cached = state["numpy"]
        keys = np.array(keys.tolist(), dtype=np.uint32)
        np.random.set_state((kind, keys, int(place), int(has_gauss), cached))
        for generator, value in zip(self.generators, state["loaders"], strict=True):
            generator.set_state(value)
        for loader, passes in zip(self.loaders, state["passes"], strict=True):
            if hasattr(loader, "_num_iter_calls"):  # Fabric tells it to samplers as the epoch
                loader._num_iter_calls = passes


def _generators(loader: Any) -> list[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (
        loader, getattr(loader, "sampler", None), batch_sampler,
        getattr(batch_sampler, "sampler", None), getattr(loader, "dataset", None),
    )  # fmt: skip
    found = (getattr(holder, "generator", None) for holder in holders)
    return [generator for generator in found if isinstance(generator, torch.Generator)]


class Reader:
    """Passes over a loader, one after the other, whose place can be saved and found again.

    A place is what the random generators were when the pass began, and how many batches were taken
    since; it is found by beginning the pass again and taking as many.
    """

    def __init__(
        self, data: Any, what: str, move: Callable[[Any], Any], randomness: Randomness
    ) -> None:
        """See `batches`; `randomness` is saved when a pass begins."""
        self.data, self.what, self.move, self.randomness = data, what, move, randomness
        self._pass: Iterator[Batch] | None = None
        self._start: Plain = {}
        self._taken = 0

    def rest(self) -> Iterator[Batch]:
        """What is left of the pass; the whole of a new one after `close`, or at first."""
        if self._pass is None:
            self._start, self._taken = self.randomness.state(), 0
            self._pass = batches(self.data, self.what, self.move)
        for batch in self._pass:
            self._taken += 1
            yield batch

    def close(self) -> None:
        """The pass is over."""
        self._pass, self._start, self._taken = None, {}, 0

    def endless(self) -> Iterator[Batch]:
        """Pass after pass."""
        while True:
            yield from self.rest()
            self.close()

    def state(self) -> Plain:
        """The place."""
        return {"start": self._start, "taken": self._taken}

    def load_state(self, state: Plain) -> None:
        """Find the place; the random generators are left anywhere.

        Raises:
            CheckpointError: the loader has fewer batches now.
        """
        self.close()
        if not state["start"]:
            return
        self.randomness.load_state(state["start"])
        self._start, self._taken = state["start"], int(state["taken"])
        self._pass = batches(self.data, self.what, self.move)
        found = sum(1 for _ in islice(self._pass, self._taken))
        if found < self._taken:
            raise CheckpointError(
                f"{self.what} gave {found} batches, and the checkpoint was written after "
                f"{self._taken} of a pass: it is not the same data; search on with that, or give "
                "another checkpoint_dir to start again"
            )
