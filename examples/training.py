"""What the classification examples share: presets, recipes, and the training of a fixed net."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Training, say, write_results
from images import Data, loader
from lightning_fabric import Fabric
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader

import nasfx
from nasfx.costs import LatencyTable, Measured

Settings = Mapping[str, Any]
Records = list[dict[str, float]]

RUNTIMES = ("onnxruntime", "mnn", "torch")
SMOKE = {"epochs": 2, "limit": 96, "held_out": 32, "batch": 16}
"""What `--smoke` makes of any script."""


# -- flags -----------------------------------------------------------------------------------------


def parse(
    made: argparse.ArgumentParser,
    presets: Mapping[str, Settings],
    smoke: Settings,
    argv: Sequence[str] | None,
) -> argparse.Namespace:
    """Parse, with defaults that depend on `--preset` and `--smoke`.

    `--preset paper --help` shows those of the paper.

    Args:
        made: the parser, with all other flags.
        presets: the defaults that differ, by preset; the first is the default.
        smoke: what `--smoke` changes beside `SMOKE`.
        argv: the arguments; by default those of the process.
    """
    made.add_argument("--preset", choices=presets, default=next(iter(presets)),
        help="the settings to start from: toy, or a published recipe")  # fmt: skip
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=presets, default=next(iter(presets)))
    first.add_argument("--smoke", action="store_true")
    chosen, _ = first.parse_known_args(argv)
    defaults = dict(presets[chosen.preset])
    if chosen.smoke:
        defaults |= {**SMOKE, **smoke}
    made.set_defaults(**defaults)
    return made.parse_args(argv)


def add_recipe(to: argparse.ArgumentParser) -> None:
    """Add the flags of the weights' optimizer."""
    add = to.add_argument_group("optimizer of the weights (SGD)").add_argument
    add("--lr", type=float, default=0.05, help="learning rate at the start")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight-decay", type=float, default=4e-5, help="of SGD")
    add("--label-smoothing", type=float, default=0.0, help="share spread over all classes")
    add("--log-every", type=int, default=50, help="batches between lines of progress; 0: epochs")


# -- recipes ---------------------------------------------------------------------------------------


def weights_only_decay(parameters: Iterable[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: decay for tensors of 2 or more dimensions, none for the others."""
    held = list(parameters)
    return [
        {"params": [p for p in held if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in held if p.ndim <= 1], "weight_decay": 0.0},
    ]


Rate = Callable[[int], float]
"""The learning rate by the number of steps done."""


def linear(lr: float, steps: int) -> Rate:
    """From `lr` to 0, a little every step."""
    return lambda done: lr * max(0.0, 1 - done / steps)


def cosine(lr: float, steps: int, *, last: float = 0.0, every: int = 1) -> Rate:
    """From `lr` to `last` along half a cosine, changed every so many steps."""

    def rate(done: int) -> float:
        t = min(1.0, done // every * every / steps)
        return last + (lr - last) * (1 + math.cos(math.pi * t)) / 2

    return rate


def exponential(lr: float, factor: float, *, every: int) -> Rate:
    """Times `factor` every so many steps."""
    return lambda done: lr * factor ** (done // every)


def scheduled(optimizer: torch.optim.Optimizer, rate: Rate) -> torch.optim.Optimizer:
    """Let the learning rate follow `rate`.

    The number of steps done is kept in the optimizer, and so in its checkpoints.
    """

    def follow(changed: torch.optim.Optimizer, done: int) -> None:
        for group in changed.param_groups:
            group["done"], group["lr"] = done, rate(done)

    optimizer.register_step_post_hook(lambda o, *_: follow(o, o.param_groups[0]["done"] + 1))
    follow(optimizer, 0)
    return optimizer


def accuracy(outputs: Tensor, target: Tensor, k: int = 1) -> float:
    """The share of the batch whose class is among the k highest logits."""
    best = outputs.topk(min(k, outputs.shape[1])).indices
    return float((best == target[:, None]).any(1).float().mean())


def latency_source(name: str) -> Any:
    """What `nasfx.Latency` takes for a name.

    The file of a table (.json, or .yaml of ProxylessNAS's authors), a runtime to measure on this
    machine, or one of nn-Meter's devices.
    """
    if name.endswith(".json"):
        return LatencyTable.load(name)
    if name.endswith((".yaml", ".yml")):
        return LatencyTable.proxyless(name)
    return Measured(name) if name in RUNTIMES else name


def architecture_of(name: str, published: Mapping[str, nasfx.Architecture]) -> nasfx.Architecture:
    """A published architecture by name, or that of a JSON file.

    Raises:
        SystemExit: it is neither.
    """
    if name in published:
        return published[name]
    if not Path(name).is_file():
        known = f", nor one of {', '.join(published)}" if published else ""
        raise SystemExit(f"there is no file {name} (the search writes it){known}")
    return nasfx.Architecture.from_json(name)


# -- training a fixed net --------------------------------------------------------------------------


def retrain(
    net: nn.Module,
    data: Data,
    args: argparse.Namespace,
    fabric: Fabric,
    *,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Any, Tensor], Tensor],
    clip_norm: float = 0.0,
    before_epoch: Callable[[int], None] = lambda epoch: None,
    results: Mapping[str, Any],
) -> Records:
    """Train a fixed net for `args.epochs`, and write retrain.json, retrain.png and retrain.pt.

    After every epoch everything is saved in retrain-checkpoint.pt, from which `--resume` goes on;
    without that flag a new training is refused where there is such a file.
    Nothing is picked by the accuracy on the test images: the weights are those of the last epoch.

    Args:
        net: what `nasfx.finalize` made.
        data: `train` and `test` are read.
        args: the flags.
        fabric: device and precision.
        optimizer: of the net's parameters, which must be on the device already.
        loss: loss(outputs in train mode, target) -> 0-d tensor.
        clip_norm: of the gradient; 0 for none.
        before_epoch: called with the epoch's number.
        results: what else retrain.json says.

    Returns:
        A record an epoch: "epoch", "loss", "top1" and "top5" (of the test images), "lr", "seconds".

    Raises:
        SystemExit: a training is there already, or the loss is not finite.
    """
    train, test = loader(data.train, args, train=True), loader(data.test, args)
    wrapped: Any = fabric.setup_optimizers(optimizer)
    file = args.output / "retrain-checkpoint.pt"
    saved = Training(net, optimizer, fabric, train.generator)
    records: Records = saved.load(file, resume=args.resume)
    batches: Any = fabric.setup_dataloaders(train)
    for epoch in range(len(records), args.epochs):
        before_epoch(epoch)
        began, lr, total = time.perf_counter(), optimizer.param_groups[0]["lr"], 0.0
        net.train()
        for i, (x, y) in enumerate(batches):
            with fabric.autocast():
                value = loss(net(x), y)
            fabric.backward(value)
            if clip_norm:
                # Half precision may overflow; the scaler leaves such steps out.
                fabric.clip_gradients(net, wrapped, max_norm=clip_norm, error_if_nonfinite=False)
            wrapped.step()
            wrapped.zero_grad()
            total += float(value.detach())
            if args.log_every and (i + 1) % args.log_every == 0:
                say(f"epoch {epoch + 1}, batch {i + 1}/{len(train)}: loss {total / (i + 1):.4f}")
        if not math.isfinite(total):
            raise SystemExit(f"the loss is not finite in epoch {epoch}; lower --lr")
        top1, top5 = evaluate(net, test, fabric)
        figures = {"loss": total / len(train), "top1": top1, "top5": top5, "lr": lr}
        records.append({"epoch": epoch, **figures, "seconds": time.perf_counter() - began})
        saved.write(file, records)
        say(f"epoch {epoch + 1}/{args.epochs}: loss {figures['loss']:.4f} test {100 * top1:.2f} %")
    torch.save(net.state_dict(), args.output / "retrain.pt")
    plot(records, args.output / "retrain.png")
    last = {"top1": records[-1]["top1"], "top5": records[-1]["top5"]}
    write_results(args.output / "retrain.json", args, {**results, **last, "records": records})
    say(f"written to {args.output}/")
    return records


@torch.no_grad()
def evaluate(net: nn.Module, images: DataLoader[Any], fabric: Fabric) -> tuple[float, float]:
    """Top-1 and top-5 accuracy over the images, in eval mode."""
    net.eval()
    right, n = [0.0, 0.0], 0
    for batch in images:
        x, y = fabric.to_device(batch)
        with fabric.autocast():
            outputs = net(x)
        for i, k in enumerate((1, 5)):
            right[i] += accuracy(outputs, y, k) * len(y)
        n += len(y)
    return right[0] / n, right[1] / n


def counted(net: nn.Module, size: int) -> dict[str, int]:
    """Parameters and multiply-accumulates of a net for images of this side, in eval mode."""
    count = nasfx.count(net.eval(), torch.zeros(1, 3, size, size))
    return {"params": count.params, "macs": count.flops}


def plot(records: Records, file: Path) -> Path:
    """Draw the loss, the accuracies and the learning rate over the epochs."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = ("loss",), ("top1", "top5"), ("lr",)
    for axes, names in zip(figure.subplots(1, 3), panels, strict=True):
        for name in names:
            axes.plot([r["epoch"] + 1 for r in records], [r[name] for r in records], label=name)
        axes.set_xlabel("epoch")
        axes.legend()
    figure.savefig(file)
    return file
