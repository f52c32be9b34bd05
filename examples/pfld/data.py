"""Faces with landmarks: drawn ones, real ones from parquet files, or files called list.txt."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from synthetic import synthetic_faces
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

# For `common`; the other files of this example import this one first. Behind their own folder.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import parquet_rows, say


@dataclass(frozen=True)
class Faces(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Faces as (image, target); what they hold is said in `PFLDLoss.forward`.

    Attributes:
        images: uint8 (N, 3, S, S), or the N files to read them from.
        landmarks: (N, 2 P), as x0, y0, x1, y1 ..., as fractions of the image's side.
        euler: pitch, yaw and roll in radians, (N, 3).
        size: the side S that images are given in.
        attributes: 0 and 1, (N, A), or None.
    """

    images: Tensor | Sequence[Path]
    landmarks: Tensor
    euler: Tensor
    size: int
    attributes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.landmarks)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.images[i]
        if isinstance(image, Path):
            image = _pixels(Image.open(image), self.size)
        target = {"landmarks": self.landmarks[i], "euler": self.euler[i]}
        if self.attributes is not None:
            target["attributes"] = self.attributes[i]
        return image.float() / 255, target

    @property
    def points(self) -> int:
        """The number of landmarks."""
        return self.landmarks.shape[1] // 2

    @property
    def mean_shape(self) -> Tensor:
        """The mean of the landmarks, (2 P,)."""
        return self.landmarks.mean(0)

    @property
    def fractions(self) -> Tensor | None:
        """Of the faces that have each attribute, (A,)."""
        return None if self.attributes is None else self.attributes.mean(0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what to train on."""
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["synthetic"], metavar=("NAME", "FOLDER"),
        help="synthetic: drawn here; faces68: parquet files in the folder that NASFX_DATA names; "
        "list.txt FOLDER: that folder's train_data/list.txt and test_data/list.txt")  # fmt: skip
    add("--points", type=int, default=106, help="landmarks of a line of list.txt")
    add("--euler-unit", default="degrees", choices=("degrees", "radians"), help="in list.txt")
    add("--eyes", nargs=2, type=int, metavar=("A", "B"),
        help="the points whose distance the error is divided by, from 0; "
        "None: the outer corners of the eyes, known for 68, 98 and 106 points")  # fmt: skip
    add("--size", type=int, default=112, help="side of the images, a multiple of 16")
    add("--faces", type=int, default=512, help="how many are drawn for training")
    add("--batch", type=int, default=16, help="size of the batches")
    add("--workers", type=int, default=0, help="processes that load data; 0: this one")


def shrink(args: argparse.Namespace) -> None:
    """Make everything small if `--smoke` is given."""
    if args.smoke:
        args.epochs, args.faces, args.size, args.batch = 2, 48, 64, 16


def load(args: argparse.Namespace) -> tuple[Faces, Faces]:
    """The faces to train on, and those to test on.

    Raises:
        SystemExit: the data is unknown, or not there.
    """
    name, *folder = args.data
    if name == "synthetic" and not folder:
        # Seeds far apart, and not the run's own: every seed sees the same faces.
        numbers = (args.faces, max(16, args.faces // 4))
        parts = [_drawn(n, args.size, seed) for n, seed in zip(numbers, (1, 2), strict=True)]
    elif name == "faces68" and not folder:
        parts = [_parquet(f"faces68_{part}.parquet", args.size) for part in ("train", "test")]
    elif name == "list.txt" and len(folder) == 1:
        degrees = args.euler_unit == "degrees"
        files = [Path(folder[0], f"{part}_data", "list.txt") for part in ("train", "test")]
        parts = [read_list(f, args.points, args.size, degrees=degrees) for f in files]
    else:
        raise SystemExit(
            f"--data {' '.join(args.data)}: give synthetic, faces68 or list.txt FOLDER"
        )
    train, test = (
        (_first(p, n) for p, n in zip(parts, (64, 32), strict=True)) if args.smoke else parts
    )
    say(f"{' '.join(args.data)}: {len(train)} faces to train on, {len(test)} to test on")
    return train, test


def halves(faces: Faces, share: float, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """`faces` in two random parts: a share for the weights, the rest for the architecture."""
    order = torch.randperm(len(faces), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = round(share * len(faces))
    return Subset(faces, order[:cut]), Subset(faces, order[cut:])


def loader(
    faces: Dataset[Any], args: argparse.Namespace, *, shuffle: bool = False
) -> DataLoader[Any]:
    """Batches; in training shuffled by the seed, without a last one that is too small."""
    return DataLoader(
        faces,
        args.batch,
        shuffle=shuffle,
        drop_last=shuffle and len(faces) > args.batch,
        num_workers=args.workers,
        generator=torch.Generator().manual_seed(args.seed),
    )


def read_list(file: Path, points: int, size: int, *, degrees: bool = True) -> Faces:
    """Read a list.txt: a face a line, as on NNI's page; images are read when they are asked for.

    A line has 4 + 2 P + A fields between spaces: the image's path, x and y of every point as
    fractions of the image's side, A attributes of 0 or 1 (none in the 106-point data, whose lines
    have 216 fields), and pitch, yaw and roll. Paths count from the folder of the list, or from its
    folder imgs.

    Raises:
        SystemExit: there is no such file, or a line or an image is not as said.
    """
    if not file.is_file():
        raise SystemExit(f"there is no file {file}")
    paths: list[Path] = []
    rows: list[list[float]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not (fields := line.split()):
            continue
        extra = len(fields) - (4 + 2 * points)
        if extra < 0 or (rows and len(fields) - 1 != len(rows[0])):
            raise SystemExit(
                f"{file}:{number} has {len(fields)} fields; with {points} points there are "
                f"{4 + 2 * points}, or more with attributes, as many in every line (--points)"
            )
        places = (file.parent / fields[0], file.parent / "imgs" / fields[0])
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise SystemExit(f"{file}:{number}: there is neither {places[0]} nor {places[1]}")
        paths.append(found)
        rows.append([float(field) for field in fields[1:]])
    if not rows:
        raise SystemExit(f"{file} has no lines")
    table = torch.tensor(rows)
    euler = table[:, -3:].deg2rad() if degrees else table[:, -3:]
    attributes = table[:, 2 * points : -3]
    return Faces(
        paths, table[:, : 2 * points], euler, size, attributes if attributes.numel() else None
    )


def _parquet(name: str, size: int) -> Faces:
    rows = parquet_rows(name, ("image", "landmarks", "euler"))
    images = [_pixels(Image.open(io.BytesIO(row["image"])), size) for row in rows]
    euler = torch.tensor([row["euler"] for row in rows]).deg2rad()
    return Faces(torch.stack(images), torch.tensor([r["landmarks"] for r in rows]), euler, size)


def _drawn(n: int, size: int, seed: int) -> Faces:
    images, landmarks, euler = synthetic_faces(n, size, seed)
    return Faces(
        torch.from_numpy(images), torch.from_numpy(landmarks), torch.from_numpy(euler), size
    )


def _first(faces: Faces, n: int) -> Faces:
    attributes = None if faces.attributes is None else faces.attributes[:n]
    return Faces(faces.images[:n], faces.landmarks[:n], faces.euler[:n], faces.size, attributes)


def _pixels(image: Image.Image, size: int) -> Tensor:
    """Uint8 (3, size, size), in the order red, green, blue."""
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
