"""The experiment: the searched subnet against the hand-made net, over several seeds.

For every seed one search, then three trainings with the same recipe on the same faces:

- subnet: the found architecture, finetuned from the supernet's weights;
- inherited: the hand-made one, mb_k3_e2_res in all layers, finetuned from the same supernet's
  weights for as many epochs: the difference to `subnet` is that of the architectures;
- reference: the hand-made one from scratch, for the epochs of the search and of the finetuning
  together. A weight epoch of the search goes through `--share` of the faces, so the reference goes
  through more of them; it takes less CPU time, since a supernet holds nine candidates a layer.

Prints a table, and writes it with all figures to compare.json, and compare-SEED.png. Errors are
those on the test faces after the last epoch; nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import data
import export
import fitting
import torch
import train
from common import say, start, write_results
from data import Faces
from lightning_fabric import Fabric
from losses import PFLDLoss, eyes_of, nme
from rich.console import Console
from rich.table import Table
from torch import nn

COLUMNS = {
    "nme": ("NME", ".4f"), "params": ("params", ",.0f"), "macs": ("MACs", ",.0f"),
    "onnxruntime_ms": ("ORT ms", ".4f"), "mnn_ms": ("MNN ms", ".4f"),
    "cpu_seconds": ("CPU s", ".0f"),
}  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    made = train.arguments()
    made.description = __doc__
    add = made.add_argument_group("comparison").add_argument
    add("--seeds", type=int, default=3, help="how many, from --seed on")
    add("--finetune-epochs", type=int, default=20, help="of the found subnet")
    return made


def mean_shape_error(faces: Faces, test: Faces, eyes: tuple[int, int]) -> float:
    """The error of always giving the mean shape of the training faces."""
    mean = faces.landmarks.mean(0).expand_as(test.landmarks)
    return float(nme(mean, test.landmarks, eyes).mean())


def one_seed(args: argparse.Namespace, faces: Faces, test: Faces, fabric: Fabric) -> dict[str, Any]:
    """Search, train and measure with the seed of `args`; figures by the name of the net."""
    torch.manual_seed(args.seed)
    began = time.process_time()
    found = train.search(args, faces, fabric)
    searched = time.process_time() - began
    say(f"seed {args.seed}: found {dict(found.result.architecture)}")
    together = args.epochs + args.finetune_epochs
    fresh = (
        fitting.backbone(faces.points, faces.size, faces.mean_shape),
        PFLDLoss(fractions=faces.fractions),
    )
    held = found.model, found.criterion
    runs: dict[str, tuple[Any, ...]] = {
        "subnet": (found.result.architecture, held, args.finetune_epochs),
        "inherited": (fitting.REFERENCE, held, args.finetune_epochs),
        "reference": (fitting.REFERENCE, fresh, together),
    }
    figures: dict[str, Any] = {"search": train.figures(found, faces.size)}
    for name, (architecture, (model, criterion), epochs) in runs.items():
        began = time.process_time()
        net = fitting.subnet_of(model, architecture, faces.size)
        records = _fit(net, criterion, faces, test, args, fabric, epochs, name)
        spent = time.process_time() - began
        file = args.output / f"{name}-{args.seed}"
        fitting.plot_faces(net, test, file.with_suffix(".png"))
        measured = export.export(net.cpu().eval(), faces.size, file)
        spent += 0 if name == "reference" else searched
        figures[name] = {
            **measured, "nme": records[-1]["nme"], "cpu_seconds": spent,
            "architecture": dict(architecture), "records": records,
        }  # fmt: skip
    return figures


def _fit(
    net: nn.Module, criterion: PFLDLoss, faces: Faces, test: Faces, args: argparse.Namespace,
    fabric: Fabric, epochs: int, name: str,
) -> list[dict[str, float]]:  # fmt: skip
    loaders = data.loader(faces, args, shuffle=True), data.loader(test, args)
    eyes, own = eyes_of(faces.points, args.eyes), copy.deepcopy(criterion)
    return fitting.fit(net, own, *loaders, args, fabric, epochs=epochs, eyes=eyes, name=name)


def table(seeds: Mapping[int, Mapping[str, Any]], title: str) -> Table:
    """A row for every seed and net, and their means."""
    made = Table(title=title)
    for column in ("seed", "net", *(shown for shown, _ in COLUMNS.values())):
        made.add_column(column, justify="right")
    names = [name for name in next(iter(seeds.values())) if name != "search"]
    for name in names:
        for seed, figures in seeds.items():
            values = [format(figures[name][c], f) for c, (_, f) in COLUMNS.items()]
            made.add_row(str(seed), name, *values)
        if len(seeds) > 1:
            means = [statistics.mean(s[name][c] for s in seeds.values()) for c in COLUMNS]
            shown = [format(m, f) for m, (_, f) in zip(means, COLUMNS.values(), strict=True)]
            made.add_row("mean", name, *shown, end_section=True)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the flags say."""
    args = arguments().parse_args(argv)
    train.smoke(args)
    if args.smoke:
        args.seeds, args.finetune_epochs = 1, 1
    fabric = start(args)
    faces, test = data.load(args)
    constant = mean_shape_error(faces, test, eyes_of(faces.points, args.eyes))
    seeds: dict[int, dict[str, Any]] = {}
    for seed in range(args.seed, args.seed + args.seeds):
        seeds[seed] = one_seed(
            argparse.Namespace(**{**vars(args), "seed": seed}), faces, test, fabric
        )
        runs = {name: seeds[seed][name]["records"] for name in ("subnet", "inherited", "reference")}
        fitting.plot_training(runs, args.output / f"compare-{seed}.png")
        results = {"constant_mean_shape_nme": constant, "seeds": seeds}
        write_results(args.output / "compare.json", args, results)
    title = f"{' '.join(args.data)}, {faces.size} px; a constant mean shape has NME {constant:.4f}"
    Console().print(table(seeds, title))
    say(f"written to {args.output}/")


if __name__ == "__main__":
    main()
