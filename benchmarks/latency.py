"""How well calibrated predictors predict the latency of nets that they have not seen.

    python benchmarks/latency.py [--runtimes onnxruntime mnn] [--kernels 2000] [--seconds 40]
        [--nets 24] [--seed 0]

Calibrates each runtime on this machine and compares predictions, MACs times a constant, and a
second measurement with measured random nets of four families (MBConv, ShuffleNet, ResNet and VGG).
One thread; other work on the machine makes it worse.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from common import Row, add_output, report

from nasfx.costs.calibration import calibrate


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "mnn"])
    parser.add_argument("--kernels", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--nets", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    args = parser.parse_args(argv)
    rows: list[Row] = []
    for runtime in args.runtimes:
        with tempfile.TemporaryDirectory() as name:
            made = calibrate(
                runtime,
                Path(name, runtime),
                kernels=args.kernels,
                seconds=args.seconds,
                nets=args.nets,
                seed=args.seed,
            )
        shared = {
            "runtime": runtime,
            "version": version({"mnn": "MNN"}.get(runtime, runtime)),
            "kernels": made.kernels,
            "calibration": float(f"{1e3 * made.seconds:.5g}"),
            "load": os.getloadavg()[0],
        }
        rows += [shared | dataclasses.asdict(row) for row in made.accuracies]
    columns = ("runtime", "nets", "estimate", "count", "spearman", "mape", "within_10_percent")
    report(__file__, args, rows, {"predictions against measurements": columns})


if __name__ == "__main__":
    main()
