"""A module as an ONNX file: simplified, and checked against torch in ONNX Runtime."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasfx.costs.onnx_graph import onnx_program, simplified, to_proto
from nasfx.costs.runtimes import library, onnxruntime_session, run_onnxruntime
from nasfx.errors import ExportError, ProfileError
from nasfx.export.checking import (
    describe,
    float_dtypes,
    mismatch,
    named_leaves,
    run_module,
    write_whole,
)
from nasfx.export.provenance import copied, record, recorded, restore, scoped

# The largest difference from torch allowed, as a share of the output's largest magnitude: some
# hundred roundings of the type, since folding batch norm and other kernels reorder the sums.
TOLERANCES = {torch.float16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-8}


def export_onnx(
    module: nn.Module,
    path: str | Path,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    dynamic_batch: bool = False,
) -> Path:
    """Write the module's eval behaviour as an ONNX file that is known to compute the same.

    The module is exported on a copy, on the CPU, in its own dtype. The file is simplified
    (batch norm is folded into convolutions, constants become initializers), then every output is
    compared with torch's in ONNX Runtime, on the example inputs and, with `dynamic_batch`, on
    other batch sizes. An example that is one constant, such as `torch.zeros`, only gives shape
    and dtype: the comparison takes seeded normal values.

    Inputs are named after the parameters of `forward`. An output is called "output" if there is
    one, else "output_0", "output_1" ..., or by its key in a dict; a None among them is left out.

    Nodes say in their metadata where they come from: "nasfx.module" is the path of the module, and
    "nasfx.choice", in a subnet that `finalize` made, the choice and what was decided for it, as in
    "block: conv3". A node that others were merged into keeps its own; one of which it is not known,
    or that the outermost module made, has none.

    Args:
        module: Any module, in any mode; it is left as it is.
        path: The file to write. One that is there is replaced, and only on success.
        example_inputs: What `forward` takes: a tensor, or a tuple of tensors. With
            `dynamic_batch` the first dimension of each is the batch.
        dynamic_batch: Leave the batch size open. Otherwise it is that of the example.

    Returns:
        The path.

    Raises:
        ExportError: The example inputs do not fit the module, torch cannot export it, ONNX
            Runtime cannot run it, or it computes something else: then the message holds the
            output's name and the largest difference.

    Example:
        >>> export_onnx(subnet, "subnet.onnx", torch.randn(1, 3, 224, 224))  # doctest: +SKIP
        PosixPath('subnet.onnx')
    """
    path = Path(path)
    inputs = _as_tuple(example_inputs)
    batches = {x.shape[0] if x.dim() else 0 for x in inputs}
    if dynamic_batch and (len(batches) > 1 or 0 in batches):
        raise ExportError(
            "dynamic_batch needs inputs that share their first dimension, the batch; "
            f"got {describe(inputs)}."
        )
    model = _copy(module)
    if unknown := (float_dtypes(model) | float_dtypes(inputs)) - TOLERANCES.keys():
        raise ExportError(
            f"ONNX Runtime's Python has no {', '.join(map(str, unknown))}: export a copy in "
            "float32, copy.deepcopy(module).float()."
        )
    try:
        for name in ("onnx", "onnxscript", "onnxsim", "onnxruntime"):
            library(name)
        with torch.no_grad():
            outputs = run_module(model, inputs)
            names = _input_names(model, inputs)
            proto = _exported(model, inputs, names, list(outputs), dynamic_batch)
            data = proto.SerializeToString()
            _check(data, model, inputs, names, dynamic_batch)
    except ProfileError as e:
        hint = ""
        if torch.float64 in float_dtypes(model):
            hint = ". It has few double kernels: export copy.deepcopy(module).float()."
        raise ExportError(f"{type(module).__name__} was not exported to ONNX: {e}{hint}") from e
    write_whole(path, data)
    return path


def _as_tuple(example_inputs: Any) -> tuple[Tensor, ...]:
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise ExportError(
            f"example_inputs is a tensor or a tuple of tensors; got {describe(inputs)}."
        )
    return tuple(x.detach().cpu() for x in inputs)


def _copy(module: nn.Module) -> nn.Module:
    try:
        return copied(module).cpu().eval()
    except Exception as e:
        raise ExportError(
            f"{type(module).__name__} cannot be copied, and it is exported on a copy: {e}"
        ) from e


def _bound(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    return inspect.signature(model.forward).bind(*inputs).arguments


def _input_names(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[str]:
    return [
        name for key, value in _bound(model, inputs).items() for name, _ in named_leaves(value, key)
    ]


def _with_batch(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    return tuple(x[torch.arange(size) % x.shape[0]] for x in inputs)


def _exported(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    input_names: list[str],
    output_names: list[str],
    dynamic_batch: bool,
) -> Any:
    shapes = None
    if dynamic_batch:
        if inputs[0].shape[0] == 1:
            inputs = _with_batch(inputs, 2)  # torch.export takes an example's 1 as a constant.
        axes = {0: torch.export.Dim("batch")}
        marks = _bound(model, tuple(axes for _ in inputs))
        shapes = tuple(marks.values())
    model, scopes = scoped(model)
    program = onnx_program(model, inputs, input_names, output_names, shapes)
    record(program, scopes)
    proto = to_proto(program)
    names = recorded(proto)
    return simplified(proto, lambda left: restore(left, names))


def _check(
    data: bytes,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    names: list[str],
    dynamic_batch: bool,
) -> None:
    """Compare the file's bytes with torch, on every output."""
    session = onnxruntime_session(data)
    if dynamic_batch and any(isinstance(node.shape[0], int) for node in session.get_inputs()):
        raise ExportError(
            f"{type(model).__name__} fixes its batch size, so dynamic_batch=True cannot hold: look "
            "for a reshape or a comparison with a constant batch size."
        )
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(_varied(x, generator) for x in inputs)
    types = float_dtypes(model) | float_dtypes(inputs)
    share = max((TOLERANCES[t] for t in types), default=TOLERANCES[torch.float32])
    sizes = dict.fromkeys((inputs[0].shape[0], 1, inputs[0].shape[0] + 1)) if dynamic_batch else ()
    for given in [_with_batch(inputs, size) for size in sizes] or [inputs]:
        wanted = run_module(model, given)
        feed = {n: x.numpy() for n, x in zip(names, given, strict=True)}
        got = run_onnxruntime(session, feed)
        for value, (name, want) in zip(got.values(), wanted.items(), strict=True):
            if wrong := mismatch(name, value, want.numpy(), share):
                raise ExportError(
                    f"{type(model).__name__} computes something else in ONNX Runtime than in "
                    f"torch: {wrong}, on inputs {describe(given)}. No file was written."
                )


def _varied(x: Tensor, generator: torch.Generator) -> Tensor:
    """Other values for a constant float input: on torch.zeros nearly any graph is right."""
    if not x.is_floating_point() or x.numel() < 2 or not bool((x == x.flatten()[0]).all()):
        return x
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)
