"""Architectures, and the single decisions that they are made of."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any, cast

import torch

from nasfx.choice import Decision, checked_indices
from nasfx.errors import SpaceError
from nasfx.reading import read_json, shown


class Architecture(Mapping[str, Any]):
    """Immutable decisions: a candidate's name, or a list of input indices, for each label.

    Example:
        >>> arch = Architecture({"block": "conv3", "skips": [0, 2]})
        >>> arch["skips"], arch == {"block": "conv3", "skips": [0, 2]}
        ([0, 2], True)
    """

    __slots__ = ("_decisions",)

    def __init__(self, decisions: Mapping[str, Any]) -> None:
        self._decisions: dict[str, Decision] = {
            label: value if isinstance(value, str) else _indices(label, value)
            for label, value in decisions.items()
        }

    def __getitem__(self, label: str) -> Any:
        value = self._decisions[label]
        return value if isinstance(value, str) else list(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._decisions)

    def __len__(self) -> int:
        return len(self._decisions)

    def __hash__(self) -> int:
        return hash(frozenset(self._decisions.items()))

    def __repr__(self) -> str:
        return f"Architecture({dict(self)})"

    def decision(self, label: str) -> Decision:
        """The decision for `label`: a name, or a tuple of indices."""
        return self._decisions[label]

    def to_json(self, path: str | Path) -> None:
        """Write the architecture to a file."""
        Path(path).write_text(json.dumps(dict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> Architecture:
        """Read an architecture from a file.

        Raises:
            SpaceError: the file is no JSON object of names and lists of indices, or is larger than
                16 MiB.
        """
        try:
            data: object = read_json(path)
        except ValueError as error:
            raise SpaceError(f"{path} is not a JSON file: {error}") from error
        if not isinstance(data, dict):
            raise SpaceError(f"{path} holds no JSON object of labels and decisions")
        return cls(cast("dict[str, Any]", data))


def _indices(label: str, value: Any) -> tuple[int, ...]:
    values: list[Any] = [value] if isinstance(value, int) else list(_sequence(label, value))
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in values):
        raise SpaceError(f"decision {shown(value)} of {label!r} is no name and no list of indices")
    return tuple(sorted(values))


def _sequence(label: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, Sequence):
        raise SpaceError(f"decision {shown(value)} of {label!r} is no name and no list of indices")
    return cast("Sequence[Any]", value)


@dataclass(frozen=True)
class SpaceChoice:
    """One decision of the space.

    Attributes:
        label: its name.
        kind: "layer" or "input".
        candidates: names (layer) or indices (input), in order.
        n_chosen: how many inputs are chosen; None for any subset; 1 for a layer.
        places: the paths of the choice modules with this label.
        relaxed_only: candidates of mixtures only, which are never chosen.
        zeros: the candidates that add nothing: their graphs give zeros, or they give the input as
            it is where all others add to it.
        sources: for an input choice, by index the choice whose output the input comes from last,
            or None.
        edges: for an input choice whose every input comes straight from a layer choice of its own
            (*edge-scored*, as in a DARTS cell), the labels of those, by index; else empty.
    """

    label: str
    kind: str
    candidates: tuple[Any, ...]
    n_chosen: int | None
    places: tuple[str, ...]
    relaxed_only: tuple[str, ...] = ()
    edges: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    sources: tuple[str | None, ...] = ()

    @property
    def choosable(self) -> tuple[Any, ...]:
        """The candidates that may be chosen."""
        return tuple(name for name in self.candidates if name not in self.relaxed_only)

    @property
    def n_values(self) -> int:
        """How many ways there are to decide."""
        n = len(self.candidates)
        if self.kind == "layer":
            return n - len(self.relaxed_only)
        return 2**n if self.n_chosen is None else comb(n, self.n_chosen)

    def values(self) -> Iterator[Decision]:
        """All ways to decide, in a fixed order."""
        if self.kind == "layer":
            yield from self.choosable
            return
        n = len(self.candidates)
        for k in range(n + 1) if self.n_chosen is None else (self.n_chosen,):
            yield from itertools.combinations(range(n), k)

    def draw(self, generator: torch.Generator | None) -> Decision:
        """One way to decide, uniformly."""
        n = len(self.candidates)
        if self.kind == "layer":
            names = self.choosable
            return names[int(torch.randint(len(names), (), generator=generator))]
        if self.n_chosen is None:
            taken = torch.randint(2, (n,), generator=generator).tolist()
            return tuple(i for i in range(n) if taken[i])
        chosen: list[int] = torch.randperm(n, generator=generator)[: self.n_chosen].tolist()
        return tuple(sorted(chosen))

    def checked(self, value: Decision) -> Decision:
        """`value`, if this choice can be decided so; SpaceError otherwise."""
        if self.kind == "input":
            if isinstance(value, str):
                raise SpaceError(f"{self.label!r} chooses inputs: give indices, not {shown(value)}")
            return checked_indices(value, len(self.candidates), self.n_chosen, repr(self.label))
        if value in self.relaxed_only:
            raise SpaceError(f"{self.label!r}: {value!r} is relaxed_only and cannot be chosen")
        if value not in self.candidates:
            raise SpaceError(
                f"{self.label!r} has no candidate {shown(value)}; "
                f"its candidates are {self.candidates}"
            )
        return value
