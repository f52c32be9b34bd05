"""Synthetic faces: drawings of a head in a known pose, with exact landmarks and Euler angles.

They are no photographs and no stand-in for them: they let everything run where there is no data.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

POINTS = 68
"""In the order of the 68-point scheme: jaw, brows, nose, eyes (outer corners 36 and 45), mouth."""

LIMITS = np.radians([25.0, 45.0, 25.0])
"""The largest pitch, yaw and roll."""

_HEAD = np.array([1.0, 1.35, 1.0])  # the radii of the ellipsoid: right, down, towards the viewer
_LEFT_EYE, _RIGHT_EYE, _LIPS, _MOUTH = (slice(*s) for s in ((36, 42), (42, 48), (48, 60), (60, 68)))


def synthetic_faces(
    n: int, size: int = 112, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw n faces, each of another shape, pose and colour.

    Args:
        n: how many.
        size: the side of the images.
        seed: for everything random.

    Returns:
        Images uint8 (n, 3, size, size); landmarks float32 (n, 136), x0, y0, x1 ... as fractions of
        the side; pitch, yaw and roll float32 (n, 3), in radians.
    """
    rng = np.random.default_rng(seed)
    images = np.empty((n, 3, size, size), np.uint8)
    landmarks = np.empty((n, 2 * POINTS), np.float32)
    euler = rng.uniform(-LIMITS, LIMITS, (n, 3)).astype(np.float32)
    for i in range(n):
        turn = rotation(*euler[i])
        scale, shift = rng.uniform(0.26, 0.32), rng.uniform(0.46, 0.54, 2)
        points = scale * (head_points(rng) @ turn.T)[:, :2] + shift
        outline = scale * _outline(turn) + shift
        images[i] = _drawing(points * size, outline * size, size, rng)
        landmarks[i] = points.reshape(-1)
    return images, landmarks, euler


def rotation(pitch: float, yaw: float, roll: float) -> np.ndarray:
    """The matrix of the pose, (3, 3): about the axis to the right, then down, then the viewer's."""
    (cp, cy, cr), (sp, sy, sr) = np.cos([pitch, yaw, roll]), np.sin([pitch, yaw, roll])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def head_points(rng: np.random.Generator) -> np.ndarray:
    """The 68 points of a random head that looks at the viewer, (68, 3)."""
    jaw = np.pi * np.arange(17) / 16
    width, length = rng.uniform(0.85, 1.0), rng.uniform(1.1, 1.3)
    points = [_with_depth(-width * np.cos(jaw), length * np.sin(jaw), 0.6 * np.sin(jaw) - 0.25)]
    lift, apart, open_, smile = rng.uniform((0.0, 0.38, 0.05, -0.06), (0.12, 0.48, 0.12, 0.1))
    arch = np.linspace(0, 1, 5)
    for side in (-1, 1):
        x = side * (0.72 - 0.52 * arch) if side < 0 else 0.2 + 0.52 * arch
        points.append(_on_head(x, -0.5 - lift - 0.1 * np.sin(np.pi * arch)))
    bridge = np.linspace(0, 1, 4)
    points.append(_with_depth(0 * bridge, 0.42 * bridge - 0.28, 0.85 + 0.3 * bridge))
    wings = np.linspace(-1, 1, 5)
    points.append(_with_depth(0.2 * wings, 0.26 + 0.05 * (1 - wings**2), 1 - 0.15 * np.abs(wings)))
    ring = np.radians([180, 240, 300, 0, 60, 120])
    x, y = 0.19 * np.cos(ring), open_ * np.sin(ring) - 0.28
    points += [_on_head(x - apart, y), _on_head(x + apart, y)]
    mouth, gap = rng.uniform((0.26, 0.0), (0.4, 0.16))
    for n, shrink, thick in ((12, 1.0, 0.08), (8, 0.8, 0.0)):
        ring = np.pi + 2 * np.pi * np.arange(n) / n
        x, y = np.cos(ring), np.sin(ring)
        points.append(_on_head(mouth * shrink * x, 0.66 + (gap + thick) * y - smile * x**2))
    return np.concatenate(points)


def _with_depth(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.stack([x, y, z], 1)


def _on_head(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Points of the ellipsoid's front."""
    inside = 1 - (x / _HEAD[0]) ** 2 - (y / _HEAD[1]) ** 2
    return _with_depth(x, y, _HEAD[2] * np.sqrt(np.maximum(inside, 0)))


def _outline(turn: np.ndarray) -> np.ndarray:
    """What is seen of the turned ellipsoid from far away: the edge of an ellipse, (48, 2)."""
    axes, radii, _ = np.linalg.svd((turn * _HEAD)[:2], full_matrices=False)
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.stack([np.cos(t), np.sin(t)], 1) * radii @ axes.T


def _drawing(
    points: np.ndarray, outline: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """The face in pixels, uint8 (3, size, size)."""
    ground, skin = rng.uniform(0, 255, 3), rng.uniform((120, 90, 70), (240, 205, 185))
    image = Image.new("RGB", (size, size), _colour(ground))
    draw = ImageDraw.Draw(image)
    line = max(1, round(size / 56))
    dark = _colour(skin * 0.55)
    draw.polygon(_path(outline), fill=_colour(skin))
    draw.line(_path(points[:17]), fill=dark, width=line)
    for part in (points[17:22], points[22:27]):
        draw.line(_path(part), fill=_colour(skin * 0.25), width=2 * line)
    for part in (points[27:31], points[31:36]):
        draw.line(_path(part), fill=dark, width=line)
    for eye in (points[_LEFT_EYE], points[_RIGHT_EYE]):
        draw.polygon(_path(eye), fill=(245, 245, 245), outline=(30, 30, 30))
        x, y = eye.mean(0)
        r = size / 60
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(30, 20, 20))
    draw.polygon(_path(points[_LIPS]), fill=_colour(np.array([190, 70, 80]) * skin[0] / 240))
    draw.polygon(_path(points[_MOUTH]), fill=(60, 20, 20))
    light = np.linspace(*rng.uniform(0.75, 1.15, 2), size)  # from the left to the right
    pixels = np.asarray(image, np.float64) * light[None, :, None] + rng.normal(
        0, 6, (size, size, 3)
    )
    return pixels.clip(0, 255).astype(np.uint8).transpose(2, 0, 1)


def _path(points: np.ndarray) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in points]


def _colour(values: np.ndarray) -> tuple[int, int, int]:
    r, g, b = (int(v) for v in values)
    return r, g, b
