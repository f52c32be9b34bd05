"""Modules as ONNX graphs, as they are exported and as their latency is predicted."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasfx.costs.runtimes import library, run_apart
from nasfx.errors import ExportError, ProfileError
from nasfx.reading import shown

OPSET = 18


def read_onnx(path: str | Path, *, weights: bool = False) -> Any:
    """An ONNX file, anybody's, with inferred shapes.

    Args:
        path: the file.
        weights: read external weights too, from the folder of the file and nowhere else.

    Returns:
        An `onnx.ModelProto`.

    Raises:
        ProfileError: there is none, it is something else, or it holds what takes unbounded time or
            memory to look at: functions of its own, cycles, or a Split into more outputs than it
            names.
    """
    onnx = library("onnx")
    try:
        model = onnx.load(path, load_external_data=False)
        if model.functions:
            raise ProfileError(
                f"{path} holds functions of its own, such as {shown(model.functions[0].name)}: "
                "inline them, by onnx.inliner.inline_local_functions."
            )
        if not model.graph.node:
            raise ProfileError(f"{path} is not an ONNX model, or is one without nodes.")
        for node in _nodes(model.graph):
            _check_split(node, path)
        _check_order(model.graph, path)
        model = inferred_apart(model)
        if weights:
            onnx.external_data_helper.load_external_data_for_model(model, str(Path(path).parent))
        return model
    except ProfileError as error:
        if str(path) in str(error):
            raise
        raise ProfileError(f"{path} is not a valid ONNX model: {error}.") from error
    except OSError as error:
        raise ProfileError(f"The ONNX file {path} cannot be read: {error}.") from error
    except Exception as error:  # protobuf's and onnx's exceptions share no base class
        raise ProfileError(f"{path} is not a valid ONNX model: {error}.") from error


def inferred_apart(model: Any) -> Any:
    """The model with inferred shapes, by a process of its own.

    onnx aborts the process on some invalid models, such as a Slice of a negative size. It gets ten
    minutes and, beyond four times the model, 8 GiB.

    Raises:
        ProfileError: it failed, or wanted more.
    """
    with tempfile.TemporaryDirectory() as name:
        Path(name, "given.onnx").write_bytes(model.SerializeToString())
        run_apart(_infer_program, Path(name))
        return library("onnx").load(Path(name, "shapes.onnx"), load_external_data=False)


def _infer_program(folder: str) -> None:
    """Run alone, by run_apart: the shapes of "given.onnx"."""
    import contextlib
    from pathlib import Path

    import onnx

    given = Path(folder, "given.onnx")
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        memory = 8 * 2**30 + 4 * given.stat().st_size
        for what, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, 600)):
            hard = resource.getrlimit(what)[1]
            soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(what, (soft, hard))
    model = onnx.load(given, load_external_data=False)
    onnx.save(onnx.shape_inference.infer_shapes(model), Path(folder, "shapes.onnx"))


def _nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a graph and of those inside it; protobuf bounds the depth."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _check_split(node: Any, path: str | Path) -> None:
    for attribute in node.attribute:
        if attribute.name == "num_outputs" and attribute.i != len(node.output):
            raise ProfileError(
                f"{path} is not a valid ONNX model: {shown(node.name)} splits into {attribute.i} "
                f"outputs and names {len(node.output)}."
            )


def _check_order(graph: Any, path: str | Path) -> None:
    """Every value comes from one node, before those that read it: there is no cycle."""
    later = [name for node in graph.node for name in node.output if name]
    left = set(later)
    if len(left) < len(later):
        raise ProfileError(f"{path} is not a valid ONNX model: two nodes give one value.")
    for node in graph.node:
        if wrong := left.intersection(node.input):
            raise ProfileError(
                f"{path} is not a valid ONNX model: {shown(node.name)} reads {shown(min(wrong))}, "
                "which a later node gives."
            )
        left.difference_update(node.output)


def onnx_program(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: tuple[Any, ...] | None = None,
) -> Any:
    """What torch's exporter makes of a module, with these names for its inputs and outputs.

    Args:
        model: it, in the mode in which it is exported.
        inputs: what it takes.
        input_names: one for every tensor that it takes.
        output_names: one for every tensor that it gives.
        dynamic_shapes: see `torch.onnx.export`.

    Returns:
        A `torch.onnx.ONNXProgram`; see `to_proto`.

    Raises:
        ExportError: torch cannot export it.
    """
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                dynamic_shapes=dynamic_shapes,
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
    return program


def to_proto(program: Any) -> Any:
    """The `onnx.ModelProto` of what `onnx_program` gave."""
    return library("onnx_ir", install="onnx-ir").to_proto(program.model)


def simplified(proto: Any, keep: Callable[[Any], None] | None = None) -> Any:
    """An `onnx.ModelProto` without redundant nodes, Constant nodes and metadata.

    Args:
        proto: it.
        keep: called with the `onnx_ir.Model` that is left, to write metadata into it.

    Raises:
        ExportError: the simplifier fails, or has changed what is computed.
    """
    onnx, onnxsim, ir = library("onnx"), library("onnxsim"), library("onnx_ir")
    common = library("onnx_ir.passes.common")
    try:
        with _quiet():
            # Its own random trials stay off (check_n=0): export compares with torch itself.
            proto, right = onnxsim.simplify(proto)
            model = ir.from_proto(proto)
            # nn-Meter's reader knows initializers but not Constant nodes.
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            common.ClearMetadataAndDocStringPass()(model)  # They hold paths of this machine.
            model.metadata_props.clear()
            if keep is not None:
                keep(model)
            proto = ir.to_proto(model)
            onnx.checker.check_model(proto, full_check=True)
    except Exception as e:
        raise ExportError(f"The exported graph cannot be simplified: {e}") from e
    if not right:
        raise ExportError("onnxsim changed what the exported graph computes.")
    return proto


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


def _rename(model: Any, input_names: Sequence[str], output_names: Sequence[str]) -> None:
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


def free_name(name: str, taken: Container[str | None]) -> str:
    """The name, or it with a suffix that nothing has yet."""
    wanted, tail = name, 0
    while name in taken:
        tail += 1
        name = f"{wanted}_{tail}"
    return name
