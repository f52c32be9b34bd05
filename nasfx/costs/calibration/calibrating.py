"""Calibrating latency predictors on a runtime of this machine."""

import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from nasfx.costs.calibration.accuracy import Accuracy, Calibration, accuracy, scale_to
from nasfx.costs.calibration.folder import (
    check_folder,
    register_predictor,
    write_folder,
    write_rules,
)
from nasfx.costs.calibration.fusions import fusion_rules
from nasfx.costs.calibration.nets import FAMILIES, random_net
from nasfx.costs.calibration.regressor import fit
from nasfx.costs.calibration.sampling import sample_kernels
from nasfx.costs.calibration.timing import Runtime, check_runtime, whole_milliseconds
from nasfx.costs.onnx_graph import read_onnx
from nasfx.costs.profiling import profile
from nasfx.costs.runtimes import library
from nasfx.errors import ProfileError

# Enough for a first look, in about ten seconds: calibrate(..., **QUICK).
QUICK: Final[dict[str, Any]] = {"kernels": 300, "seconds": 4.0, "nets": 4}

_REPEATS = 24
# Seeds of the nets of the report, apart from those of a user's experiments.
_FIRST_NET = 7_000


@dataclass(frozen=True)
class _Net:
    """A net of which everything is known but how long it takes: predicted ms, and MACs."""

    model: Any
    predicted: float
    macs: int


def calibrate(
    runtime: Runtime,
    folder: str | Path,
    *,
    name: str | None = None,
    kernels: int = 2000,
    seconds: float = 40.0,
    nets: int = 16,
    space: Iterable[str | Path] = (),
    seed: int = 0,
    register: bool = False,
) -> Calibration:
    """Fit latency predictors for a runtime on this machine, and write them as nn-Meter's own.

    Random kernels are measured inside small nets by the runtime's own times per operator, on one
    thread and at batch size 1; which operators the runtime fuses is found by trying. The folder
    then holds `<kernel>.pkl`, fusion_rules.json and meta.yaml: `profile` takes its path as the
    hardware, and `nn-meter register --predictor <folder>/meta.yaml` makes it known by name. Kernels
    that nn-Meter has no features for, such as grouped convolutions, are in files named "nasfx-...",
    which `profile` uses and nn-Meter itself does not.

    The report compares predictions with measured random nets of four families, which no predictor
    was fitted on. Latencies are those of an idle machine: other work on it makes the measurements
    noisy, which the row of the repeated measurement shows.

    Args:
        runtime: "onnxruntime" or "mnn".
        folder: A new folder, or one of an earlier calibration, which is replaced.
        name: Of the hardware; the folder's own name by default.
        kernels: About how many kernels are measured, at least some 200.
        seconds: The time for measurements of kernels; nets take about half of that again, and
            building, converting and fitting add some.
        nets: How many random nets the report is about.
        space: ONNX files of subnets of your space, at least four, with inputs of batch size 1. One
            factor, by which all predictions are then multiplied, is fitted on every other of them,
            and the report has the rest too.
        seed: Which kernels and nets are drawn.
        register: Make the name known to nn-Meter, and so to `profile`, in ~/.nn_meter/config.

    Returns:
        Where the predictors are and how good; printing it shows the table.

    Raises:
        ProfileError: The runtime is unknown, it, nn-Meter or scikit-learn is not installed, the
            folder holds something else, a subnet cannot be priced or run, or a number is out of
            range.

    Example:
        >>> print(calibrate("onnxruntime", "my-laptop"))  # doctest: +SKIP
        >>> profile("subnet.onnx", "my-laptop")  # doctest: +SKIP
    """
    start = time.perf_counter()
    folder, files = Path(folder), [Path(path) for path in space]
    check_runtime(runtime)
    _check_numbers(kernels, seconds, nets, len(files))
    subnets = [read_onnx(path, weights=True) for path in files]
    library("sklearn", install="nasfx[latency]")
    check_folder(folder)
    rules = fusion_rules(runtime)
    with tempfile.TemporaryDirectory() as scratch:
        samples = sample_kernels(
            runtime,
            write_rules(Path(scratch), rules),
            kernels=kernels,
            repeats=_REPEATS,
            seconds=seconds,
            seed=seed,
        )
    fitted = {kind: fit(kind, s.rows, s.milliseconds, seed=seed) for kind, s in samples.items()}
    name = folder.absolute().name if name is None else name
    write_folder(folder, name, runtime, rules, fitted)
    ours = [
        random_net(FAMILIES[index % len(FAMILIES)], _FIRST_NET + seed * nets + index)
        for index in range(nets)
    ]
    known = [_priced(model, folder) for model in ours]
    rows = _compare("random nets", known, runtime, seconds / 4)
    scale = 1.0
    if subnets:
        theirs = [_priced(model, folder) for model in subnets]
        scale, more = _fit_scale(theirs, runtime, seconds / 4)
        rows += more
        scaled = {kind: predictor.scaled(scale) for kind, predictor in fitted.items()}
        write_folder(folder, name, runtime, rules, scaled)
    if register:
        register_predictor(folder)
    counts = {kind: len(s.rows) for kind, s in sorted(samples.items())}
    took = time.perf_counter() - start
    return Calibration(runtime, name, folder, counts, scale, tuple(rows), took)


def _check_numbers(kernels: int, seconds: float, nets: int, subnets: int) -> None:
    if kernels < 1 or seconds <= 0 or nets < 2:
        raise ProfileError(
            "kernels is at least 1, seconds above 0 and nets at least 2; "
            f"got kernels={kernels}, seconds={seconds}, nets={nets}."
        )
    if 0 < subnets < 4:
        raise ProfileError(f"space needs at least four ONNX files, or none; got {subnets}.")


def _priced(model: Any, folder: Path) -> _Net:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "net.onnx")
        library("onnx").save(model, path)
        predicted = profile(path, str(folder.absolute()))
    return _Net(model, predicted.milliseconds, sum(k.macs for k in predicted.kernels))


def _measure_twice(
    nets: Sequence[_Net], runtime: Runtime, seconds: float
) -> tuple[list[float], list[float]]:
    models = [net.model for net in nets]
    return (
        whole_milliseconds(models, runtime, repeats=_REPEATS, seconds=seconds),
        whole_milliseconds(models, runtime, repeats=_REPEATS, seconds=seconds),
    )


def _rows(
    what: str, nets: Sequence[_Net], measured: Sequence[float], again: Sequence[float]
) -> list[Accuracy]:
    macs = [float(net.macs) for net in nets]
    constant = scale_to(macs, measured)
    return [
        accuracy(what, "predicted", [net.predicted for net in nets], measured),
        accuracy(what, "MACs x a constant", [m * constant for m in macs], measured),
        accuracy(what, "measured again", again, measured),
    ]


def _compare(what: str, nets: Sequence[_Net], runtime: Runtime, seconds: float) -> list[Accuracy]:
    measured, again = _measure_twice(nets, runtime, seconds)
    return _rows(what, nets, measured, again)


def _fit_scale(
    nets: Sequence[_Net], runtime: Runtime, seconds: float
) -> tuple[float, list[Accuracy]]:
    """The factor fitted on every other net, and the accuracies on the rest with it applied."""
    measured, again = _measure_twice(nets, runtime, seconds)
    scale = scale_to([net.predicted for net in nets[::2]], measured[::2])
    held = [replace(net, predicted=scale * net.predicted) for net in nets[1::2]]
    return scale, _rows("subnets of yours", held, measured[1::2], again[1::2])
