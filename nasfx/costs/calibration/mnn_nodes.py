"""The time of each ONNX node in MNN's CPU backend, by callbacks around its operators."""

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nasfx.costs.calibration.nodes import Graph, low, share_copies, trivial_chain
from nasfx.costs.runtimes import library, mnn_converter, require_mnn, run_apart


def node_seconds(models: Sequence[bytes], repeats: int, seconds: float) -> list[dict[str, float]]:
    """Per model the seconds of each node, less what the callbacks themselves take.

    The models take turns, so that a disturbance falls on all of them alike. Each is run `repeats`
    times, less often if all would take more than `seconds`.
    """
    chain = trivial_chain()
    (timed,) = _run([chain], "operators", 30, 1.0)
    called = sum(low(times) for *_, times in timed)
    floor = max(0.0, called - run_seconds([chain], 30, 1.0)[0]) / len(timed)
    rows = _run(models, "operators", repeats, seconds)
    graphs = [Graph.of(library("onnx").load_model_from_string(data)) for data in models]
    return [_assign(graph, row, floor) for graph, row in zip(graphs, rows, strict=True)]


def run_seconds(models: Sequence[bytes], repeats: int, seconds: float) -> list[float]:
    """The seconds of one inference of each model, in CPU time of the thread that runs it.

    The models take turns, so that a disturbance falls on all of them alike.
    """
    return [low(row) for row in _run(models, "whole", repeats, seconds)]


def _run(models: Sequence[bytes], mode: str, repeats: int, seconds: float) -> list[Any]:
    require_mnn()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index, data in enumerate(models):
            (folder / f"model{index}.onnx").write_bytes(data)
        (folder / "flags").write_text("")
        run_apart(mnn_converter, folder)
        job = {"mode": mode, "models": len(models), "repeats": repeats, "seconds": seconds}
        (folder / "job.json").write_text(json.dumps(job))
        run_apart(_program, folder)
        return json.loads((folder / "times.json").read_text())


def _program(folder: str) -> None:
    """Run alone, by run_apart: times of model0.mnn, model1.mnn ... into times.json."""
    import importlib
    import json
    import time
    from collections.abc import Generator
    from pathlib import Path
    from typing import Any

    import numpy as np

    mnn: Any = importlib.import_module("MNN")
    job = json.loads(Path(folder, "job.json").read_text())

    def visits() -> Generator[int]:
        stop = time.perf_counter() + job["seconds"]
        for turn in range(max(2, (job["repeats"] + 1) // 2)):
            if turn >= 2 and time.perf_counter() > stop:
                return
            yield from range(job["models"])

    def open_model(index: int) -> tuple[Any, Any]:
        net = mnn.Interpreter(f"model{index}.mnn")
        config = {"backend": "CPU", "numThread": 1, "precision": "normal"}
        session = net.createSession(config)
        for tensor in net.getSessionInputAll(session).values():
            shape = tensor.getShape()
            values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
            kind = mnn.Tensor_DimensionType_Caffe
            host = mnn.Tensor(shape, mnn.Halide_Type_Float, values, kind)
            tensor.copyFrom(host)
        return net, session

    opened = [open_model(index) for index in range(job["models"])]

    def operators() -> list[Any]:
        """Per model its operators in order, as [name, type, seconds in each timed run]."""
        kinds: list[list[tuple[str, str]]] = [[] for _ in opened]
        times: list[list[list[float]]] = [[] for _ in opened]
        start, row, seen = [0.0], list[float](), list[tuple[str, str]]()

        def look(_: Any, op: Any) -> bool:
            seen.append((op.getName(), op.getType()))
            return True

        def before(_: Any, op: Any) -> bool:
            start[0] = time.thread_time()
            return True

        def after(_: Any, op: Any) -> bool:
            row.append(time.thread_time() - start[0])
            return True

        for index in visits():
            net, session = opened[index]
            seen.clear()
            net.runSessionWithCallBackInfo(session, look, after)  # and fills the cache
            kinds[index] = list(seen)
            for _ in range(2):
                row.clear()
                net.runSessionWithCallBackInfo(session, before, after)
                times[index].append(list(row))
        return [
            [[*kind, list(column)] for kind, column in zip(k, zip(*t, strict=True), strict=True)]
            for k, t in zip(kinds, times, strict=True)
        ]

    def whole() -> list[list[float]]:
        times: list[list[float]] = [[] for _ in opened]
        for index in visits():
            net, session = opened[index]
            net.runSession(session)  # brings its weights back into the cache
            for _ in range(2):
                start = time.thread_time()
                net.runSession(session)
                times[index].append(time.thread_time() - start)
        return times

    results: Any = operators() if job["mode"] == "operators" else whole()
    Path(folder, "times.json").write_text(json.dumps(results))


def _source(graph: Graph, name: str) -> str | None:
    """The original node that an operator of MNN's is named after, by its output tensor."""
    tensor = re.sub(r"(_raster_\d+|__group__\d+|__matmul_converted|_?_\d+)+$", "", name)
    for candidate in (name, tensor):
        if candidate in graph.maker:
            return graph.maker[candidate]
    return None


def _assign(graph: Graph, row: list[Any], floor: float) -> dict[str, float]:
    sources = [_source(graph, name) for name, *_ in row]
    known = dict.fromkeys(s for s in sources if s is not None)
    times = dict.fromkeys(graph.nodes, 0.0)
    # An operator of no name that we know belongs to the next one that has such a name.
    following: str | None = None
    for index in reversed(range(len(row))):
        following = sources[index] = sources[index] or following
    for (_, kind, seconds), source in zip(row, sources, strict=True):
        if source is None:
            continue
        took = max(0.0, low(seconds) - floor)
        if kind == "Raster":
            share_copies(graph, source, took, times, known)
        else:
            times[source] += took
    return times
