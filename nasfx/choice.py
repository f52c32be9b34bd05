"""The two marks that a user puts in a model: `LayerChoice` and `InputChoice`.

Both are ordinary modules. Eagerly they run their active candidate, so a model with choices runs,
trains and pickles as it is, and is the oracle that every rewrite is compared with.
"""

from __future__ import annotations

import functools
import keyword
import operator
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from nasfx.errors import SpaceError, user_site

Decision = str | tuple[int, ...]
"""What is decided for one label: a candidate's name, or the ascending indices of the inputs."""

EMPTY = -1
"""Stands, among the indices of inputs, for the empty subset (whose zeros have input 0's shape)."""

SINGLE = -2
"""Stands for the subsets of one input."""

_MODULE = nn.Module()


class TensorLeaf:
    """Stands, in the structure of a traced call, for an argument that is a tensor."""


def _may_be_named(name: object) -> bool:
    """Whether an attribute of this name can be written in a graph's generated source."""
    return (
        isinstance(name, str) and bool(name) and name.isprintable() and not set(name) & set('."\\')
    )


def _checked_label(label: str | None, site: str) -> str | None:
    if label is None:
        return None
    if not _may_be_named(label):
        raise SpaceError(
            f"{site}: a label is a non-empty, printable string without dots, double quotes and "
            f"backslashes, not {label!r}"
        )
    if hasattr(_MODULE, label):
        raise SpaceError(f"{site}: label {label!r} is an attribute of nn.Module; choose another")
    return label


class LayerChoice(nn.Module):
    """One of several layers, to be decided by the search.

    The candidates become direct children under their names, so the parameters of candidate
    `conv3` of a choice at `block` are called `block.conv3....`, whatever is done to the model.

    Args:
        candidates: the candidate modules by name, or a list, whose names are "0", "1", ...
        label: the name of the decision. Choices with equal labels are one decision and must have
            the same candidates' names in the same order. By default the module's path, with "/"
            for ".".
        relaxed_only: names of candidates that take part in mixtures but are never derived, sampled,
            enumerated or counted (the "none" of DARTS).

    Raises:
        SpaceError: no candidate, one that is no module, or a name or label that cannot be used.

    Example:
        >>> import torch
        >>> block = LayerChoice({"conv": nn.Conv2d(8, 8, 3, padding=1), "skip": nn.Identity()})
        >>> block(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    holds_graphs = True
    kind = "layer"
    n_chosen: int | None = 1
    structure: tuple[Any, ...] | None = None  # of the call, once traced: spec, then the leaves

    def __init__(
        self,
        candidates: Mapping[str, nn.Module] | Sequence[nn.Module],
        *,
        label: str | None = None,
        relaxed_only: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.site = site = user_site()
        self.label = _checked_label(label, site)
        if not isinstance(candidates, Mapping):
            candidates = {str(i): candidate for i, candidate in enumerate(candidates)}
        if not candidates:
            raise SpaceError(f"{site}: a LayerChoice needs at least one candidate")
        reserved = {*dir(self), "relaxed_only", "_active", "graph_children"}
        for name, candidate in candidates.items():
            if not isinstance(candidate, nn.Module):
                raise SpaceError(
                    f"{site}: candidate {name!r} is a {type(candidate).__name__}, not an "
                    "nn.Module; wrap a function in a module, and call a class to get an instance"
                )
            if not _may_be_named(name) or keyword.iskeyword(name) or name in reserved:
                raise SpaceError(
                    f"{site}: {name!r} cannot be a candidate's name: it must be a non-empty, "
                    "printable string without dots, double quotes and backslashes, no keyword of "
                    "Python and no attribute of nn.Module or LayerChoice"
                )
            self.add_module(name, candidate)
        if isinstance(relaxed_only, str) or set(relaxed_only) - set(candidates):
            raise SpaceError(f"{site}: relaxed_only={relaxed_only!r} must list candidates' names")
        self.relaxed_only = tuple(relaxed_only)
        choosable = [name for name in candidates if name not in self.relaxed_only]
        if not choosable:
            raise SpaceError(f"{site}: every candidate is relaxed_only, so none could be chosen")
        self._active = choosable[0]

    @property
    def candidates(self) -> tuple[str, ...]:
        """The names of the candidates, in order."""
        return tuple(self._modules)

    def named_candidates(self) -> Iterator[tuple[str, nn.Module]]:
        """The candidates by name; one module under two names comes twice."""
        yield from ((name, m) for name, m in self._modules.items() if m is not None)

    @property
    def choosable(self) -> tuple[str, ...]:
        """The names of the candidates that may be chosen: all but the `relaxed_only` ones."""
        return tuple(name for name in self._modules if name not in self.relaxed_only)

    @property
    def active(self) -> str:
        """The name of the candidate that runs; assign another to run that one."""
        return self._active

    @active.setter
    def active(self, name: str) -> None:
        if name not in self._modules:
            raise SpaceError(
                f"{self.described}: no candidate {name!r}; there are {self.candidates}"
            )
        self._active = name

    @property
    def described(self) -> str:
        """How error messages call this choice."""
        return f"choice {self.label or '(unlabelled)'} ({self.site})"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active candidate."""
        return call_candidate(self._modules[self._active], self.structure, args, kwargs)

    def extra_repr(self) -> str:
        """The label and the active candidate."""
        return f"label={self.label!r}, active={self._active!r}"


class InputChoice(nn.Module):
    """Some of several input tensors, to be decided by the search, reduced to one.

    Called with a list of `n_candidates` tensors.

    Args:
        n_candidates: how many inputs there are to choose from.
        n_chosen: how many are chosen; None for any subset, of which there are 2**n_candidates. The
            empty subset gives zeros of the first input's shape (sum, mean) or an empty list (none).
        reduction: "sum", "mean", "concat" (along dimension 1, ascending) or "none" (the list).
        label: as for `LayerChoice`.

    Raises:
        SpaceError: a count out of range, or an unknown reduction.

    Example:
        >>> import torch
        >>> InputChoice(3, n_chosen=2)([torch.ones(2), torch.ones(2), torch.ones(2)])
        tensor([2., 2.])
    """

    holds_graphs = True
    kind = "input"
    relaxed_only: tuple[str, ...] = ()

    def __init__(
        self,
        n_candidates: int,
        n_chosen: int | None = 1,
        *,
        reduction: str = "sum",
        label: str | None = None,
    ) -> None:
        super().__init__()
        self.site = site = user_site()
        self.label = _checked_label(label, site)
        if not _is_index(n_candidates) or n_candidates < 1:
            raise SpaceError(f"{site}: n_candidates must be at least 1, not {n_candidates!r}")
        if n_chosen is not None and not (_is_index(n_chosen) and 1 <= n_chosen <= n_candidates):
            raise SpaceError(
                f"{site}: n_chosen={n_chosen!r} must be between 1 and n_candidates={n_candidates}, "
                "or None for any subset"
            )
        if reduction not in ("sum", "mean", "concat", "none"):
            raise SpaceError(
                f"{site}: reduction {reduction!r} is none of 'sum', 'mean', 'concat', 'none'"
            )
        if n_chosen is None and reduction == "concat":
            raise SpaceError(
                f"{site}: n_chosen=None may choose no input at all, and nothing cannot be "
                "concatenated; use reduction='sum', or a number of inputs"
            )
        self.n_candidates, self.n_chosen, self.reduction = n_candidates, n_chosen, reduction
        self._active = tuple(range(n_candidates if n_chosen is None else n_chosen))

    @property
    def candidates(self) -> tuple[str, ...]:
        """The indices of the inputs, as strings."""
        return tuple(str(i) for i in range(self.n_candidates))

    @property
    def active(self) -> tuple[int, ...]:
        """The ascending indices of the inputs that are chosen; assign others to choose those."""
        return self._active

    @active.setter
    def active(self, indices: Sequence[int]) -> None:
        self._active = checked_indices(indices, self.n_candidates, self.n_chosen, self.described)

    @property
    def described(self) -> str:
        """How error messages call this choice."""
        return f"choice {self.label or '(unlabelled)'} ({self.site})"

    def forward(self, inputs: Sequence[torch.Tensor]) -> Any:
        """Reduce the chosen ones of `inputs`, a list of `n_candidates` tensors of one shape."""
        if len(inputs) != self.n_candidates:
            raise SpaceError(
                f"{self.described} is called with {len(inputs)} inputs but has "
                f"n_candidates={self.n_candidates}"
            )
        return reduce_inputs(inputs, self._active, self.reduction)

    def extra_repr(self) -> str:
        """The label, the counts and the reduction."""
        return (
            f"n_candidates={self.n_candidates}, n_chosen={self.n_chosen}, "
            f"reduction={self.reduction!r}, label={self.label!r}, active={self._active}"
        )


def call_candidate(
    candidate: Any, structure: tuple[Any, ...] | None, args: Any, kwargs: Any, *more: Any
) -> Any:
    """Call a candidate: a traced one with the tensors alone (and `more`), another as it stands."""
    if structure is None or not isinstance(candidate, fx.GraphModule):
        return candidate(*args, **kwargs)
    return candidate(*tensor_arguments(structure, args, kwargs), *more)


def tensor_arguments(structure: tuple[Any, ...], args: Any, kwargs: Any) -> list[Any]:
    """The arguments of a call that a traced candidate takes: its tensors, in order."""
    leaves = pytree.tree_leaves((args, kwargs))
    return [x for x, kind in zip(leaves, structure[1:], strict=True) if kind is TensorLeaf]


def reduce_inputs(inputs: Sequence[Any], chosen: Sequence[int], reduction: str) -> Any:
    """What an InputChoice gives for the `chosen` indices; works on fx proxies too."""
    taken = [inputs[i] for i in chosen]
    if reduction == "none":
        return taken
    if reduction == "concat":
        return torch.cat(taken, 1) if len(taken) > 1 else taken[0]
    if not taken:
        return torch.zeros_like(inputs[0])
    total = functools.reduce(operator.add, taken)
    return total / len(taken) if reduction == "mean" and len(taken) > 1 else total


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def checked_indices(
    value: Any, n_candidates: int, n_chosen: int | None, where: str
) -> tuple[int, ...]:
    """`value` as ascending indices of inputs.

    Raises:
        SpaceError: it is no sequence of distinct indices in range, or not `n_chosen` of them.
    """
    indices = (value,) if _is_index(value) else value
    if (
        isinstance(indices, str)
        or not isinstance(indices, Sequence)
        or not all(_is_index(i) and 0 <= i < n_candidates for i in indices)
        or len(set(indices)) != len(indices)
    ):
        raise SpaceError(
            f"{where}: {value!r} is not a list of distinct indices below {n_candidates}"
        )
    if n_chosen is not None and len(indices) != n_chosen:
        raise SpaceError(f"{where}: {value!r} has {len(indices)} inputs, n_chosen is {n_chosen}")
    return tuple(sorted(indices))


Choice = LayerChoice | InputChoice


def named_choices(model: nn.Module) -> Iterator[tuple[str, Choice]]:
    """The choices of `model` with their paths, each object once."""
    for path, module in model.named_modules():
        if isinstance(module, Choice):
            yield path, module


def default_label(path: str) -> str:
    """The label of an unlabelled choice at `path`."""
    return path.replace(".", "/")


@contextmanager
def activated(
    model: nn.Module, architecture: Mapping[str, Any]
) -> Generator[nn.Module, None, None]:
    """Within the block, `model` eagerly runs `architecture`; afterwards what it ran before.

    Labels that the architecture does not hold keep their active candidate.

    Example:
        >>> net = nn.Sequential(LayerChoice({"a": nn.Identity(), "b": nn.ReLU()}, label="act"))
        >>> with activated(net, {"act": "b"}):
        ...     net(torch.tensor([-1.0]))
        tensor([0.])
    """
    choices = [(choice, choice.active) for _, choice in named_choices(model)]
    labels = {choice.label or default_label(path) for path, choice in named_choices(model)}
    if unknown := set(architecture) - labels:
        raise SpaceError(
            f"no choice has the label {min(unknown)!r}; the labels are {sorted(labels)}"
        )
    try:
        for path, choice in named_choices(model):
            label = choice.label or default_label(path)
            if label in architecture:
                choice.active = architecture[label]
        yield model
    finally:
        for choice, active in choices:
            choice.active = active  # type: ignore[assignment]
