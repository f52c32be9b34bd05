"""The time of each ONNX node in ONNX Runtime, by its own profiler."""

import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nasfx.costs.calibration.nodes import Graph, low, trivial_chain, visits
from nasfx.costs.runtimes import library, onnxruntime_session, random_inputs
from nasfx.errors import ProfileError

_CONVOLUTIONS = ("Conv", "FusedConv")

# An operator of the optimized graph and its seconds in each timed run.
_Timed = list[tuple[Any, list[float]]]


def node_seconds(models: Sequence[bytes], repeats: int, seconds: float) -> list[dict[str, float]]:
    """Per model the seconds of each node, less what the profiler itself takes.

    The models take turns, so that a disturbance falls on all of them alike. Each is run `repeats`
    times, less often if all would take more than `seconds`.
    """
    chain = trivial_chain()
    (timed,) = _run([chain], 30, 1.0)
    profiled = sum(low(times) for _, times in timed)
    floor = max(0.0, profiled - run_seconds([chain], 30, 1.0)[0]) / len(timed)
    onnx = library("onnx")
    graphs = [Graph.of(onnx.load_model_from_string(data)) for data in models]
    runs = _run(models, repeats, seconds)
    return [_assign(graph, timed, floor) for graph, timed in zip(graphs, runs, strict=True)]


def run_seconds(models: Sequence[bytes], repeats: int, seconds: float) -> list[float]:
    """The seconds of one inference of each model, in CPU time of the thread that runs it.

    The models take turns, as in `node_seconds`.
    """
    sessions = [onnxruntime_session(data) for data in models]
    inputs = [random_inputs(session) for session in sessions]
    times: list[list[float]] = [[] for _ in sessions]
    for index in visits(repeats, seconds, len(models)):
        session, x = sessions[index], inputs[index]
        session.run(None, x)  # brings its weights back into the cache
        for _ in range(2):
            start = time.thread_time()
            session.run(None, x)
            times[index].append(time.thread_time() - start)
    return [low(row) for row in times]


def _run(models: Sequence[bytes], repeats: int, seconds: float) -> list[_Timed]:
    runtime = library("onnxruntime")
    with tempfile.TemporaryDirectory() as name:
        sessions: list[Any] = []
        files = [Path(name, f"optimized{index}.onnx") for index in range(len(models))]
        try:
            for data, file in zip(models, files, strict=True):
                options = runtime.SessionOptions()
                options.intra_op_num_threads = 1
                options.inter_op_num_threads = 1
                options.log_severity_level = 4
                options.enable_profiling = True
                options.profile_file_prefix = str(file.with_suffix(""))
                options.optimized_model_filepath = str(file)
                providers = ["CPUExecutionProvider"]
                sessions.append(runtime.InferenceSession(data, options, providers=providers))
            inputs = [random_inputs(session) for session in sessions]
            for index in visits(repeats, seconds, len(models)):
                for _ in range(3):  # the first brings its weights back into the cache
                    sessions[index].run(None, inputs[index])
            profiles = [Path(session.end_profiling()) for session in sessions]
        except Exception as e:  # its exceptions share no base class
            raise ProfileError(f"ONNX Runtime cannot measure the model: {e}") from e
        return [_timed(file, profile) for file, profile in zip(files, profiles, strict=True)]


def _timed(optimized: Path, profile: Path) -> _Timed:
    """The operators of the optimized graph, in their order, which is that of the profile too."""
    nodes = list(library("onnx").load(optimized).graph.node)
    events = [
        event
        for event in json.loads(profile.read_text())
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]
    rows = [events[i : i + len(nodes)] for i in range(0, len(events), len(nodes))]
    kinds = [node.op_type for node in nodes]
    if any([event["args"]["op_name"] for event in row] != kinds for row in rows):
        raise ProfileError(
            "The profile of ONNX Runtime does not list the operators of its optimized graph in "
            "order: this version of it cannot be measured node by node."
        )
    kept = [row for index, row in enumerate(rows) if index % 3]
    return [(node, [row[i]["dur"] / 1e6 for row in kept]) for i, node in enumerate(nodes)]


def _assign(graph: Graph, timed: _Timed, floor: float) -> dict[str, float]:
    nodes = [node for node, _ in timed]
    made = {tensor: index for index, node in enumerate(nodes) for tensor in node.output}
    sources = _sources(graph, nodes, made)
    known = set(filter(None, sources))
    read = {tensor: i for i, node in reversed(list(enumerate(nodes))) for tensor in node.input}
    times = dict.fromkeys(graph.nodes, 0.0)
    for index, (node, seconds) in enumerate(timed):
        # A reorder serves the node that does not take the layout of convolutions.
        served = index
        if node.op_type == "ReorderInput":
            served = made.get(node.input[0], read.get(node.output[0], index))
        elif node.op_type == "ReorderOutput":
            served = read.get(node.output[0], made.get(node.input[0], index))
        if name := sources[served]:
            kind = nodes[served].op_type
            name = _first(graph, name, "Conv" if kind in _CONVOLUTIONS else kind, known)
            times[name] += max(0.0, low(seconds) - floor)
    return times


def _sources(graph: Graph, nodes: list[Any], made: dict[str, int]) -> list[str]:
    """Per operator the original node that it stands for, or the last of those; "" if unknown."""
    sources = [_named(graph, node) for node in nodes]
    known = set(filter(None, sources))
    for index, node in enumerate(nodes):
        # HardSwish is run as two operators without a name: what follows their input's maker.
        above = [sources[made[t]] for t in node.input if t in made]
        if not sources[index] and not node.op_type.startswith("Reorder") and above and above[0]:
            after = [n for n in (above[0], *graph.after(above[0])) if n not in known]
            sources[index] = after[0] if after else above[0]
    return sources


def _named(graph: Graph, node: Any) -> str:
    """The original node that the operator is named after, or whose output it makes."""
    for tensor in (re.sub(r"(_bn)?_nchwc$", "", node.name), *node.output):
        if tensor in graph.maker:
            return graph.maker[tensor]
    name = node.name.split("/")[0]
    return name if name in graph.nodes else ""


def _first(graph: Graph, name: str, kind: str, known: set[str]) -> str:
    """The first node of a fusion into an operator of this kind, whose last node has the name."""
    while graph.nodes[name].op_type not in (kind, "BatchNormalization"):
        above = [n for n in graph.before(name) if n not in known and set(graph.after(n)) == {name}]
        if not above:
            break
        name = above[0]
    return name
