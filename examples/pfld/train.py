"""Step 1, search: train the supernet with FBNet and find an architecture.

Writes supernet.pt, architecture.json, search.json and search.png to the output folder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import data
import fitting
import torch
from common import add_resume, parser, resume_options, say, start, write_results
from data import Faces
from lightning_fabric import Fabric
from losses import PFLDLoss, eyes_of, nme
from torch import Tensor, nn

import nasfx
from nasfx.costs import LatencyTable, Measured
from nasfx.searching import SearchResult

MEASURED = ("onnxruntime", "mnn", "torch")


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    made = parser(__doc__, output="pfld-output", epochs=12)
    add_resume(made)
    data.add_arguments(made)
    fitting.add_arguments(made)
    add_search_arguments(made)
    return made


def add_search_arguments(to: argparse.ArgumentParser) -> None:
    """Add the flags of the search."""
    add = to.add_argument_group("search").add_argument
    add("--warmup", type=int, default=4, help="first epochs, in which only weights are trained")
    add("--share", type=float, default=0.8, help="of the faces that train weights; the rest: arch")
    add("--arch-lr", type=float, default=0.02, help="of Adam on the architecture; the paper's 0.01")
    add("--temperature", type=float, default=5.0, help="of the Gumbel softmax at the start")
    add("--last-temperature", type=float, default=0.5, help="in the last epoch")
    add(
        "--samples", type=int, default=6, help="subnets drawn at the end, of which the best is kept"
    )
    add("--objective", default="flops", choices=("flops", "latency", "none"), help="the cost")
    add("--cost-loss", default="fbnet-mul", choices=("fbnet-mul", "fbnet-add", "add#linear"),
        help="how the cost is weighed; the last one needs --target")  # fmt: skip
    add("--alpha", type=float, default=0.25, help="of the losses of FBNet")
    add("--beta", type=float, default=0.6, help="of the losses of FBNet")
    add("--target", type=float, help="cost to aim at: M multiply-accumulates, or microseconds")
    add("--max", type=float, help="what the found net may cost at most, likewise")
    add("--hardware", default="onnxruntime",
        help="whose latency: onnxruntime, mnn or torch, measured here, or a name of nn-Meter's",
    )  # fmt: skip
    add("--latency-table", type=Path,
        help="file to read latencies from; if it is missing, it is made for --hardware",
    )  # fmt: skip


def smoke(args: argparse.Namespace) -> None:
    """Make everything small if `--smoke` is given."""
    data.shrink(args)
    if args.smoke:
        args.warmup, args.samples = 1, 1


def objective(args: argparse.Namespace, model: nn.Module, x: Tensor) -> nasfx.Objective | None:
    """The cost that the search weighs in, as the flags say."""
    options: dict[str, Any] = {"target": args.target, "max": args.max, "loss": args.cost_loss}
    if args.cost_loss.startswith("fbnet"):
        options |= {"alpha": args.alpha, "beta": args.beta}
    if args.objective == "none":
        return None
    if args.objective == "flops":
        return nasfx.Flops(unit="M", **options)
    source: Any = Measured(args.hardware) if args.hardware in MEASURED else args.hardware
    if args.latency_table is not None:
        if not args.latency_table.is_file():
            say(f"{args.latency_table} is made: every part is measured or predicted")
            nasfx.latency_table(model, x, source).save(args.latency_table)
        source = LatencyTable.load(args.latency_table)
    return nasfx.Latency(source, unit="us", **options)


class Searched(NamedTuple):
    """What a search leaves."""

    model: nn.Module
    criterion: PFLDLoss
    result: SearchResult
    probabilities: dict[str, list[float]]
    seconds: float


def search(args: argparse.Namespace, faces: Faces, fabric: Fabric) -> Searched:
    """Search with FBNet; the model has the supernet's weights afterwards."""
    began = time.perf_counter()
    model, criterion = (
        fitting.backbone(faces.points, faces.size, faces.mean_shape),
        PFLDLoss(fractions=faces.fractions),
    )
    x, eyes = torch.zeros(1, 3, faces.size, faces.size), eyes_of(faces.points, args.eyes)
    annealed = max(1, args.epochs - args.warmup - 1)
    anneal = (args.last_temperature / args.temperature) ** (1 / annealed)
    strategy = nasfx.FBNet(args.temperature, anneal, final_samples=args.samples)
    cost = objective(args, model, x)
    net = nasfx.transform(model, strategy, example_inputs=x, objective=cost, seed=args.seed)
    # Trained and saved with the net, but no part of its graph, so the net's cost is without it.
    net.add_module("auxiliary", criterion.auxiliary)
    # To the device before there are optimizers, which hold the parameters.
    fabric.to_device(net)
    fabric.to_device(criterion)
    for_weights, for_arch = data.halves(faces, args.share, args.seed)
    train = data.loader(for_weights, args, shuffle=True)
    optimizer = fitting.optimizer_of(args, net.weight_parameters(), steps=args.epochs * len(train))

    def loss(outputs: Any, target: Any) -> Tensor:
        return (criterion.plain if net.step_kind == "arch" else criterion)(outputs, target)

    result = nasfx.search(
        net,
        train,
        data.loader(for_arch, args, shuffle=True),
        loss=loss,
        metric=lambda outputs, target: -nme(outputs[0], target["landmarks"], eyes).mean(),
        epochs=args.epochs,
        warmup=args.warmup,
        optimizers=(optimizer, net.arch_optimizer(lr=args.arch_lr)),
        seed=args.seed,
        fabric=fabric,
        **resume_options(args, f"checkpoints-{args.seed}"),
    )
    chances = {label: p.tolist() for label, p in net.probabilities().items()}
    model.to("cpu")
    return Searched(model, criterion, result, chances, time.perf_counter() - began)


def figures(found: Searched, size: int) -> dict[str, Any]:
    """What the results say of a search."""
    arch = found.result.architecture
    count = nasfx.count(fitting.subnet_of(found.model, arch, size), torch.zeros(1, 3, size, size))
    return {
        "architecture": dict(arch),
        "supernet_nme": -found.result.best_metric,
        "params": count.params,
        "macs": count.flops,
        "probabilities": found.probabilities,
        "evaluated": [{**dict(a), "nme": -m} for a, m in found.result.evaluated.items()],
        "records": found.result.records,
        "seconds": found.seconds,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Search as the flags say."""
    args = arguments().parse_args(argv)
    smoke(args)
    fabric = start(args)
    faces, _ = data.load(args)
    found = search(args, faces, fabric)
    print(found.result)
    arch, out = found.result.architecture, args.output
    fitting.save(out / "supernet.pt", found.model, found.criterion, faces, architecture=dict(arch))
    arch.to_json(out / "architecture.json")
    found.result.plot(out / "search.png")
    write_results(out / "search.json", args, figures(found, faces.size))
    say(f"written to {out}/ after {found.seconds:.0f} s")


if __name__ == "__main__":
    main()
