"""What a runtime takes on this machine, node by node or as a whole."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from nasfx.costs.calibration import mnn_nodes, onnxruntime_nodes
from nasfx.errors import ProfileError

Runtime = Literal["onnxruntime", "mnn"]

_RUNTIMES = {"onnxruntime": onnxruntime_nodes, "mnn": mnn_nodes}


def check_runtime(runtime: str) -> None:
    """Raise ProfileError unless `runtime` is one of `Runtime`."""
    if runtime not in _RUNTIMES:
        known = ", ".join(map(repr, get_args(Runtime)))
        raise ProfileError(f"The runtime is one of {known}; got {runtime!r}.")


def node_milliseconds(
    model: Any, runtime: Runtime, *, repeats: int = 30, seconds: float = 10.0
) -> dict[str, float]:
    """Measure each node of an ONNX model in a runtime, on one thread of this machine's CPU.

    The times of all nodes add up to that of an inference: what the measurement itself adds is
    subtracted. Where the runtime fuses nodes, the first of them has the time and the others have 0.
    A copy that changes the memory layout belongs to the node that does not take the layout of
    convolutions; one copy that does several concatenations, splits or transpositions at once is
    shared equally among them.

    Args:
        model: An `onnx.ModelProto` of static float inputs whose nodes have unique names.
        runtime: "onnxruntime" or "mnn". MNN runs in processes of its own.
        repeats: Timed inferences, of which the fastest eighth is averaged, node by node.
        seconds: After that long no further inference is begun, but four are done in any case.

    Returns:
        Milliseconds by the name of the node; every node of the model has an entry.

    Raises:
        ProfileError: The runtime is unknown, is not installed or cannot run the model, the names
            of the nodes are not unique, or a number is out of range.

    Example:
        >>> node_milliseconds(onnx.load("subnet.onnx"), "onnxruntime")  # doctest: +SKIP
        {'conv1': 0.412, 'relu1': 0.0, ...}
    """
    return nodes_of_models([model], runtime, repeats=repeats, seconds=seconds)[0]


def nodes_of_models(
    models: Sequence[Any], runtime: Runtime, *, repeats: int, seconds: float
) -> list[dict[str, float]]:
    """`node_milliseconds` of several models, which share the time and the set-up."""
    check_runtime(runtime)
    if repeats < 1 or seconds <= 0:
        raise ProfileError(
            f"repeats is at least 1 and seconds above 0; got {repeats} and {seconds}."
        )
    for model in models:
        names = [node.name for node in model.graph.node]
        if "" in names or len(set(names)) < len(names):
            raise ProfileError(
                "Times are given by the names of nodes: give every node of the model a unique one."
            )
    data = [model.SerializeToString() for model in models]
    rows = _RUNTIMES[runtime].node_seconds(data, repeats, seconds)
    return [{name: 1e3 * took for name, took in row.items()} for row in rows]


def whole_milliseconds(
    models: Sequence[Any], runtime: Runtime, *, repeats: int, seconds: float
) -> list[float]:
    """Milliseconds of one inference of each ONNX model, measured in turns.

    It is CPU time on one thread, warm: the mean of the fastest eighth of the runs.
    """
    check_runtime(runtime)
    data = [model.SerializeToString() for model in models]
    return [1e3 * took for took in _RUNTIMES[runtime].run_seconds(data, repeats, seconds)]
