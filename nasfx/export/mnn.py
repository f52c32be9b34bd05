"""ONNX to MNN, checked in MNN's own runtime."""

import tempfile
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from nasfx.costs.runtimes import mnn_converter as _converter_program
from nasfx.costs.runtimes import (
    onnxruntime_session,
    random_inputs,
    require_mnn,
    run_apart,
    run_mnn,
    run_onnxruntime,
)
from nasfx.errors import ExportError, ProfileError
from nasfx.export.checking import mismatch, write_whole

Precision = Literal["fp32", "fp16", "w8"]

_FLAGS: dict[str, list[str]] = {
    "fp32": [],
    "fp16": ["--fp16"],
    "w8": ["--weightQuantBits", "8"],
}

# The largest difference allowed, as a share of the output's largest magnitude. A wrong conversion
# is off by the magnitude itself; what rounding costs in accuracy is for a validation set to say.
TOLERANCES: dict[str, float] = {
    "fp32": 5e-3,  # Winograd: 3e-7 to 1.9e-4 in eight torchvision nets, 4.7e-4 in feature maps.
    "fp16": 5e-2,  # Weights keep 11 bits: 2.6e-4 to 9.0e-3 in the same nets.
    "w8": 2e-1,  # Weights keep 8 bits per channel: 3.7e-3 to 3.1e-2.
}


def export_mnn(
    onnx_path: str | Path, mnn_path: str | Path, *, precision: Precision = "fp32"
) -> Path:
    """Convert an ONNX file to MNN and check it in the MNN runtime against ONNX Runtime.

    Conversion and check run in processes of their own, since MNN's native code may abort. The
    check takes seeded random inputs of the ONNX file's shapes, 1 where a dimension is dynamic.
    Integer outputs, such as an argmax, must be equal at fp32; at fp16 and w8, where rounding may
    rightly change them, only their shapes are compared.

    Args:
        onnx_path: An ONNX file, such as `export_onnx` writes.
        mnn_path: The file to write. One that is there is replaced, and only on success.
        precision: How weights are stored: "fp32", "fp16" (half the size) or "w8" (8-bit
            weights, a quarter of the size). Activations stay floating point.

    Returns:
        The path of the MNN file.

    Raises:
        ExportError: MNN is not installed, the ONNX file is missing or invalid, the precision is
            unknown, MNN cannot convert or run the model, or it computes something else: then
            the message holds the output's name and the largest difference.

    Example:
        >>> export_mnn("subnet.onnx", "subnet.mnn", precision="fp16")  # doctest: +SKIP
        PosixPath('subnet.mnn')
    """
    source, target = Path(onnx_path), Path(mnn_path)
    if precision not in _FLAGS:
        known = ", ".join(map(repr, get_args(Precision)))
        raise ExportError(f"The precision is one of {known}; got {precision!r}.")
    try:
        require_mnn()
        session = onnxruntime_session(source)
        inputs = random_inputs(session)
        expected = run_onnxruntime(session, inputs)
        with tempfile.TemporaryDirectory() as name:
            converted = _convert(source, Path(name), _FLAGS[precision])
            computed, _ = run_mnn(converted, inputs, list(expected))
            _compare(computed, expected, precision, source)
            write_whole(target, converted.read_bytes())
    except ProfileError as e:
        raise ExportError(f"{source} was not exported to MNN: {e}") from e
    return target


def _convert(source: Path, folder: Path, flags: list[str]) -> Path:
    """Convert inside the folder, where the converter also leaves a scratch file."""
    (folder / "model.onnx").write_bytes(source.read_bytes())
    (folder / "flags").write_text("\n".join(flags))
    run_apart(_converter_program, folder)
    return folder / "model.mnn"


def _compare(
    computed: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    precision: str,
    source: Path,
) -> None:
    for name, want in expected.items():
        got = computed[name]
        exact = not np.issubdtype(want.dtype, np.floating)
        if exact and precision != "fp32" and got.shape == want.shape:
            continue
        if wrong := mismatch(name, got, want, TOLERANCES[precision]):
            raise ExportError(
                f"{source} as MNN at {precision} does not compute what it does in ONNX Runtime: "
                f"{wrong}. No file was written."
            )
