"""What the examples share: flags, devices, results as JSON, and the reader of parquet files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

import nasfx

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
DATA_VARIABLE = "NASFX_DATA"


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and the description as it is written."""


def parser(
    description: str | None, *, output: str, epochs: int, seed: int = 0
) -> argparse.ArgumentParser:
    """A parser with the flags that every example has; `--help` shows the defaults.

    Args:
        description: what the script does, as a rule its `__doc__`.
        output: the default folder for what is written.
        epochs: the default number of epochs.
        seed: the default seed.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=Help)
    made.add_argument("--epochs", type=int, default=epochs, help="passes over the training data")
    made.add_argument("--seed", type=int, default=seed, help="of weights, data order and draws")
    made.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:1")
    made.add_argument("--precision", default="32-true", choices=PRECISIONS, help="of the training")
    made.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0: its own")
    made.add_argument("--output", type=Path, default=Path(output), help="folder for the results")
    made.add_argument(
        "--smoke", action="store_true", help="tiny data and few epochs: seconds, for CI"
    )
    return made


def add_resume(to: argparse.ArgumentParser) -> None:
    """Add `--resume`, for scripts that search; see `resume_options`."""
    to.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in the output folder; without it a new search is refused "
        "where there is one",
    )


def resume_options(args: argparse.Namespace, name: str = "checkpoints") -> dict[str, Any]:
    """Arguments for `nasfx.search`: where checkpoints are, and what to do if there are any.

    Args:
        args: with `output` and `resume`.
        name: of the folder of the checkpoints, in the output folder.
    """
    return {"checkpoint_dir": args.output / name, "resume": "auto" if args.resume else False}


def start(args: argparse.Namespace) -> Fabric:
    """Seed everything, make the output folder, and give the device and precision as a Fabric."""
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    name, _, index = args.device.partition(":")
    devices: Any = [int(index)] if index else 1
    fabric = Fabric(accelerator=name, devices=devices, precision=args.precision)
    fabric.launch()
    return fabric


class Training:
    """What the training of a fixed net goes on from, saved after every epoch."""

    def __init__(
        self, net: nn.Module, optimizer: torch.optim.Optimizer, fabric: Fabric, generator: Any,
        **more: nn.Module,
    ) -> None:  # fmt: skip
        """All of it: `generator` is the loader's, `more` what else has a state."""
        precision = fabric.strategy.precision
        self.parts = {"net": net, "optimizer": optimizer, "precision": precision, **more}
        self.generator = generator

    def write(self, file: Path, records: Sequence[Mapping[str, float]]) -> None:
        """Save it, with a record of each epoch."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        random = torch.get_rng_state(), self.generator.get_state()
        new = file.with_suffix(".new")
        torch.save({**states, "random": random, "records": list(records)}, new)
        new.replace(file)

    def load(self, file: Path, *, resume: bool) -> list[dict[str, float]]:
        """The records so far; none, and nothing is loaded, where there is no file.

        Raises:
            SystemExit: there is one, and `resume` is not asked for.
        """
        if not file.is_file():
            return []
        if not resume:
            raise SystemExit(
                f"{file} is there, of a training that could go on: give --resume, or another "
                "--output, or delete it"
            )
        held = torch.load(file, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(held[name])
        torch.set_rng_state(held["random"][0])
        self.generator.set_state(held["random"][1])
        say(f"going on after {len(held['records'])} epochs")
        return held["records"]


def say(text: str) -> None:
    """A line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def write_results(path: Path, args: argparse.Namespace, results: Mapping[str, Any]) -> Path:
    """Write results as JSON, with the command, its arguments, the versions and the machine."""
    content = {
        "command": " ".join(["python", *sys.argv]),
        "arguments": {key: _plain(value) for key, value in vars(args).items()},
        "versions": {"nasfx": nasfx.__version__, "torch": torch.__version__},
        "machine": {"processor": _processor(), "threads": torch.get_num_threads()},
        **{key: _plain(value) for key, value in results.items()},
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def parquet_rows(name: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of the file `name` in the folder that the environment variable NASFX_DATA names.

    Args:
        name: the file's name, such as "faces68_train.parquet".
        columns: those to read; by default all.

    Raises:
        SystemExit: the variable is not set, there is no such file, or pyarrow is missing.
    """
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise SystemExit(f"set the environment variable {DATA_VARIABLE} to the folder of {name}")
    path = Path(folder, name)
    if not path.is_file():
        raise SystemExit(f"there is no file {path}; {DATA_VARIABLE} names the folder of {name}")
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise SystemExit("parquet files are read by pyarrow: pip install pyarrow") from None
    return parquet.read_table(path, columns=columns and list(columns)).to_pylist()


def _plain(value: Any) -> Any:
    """A value as JSON holds it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
