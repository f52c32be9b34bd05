"""Predicting the latency of an ONNX file on a device that is not at hand."""

import io
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nasfx.costs import nnmeter
from nasfx.costs.metadata import CHOICE, MODULE, origin_entries
from nasfx.costs.nnmeter import Kernel
from nasfx.costs.onnx_graph import read_onnx
from nasfx.errors import ProfileError

_WIDTH = 100


class Coverage(NamedTuple):
    """The fractions, from 0 to 1, of a model's kernels and of its MACs that have a price."""

    kernels: float
    macs: float


@dataclass(frozen=True)
class Profile:
    """A predicted latency, kernel by kernel; printing it shows the table.

    Attributes:
        hardware: The name of nn-Meter's predictor, or the path of a folder with predictors.
        kernels: All kernels of the model, also those without a price.
    """

    hardware: str
    kernels: tuple[Kernel, ...]

    @property
    def milliseconds(self) -> float:
        """The predicted latency: the sum over the kernels that have a price."""
        return math.fsum(k.milliseconds for k in self.kernels if k.milliseconds is not None)

    @property
    def coverage(self) -> Coverage:
        """How much of the model the sum stands for.

        MACs are those of Conv, ConvTranspose, Gemm and MatMul nodes. In a model without any, the
        fraction of kernels stands for both.
        """
        priced = [k for k in self.kernels if k.milliseconds is not None]
        kernels = len(priced) / len(self.kernels)
        macs = sum(k.macs for k in self.kernels)
        return Coverage(kernels, sum(k.macs for k in priced) / macs if macs else kernels)

    def table(self) -> Table:
        """A rich table with one row per kernel, with modules and choices if the file holds them."""
        table = Table(
            title=f"Latency on {self.hardware}: {self.milliseconds:.3f} ms, a prediction "
            "and not a measurement",
            caption=f"Priced: {_percent(self.coverage.kernels)} of {len(self.kernels)} kernels, "
            f"{_percent(self.coverage.macs)} of the MACs",
        )
        table.add_column("kernel")
        table.add_column("ONNX nodes", overflow="fold")
        origins = {"module": [k.modules for k in self.kernels]}
        origins["choice"] = [k.choices for k in self.kernels]
        origins = {title: values for title, values in origins.items() if any(map(any, values))}
        for title in origins:
            table.add_column(title, overflow="fold")
        table.add_column("MACs", justify="right", no_wrap=True)
        table.add_column("ms", justify="right", no_wrap=True)
        table.add_column("note", overflow="fold")
        for i, k in enumerate(self.kernels):
            ms = "-" if k.milliseconds is None else f"{k.milliseconds:.4f}"
            nodes, reason = Text("\n".join(k.nodes)), Text(k.reason)  # a name may look like markup
            columns = [Text(_distinct(values[i])) for values in origins.values()]
            table.add_row(k.type, nodes, *columns, f"{k.macs:,}", ms, reason)
        return table

    def __str__(self) -> str:
        """The table as plain text, 100 columns wide."""
        return as_text(self.table())


def as_text(table: Table) -> str:
    """A table as plain text, 100 columns wide, wherever it is printed."""
    text = io.StringIO()
    console = Console(
        file=text,
        width=_WIDTH,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        legacy_windows=False,
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _distinct(texts: tuple[str, ...]) -> str:
    return "\n".join(dict.fromkeys(filter(None, texts)))


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _load(path: Path) -> Any:
    """The model, with inferred shapes and without its external weights, which nobody needs here."""
    model = read_onnx(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in weights:
            continue
        shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims]
        if not all(isinstance(size, int) and size > 0 for size in shape):
            raise ProfileError(
                f"The input {value.name!r} of {path} has the dynamic shape {shape}; nn-Meter needs "
                "a fixed one. Export it with dynamic_batch=False."
            )
        if len(shape) == 4 and shape[0] != 1:
            raise ProfileError(
                f"The input {value.name!r} of {path} has the batch size {shape[0]}; nn-Meter's "
                "predictors are for 1. Export it with example inputs of batch size 1."
            )
    return model


def macs_of(model: Any) -> dict[str, int]:
    """The multiply-accumulates of each node that has any, by its name."""
    graph = model.graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    macs: dict[str, int] = {}
    for node in graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        names = (*node.input[:2], *node.output[:1])
        if len(names) < 3 or not all(name in shapes for name in names):
            continue
        data, weight, out = (shapes[name] for name in names)
        if node.op_type == "Conv":
            macs[node.name] = math.prod(out) * math.prod(weight[1:])
        elif node.op_type == "ConvTranspose":
            macs[node.name] = math.prod(data) * math.prod(weight[1:])
        elif data:
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            macs[node.name] = math.prod(out) * data[0 if transposed else -1]
    return macs


def unpriced(kernels: tuple[Kernel, ...]) -> str:
    """The kernels without a price and why, a line each, the largest first."""
    return "\n".join(
        f"  {k.type} ({', '.join(k.nodes)}), {k.macs:,} MACs: {k.reason}"
        for k in sorted(kernels, key=lambda k: -k.macs)
        if k.milliseconds is None
    )


def known_hardware() -> list[str]:
    """The names that `profile` takes: nn-Meter's own predictors and those registered with it.

    Raises:
        ProfileError: If nn-Meter is not installed or its configuration is damaged.

    Example:
        >>> known_hardware()
        ['cortexA76cpu_tflite21', 'adreno640gpu_tflite21', ...]
    """
    return list(nnmeter.predictors())


def profile(
    onnx_path: str | Path, hardware: str | Path, *, minimum_coverage: float = 0.9
) -> Profile:
    """Predict the latency of an ONNX file by nn-Meter's predictors for `hardware`.

    The predictors are downloaded on first use into nn-Meter's data folder. Unlike nn-Meter this
    drops no kernel: one that it cannot price is listed with the reason.

    Args:
        onnx_path: A file with static shapes of batch size 1, as `export_onnx` writes it.
        hardware: One of `known_hardware()`, or a folder with predictors.
        minimum_coverage: The fraction of the MACs, from 0 to 1, that must have a price.

    Returns:
        The latency in milliseconds, kernel by kernel.

    Raises:
        ProfileError: If nn-Meter is missing, the hardware is unknown, its predictors cannot be
            had, are damaged or predict nonsense, the file is missing, invalid or of dynamic shape,
            or less than `minimum_coverage` of its MACs can be priced.

    Example:
        >>> print(profile("subnet.onnx", "cortexA76cpu_tflite21"))  # doctest: +SKIP
    """
    if not 0 <= minimum_coverage <= 1:
        raise ProfileError(f"minimum_coverage is a fraction from 0 to 1, not {minimum_coverage}.")
    path = Path(onnx_path)
    model = _load(path)
    # nn-Meter goes by the nodes' names: an empty or double one would lose nodes, ";" is its own.
    names: dict[str, str] = {}
    entries: dict[str, dict[str, str]] = {}
    for index, node in enumerate(model.graph.node):
        original = node.name or f"{node.op_type}_{index}"
        node.name = f"n{index}"
        names[node.name] = original
        entries[node.name] = origin_entries(node)
    priced = nnmeter.price(model, macs_of(model), nnmeter.predictor_folder(hardware))
    kernels = tuple(
        replace(
            k,
            nodes=tuple(names[name] for name in k.nodes),
            modules=tuple(entries[name].get(MODULE, "") for name in k.nodes),
            choices=tuple(entries[name].get(CHOICE, "") for name in k.nodes),
        )
        for k in priced
    )
    result = Profile(str(hardware), kernels)
    covered = result.coverage.macs
    if covered < minimum_coverage:
        raise ProfileError(
            f"Only {_percent(covered)} of the MACs of {path} can be priced for {hardware}, less "
            f"than the {_percent(minimum_coverage)} asked for. Without a price:\n"
            f"{unpriced(kernels)}\nTo have the latency of the rest, pass "
            f"minimum_coverage={math.floor(covered * 100) / 100}."
        )
    return result
