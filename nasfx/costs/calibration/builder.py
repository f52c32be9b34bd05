"""A small builder of ONNX graphs of convolutional nets, with random weights."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from nasfx.costs.runtimes import library

_OPSET = 18
# Activations that are one ONNX node, with its attributes.
_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "hswish": ("HardSwish", {}),
    "hsigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "sigmoid": ("Sigmoid", {}),
}


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: its name and its shape, (N, C, H, W) or (N, C)."""

    name: str
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        """The second dimension."""
        return self.shape[1]

    @property
    def height(self) -> int:
        """The third dimension."""
        return self.shape[2]


class Builder:
    """Adds nodes one by one; nodes are named after `scope`, a counter and their type.

    Convolutions carry a bias and no batch norm, as exported nets do once it is folded.
    """

    def __init__(self, seed: int = 0) -> None:
        self.scope = ""
        self._onnx = library("onnx")
        self._rng = np.random.default_rng(seed)
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._inputs: list[Value] = []
        self._outputs: list[Value] = []

    def input(self, *shape: int) -> Value:
        """An input of the graph."""
        value = Value(f"input{len(self._inputs)}", shape)
        self._inputs.append(value)
        return value

    def output(self, x: Value) -> None:
        """Make `x` an output of the graph."""
        self._outputs.append(x)

    def node(
        self, kind: str, inputs: list[str], *shapes: tuple[int, ...], **attributes: Any
    ) -> Any:
        """Add a node; its outputs, as values of the given shapes (one value if there is one)."""
        name = f"{self.scope}{len(self._nodes)}.{kind}"
        outs = [Value(f"{name}.out{i}", shape) for i, shape in enumerate(shapes)]
        names = [value.name for value in outs]
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, names, name, **attributes))
        return outs[0] if len(outs) == 1 else outs

    def constant(self, array: np.ndarray) -> str:
        """The name of an initializer that holds `array`."""
        name = f"constant{len(self._weights)}"
        self._weights.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int) -> str:
        """A constant of normal values, scaled to keep activations of unit size."""
        scale = 1 / math.sqrt(max(math.prod(shape[1:]), 1))
        values = self._rng.standard_normal(math.prod(shape), np.float32) * scale
        return self.constant(values.reshape(shape).astype(np.float32))

    def conv(
        self, x: Value, cout: int, k: int = 1, stride: int = 1, *, groups: int = 1, act: str = ""
    ) -> Value:
        """A square convolution padded to keep the size, with an activation if one is named."""
        size = math.ceil(x.height / stride)
        inputs = [x.name, self.weight(cout, x.channels // groups, k, k), self.weight(cout)]
        out = self.node(
            "Conv",
            inputs,
            (1, cout, size, size),
            kernel_shape=[k, k],
            strides=[stride, stride],
            pads=[k // 2] * 4,
            group=groups,
        )
        return self.act(out, act)

    def act(self, x: Value, kind: str) -> Value:
        """relu, relu6, hswish, hsigmoid, sigmoid, swish (x times sigmoid), or "" for none."""
        if not kind:
            return x
        if kind == "relu6":
            ends = [self.constant(np.array(end, np.float32)) for end in (0, 6)]
            return self.node("Clip", [x.name, *ends], x.shape)
        if kind == "swish":
            return self.mul(x, self.act(x, "sigmoid"))
        op, attributes = _ACTIVATIONS[kind]
        return self.node(op, [x.name], x.shape, **attributes)

    def add(self, x: Value, y: Value) -> Value:
        """The sum of two tensors of one shape."""
        return self.node("Add", [x.name, y.name], x.shape)

    def mul(self, x: Value, y: Value) -> Value:
        """The product; `y` may be broadcast."""
        return self.node("Mul", [x.name, y.name], x.shape)

    def batch_norm(self, x: Value) -> Value:
        """A batch norm of its own, with random statistics."""
        rows = [np.abs(self._rng.standard_normal(x.channels)) + 0.5 for _ in range(4)]
        constants = [self.constant(row.astype(np.float32)) for row in rows]
        return self.node("BatchNormalization", [x.name, *constants], x.shape)

    def pool(self, x: Value, kind: str, k: int, stride: int) -> Value:
        """A pooling, kind "MaxPool" or "AveragePool"."""
        pad = (k - 1) // 2
        size = (x.height + 2 * pad - k) // stride + 1
        return self.node(
            kind,
            [x.name],
            (1, x.channels, size, size),
            kernel_shape=[k, k],
            strides=[stride, stride],
            pads=[pad] * 4,
        )

    def global_pool(self, x: Value) -> Value:
        """The mean over height and width, as `export_onnx` writes an adaptive average pooling."""
        return self.node("GlobalAveragePool", [x.name], (1, x.channels, 1, 1))

    def mean(self, x: Value) -> Value:
        """The mean over height and width as a ReduceMean, the form of x.mean((2, 3))."""
        axes = self.constant(np.array([2, 3], np.int64))
        return self.node("ReduceMean", [x.name, axes], (1, x.channels, 1, 1), keepdims=1)

    def squeeze_excite(self, x: Value, reduced: int, gate: str) -> Value:
        """Squeeze-and-excitation, whose gate is "hsigmoid" or "sigmoid"."""
        s = self.conv(self.global_pool(x), reduced, act="relu")
        return self.mul(x, self.conv(s, x.channels, act=gate))

    def concat(self, *values: Value) -> Value:
        """Tensors joined along the channels."""
        shape = (1, sum(value.channels for value in values), *values[0].shape[2:])
        return self.node("Concat", [value.name for value in values], shape, axis=1)

    def split(self, x: Value) -> list[Value]:
        """Two halves of the channels."""
        half = x.channels // 2
        sizes = self.constant(np.array([half, x.channels - half], np.int64))
        shapes = [(1, half, *x.shape[2:]), (1, x.channels - half, *x.shape[2:])]
        return self.node("Split", [x.name, sizes], *shapes, axis=1)

    def reshape(self, x: Value, *shape: int) -> Value:
        """The same elements in another shape."""
        return self.node("Reshape", [x.name, self.constant(np.array(shape, np.int64))], shape)

    def transpose(self, x: Value, *order: int) -> Value:
        """The axes in another order."""
        shape = tuple(x.shape[axis] for axis in order)
        return self.node("Transpose", [x.name], shape, perm=list(order))

    def linear_gate(self, x: Value) -> Value:
        """One value per channel by a 1x1 convolution of the mean, as efficient attention does."""
        return self.conv(self.global_pool(x), x.channels)

    def shuffle(self, x: Value, groups: int) -> Value:
        """A channel shuffle: reshape, transpose, reshape."""
        n, c, h, w = x.shape
        y = self.reshape(x, n, groups, c // groups, h, w)
        return self.reshape(self.transpose(y, 0, 2, 1, 3, 4), n, c, h, w)

    def linear(self, x: Value, features: int, *, act: str = "") -> Value:
        """A fully connected layer; what is not flat is flattened first."""
        if len(x.shape) > 2:
            x = self.reshape(x, 1, math.prod(x.shape))
        inputs = [x.name, self.weight(features, x.channels), self.weight(features)]
        return self.act(self.node("Gemm", inputs, (1, features), transB=1), act)

    def model(self) -> Any:
        """The graph so far as an `onnx.ModelProto`, in float32."""
        helper, kind = self._onnx.helper, self._onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self._nodes,
            "net",
            [helper.make_tensor_value_info(v.name, kind, v.shape) for v in self._inputs],
            [helper.make_tensor_value_info(v.name, kind, v.shape) for v in self._outputs],
            self._weights,
        )
        opset = [helper.make_opsetid("", _OPSET)]
        return self._onnx.shape_inference.infer_shapes(
            helper.make_model(graph, opset_imports=opset, ir_version=9)
        )
