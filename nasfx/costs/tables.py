"""Tables of latencies as sources: our own in JSON, and that of the ProxylessNAS authors in YAML."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from nasfx.costs.parts import Part
from nasfx.costs.runtimes import library
from nasfx.costs.sources import LatencySource, unlike
from nasfx.errors import ProfileError
from nasfx.reading import read_json, read_yaml, shown

_FORMAT = "nasfx latency table"
_SHOWN = 3


def _own_key(part: Part) -> tuple[str, ...]:
    """The part's own key alone."""
    return (part.key,)


@dataclass(frozen=True)
class LatencyTable:
    """Latencies by what a part computes, as a source for `Latency`.

    Attributes:
        rows: milliseconds by key.
        name: of the device.
        keys: the keys whose rows add up to a part's latency; by default the part's own key.
        where: the file, for messages.

    Example:
        >>> table = nasfx.latency_table(net, x, Measured("mnn"))  # doctest: +SKIP
        >>> table.save("mnn.json")  # doctest: +SKIP
        >>> Latency(LatencyTable.load("mnn.json"), target=2.0)  # doctest: +SKIP
    """

    rows: Mapping[str, float]
    name: str = "table"
    keys: Callable[[Part], Sequence[str]] = field(default=_own_key, repr=False)
    where: str = ""

    def milliseconds(self, parts: Sequence[Part]) -> list[float]:
        """The sums of the rows.

        Raises:
            ProfileError: a row is missing.
        """
        return [math.fsum(self._row(key, part) for key in self.keys(part)) for part in parts]

    def _row(self, key: str, part: Part) -> float:
        if key not in self.rows:
            near = difflib.get_close_matches(key, self.rows, n=_SHOWN, cutoff=0.5)
            hint = "".join(f"\n  {other}" for other in near)
            raise ProfileError(
                f"The latency table {self.where or self.name!r} has no row for {part}. It needs\n"
                f"  {key}" + (f"\nand has{hint}" if near else "")
            )
        return self.rows[key]

    @classmethod
    def measure(
        cls, parts: Sequence[Part], source: LatencySource, *, name: str = ""
    ) -> LatencyTable:
        """A table of what `source` says of some parts; see `nasfx.latency_table`.

        Raises:
            ProfileError: the source does not know one.
        """
        several = unlike(parts)
        values = source.milliseconds(several)
        rows = {p.key: float(value) for p, value in zip(several, values, strict=True)}
        return cls(rows, name or source.name)

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON; the path."""
        path = Path(path)
        content = {"format": _FORMAT, "version": 1, "hardware": self.name, "unit": "ms"}
        path.write_text(json.dumps(content | {"rows": dict(self.rows)}, indent=1) + "\n", "utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            ProfileError: there is no such file, or it holds something else.
        """
        try:
            content = read_json(path)
        except (OSError, ValueError) as error:
            raise ProfileError(f"The latency table {path} cannot be read: {error}.") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ProfileError(f"{path} is no latency table; LatencyTable.save() writes one.")
        if content.get("version") != 1 or content.get("unit") != "ms":
            raise ProfileError(
                f"The latency table {path} has version {shown(content.get('version'))} and "
                f"unit {shown(content.get('unit'))}; known is version 1 in 'ms'."
            )
        rows = content.get("rows")
        if not isinstance(rows, dict):
            raise ProfileError(f"The latency table {path} has no rows.")
        checked = {str(k): _latency(v, f"row {shown(k)} of {path}") for k, v in rows.items()}
        name = content.get("hardware", "table")
        if not isinstance(name, str):
            raise ProfileError(f"The 'hardware' of {path} is {shown(name)}, and no name.")
        return cls(checked, name, where=str(path))

    @classmethod
    def proxyless(cls, path: str | Path, *, name: str = "") -> LatencyTable:
        """Read a table in the form of the ProxylessNAS authors (arXiv 1812.00332, appendix).

        Its rows are convolutions ("Conv"), the last one ("Conv_1"), inverted bottlenecks
        ("expanded_conv") and the classifier ("Logits"), by the shapes of their inputs and outputs.
        Parts are taken apart into these. What has no weights (activations, sums of residuals,
        pools) has no row: it was measured together with what stands before it.

        Args:
            path: the file.
            name: of the device; by default the file's.

        Raises:
            ProfileError: there is no such file, or it holds something else.
        """
        library("yaml", install="pyyaml")
        try:
            content = read_yaml(path)
        except (OSError, ValueError) as error:
            raise ProfileError(f"The latency table {path} cannot be read: {error}.") from error
        if not isinstance(content, dict):
            raise ProfileError(f"{path} holds no table of the ProxylessNAS authors' form.")
        rows: dict[str, float] = {}
        for key, row in cast("dict[Any, Any]", content).items():
            if not isinstance(key, str):
                raise ProfileError(f"The row {shown(key)} of {path} has no name.")
            mean = row.get("mean") if isinstance(row, dict) else None
            rows[key] = _latency(mean, f"'mean' of row {shown(key)} of {path}")
        return cls(rows, name or Path(path).stem, proxyless_keys, str(path))


def _latency(value: Any, what: str) -> float:
    with contextlib.suppress(OverflowError):  # an integer beyond the largest float
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = float(value)
            if 0 <= number < math.inf:
                return number
    raise ProfileError(
        f"The {what} is {shown(value)}; a latency is a finite number of zero or more."
    )


# -- the keys of the ProxylessNAS authors ----------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """A convolution or linear layer, with the shapes without the batch."""

    module: nn.Module
    takes: tuple[int, ...]
    gives: tuple[int, ...]

    @property
    def depthwise(self) -> bool:
        return isinstance(self.module, nn.Conv2d) and self.module.groups == self.takes[0] > 1

    @property
    def pointwise(self) -> bool:
        conv = self.module
        return isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1) and conv.groups == 1


def proxyless_keys(part: Part) -> list[str]:
    """The keys of the rows that a part consists of.

    Raises:
        ProfileError: it holds something that the authors' tables have no rows for.
    """
    layers = list(_layers(part))
    keys: list[str] = []
    while layers:
        if layers[0].depthwise:
            block, layers = layers[:2], layers[2:]
        elif len(layers) > 1 and layers[1].depthwise and layers[0].pointwise:
            block, layers = layers[:3], layers[3:]
        else:
            keys.append(_single(layers.pop(0), part))
            continue
        keys.append(_bottleneck(block, part))
    return keys


def _layers(part: Part) -> Iterator[_Layer]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        FakeTensorProp(part.module, mode).propagate(*part.example_inputs())
    for node in part.module.graph.nodes:
        if node.op != "call_module":
            if node.op.startswith("call_") and node.target not in _WEIGHTLESS:
                raise _no_row(part, f"a call of {node.target}")
            continue
        module = part.module.get_submodule(str(node.target))
        if isinstance(module, nn.Conv2d | nn.Linear):
            source = cast("fx.Node", node.args[0])
            yield _Layer(module, _shape(source), _shape(node))
        elif any(True for _ in module.parameters()) and not isinstance(module, nn.BatchNorm2d):
            raise _no_row(part, f"a {type(module).__name__}")


_WEIGHTLESS = {
    operator.add, operator.iadd, operator.getitem, torch.add, torch.mean, torch.flatten,
    nn.functional.relu, nn.functional.relu6, nn.functional.adaptive_avg_pool2d,
    "add", "add_", "flatten", "mean", "reshape", "size", "squeeze", "view",
}  # fmt: skip


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return tuple(value.shape[1:])


def _single(layer: _Layer, part: Part) -> str:
    if isinstance(layer.module, nn.Linear):
        # The classifier's row counts the pool before it too, so it starts from the feature map.
        pooled = next((shape for shape in _maps(part) if shape[0] == layer.takes[0]), layer.takes)
        return f"Logits-input:{_text(pooled)}-output:{layer.gives[0]}"
    name = "Conv_1" if layer.pointwise else "Conv"
    return f"{name}-input:{_text(layer.takes)}-output:{_text(layer.gives)}"


def _maps(part: Part) -> Iterator[tuple[int, ...]]:
    """The shapes of feature maps, latest first, before they are pooled."""
    for node in reversed(part.module.graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] > 1:
            yield tuple(value.shape[1:])


def _bottleneck(block: Sequence[_Layer], part: Part) -> str:
    first, last = block[0], block[-1]
    if len(block) < 2 or not last.pointwise:
        raise _no_row(part, "a depthwise convolution that no pointwise one follows")
    depthwise = block[-2]
    conv = cast("nn.Conv2d", depthwise.module)
    expand = depthwise.takes[0] / first.takes[0]
    stride = conv.stride[0]
    skip = int(stride == 1 and first.takes[0] == last.gives[0])
    return (
        f"expanded_conv-input:{_text(first.takes)}-output:{_text(last.gives)}-expand:{expand:g}"
        f"-kernel:{conv.kernel_size[0]}-stride:{stride}-idskip:{skip}"
    )


def _text(shape: Sequence[int]) -> str:
    channels, *size = shape
    return "x".join(map(str, (*size, channels)))


def _no_row(part: Part, what: str) -> ProfileError:
    return ProfileError(
        f"{part} holds {what}, for which tables of the ProxylessNAS authors' form have no rows. "
        "Give your own: LatencyTable(rows, keys=...)."
    )
