"""Step 2 of SPOS: evolution among the subnets of the trained supernet.

The batch norms of every subnet are recalibrated before it is evaluated on the held out images.
Writes architecture.json, search.json and search.png to the output folder, and checkpoints, from
which --resume goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import supernet
import torch
from torch import nn

import nasfx
from nasfx.spaces import shufflenet

# isort: split
import images
import training
from common import Help, add_resume, parser, resume_options, say, start, write_results

PRESETS = {
    "toy": {**supernet.TOY, "population": 12, "generations": 5, "recalibrate": 10},
    "paper": {**supernet.PAPER, "batch": 128, "eval_batch": 200, "max_flops": 330.0},
}
SMOKE = {**supernet.SMOKE, "population": 4, "generations": 2, "recalibrate": 2}


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=Help,
        parents=[parser(None, output="spos-output", epochs=0)],
        add_help=False,
        conflict_handler="resolve",
    )
    made.add_argument("--epochs", type=int, default=0, help=argparse.SUPPRESS)  # nothing is trained
    add_resume(made)
    images.add_data(made)
    supernet.add_space(made)
    add = made.add_argument_group("evolution").add_argument
    add("--checkpoint", type=Path,
        help="of the supernet: supernet.pt, or the authors' checkpoint-150000.pth.tar; "
        "None: supernet.pt in the output folder")  # fmt: skip
    add("--population", type=int, default=50, help="architectures in a generation")
    add("--generations", type=int, default=20, help="how many, the first included")
    add("--recalibrate", type=int, default=200, metavar="BATCHES",
        help="training batches that the batch norms' statistics are taken from")  # fmt: skip
    add("--checkpoint-every", type=int, metavar="EVALUATIONS",
        help="evaluations between checkpoints; None: only at the ends of generations")  # fmt: skip
    add("--max-flops", type=float, help="bound in million multiply-accumulates")
    add("--latency-filter", metavar="NAME",
        help="bound the latency on one of nn-Meter's devices such as cortexA76cpu_tflite21; on "
        f"{', '.join(training.RUNTIMES)}, measured here; or by a latency table's file")  # fmt: skip
    add("--latency-limit", type=float, default=100.0, help="the bound in milliseconds")
    return made


def load_weights(model: nn.Module, file: Path, *, bgr: bool) -> None:
    """Load a supernet's weights, ours or the authors'."""
    if not file.is_file():
        raise SystemExit(f"there is no file {file}; supernet.py writes it")
    held = torch.load(file, map_location="cpu", weights_only=True)
    if "supernet" not in held:
        held = {"supernet": shufflenet.from_authors(held["state_dict"])}
        if not bgr:
            say(f"{file} was trained on BGR images from 0 to 255: give --spos-preprocessing")
    model.load_state_dict(held["supernet"])


def bounds(args: argparse.Namespace) -> list[nasfx.Objective]:
    """What the found architecture may cost at most."""
    made: list[nasfx.Objective] = []
    if args.max_flops:
        made.append(nasfx.Flops(max=args.max_flops, unit="M"))
    if args.latency_filter:
        source = training.latency_source(args.latency_filter)
        made.append(nasfx.Latency(source, max=args.latency_limit))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Search as the flags say."""
    args = training.parse(arguments(), PRESETS, SMOKE, argv)
    fabric, began = start(args), time.perf_counter()
    data = images.load(args)
    model = supernet.space_of(args, data.classes)
    file = args.checkpoint or args.output / "supernet.pt"
    load_weights(model, file, bgr=args.spos_preprocessing)
    net = nasfx.transform(
        model,
        nasfx.SinglePath(),
        example_inputs=torch.zeros(1, 3, args.size, args.size),
        objective=bounds(args),
    )
    fabric.to_device(net)
    with fabric.autocast():
        result = nasfx.evolve(
            net,
            images.loader(data.held_out, args),
            metric=training.accuracy,
            recalibrate=(images.loader(data.train, args, train=True), args.recalibrate),
            population=args.population,
            generations=args.generations,
            seed=args.seed,
            checkpoint_every=args.checkpoint_every,
            **resume_options(args, "search-checkpoints"),
        )
    print(result)
    model.to("cpu")
    arch, seconds = result.architecture, time.perf_counter() - began
    costs = {name: float(of(arch)) for name, of in net.space.costs.items()}
    arch.to_json(args.output / "architecture.json")
    result.plot(args.output / "search.png")
    results = {
        "architecture": dict(arch),
        "supernet_accuracy": result.best_metric,
        "costs": costs,
        **training.counted(nasfx.finalize(net, arch), args.size),
        "evaluated": [{**dict(a), "accuracy": m} for a, m in result.evaluated.items()],
        "records": result.records,
        "seconds": seconds,
    }
    write_results(args.output / "search.json", args, results)
    say(f"written to {args.output}/ after {seconds:.0f} s")


if __name__ == "__main__":
    main()
