"""What the classification examples train on: digits, CIFAR-10 or ImageNet."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import parquet_rows, say
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

# Of the pixels from 0 to 1, by the first word of the data's name.
_MEAN_AND_STD = {
    "digits": ([0.5] * 3, [0.5] * 3),
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}
_PARQUET = {
    "cifar10-jpg": "cifar10_{}_jpg.parquet",
    "cifar10-jpg-fixture": "cifar10_fixture_{}_jpg.parquet",
}
DATA = ("digits", "cifar10", *_PARQUET, "imagenet")


def add_data(to: argparse.ArgumentParser) -> None:
    """Add the flags that say what to train on."""
    add = to.add_argument_group("data").add_argument
    add("--data", default="digits", choices=DATA,
        help="digits: scikit-learn's, offline; cifar10: torchvision's, in --data-root; cifar10-jpg "
        "and its fixture: parquet files in the folder that NASFX_DATA names; imagenet: the folders "
        "train and val in --data-root")  # fmt: skip
    add("--data-root", type=Path, default=Path("data"), help="folder of cifar10 or imagenet")
    add("--size", type=int, default=32, help="side of the images")
    add("--batch", type=int, default=64, help="size of the batches")
    add("--eval-batch", type=int, default=256, help="size of the batches in evaluation")
    add("--workers", type=int, default=0, help="processes that load data; 0: this one")
    add("--held-out", type=int, default=0, help="training images that the search is judged by")
    add("--limit", type=int, default=0, help="training images to use, held out ones too; 0: all")
    add("--cutout", type=int, default=0, help="side of the square that training images lose")
    add("--jitter", type=float, nargs="*", default=(),
        help="of brightness, contrast, saturation and hue, for ImageNet's images")  # fmt: skip
    add("--spos-preprocessing", action="store_true",
        help="images as the authors of SPOS had them: BGR, from 0 to 255")  # fmt: skip


class Data(NamedTuple):
    """Images (3, S, S) with labels. `held_out` are training images, disjoint from `train`."""

    train: Dataset[Any]
    held_out: Dataset[Any]
    test: Dataset[Any]
    classes: int


class Images(Dataset[tuple[Tensor, int]]):
    """A data set's images, transformed."""

    def __init__(self, source: Dataset[Any], transform: Callable[[Any], Tensor]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, label = self.source[i]
        return self.transform(image), int(label)


def load(args: argparse.Namespace, *, augment_held_out: bool = False) -> Data:
    """The data that the flags name; which images are held out depends on the seed.

    Raises:
        SystemExit: it is not there, or has too few images.
    """
    train, test, classes = _sources(args)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed)).tolist()
    order = order[: args.limit or None]
    if not 0 <= args.held_out < len(order):
        raise SystemExit(f"--held-out {args.held_out}: there are {len(order)} training images")
    if args.smoke:
        test = Subset(test, range(min(64, len(test))))
    plain, augmented = transform_of(args), transform_of(args, training=True)
    data = Data(
        Images(Subset(train, order[args.held_out :]), augmented),
        Images(Subset(train, order[: args.held_out]), augmented if augment_held_out else plain),
        Images(test, plain),
        classes,
    )
    sizes = f"{len(order) - args.held_out} images to train on, {args.held_out} held out"
    say(f"{args.data}: {sizes}, {len(test)} to test on")
    return data


def loader(
    images: Dataset[Any], args: argparse.Namespace, *, train: bool = False, batch: int = 0
) -> DataLoader[Any]:
    """Batches, by default of the flags' size; in training whole ones, shuffled by the seed."""
    batch = batch or (args.batch if train else args.eval_batch)
    return DataLoader(
        images,
        batch,
        shuffle=train,
        drop_last=train and len(images) >= batch,  # pyright: ignore[reportArgumentType]
        num_workers=args.workers,
        generator=torch.Generator().manual_seed(args.seed),
    )


def _sources(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """Training images, test images, and the number of classes."""
    root = args.data_root
    if args.data == "digits":
        return *_digits(args.size), 10
    if args.data in _PARQUET:
        train, test = (_parquet(_PARQUET[args.data].format(part)) for part in ("train", "test"))
        return train, test, 10
    try:
        if args.data == "cifar10":
            train, test = (datasets.CIFAR10(root, train=part) for part in (True, False))
        else:
            train, test = (datasets.ImageFolder(root / part) for part in ("train", "val"))
    except (RuntimeError, FileNotFoundError) as error:
        raise SystemExit(f"--data {args.data}: not found in --data-root {root}: {error}") from None
    return train, test, len(train.classes)


def _digits(size: int) -> tuple[TensorDataset, TensorDataset]:
    """1,437 and 360 of the 1,797 digits, 8x8, enlarged; the same ones for every seed."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) * (255 / 16)
    x = F.interpolate(x, size=(size, size), mode="bilinear").round().to(torch.uint8)
    x, y = x.expand(-1, 3, -1, -1), torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def _parquet(name: str) -> TensorDataset:
    """The images of a parquet file, uint8 (N, 3, H, W)."""
    rows = parquet_rows(name, ("image", "label"))
    pixels = [np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")) for row in rows]
    labels = torch.tensor([row["label"] for row in rows])
    return TensorDataset(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), labels)


class BGR(nn.Module):
    """Pixels (3, H, W) from 0 to 255 in the order blue, green, red, as SPOS's authors had them."""

    def forward(self, image: Tensor) -> Tensor:
        return image.flip(0).float()


class Cutout(nn.Module):
    """Zero a square of the image whose centre is anywhere (arXiv 1708.04552)."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, image: Tensor) -> Tensor:
        corners = [int(torch.randint(n, ())) - self.side // 2 for n in image.shape[1:]]
        top, left = (max(0, corner) for corner in corners)
        image[:, top : corners[0] + self.side, left : corners[1] + self.side] = 0
        return image


def transform_of(args: argparse.Namespace, *, training: bool = False) -> v2.Compose:
    """From an image as the data set has it to the net's input, float (3, S, S)."""
    size = args.size
    steps: list[nn.Module] = [v2.ToImage()]
    if args.data == "imagenet" and training:
        jitter = [v2.ColorJitter(*args.jitter)] if args.jitter else []
        steps += [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *jitter]
    elif args.data == "imagenet":
        steps += [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    elif args.data != "digits":
        steps += [v2.Resize(size)]
        if training:
            steps += [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()]
    if args.spos_preprocessing:
        steps += [BGR()]
    else:
        mean, std = _MEAN_AND_STD[args.data.partition("-")[0]]
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    if training and args.cutout:
        steps += [Cutout(args.cutout)]
    return v2.Compose([*steps, v2.ToPureTensor()])
