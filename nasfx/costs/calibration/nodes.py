"""Which nodes of an ONNX graph a runtime's own operators stand for."""

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nasfx.costs.runtimes import library

# What only moves data: a runtime may do several of them in one copy, or none.
LAYOUT = ("Concat", "Split", "Slice", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
_FREE = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Graph:
    """The nodes of an ONNX graph by name, and who makes and reads each tensor.

    Attributes:
        nodes: In topological order.
        maker: The name of the node that makes a tensor.
        readers: The names of the nodes that read a tensor, in order.
    """

    nodes: Mapping[str, Any]
    maker: dict[str, str] = field(default_factory=dict[str, str])
    readers: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    @classmethod
    def of(cls, model: Any) -> "Graph":
        """The graph of an `onnx.ModelProto` whose nodes have unique names."""
        graph = cls({node.name: node for node in model.graph.node})
        for name, node in graph.nodes.items():
            for tensor in node.output:
                graph.maker[tensor] = name
            for tensor in node.input:
                graph.readers.setdefault(tensor, []).append(name)
        return graph

    def before(self, name: str) -> list[str]:
        """The nodes whose outputs the node reads."""
        return [self.maker[t] for t in self.nodes[name].input if t in self.maker]

    def after(self, name: str) -> list[str]:
        """The nodes that read the node's outputs."""
        return [r for t in self.nodes[name].output for r in self.readers.get(t, ())]


def share_copies(
    graph: Graph, reader: str, copies: float, times: dict[str, float], known: Mapping[str, object]
) -> None:
    """Add the time of the copies made for `reader` to the nodes that ask for them.

    Those are the layout nodes above it that no operator of the runtime stands for, in equal parts;
    those that only rename dimensions ask for nothing unless they are alone. If there are none, the
    copies change the memory layout for the reader itself.
    """
    chain: list[str] = []
    front = [reader]
    while front:
        above = [n for name in front for n in graph.before(name)]
        front = [n for n in above if n not in known and graph.nodes[n].op_type in LAYOUT]
        chain += [n for n in front if n not in chain]
    moving = [n for n in chain if graph.nodes[n].op_type not in _FREE] or chain[:1] or [reader]
    for name in moving:
        times[name] += copies / len(moving)


def low(times: Sequence[float]) -> float:
    """The mean of the fastest eighth: what an operator takes when nothing else disturbs it."""
    fastest = sorted(times)[: max(1, len(times) // 8)]
    return sum(fastest) / len(fastest)


def visits(repeats: int, seconds: float, models: int) -> Generator[int, None, None]:
    """The index of the model whose turn it is: two runs a visit, at least two visits each."""
    stop = time.perf_counter() + seconds
    for turn in range(max(2, (repeats + 1) // 2)):
        if turn >= 2 and time.perf_counter() > stop:
            return
        yield from range(models)


def trivial_chain() -> bytes:
    """An ONNX model of 200 operators that take next to no time, which no runtime merges."""
    helper, kind = library("onnx").helper, library("onnx").TensorProto.FLOAT
    names = [f"t{i}" for i in range(201)]
    nodes = [
        helper.make_node("Sin" if i % 2 else "Tanh", [names[i]], [names[i + 1]], f"n{i}")
        for i in range(200)
    ]
    ends = [helper.make_tensor_value_info(n, kind, [1, 4]) for n in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "trivial", ends[:1], ends[1:])
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    return model.SerializeToString()
