"""Where latencies come from: nn-Meter, a table, a measurement on this machine, a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nasfx.costs.onnx_graph import onnx_program, simplified, to_proto
from nasfx.costs.parts import Part
from nasfx.costs.runtimes import library
from nasfx.errors import ExportError, ProfileError, SearchError

_TOGETHER = 48  # parts in one export, which has a fixed cost and grows faster than its parts


@runtime_checkable
class LatencySource(Protocol):
    """What knows how long a part of a network takes.

    Attributes:
        name: of the device, the key of `expected_cost()` after "latency:".
    """

    @property
    def name(self) -> str:
        """Of the device."""
        ...

    def milliseconds(self, parts: Sequence[Part]) -> Sequence[float]:
        """The latency of each part on one sample, in milliseconds.

        Called once for a model. Parts of one key are alike, and need be looked at once only.

        Raises:
            ProfileError: one cannot be had; the message says which part, and where it stands.
        """
        ...


@dataclass(frozen=True)
class FunctionSource:
    """A function of yours as a source: it is given a `Part` and returns milliseconds.

    Attributes:
        function: the function.
        name: of the device.
    """

    function: Callable[[Part], float]
    name: str = "custom"

    def milliseconds(self, parts: Sequence[Part]) -> list[float]:
        """What the function says."""
        return [self.function(part) for part in parts]


@dataclass(frozen=True)
class NnMeter:
    """nn-Meter's predictors of a device; also those that `nasfx calibrate` has written.

    Every part is exported to ONNX as a subnet would be, split into kernels, and the predictions for
    its kernels are added up.

    Attributes:
        hardware: one of `known_hardware()`, or the folder of a predictor.
        minimum_coverage: the fraction of the MACs of every part that must have a price, from 0 to
            1; of its kernels where it has no MACs.
    """

    hardware: str
    minimum_coverage: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.minimum_coverage <= 1:
            raise SearchError(
                f"minimum_coverage={self.minimum_coverage!r}: it is a fraction from 0 to 1"
            )

    @property
    def name(self) -> str:
        """The name of the predictor."""
        return self.hardware.rstrip("/").rpartition("/")[2]

    def milliseconds(self, parts: Sequence[Part]) -> list[float]:
        """The sums over the kernels.

        Raises:
            ProfileError: nn-Meter is missing, the hardware is unknown, its predictors cannot be
                had, or less of a part than `minimum_coverage` has a price.
        """
        from nasfx.costs import nnmeter
        from nasfx.costs.profiling import Profile, macs_of, unpriced

        onnx = library("onnx")
        folder = nnmeter.predictor_folder(self.hardware)
        found: dict[str, float] = {}
        for chunk, model, owner in onnx_models(parts):
            model = onnx.shape_inference.infer_shapes(model)
            kernels = nnmeter.price(model, macs_of(model), folder)
            for i, part in enumerate(chunk):
                own = tuple(k for k in kernels if owner[k.nodes[0]] == i)
                profile = Profile(self.hardware, own)
                if own and profile.coverage.macs < self.minimum_coverage:
                    of = "MACs" if any(kernel.macs for kernel in own) else "kernels"
                    raise ProfileError(
                        f"{self.hardware} has a price for {100 * profile.coverage.macs:.0f} % of "
                        f"the {of} of {part}, less than minimum_coverage="
                        f"{self.minimum_coverage:g}. Without a price:\n{unpriced(own)}"
                    )
                found[part.key] = profile.milliseconds
        return [found[part.key] for part in parts]


@dataclass(frozen=True)
class Measured:
    """Measured on this machine's CPU, part by part, on one thread.

    In ONNX Runtime and MNN the times are the runtime's own, node by node, so what it costs to call
    it is not counted with every part. In torch it is: the median time of the part, eagerly.

    Attributes:
        runtime: "onnxruntime", "mnn" or "torch".
        repeats: runs that are timed.
    """

    runtime: Literal["onnxruntime", "mnn", "torch"] = "onnxruntime"
    repeats: int = 30

    def __post_init__(self) -> None:
        if self.runtime not in ("onnxruntime", "mnn", "torch"):
            raise SearchError(
                f"Measured(runtime={self.runtime!r}): it must be 'onnxruntime', 'mnn' or 'torch'"
            )
        if self.repeats < 1:
            raise SearchError(f"Measured(repeats={self.repeats!r}): it must be at least 1")

    @property
    def name(self) -> str:
        """The runtime."""
        return self.runtime

    def milliseconds(self, parts: Sequence[Part]) -> list[float]:
        """The times.

        Raises:
            ProfileError: the runtime is not installed or cannot run a part.
        """
        if self.runtime == "torch":
            from nasfx.costs.runtimes import torch_milliseconds

            found = {
                p.key: torch_milliseconds(p.module, p.example_inputs(), repeats=self.repeats)
                for p in unlike(parts)
            }
            return [found[part.key] for part in parts]
        from nasfx.costs.calibration import node_milliseconds

        found = {part.key: 0.0 for part in parts}
        for chunk, model, owner in onnx_models(parts):
            times = node_milliseconds(model, self.runtime, repeats=self.repeats)
            for node, time in times.items():
                found[chunk[owner[node]].key] += time
        return [found[part.key] for part in parts]


def unlike(parts: Sequence[Part]) -> list[Part]:
    """The first part of every key."""
    found: dict[str, Part] = {}
    for part in parts:
        found.setdefault(part.key, part)
    return list(found.values())


def onnx_models(
    parts: Sequence[Part],
) -> Iterator[tuple[Sequence[Part], Any, dict[str, int]]]:
    """Unlike parts as ONNX models of several, side by side, each exported as a subnet would be.

    Yields:
        some of the parts, their `onnx.ModelProto` with unique node names, and by node the index of
        its part among them.

    Raises:
        ProfileError: torch cannot export one.
    """
    several = unlike(parts)
    for start in range(0, len(several), _TOGETHER):
        chunk = several[start : start + _TOGETHER]
        try:
            model = _onnx(chunk)
        except ExportError:
            for part in chunk:  # to say which
                _alone(part)
            raise
        yield chunk, model, _owners(model)


def _onnx(parts: Sequence[Part]) -> Any:
    side = _Side(parts)
    inputs = side.example_inputs()
    takes = [f"in{i}" for i in range(len(inputs))]
    gives = [f"part{i}_{j}" for i, p in enumerate(parts) for j in range(p.outputs)]
    return simplified(to_proto(onnx_program(side, inputs, takes, gives)))


def _alone(part: Part) -> None:
    try:
        _onnx([part])
    except ExportError as error:
        raise ProfileError(f"The latency of {part} is not known: {error}") from error


class _Side(nn.Module):
    """Parts side by side, as one module."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(part.module for part in parts)
        self.of = parts
        self.eval()

    def example_inputs(self) -> tuple[Tensor, ...]:
        return tuple(x for part in self.of for x in part.example_inputs())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        rest = iter(inputs)
        for part, module in zip(self.of, self.parts, strict=True):
            results += tree_leaves(module(*islice(rest, len(part.inputs))))
        return tuple(results)


def _owners(model: Any) -> dict[str, int]:
    """By node, the part that it belongs to: that of the output which it leads to."""
    owner: dict[str, int] = {
        value.name: int(value.name.removeprefix("part").partition("_")[0])
        for value in model.graph.output
    }
    found: dict[str, int] = {}
    for i, node in enumerate(model.graph.node):
        node.name = f"n{i}"
    for node in reversed(model.graph.node):
        part = next(owner[name] for name in node.output if name in owner)
        found[node.name] = part
        for name in node.input:
            owner.setdefault(name, part)
    return found
