"""The loss of PFLD (Guo et al., arXiv 1902.10859), and the error that landmarks are judged by."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasfx.spaces import pfld

EYES = {68: (36, 45), 98: (60, 72), 106: (35, 93)}
"""By number of points, the outer corners of the eyes, whose distance errors are divided by."""

_SIDES = (28, 32, 36)  # of the features that `pfld.auxiliary` takes


class Auxiliary(nn.Module):
    """PFLD's auxiliary net on features of any side: others are resized to 28."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.net = pfld.auxiliary(channels)

    def forward(self, feature: Tensor) -> Tensor:
        """(N, C, S, S) to angles in radians, (N, 3)."""
        feature = feature.to(next(self.parameters()).dtype)  # mixed precision gives half
        if feature.shape[-1] not in _SIDES:
            feature = F.interpolate(feature, size=(28, 28), mode="bilinear", align_corners=False)
        return self.net(feature)


class PFLDLoss(nn.Module):
    """PFLD's loss, with the auxiliary net that predicts the Euler angles.

    For sample n with points d (equation 2 of the paper)::

        loss = 1/N sum_n (sum_c w_n^c) (sum_k 1 - cos theta_n^k) |d_n - d*_n|^2

    theta^k is the difference between the predicted and the true pitch, yaw or roll. w^c is 1 /
    (the fraction of the training faces with attribute c) where face n has it; without attributes
    in the data that factor is left out. The norm is taken over all 2 P coordinates.

    Steps of the architecture take `plain`, the mean of |d_n - d*_n|^2, as NNI's example does: there
    the weights of the auxiliary net stand still.

    Args:
        channels: of the feature.
        fractions: of the training faces, by attribute, (A,); None where there are no attributes.
    """

    def __init__(self, channels: int = 16, fractions: Tensor | None = None) -> None:
        super().__init__()
        self.auxiliary = Auxiliary(channels)
        rare = None if fractions is None else torch.where(fractions > 0, 1 / fractions, 0.0)
        self.register_buffer("rare", rare)

    def forward(self, outputs: tuple[Tensor, Tensor], target: dict[str, Tensor]) -> Tensor:
        """The mean over the batch, 0-d.

        Args:
            outputs: of the backbone: landmarks (N, 2 P, 1, 1) and the feature (N, C, S, S).
            target: "landmarks" (N, 2 P), "euler" (N, 3) in radians and, if the data has any,
                "attributes" (N, A) of 0 and 1.
        """
        landmarks, feature = outputs
        weights = (1 - torch.cos(self.auxiliary(feature) - target["euler"])).sum(1)
        if self.rare is not None:
            weights = weights * (target["attributes"] @ self.rare).clamp(min=1)
        return (weights * squared_distance(landmarks, target)).mean()

    def plain(self, outputs: tuple[Tensor, Tensor], target: dict[str, Tensor]) -> Tensor:
        """The unweighted mean, 0-d."""
        return squared_distance(outputs[0], target).mean()


def squared_distance(landmarks: Tensor, target: dict[str, Tensor]) -> Tensor:
    """Per sample, the sum over all coordinates of the squared differences, (N,)."""
    truth = target["landmarks"]
    return ((landmarks.flatten(1).to(truth.dtype) - truth) ** 2).sum(1)


def nme(landmarks: Tensor, truth: Tensor, eyes: tuple[int, int]) -> Tensor:
    """The normalised mean error of each sample, (N,).

    The mean distance of a point from its true place, divided by the distance of the outer corners
    of the eyes.

    Args:
        landmarks: (N, 2 P) or (N, 2 P, 1, 1), as x0, y0, x1, y1 ...
        truth: (N, 2 P).
        eyes: the numbers of the two points of the eyes, from 0.
    """
    found, true = (points.flatten(1).unflatten(1, (-1, 2)) for points in (landmarks, truth))
    apart = (true[:, eyes[0]] - true[:, eyes[1]]).norm(dim=1)
    return (found.to(true.dtype) - true).norm(dim=2).mean(1) / apart


def eyes_of(points: int, given: Any = None) -> tuple[int, int]:
    """The corners of the eyes among so many points.

    Raises:
        SystemExit: the number of points is unknown, and they are not given.
    """
    if given:
        return tuple(given)
    if points not in EYES:
        raise SystemExit(f"with {points} points give --eyes A B, the outer corners, from 0")
    return EYES[points]
