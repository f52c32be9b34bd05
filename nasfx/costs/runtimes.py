"""Exported files in their runtimes: run once to check them, many times to measure them."""

import importlib
import inspect
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nasfx.errors import ProfileError

Arrays = dict[str, np.ndarray]

_MOST_ELEMENTS = 2**28  # of a random input: 2 GiB as it is drawn


def library(name: str, *, install: str = "nasfx") -> Any:
    """Import an optional library late, so that `import nasfx` stays light.

    Raises:
        ProfileError: It is not installed; the message gives the pip command.
    """
    try:
        with warnings.catch_warnings():
            # A deprecation inside somebody else's package is not our caller's concern.
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as e:
        raise ProfileError(
            f"{name} cannot be imported ({e}). Install it with: pip install {install}"
        ) from e


def require_mnn() -> None:
    """Raise ProfileError unless MNN is installed, without importing it (it may abort)."""
    if find_spec("MNN") is None or find_spec("_tools") is None:
        raise ProfileError("MNN is not installed. Install it with: pip install nasfx[mnn]")


def onnxruntime_session(model: bytes | Path, *, threads: int = 1) -> Any:
    """Open an ONNX model, a file or its bytes, in ONNX Runtime on the CPU.

    Raises:
        ProfileError: The file is missing or ONNX Runtime refuses it.
    """
    runtime = library("onnxruntime")
    if isinstance(model, Path) and not model.is_file():
        raise ProfileError(f"There is no file {model}.")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # What it would log arrives as the exception too.
    try:
        return runtime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as e:  # Its exceptions share no base class.
        where = "the model" if isinstance(model, bytes) else str(model)
        raise ProfileError(f"ONNX Runtime cannot load {where}: {e}") from e


def run_onnxruntime(session: Any, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """Every output of one inference, by name."""
    names = [output.name for output in session.get_outputs()]
    try:
        values = session.run(names, dict(inputs))
    except Exception as e:
        raise ProfileError(f"ONNX Runtime cannot run the model: {e}") from e
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


def random_inputs(session: Any, *, seed: int = 0) -> Arrays:
    """Seeded inputs of the session's shapes, 1 where a dimension is dynamic.

    Floats are standard normal. Integers are 0 or 1, which is a valid index nearly everywhere.
    """
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for node in session.get_inputs():
        shape = [size if isinstance(size, int) and size > 0 else 1 for size in node.shape]
        kind = {"tensor(float)": "float32", "tensor(float16)": "float16"}.get(node.type)
        kind = kind or node.type.removeprefix("tensor(").removesuffix(")")
        try:
            dtype = np.dtype("float64" if kind == "double" else kind)
        except TypeError as error:  # strings, sequences and the like
            raise ProfileError(
                f"The input {node.name!r} is a {node.type}, and no numbers."
            ) from error
        if math.prod(shape) > _MOST_ELEMENTS:
            raise ProfileError(
                f"The input {node.name!r} of the model has {math.prod(shape):,} elements, more "
                f"than the {_MOST_ELEMENTS:,} that are drawn."
            )
        floating = np.issubdtype(dtype, np.floating)
        value = rng.standard_normal(shape) if floating else rng.integers(0, 2, shape)
        arrays[node.name] = np.asarray(value, dtype)
    return arrays


def run_apart(program: Callable[[str], None], folder: Path) -> None:
    """Run `program(folder)` in a Python of its own, whose working directory is the folder.

    The text of the function is all that the process gets, so it imports what it needs, and not
    nasfx: starting takes milliseconds and a native abort takes down nobody else. The caller's own
    working directory is out of reach: what lies there shadows no library and is not littered.

    Raises:
        ProfileError: The process failed; the message ends with what it printed last.
    """
    code = f"import sys\n{inspect.getsource(program)}\n{program.__name__}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        how = f"exit code {done.returncode}"
        if done.returncode < 0:
            how = signal.Signals(-done.returncode).name
        said = "\n".join(done.stdout.strip().splitlines()[-8:])
        raise ProfileError(f"the process ended with {how}. It printed last:\n{said}")


def mnn_converter(folder: str) -> None:
    """Run alone, by run_apart: convert every `<name>.onnx` in the folder to `<name>.mnn`.

    The file "flags" holds options of MNN's converter, which leaves a scratch file in the folder.
    MNN's command-line tools would pip-install and report usage.
    """
    from pathlib import Path

    import _tools

    flags = Path(folder, "flags").read_text().split()
    for source in sorted(Path(folder).glob("*.onnx")):
        target = source.with_suffix(".mnn").name
        files = ["--modelFile", source.name, "--MNNModel", target]
        _tools.mnnconvert(["mnnconvert", "-f", "ONNX", *files, *flags])
        # It returns True also when it failed: the file is what tells.
        if not Path(folder, target).is_file():
            raise SystemExit(1)


def _mnn_program(folder: str) -> None:
    """Run alone, by run_apart: one model in MNN, on given or random inputs."""
    import importlib
    import json
    import time
    from pathlib import Path

    import numpy as np

    F, modules = importlib.import_module("MNN.expr"), importlib.import_module("MNN.nn")
    job = json.loads(Path(folder, "job.json").read_text())
    # MNN 3.6.1 ignores load_module_from_file's own thread_num: without a manager it starts four.
    options = {"backend": "CPU", "numThread": job["threads"], "precision": job["precision"]}
    manager = modules.create_runtime_manager((options,))
    info = modules.load_module_from_file(job["model"], [], [], runtime_manager=manager).get_info()
    names, rng = info["inputNames"], np.random.default_rng(0)
    kinds = [(F.float, np.float32), (F.int, np.int32), (F.uint8, np.uint8), (F.int8, np.int8)]
    variables = []
    for name, spec in zip(names, info["inputs"], strict=True):
        kind, dtype = next(pair for pair in kinds if pair[0] == spec.dtype)
        if job["inputs"] is not None:
            if name not in job["inputs"]:
                raise SystemExit(f"The MNN model has an input {name!r} that ONNX has not.")
            array = np.load(Path(folder, f"input{job['inputs'].index(name)}.npy")).astype(dtype)
        else:
            shape = [max(size, 1) for size in spec.shape]
            floating = kind == F.float
            value = rng.standard_normal(shape) if floating else rng.integers(0, 2, shape)
            array = np.asarray(value, dtype)
        variables.append(F.const(np.ascontiguousarray(array), list(array.shape), F.NCHW, kind))
    outputs = job["outputs"] or info["outputNames"]
    module = modules.load_module_from_file(job["model"], names, outputs, runtime_manager=manager)
    times, values = [], []
    for _ in range(job["warmup"] + job["repeats"]):
        start = time.perf_counter()
        values = [result.read() for result in module.onForward(variables)]
        times.append(time.perf_counter() - start)
    for index, value in enumerate(values):
        np.save(Path(folder, f"output{index}.npy"), value)
    Path(folder, "times.json").write_text(json.dumps(times[job["warmup"] :]))


def run_mnn(
    path: Path,
    inputs: Mapping[str, np.ndarray] | None = None,
    outputs: Sequence[str] = (),
    *,
    precision: str = "high",
    threads: int = 1,
    repeats: int = 1,
    warmup: int = 0,
) -> tuple[Arrays, list[float]]:
    """Run an MNN model in a process of its own: the outputs asked for, and seconds per run.

    Without inputs it takes seeded random ones of the model's own shapes. `precision` is MNN's
    precision mode: "high", "normal" or "low".
    """
    require_mnn()
    if not path.is_file():
        raise ProfileError(f"There is no file {path}.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index, array in enumerate((inputs or {}).values()):
            np.save(folder / f"input{index}.npy", array)
        job = {
            "model": str(path.resolve()),
            "inputs": None if inputs is None else list(inputs),
            "outputs": list(outputs),
            "precision": precision,
            "threads": threads,
            "repeats": repeats,
            "warmup": warmup,
        }
        (folder / "job.json").write_text(json.dumps(job))
        try:
            run_apart(_mnn_program, folder)
        except ProfileError as e:
            raise ProfileError(f"MNN cannot run {path}: {e}") from e
        times = json.loads((folder / "times.json").read_text())
        return {o: np.load(folder / f"output{i}.npy") for i, o in enumerate(outputs)}, times


def onnxruntime_milliseconds(
    path: str | Path, *, threads: int = 1, repeats: int = 50, warmup: int = 10
) -> float:
    """Measure one inference of an ONNX file in ONNX Runtime, on this machine's CPU.

    Args:
        path: The ONNX file. Dynamic dimensions are taken as 1, so the batch is 1.
        threads: Threads for the operators.
        repeats: Timed inferences, of which the median is taken.
        warmup: Inferences before the first timed one.

    Returns:
        The median wall time, in milliseconds, on seeded random inputs.

    Raises:
        ProfileError: The file is missing, does not load or does not run, or a count is wrong.

    Example:
        >>> onnxruntime_milliseconds("subnet.onnx", threads=1)  # doctest: +SKIP
        4.31
    """
    _check_counts(threads, repeats, warmup)
    session = onnxruntime_session(Path(path), threads=threads)
    inputs = random_inputs(session)
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        run_onnxruntime(session, inputs)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[warmup:])


def mnn_milliseconds(
    path: str | Path, *, threads: int = 1, repeats: int = 50, warmup: int = 10
) -> float:
    """Measure one inference of an MNN file in MNN's CPU backend, on this machine.

    It runs in a process of its own, at MNN's normal precision mode.

    Args:
        path: The MNN file. Dynamic dimensions are taken as 1, so the batch is 1.
        threads: Threads for the operators.
        repeats: Timed inferences, of which the median is taken.
        warmup: Inferences before the first timed one.

    Returns:
        The median wall time, in milliseconds, on seeded random inputs.

    Raises:
        ProfileError: MNN or the file is missing, the model does not run, or a count is wrong.

    Example:
        >>> mnn_milliseconds("subnet.mnn", threads=1)  # doctest: +SKIP
        3.87
    """
    _check_counts(threads, repeats, warmup)
    _, times = run_mnn(
        Path(path), precision="normal", threads=threads, repeats=repeats, warmup=warmup
    )
    return 1e3 * statistics.median(times)


def _check_counts(threads: int, repeats: int, warmup: int) -> None:
    if threads < 1 or repeats < 1 or warmup < 0:
        raise ProfileError(
            "threads and repeats are at least 1 and warmup at least 0; "
            f"got threads={threads}, repeats={repeats}, warmup={warmup}."
        )


def torch_milliseconds(
    module: Any, inputs: Sequence[Any], *, threads: int = 1, repeats: int = 50, warmup: int = 10
) -> float:
    """Measure one call of a module, eagerly and without gradients, on this machine's CPU.

    Args:
        module: an `nn.Module`, in the mode that it is in.
        inputs: what it takes.
        threads: Threads for the operators.
        repeats: Timed calls, of which the median is taken.
        warmup: Calls before the first timed one.

    Returns:
        The median wall time, in milliseconds.

    Raises:
        ProfileError: A count is wrong.
    """
    import torch

    _check_counts(threads, repeats, warmup)
    before = torch.get_num_threads()
    times: list[float] = []
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for _ in range(warmup + repeats):
                start = time.perf_counter()
                module(*inputs)
                times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 1e3 * statistics.median(times[warmup:])
