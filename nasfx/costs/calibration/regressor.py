"""Kernel latencies from nn-Meter's features: a sum of physical terms, corrected by a forest.

A kernel's time is first fitted as a sum of non-negative terms such as the multiply-accumulates and
the bytes that it moves, which extrapolates, then corrected by extra-trees on the logarithm of what
is left over. Channels are also counted in whole vectors, as the runtimes lay them out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

_VECTOR = 16  # float32 values in the widest vector of today's CPUs
_LANE = 4  # fewer channels than a multiple of this, and a runtime leaves its fast layout
_UNIT = 1e-6
_CLOCK = 1e-3  # milliseconds: below it the error is the clock's, and ratios mean nothing
_LEAST = 1e-5


def _padded(channels: np.ndarray) -> np.ndarray:
    return np.ceil(channels / _VECTOR) * _VECTOR


def _convolution(rows: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Terms and traits of rows (height, cin, cout, k, stride, ...); of a gconv the last: groups."""
    h, cin, cout, k, s = rows[:, :5].T
    groups = rows[:, 5] if kind == "nasfx-gconv" else np.ones(len(rows))
    out = np.ceil(h / s) ** 2
    depthwise = kind == "dwconv-bn-relu"
    inner = np.ones(len(rows)) if depthwise else cin / groups
    plain, weights = out * k * k * inner * cout, k * k * inner * _padded(cout)
    # The channels of an image are not padded.
    padded = np.where(inner < 8, inner, _padded(inner)) * groups * _padded(cout / groups)
    macs = out * k * k * padded
    read, written = h * h * _padded(cin), out * _padded(cout)
    ragged = cout % _LANE > 0
    ragged |= (cout / groups % _LANE > 0) | ((cin / groups) % _LANE > 0) & (cin / groups > 4)
    # What runtimes have separate algorithms for: pointwise, Winograd's of two sizes, the rest.
    still, moved = s == 1, read + written
    cases = [k == 1, (k == 3) & still, (k > 3) & still, (k > 1) & ~still]
    terms = [part * case for case in cases for part in (macs, weights, moved)]
    terms += [plain, macs * (cin < 8), plain * ragged * still, plain * ragged * ~still]
    terms += [moved * ragged, read, written, out * k * k, groups, groups * ragged]
    traits = [h, cin, cout, k, s, groups, out, plain, macs / plain, plain / (read + written)]
    traits += [weights, 8 * ragged, cout % _VECTOR, read + written]
    return np.stack(terms, 1), np.stack(traits, 1)


def _pooling(rows: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    h, cin, _, k, s = rows.T
    out = np.ceil(h / s) ** 2
    read, written = h * h * _padded(cin), out * _padded(cin)
    ragged = cin % _VECTOR > 0
    terms = [written * k * k, read, written]
    terms += [out * cin * ragged * part for part in (k * k, s * s, 1)]
    return np.stack(terms, 1), np.stack([h, cin, k, s, read, written, 8 * ragged], 1)


def _dense(rows: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    cin, cout = rows[:, 0], rows[:, 1]
    return np.stack([cin * cout, cin, cout], 1), np.stack([cin, cout, cin * cout], 1)


def _joined(rows: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a height, perhaps a number of tensors, and their channels."""
    h, channels = rows[:, 0], rows[:, 2 if kind == "concat" else 1 :]
    total, area = h * h * channels.sum(1), h * h
    padded = area * _padded(channels).sum(1)
    ragged = [area * (channels * (channels % size > 0)).sum(1) for size in (_LANE, _VECTOR)]
    terms = [total, padded, *ragged, area, channels.sum(1)]
    count = (channels > 0).sum(1)
    return np.stack(terms, 1), np.stack([h, channels.sum(1), total, *ragged, count], 1)


def _elements(rows: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    return rows, np.concatenate([rows, rows[:, :1] / np.maximum(rows[:, 1:], 1)], 1)


_FEATURES = {
    "conv-bn-relu": _convolution,
    "dwconv-bn-relu": _convolution,
    "nasfx-gconv": _convolution,
    "maxpool": _pooling,
    "avgpool": _pooling,
    "fc": _dense,
}


def _features(rows: Any, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The terms of the sum, of which the first is constant, and the logarithms of the traits."""
    rows = np.asarray(rows, np.float64)
    make = _FEATURES.get(kind, _elements if kind.startswith("nasfx-") else _joined)
    terms, traits = make(rows, kind)
    ones = np.ones((len(rows), 1))
    return np.concatenate([ones, terms * _UNIT], 1), np.log1p(np.maximum(traits, 0))


_ROW_WIDTHS = {
    "conv-bn-relu": 7,
    "dwconv-bn-relu": 7,
    "nasfx-gconv": 6,
    "fc": 4,
    "concat": 6,
    "maxpool": 5,
    "avgpool": 5,
    "add": 3,
    "addrelu": 3,
}


def widths(kind: str) -> tuple[int, int]:
    """The number of terms and of traits that a predictor of this kind works with."""
    terms, traits = _features(np.ones((1, _ROW_WIDTHS.get(kind, 2))), kind)
    return terms.shape[1], traits.shape[1]


class LatencyRegressor:
    """Predicts milliseconds from rows of nn-Meter's features of one type of kernel.

    Attributes:
        kind: The type of kernel, which says what the features are.
        weights: Milliseconds per term, none below 0; shape (terms,).
        forest: A fitted scikit-learn regressor of the logarithm of measured by summed time, with a
            microsecond added to either.
        factor: What the result is multiplied by.
    """

    def __init__(self, kind: str, weights: np.ndarray, forest: Any, factor: float = 1.0) -> None:
        self.kind = kind
        self.weights = weights
        self.forest = forest
        self.factor = factor

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803 - scikit-learn's own name
        """One latency in milliseconds per row of `X`; shape (rows,)."""
        terms, traits = _features(X, self.kind)
        correction = np.exp(self.forest.predict(traits))
        summed = (terms @ self.weights + _CLOCK) * correction - _CLOCK
        return self.factor * np.maximum(summed, _LEAST)

    def scaled(self, factor: float) -> "LatencyRegressor":
        """The same predictor with all latencies multiplied by `factor`."""
        return LatencyRegressor(self.kind, self.weights, self.forest, self.factor * factor)


def fit(
    kind: str, rows: Sequence[Sequence[float]], milliseconds: Sequence[float], *, seed: int = 0
) -> LatencyRegressor:
    """Fit the predictor of one type of kernel.

    The sum minimizes the relative error; the forest's target is the logarithm, so that a small
    kernel counts as much as a large one.

    Args:
        kind: The name of the predictor, such as "conv-bn-relu".
        rows: nn-Meter's features, one row per measured kernel.
        milliseconds: What each took; less than 10 nanoseconds counts as that. Errors count
            relative to the latency, or to a microsecond where it is less.
        seed: Of the forest.
    """
    from scipy.optimize import nnls
    from sklearn.ensemble import ExtraTreesRegressor

    y = np.maximum(np.asarray(milliseconds, np.float64), _LEAST)
    terms, traits = _features(rows, kind)
    # A term that is tiny here must not blow up: scaled to one, it is fitted as well as any other.
    scale = np.maximum(np.abs(terms).max(0), 1e-12)
    within = y + _CLOCK
    weights, _ = nnls(terms / scale / within[:, None], y / within, maxiter=1000)
    weights = weights / scale
    left = np.log((y + _CLOCK) / (terms @ weights + _CLOCK))
    forest = ExtraTreesRegressor(60, min_samples_leaf=3, random_state=seed, n_jobs=1)
    return LatencyRegressor(kind, weights, forest.fit(traits, left))
