"""Step 3, export: the trained subnet as ONNX and MNN, and its latency on this machine.

Writes NAME.onnx, NAME.mnn and export.json to the output folder. Latencies are medians of single
inferences on one thread of this machine's CPU, not of a phone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nasfx

# For `common`; behind the folder of this example.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import fitting
from common import Help, write_results

OUTPUTS = ("landmarks", "feature")


class Named(nn.Module):
    """The net with names for its outputs: those of the ONNX file."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, S, S), from 0 to 1, to (N, 2 P, 1, 1) and (N, C, S / 4, S / 4)."""
        return dict(zip(OUTPUTS, self.net(image), strict=True))


def export(
    net: nn.Module, size: int, file: Path, weights: str = "fp32", *, mnn: bool = True
) -> dict[str, Any]:
    """Write `file` as .onnx and .mnn; their sizes in bytes and latencies in milliseconds.

    Args:
        net: the trained net.
        size: the side of its images.
        file: the path without an ending.
        weights: how MNN stores them: fp32, fp16 or w8.
        mnn: also write MNN, which needs the extra `mnn`.
    """
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    count = nasfx.count(net, x)
    onnx_file = nasfx.export_onnx(Named(net), file.with_suffix(".onnx"), x)
    figures: dict[str, Any] = {
        "params": count.params,
        "macs": count.flops,
        "onnx_bytes": onnx_file.stat().st_size,
        "onnxruntime_ms": nasfx.onnxruntime_milliseconds(onnx_file),
    }
    if mnn:
        mnn_file = nasfx.export_mnn(onnx_file, file.with_suffix(".mnn"), precision=weights)
        figures["mnn_bytes"] = mnn_file.stat().st_size
        figures["mnn_ms"] = nasfx.mnn_milliseconds(mnn_file)
    return figures


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = made.add_argument
    add("--output", type=Path, default=Path("pfld-output"), help="folder for the results")
    add("--subnet", type=Path, help="of retrain.py; None: subnet.pt in the output folder")
    add("--weights", default="fp32", choices=("fp32", "fp16", "w8"), help="in the MNN file")
    add("--no-mnn", action="store_true", help="write ONNX only")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Export as the flags say."""
    args = arguments().parse_args(argv)
    file = args.subnet or args.output / "subnet.pt"
    subnet, held = fitting.load_subnet(file)
    args.output.mkdir(parents=True, exist_ok=True)
    figures = export(
        subnet, held["size"], args.output / file.stem, args.weights, mnn=not args.no_mnn
    )
    write_results(args.output / "export.json", args, figures)
    for name, value in figures.items():
        print(f"{name:>16} {value:,.4g}" if isinstance(value, float) else f"{name:>16} {value:,}")


if __name__ == "__main__":
    main()
