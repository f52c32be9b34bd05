"""How well calibrated predictors predict the latency of nets that they have not seen.

    python benchmarks/latency.py [--runtimes onnxruntime mnn] [--kernels 2000] [--seconds 40]
        [--nets 24] [--seed 0]

Calibrates each runtime on this machine and compares predictions, MACs times a constant, and a
second measurement with measured random nets of four families (MBConv, ShuffleNet, ResNet and VGG).
Prints a table per runtime, then JSON. One thread; other work on the machine makes it worse.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

from nasfx.costs.calibration import calibrate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "mnn"])
    parser.add_argument("--kernels", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--nets", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = []
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
        print(made, flush=True)
        results.append(
            {
                "runtime": runtime,
                "version": version({"mnn": "MNN"}.get(runtime, runtime)),
                "kernels": made.kernels,
                "seconds": round(made.seconds, 1),
                "load": os.getloadavg()[0],
                "accuracies": [dataclasses.asdict(row) for row in made.accuracies],
            }
        )
    machine = {"cpu": platform.machine(), "threads": 1, "cores": os.cpu_count()}
    print(json.dumps({"machine": machine, "seed": args.seed, "results": results}, indent=1))


if __name__ == "__main__":
    main()
