"""A module as an ONNX file: simplified, and checked against torch in ONNX Runtime."""

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasfx.costs.runtimes import library, onnxruntime_session, run_onnxruntime
from nasfx.errors import ExportError, ProfileError
from nasfx.export.checking import (
    describe,
    float_dtypes,
    free_name,
    mismatch,
    named_leaves,
    run_module,
    write_whole,
)

OPSET = 18

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
            proto = _simplified(_exported(model, inputs, names, list(outputs), dynamic_batch))
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
        return copy.deepcopy(module).cpu().eval()
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


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """The exporter prints, logs and warns about its own insides; errors still come as errors."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


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
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as e:
        root: BaseException = e
        while root.__cause__ is not None:
            root = root.__cause__
        raise ExportError(
            f"torch cannot export {type(model).__name__} to ONNX: {type(root).__name__}: "
            + str(root).split("\n\n")[0]
        ) from e
    assert program is not None
    _rename(program.model, input_names, output_names)
    ir = library("onnx_ir", install="onnx-ir")
    return ir.to_proto(program.model)


def _rename(model: Any, input_names: list[str], output_names: list[str]) -> None:
    """Give inputs and outputs their names; an inner value that has one already gives way."""
    graph = model.graph
    ends = [*graph.inputs, *graph.outputs]
    names = list(input_names)
    for name in output_names:
        names.append(free_name(name, names))
    if len(ends) != len(names):
        raise ExportError(
            f"The ONNX graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs; "
            f"the module has {input_names} and {output_names}."
        )
    inner = [*graph.initializers.values(), *(v for n in graph.all_nodes() for v in n.outputs)]
    taken = {value.name for value in inner} | set(names)
    for value in inner:
        if value.name in names and not any(value is end for end in ends):
            value.name = free_name(value.name, taken)
            taken.add(value.name)
    for value, name in zip(ends, names, strict=True):
        value.name = name


def _simplified(proto: Any) -> Any:
    onnx, onnxsim, ir = library("onnx"), library("onnxsim"), library("onnx_ir")
    common = library("onnx_ir.passes.common")
    try:
        with _quiet():
            # Its own random trials stay off (check_n=0): _check compares with torch itself.
            proto, right = onnxsim.simplify(proto)
            model = ir.from_proto(proto)
            # nn-Meter's reader knows initializers but not Constant nodes.
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            common.ClearMetadataAndDocStringPass()(model)  # They hold paths of this machine.
            model.metadata_props.clear()
            proto = ir.to_proto(model)
            onnx.checker.check_model(proto, full_check=True)
    except Exception as e:
        raise ExportError(f"The exported graph cannot be simplified: {e}") from e
    if not right:
        raise ExportError("onnxsim changed what the exported graph computes.")
    return proto


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
