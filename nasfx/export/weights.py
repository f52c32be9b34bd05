"""A subnet's weights as one safetensors file, which holds no code, and says what it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nasfx.errors import ExportError
from nasfx.export.checking import write_whole
from nasfx.reading import shown
from nasfx.space import SearchSpace

_FORMAT = "nasfx weights 1"


def save_weights(subnet: nn.Module, path: str | Path, *, space: SearchSpace | None = None) -> Path:
    """Write a subnet's parameters and buffers as a safetensors file, for others.

    Buffers that are not in the state_dict are in it too. What is tied is written once. The file's
    metadata are texts: "nasfx", the version; "architecture", as JSON, if the subnet has one;
    "tied", the other names of tensors, as JSON; and "space", a fingerprint of the search space.

    Args:
        subnet: what `finalize` made; any other module will do too.
        path: the file to write. One that is there is replaced, and only on success.
        space: what the subnet was found in, such as `net.space`.

    Returns:
        The path.

    Raises:
        ExportError: a tensor has no place in a safetensors file, or the file cannot be written.

    Example:
        >>> save_weights(subnet, "subnet.safetensors", space=net.space)  # doctest: +SKIP
        PosixPath('subnet.safetensors')
    """
    path = Path(path)
    own, tied = _tensors(subnet)
    about = {"format": _FORMAT, "nasfx": metadata.version("nasfx"), "tied": json.dumps(tied)}
    if (architecture := _architecture(subnet)) is not None:
        about["architecture"] = architecture
    if space is not None:
        about["space"] = fingerprint(space)
    values = {name: own[name].detach().cpu().contiguous() for name in own.keys() - tied.keys()}
    try:
        # Views of one memory are refused by safetensors: each is saved by itself.
        data = safetensors.torch.save({name: t.clone() for name, t in values.items()}, about)
    except (KeyError, RuntimeError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ExportError(f"The weights cannot be saved in {path}: {error}") from error
    write_whole(path, data)
    return path


def load_weights(subnet: nn.Module, path: str | Path, *, space: SearchSpace | None = None) -> None:
    """Load into a subnet what `save_weights` wrote of one of the same architecture.

    Nothing of the subnet is changed unless all of the file fits it.

    Args:
        subnet: where the weights go.
        path: the file, anybody's: nothing in it runs.
        space: if given, the file must be of a subnet found in this space.

    Raises:
        ExportError: the file cannot be read, is damaged, or is of another architecture or space, or
            of other tensors, types, shapes or ties. The message says which.

    Example:
        >>> load_weights(nasfx.finalize(model, arch), "subnet.safetensors")  # doctest: +SKIP
    """
    own, tied = _tensors(subnet)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            _check_about(file.metadata() or {}, subnet, tied, space, path)
            names = own.keys() - tied.keys()
            if differing := sorted(names ^ set(file.keys())):
                where = "the file" if differing[0] in names else "the subnet"
                raise ExportError(f"{path} does not fit: {where} has no {shown(differing[0])}.")
            values = {name: cast("Tensor", file.get_tensor(name)) for name in names}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ExportError(f"The weights {path} cannot be read: {error}.") from error
    for name, value in values.items():
        if value.shape != own[name].shape or value.dtype != own[name].dtype:
            raise ExportError(
                f"{path} does not fit: {name} is {value.dtype} of shape {tuple(value.shape)} there "
                f"and {own[name].dtype} of shape {tuple(own[name].shape)} in the subnet."
            )
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def fingerprint(space: SearchSpace) -> str:
    """A text that is the same for spaces of the same choices, and differs otherwise."""
    choices = [
        (c.label, c.kind, list(c.candidates), c.n_chosen, list(c.relaxed_only))
        for c in space.choices
    ]
    return "sha256:" + hashlib.sha256(json.dumps(choices).encode()).hexdigest()


def _tensors(subnet: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers by name, and of those with several names the first by the others."""
    named = [*subnet.named_parameters(remove_duplicate=False)]
    own: dict[str, Tensor] = dict([*named, *subnet.named_buffers(remove_duplicate=False)])
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name in sorted(own):
        if (known := first.setdefault(id(own[name]), name)) != name:
            tied[name] = known
    return own, tied


def _architecture(subnet: nn.Module) -> str | None:
    found = getattr(subnet, "architecture", None)
    return json.dumps(dict(found), sort_keys=True) if isinstance(found, Mapping) else None


def _check_about(
    about: Mapping[str, str],
    subnet: nn.Module,
    tied: Mapping[str, str],
    space: SearchSpace | None,
    path: str | Path,
) -> None:
    if about.get("format") != _FORMAT:
        raise ExportError(f"{path} holds no weights that nasfx wrote; save_weights writes them.")
    wanted: dict[str, Any] = {"architecture": _architecture(subnet), "tied": json.dumps(tied)}
    if space is not None:
        wanted["space"] = fingerprint(space)
    for key, value in wanted.items():
        if about.get(key) != value:
            raise ExportError(
                f"{path} is of another subnet: its {key} is {shown(about.get(key))}, and here it "
                f"is {shown(value)}."
            )
