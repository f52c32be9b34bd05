"""What searching, training and exporting share: optimizers, the training loop, files, plots."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Training, say
from data import Faces
from lightning_fabric import Fabric
from losses import PFLDLoss, nme
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader

import nasfx
from nasfx.spaces import pfld

REFERENCE = pfld.arch(["mb_k3_e2_res"] * 5)
"""The hand-made net that searched ones are compared with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the weights' optimizer."""
    add = parser.add_argument_group("optimizer of the weights").add_argument
    add("--optimizer", default="adamw", choices=("adamw", "rmsprop"), help="rmsprop: NNI's")
    add("--lr", type=float, default=6e-3, help="at the start; falls to 0 along a cosine")
    add("--weight-decay", type=float, default=1e-4, help="of the optimizer")


def optimizer_of(args: argparse.Namespace, *groups: Any, steps: int) -> torch.optim.Optimizer:
    """The optimizer of these parameters, whose learning rate falls to 0 in so many steps.

    The number of steps done is kept in the optimizer, and so in its checkpoints.
    """
    cls = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[args.optimizer]
    parameters = [p for group in groups for p in group]
    optimizer = cls(parameters, lr=args.lr, weight_decay=args.weight_decay)
    optimizer.param_groups[0]["done"] = 0

    def lower(changed: torch.optim.Optimizer, *_: Any) -> None:
        group = changed.param_groups[0]
        group["done"] += 1
        group["lr"] = args.lr * (1 + math.cos(math.pi * min(1, group["done"] / steps))) / 2

    optimizer.register_step_post_hook(lower)
    return optimizer


def backbone(points: int, size: int, mean_shape: Tensor | None = None) -> nn.Module:
    """The searched net.

    Args:
        points: how many landmarks.
        size: the side of the images.
        mean_shape: of the training faces, (2 P,): the landmarks that an untrained net gives. By
            default they are zeros, as in NNI's example, and the first epochs go by moving them.
    """
    net = pfld.net(points, size=size)
    if mean_shape is not None:
        net.fc.bias.data.copy_(mean_shape)
    return net


def subnet_of(model: nn.Module, architecture: Mapping[str, Any], size: int) -> fx.GraphModule:
    """One architecture as a net of its own, with a copy of the model's weights."""
    return nasfx.finalize(model, architecture, example_inputs=torch.zeros(1, 3, size, size))


def fit(
    net: nn.Module,
    criterion: PFLDLoss,
    train: DataLoader[Any],
    test: DataLoader[Any],
    args: argparse.Namespace,
    fabric: Fabric,
    *,
    epochs: int,
    eyes: tuple[int, int],
    name: str,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> list[dict[str, float]]:
    """Train a static net; a record an epoch: "epoch", "loss", "nme" (of `test`), "lr", "seconds".

    With a `checkpoint` everything is saved there after every epoch, from which `resume` goes on.

    Nothing is picked by the error on the test faces: the weights are those after the last epoch.
    """
    for module in (net, criterion):
        fabric.to_device(module)
    steps = epochs * len(train)
    inner = optimizer_of(args, net.parameters(), criterion.parameters(), steps=steps)
    optimizer = fabric.setup_optimizers(inner)
    loader: Any = fabric.setup_dataloaders(train)
    saved = Training(net, inner, fabric, train.generator, criterion=criterion)
    records = [] if checkpoint is None else saved.load(checkpoint, resume=resume)
    for epoch in range(len(records), epochs):
        began, lr, total = time.perf_counter(), inner.param_groups[0]["lr"], 0.0
        net.train()
        criterion.train()
        for images, target in loader:
            with fabric.autocast():
                outputs = net(images)
            loss = criterion(outputs, target)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise SystemExit(f"{name}: the loss is not finite in epoch {epoch}; lower --lr")
        error, seconds = error_of(net, test, eyes, fabric), time.perf_counter() - began
        figures = {"loss": total / len(train), "nme": error, "lr": lr, "seconds": seconds}
        records.append({"epoch": epoch, **figures})
        if checkpoint is not None:
            saved.write(checkpoint, records)
        say(f"{name}: epoch {epoch + 1}/{epochs} loss {figures['loss']:.4f} NME {error:.4f}")
    return records


@torch.no_grad()
def error_of(
    net: nn.Module, faces: DataLoader[Any], eyes: tuple[int, int], fabric: Fabric
) -> float:
    """The mean of `nme` over the faces, in eval mode."""
    net.eval()
    errors: list[Tensor] = []
    for batch in faces:
        images, target = fabric.to_device(batch)
        with fabric.autocast():
            landmarks, _ = net(images)
        errors.append(nme(landmarks, target["landmarks"], eyes))
    return float(torch.cat(errors).mean())


# -- files -----------------------------------------------------------------------------------------


def save(file: Path, net: nn.Module, criterion: PFLDLoss, faces: Faces, **more: Any) -> Path:
    """Write weights, those of the auxiliary net, and what a net like it is made with."""
    made_with = {"points": faces.points, "size": faces.size}
    states = {"net": net.state_dict(), "criterion": criterion.state_dict()}
    torch.save({**made_with, **states, **more}, file)
    return file


def load_file(file: Path, hint: str) -> dict[str, Any]:
    """What `save` wrote.

    Raises:
        SystemExit: there is no such file.
    """
    if not file.is_file():
        raise SystemExit(f"there is no file {file}; {hint} writes it")
    return torch.load(file, map_location="cpu", weights_only=True)


def load_subnet(file: Path) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The trained subnet that retrain.py wrote, in eval mode, and the other things in the file."""
    held = load_file(file, "retrain.py")
    subnet = subnet_of(backbone(held["points"], held["size"]), held["architecture"], held["size"])
    subnet.load_state_dict(held["net"])
    return subnet.eval(), held


# -- plots -----------------------------------------------------------------------------------------


def plot_training(runs: Mapping[str, Sequence[Mapping[str, float]]], file: Path) -> Path:
    """Draw the loss and the error of every run over its epochs."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"loss": "training loss", "nme": "NME on the test faces"}
    for axes, (column, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, records in runs.items():
            values = [record[column] for record in records]
            axes.plot(range(1, len(values) + 1), values, marker=".", label=name)
        axes.set(xlabel="epoch", title=title, yscale="log")
        axes.legend()
    figure.savefig(file)
    return file


@torch.no_grad()
def plot_faces(net: nn.Module, faces: Faces, file: Path, *, n: int = 8) -> Path:
    """Draw the first faces with true and found landmarks."""
    net.eval()
    device = next(net.parameters()).device
    n = min(n, len(faces))
    figure = Figure(figsize=(2 * ((n + 1) // 2), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(2, (n + 1) // 2, squeeze=False).flat
    for i, axes in enumerate(every):
        axes.set_axis_off()
        if i >= n:
            continue
        image, target = faces[i]
        found = net(image[None].to(device))[0].flatten().cpu()
        axes.imshow(image.permute(1, 2, 0).numpy())
        for points, colour, label in (
            (target["landmarks"], "lime", "true"),
            (found, "red", "found"),
        ):
            x, y = (points.reshape(-1, 2) * faces.size).T.numpy()
            axes.scatter(x, y, s=2, c=colour, label=label)
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(file)
    return file
