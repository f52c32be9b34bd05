"""What the exporters share: a module's named outputs, comparing outputs, writing files."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nasfx.costs.onnx_graph import free_name
from nasfx.errors import ExportError

# For outputs that are zero but for rounding: added to the share of their magnitude.
ABSOLUTE = 1e-7


def mismatch(name: str, got: np.ndarray, want: np.ndarray, share: float) -> str | None:
    """What is wrong with an output, or None: floats within a share of its magnitude, else equal."""
    if got.shape != want.shape:
        return f"output {name!r} has shape {got.shape} instead of {want.shape}"
    a, b = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(np.isfinite(a), finite) or not np.array_equal(
        a[~finite], b[~finite], equal_nan=True
    ):
        return f"output {name!r} is infinite or not a number in other places"
    difference = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
    largest = float(np.abs(b[finite]).max(initial=0.0))
    allowed = share * largest + ABSOLUTE if np.issubdtype(want.dtype, np.floating) else 0.0
    if difference <= allowed:
        return None
    return (
        f"the largest difference is {difference:.3g}, in output {name!r} "
        f"(allowed {allowed:.3g}, its largest magnitude is {largest:.3g})"
    )


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that there is never half of one at the path."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as e:
        raise ExportError(f"{path} cannot be written: {e}") from e
    finally:
        part.unlink(missing_ok=True)


def describe(inputs: tuple[Any, ...]) -> str:
    """Inputs as an error message shows them: dtypes and shapes."""
    texts = [
        f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
        if isinstance(x, Tensor)
        else type(x).__name__
        for x in inputs
    ]
    return "(" + ", ".join(texts) + ")"


def run_module(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Outputs by name; on clones, since a model may write into its inputs."""
    try:
        result = model(*(x.clone() for x in inputs))
    except Exception as e:
        hint = ""
        if (want := float_dtypes(model)) and not want & float_dtypes(inputs):
            kinds = ", ".join(sorted(str(dtype) for dtype in want))
            hint = f" Its parameters are {kinds}: give inputs of that dtype, or convert it."
        raise ExportError(
            f"{type(model).__name__} does not run on the example inputs {describe(inputs)}: "
            f"{type(e).__name__}: {str(e).rstrip('.')}.{hint}"
        ) from e
    leaves = list(named_leaves(result, ""))
    if len(leaves) == 1 and not isinstance(result, Mapping):
        leaves = [("output", leaves[0][1])]
    outputs: dict[str, Tensor] = {}
    for name, value in leaves:
        if not isinstance(value, Tensor):
            raise ExportError(
                f"{type(model).__name__} returns a {type(value).__name__}, which ONNX has no "
                "output for: return tensors, or tuples, lists and dicts of them."
            )
        outputs[free_name(name, outputs)] = value
    if not outputs:
        raise ExportError(f"{type(model).__name__} returns no tensor.")
    return outputs


def float_dtypes(tensors: nn.Module | tuple[Tensor, ...]) -> set[torch.dtype]:
    """The floating-point dtypes among the parameters of a module, or among tensors."""
    values = tensors.parameters() if isinstance(tensors, nn.Module) else tensors
    return {x.dtype for x in values if x.is_floating_point()}


def named_leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested outputs in torch.export's order, each named by its place."""
    if value is None:
        return
    if isinstance(value, Mapping):
        parts = [(f"{prefix}_{key}" if prefix else str(key), v) for key, v in value.items()]
    elif isinstance(value, tuple | list):
        parts = [(f"{prefix or 'output'}_{i}", v) for i, v in enumerate(value)]
    else:
        yield prefix or "output", value
        return
    for name, part in parts:
        yield from named_leaves(part, name)
