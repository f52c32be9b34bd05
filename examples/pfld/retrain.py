"""Step 2, finetune: train the found subnet on, from the weights that the supernet gave it.

Writes subnet.pt, subnet.json, subnet.png and subnet-faces.png to the output folder. The error is
that on the test faces, which neither this step nor the search trains on or chooses by.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import data
import fitting
import torch
from common import add_resume, parser, say, start, write_results
from losses import PFLDLoss, eyes_of

import nasfx


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    made = parser(__doc__, output="pfld-output", epochs=20)
    add_resume(made)
    made.add_argument("--supernet", type=Path, help="of train.py; None: the output folder's")
    made.add_argument(
        "--from-scratch", action="store_true", help="draw new weights instead of the supernet's"
    )
    made.add_argument(
        "--reference", action="store_true",
        help="train the hand-made net, mb_k3_e2_res in all layers; writes reference.pt and so on",
    )  # fmt: skip
    data.add_arguments(made)
    fitting.add_arguments(made)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say."""
    args = arguments().parse_args(argv)
    data.shrink(args)
    fabric = start(args)
    train, test = data.load(args)
    began, name = time.perf_counter(), "reference" if args.reference else "subnet"
    model, criterion = (
        fitting.backbone(train.points, train.size, train.mean_shape),
        PFLDLoss(fractions=train.fractions),
    )
    architecture = fitting.REFERENCE
    if not (args.reference and args.from_scratch):
        held = fitting.load_file(args.supernet or args.output / "supernet.pt", "train.py")
        if (held["points"], held["size"]) != (train.points, train.size):
            raise SystemExit(
                f"the supernet is for {held['points']} points and --size {held['size']}, "
                f"the data has {train.points} and {train.size}"
            )
        architecture = fitting.REFERENCE if args.reference else held["architecture"]
        if not args.from_scratch:
            model.load_state_dict(held["net"])
            criterion.load_state_dict(held["criterion"])
    subnet = fitting.subnet_of(model, architecture, train.size)
    eyes = eyes_of(train.points, args.eyes)
    records = fitting.fit(
        subnet, criterion, data.loader(train, args, shuffle=True), data.loader(test, args),
        args, fabric, epochs=args.epochs, eyes=eyes, name=name,
        checkpoint=args.output / f"{name}-checkpoint.pt", resume=args.resume,
    )  # fmt: skip
    out = args.output
    fitting.plot_training({name: records}, out / f"{name}.png")
    fitting.plot_faces(subnet, test, out / f"{name}-faces.png")
    subnet.cpu()
    fitting.save(out / f"{name}.pt", subnet, criterion, train, architecture=dict(architecture))
    count = nasfx.count(subnet, torch.zeros(1, 3, train.size, train.size))
    results = {
        "architecture": dict(architecture),
        "nme": records[-1]["nme"],
        "params": count.params,
        "macs": count.flops,
        "records": records,
        "seconds": time.perf_counter() - began,
    }
    write_results(out / f"{name}.json", args, results)
    say(f"NME {results['nme']:.4f}, {count.params:,} parameters, {count.flops:,} MACs")
    say(f"written to {out}/ after {results['seconds']:.0f} s")


if __name__ == "__main__":
    main()
