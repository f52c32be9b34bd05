"""Reading nn-Meter's pickled predictors without running what is in them.

A pickle can call anything. Here it can only make plain stand-ins for numpy's arrays and the tree
and forest classes, from which real scikit-learn forests are then built, and for the class of
nasfx's own calibrated predictors, which hold such a forest. That is also what reads the vendor's
own files: they were written by scikit-learn 0.23.1, whose pickles today's versions refuse.
"""

import math
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from nasfx.errors import ProfileError
from nasfx.reading import PlainUnpickler, Refused, shown

_FORESTS = ("RandomForestRegressor", "ExtraTreesRegressor")
_TREES = ("DecisionTreeRegressor", "ExtraTreeRegressor")
# Both the modules of today and, for files older than scikit-learn 0.22, those of then.
_SKLEARN = {
    "sklearn.ensemble._forest": _FORESTS,
    "sklearn.ensemble.forest": _FORESTS,
    "sklearn.tree._classes": _TREES,
    "sklearn.tree.tree": _TREES,
    "sklearn.tree._tree": ("Tree",),
}
# The class of calibrated predictors, which is rebuilt from its data: its own code reads no pickle.
_CALIBRATED = ("nasfx.costs.calibration.regressor", "LatencyRegressor")
_NUMBERS = re.compile(r"[biuf][1248]")
_MOST_TREES = 10_000  # a file of a few bytes per tree could name one very often
# Attributes that a prediction needs, by the names that they have had.
_FITTED = {
    "n_features_in_": ("n_features_in_", "n_features_"),
    "n_outputs_": ("n_outputs_",),
}


class Predictor(Protocol):
    """Predicts milliseconds from rows of features, as a scikit-learn regressor does."""

    def predict(self, X: Any, /) -> Any:  # noqa: N803 - scikit-learn's own name
        """One prediction, in milliseconds, per row of `X`."""
        ...


class _StandIn:
    """What a pickled object becomes: its arguments and its state, as plain data."""

    args: tuple[Any, ...] = ()
    state: Any = MappingProxyType({})  # never changed, only replaced

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Dtype(_StandIn):
    """A dtype of numpy: its code, and as state (version, order, subarray, names, fields, size).

    numpy's own takes a state unchecked: one with false offsets reads foreign memory.
    """


class _Array(_StandIn):
    """An array of numpy, with the state (version, shape, dtype, is in Fortran order, bytes)."""


def _encode(text: str, encoding: str) -> bytes:
    # Protocol 2 spells bytes as _codecs.encode(text, "latin1"); no other codec is needed.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the codec {shown(encoding)} is refused")
    return text.encode("latin1")


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", data)
    return array


def _scalar(dtype: Any, data: Any) -> _Array:
    return _frombuffer(data, dtype, (), "C")


def _allowed() -> dict[tuple[str, str], Any]:
    """What a name in a predictor's pickle stands for; nothing of numpy's own."""
    names: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): type("ndarray", (), {}),
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
    }
    for core in ("core", "_core"):
        names[f"numpy.{core}.multiarray", "_reconstruct"] = _Array
        names[f"numpy.{core}.multiarray", "scalar"] = _scalar
        names[f"numpy.{core}.numeric", "_frombuffer"] = _frombuffer
    for module, found in (*_SKLEARN.items(), (_CALIBRATED[0], _CALIBRATED[1:])):
        for name in found:
            # A class of this file's own: a pickle can set attributes on a class that it names.
            names[module, name] = type(name, (_StandIn,), {})
    return names


def _dtype(part: Any) -> np.dtype[Any]:
    """The dtype of numbers, or of a record of such, that numpy itself has checked."""
    if not isinstance(part, _Dtype):
        raise pickle.UnpicklingError("an array has no dtype")
    state: tuple[Any, ...] = (*part.state, None, None, None, None, None, None)
    order, _, names, fields, size = state[1:6]
    if names:
        kinds = [_dtype(fields[name][0]) for name in names]
        offsets = [int(fields[name][1]) for name in names]
        return np.dtype(
            {"names": list(names), "formats": kinds, "offsets": offsets, "itemsize": int(size)}
        )
    code = str(part.args[0])
    if not _NUMBERS.fullmatch(code):
        raise pickle.UnpicklingError(f"an array holds {shown(code)}, and no numbers")
    return np.dtype((">" if order == ">" else "<") + code)


def _array(part: Any) -> np.ndarray:
    """The array that a stand-in describes, without the memory that it does not have."""
    if not isinstance(part, _Array):
        raise pickle.UnpicklingError(f"a {type(part).__name__} stands where an array should")
    _, shape, dtype, fortran, data = part.state
    if not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array holds objects")
    return np.frombuffer(data, _dtype(dtype)).reshape(shape, order="F" if fortran else "C")


def _whole(part: Any) -> int:
    return int(_array(part).item() if isinstance(part, _Array) else part)


def _build_tree(part: _StandIn) -> Any:
    from sklearn.tree._tree import Tree

    n_features, n_classes, n_outputs = part.args
    if _whole(n_outputs) != 1 or _array(n_classes).tolist() != [1]:
        raise pickle.UnpicklingError("a tree has several outputs or classes")
    tree: Any = Tree(_whole(n_features), np.ones(1, dtype=np.intp), 1)
    old, values = _array(part.state["nodes"]), _array(part.state["values"])
    if old.ndim != 1 or not old.dtype.names:
        raise pickle.UnpicklingError("a tree's nodes are no list of records")
    nodes: Any = np.zeros(len(old), dtype=tree.__getstate__()["nodes"].dtype)
    for name in old.dtype.names:
        nodes[name] = old[name]  # "missing_go_to_left", which old nodes lack, stays 0
    # scikit-learn follows these indices in C, unchecked: a damaged file would read foreign memory.
    inner = nodes["left_child"] != -1
    here = np.arange(len(nodes))[inner]
    left, right = nodes["left_child"][inner], nodes["right_child"][inner]
    feature = nodes["feature"][inner]
    count, depth = (_whole(part.state[key]) for key in ("node_count", "max_depth"))
    sound = (
        len(nodes) == count > 0
        and values.shape == (len(nodes), 1, 1)
        and bool(np.all((left > here) & (left < len(nodes))))
        and bool(np.all((right > here) & (right < len(nodes))))
        and bool(np.all((feature >= 0) & (feature < _whole(n_features))))
    )
    if not sound:
        raise pickle.UnpicklingError("a tree's nodes do not form a tree of one output")
    values = np.ascontiguousarray(values, dtype=np.float64)
    tree.__setstate__({"max_depth": depth, "node_count": count, "nodes": nodes, "values": values})
    return tree


def _build_estimator(part: _StandIn) -> Any:
    import sklearn.ensemble
    import sklearn.tree

    name = type(part).__name__
    if name not in (*_FORESTS, *_TREES):
        raise pickle.UnpicklingError(f"a {name} stands where a regressor should")
    estimator: Any = getattr(sklearn.ensemble if name in _FORESTS else sklearn.tree, name)()
    # Only what a prediction reads is taken over: the parameters of the fit have been renamed since,
    # and the vendor's ask for up to 32 threads, which leave the order of the sum to chance.
    state = part.state
    for key, spellings in _FITTED.items():
        setattr(estimator, key, _whole(next(state[s] for s in spellings if s in state)))
    if estimator.n_outputs_ != 1:
        raise pickle.UnpicklingError("a regressor has several outputs")
    if name in _TREES:
        estimator.tree_ = _build_tree(state["tree_"])
        # scikit-learn hands a tree the rows of its forest without counting their columns again.
        if estimator.tree_.n_features != estimator.n_features_in_:
            raise pickle.UnpicklingError("a tree and its nodes differ in their number of features")
        return estimator
    estimator.estimator_ = getattr(sklearn.tree, _TREES[_FORESTS.index(name)])()
    trees = state["estimators_"]
    if not 0 < len(trees) <= _MOST_TREES:
        raise pickle.UnpicklingError(f"a forest holds {len(trees)} trees, not 1 to {_MOST_TREES}")
    if not {type(tree).__name__ for tree in trees} <= set(_TREES):
        raise pickle.UnpicklingError("a forest holds something other than trees")
    # One that is named many times is built once, as in the file.
    built = {id(tree): _build_estimator(tree) for tree in {id(t): t for t in trees}.values()}
    estimator.estimators_ = [built[id(tree)] for tree in trees]
    if {tree.n_features_in_ for tree in estimator.estimators_} != {estimator.n_features_in_}:
        raise pickle.UnpicklingError("a forest and its trees differ in their number of features")
    return estimator


def _build_calibrated(part: _StandIn) -> Predictor:
    from nasfx.costs.calibration.regressor import LatencyRegressor, widths

    kind, weights, forest, factor = (
        part.state[name] for name in ("kind", "weights", "forest", "factor")
    )
    if not isinstance(kind, str) or not isinstance(forest, _StandIn):
        raise pickle.UnpicklingError("a calibrated predictor lacks its kind or its forest")
    weights = _array(weights).astype(np.float64)
    made: Any = _build_estimator(forest)
    if weights.ndim != 1 or (len(weights), made.n_features_in_) != widths(kind):
        raise pickle.UnpicklingError("a calibrated predictor has too many or too few weights")
    factor = _array(factor).item() if isinstance(factor, _Array) else factor
    return LatencyRegressor(kind, weights, made, float(factor))


def read_predictor(path: str | Path) -> Predictor:
    """Read one kernel's predictor, pickled by scikit-learn 0.23 or later, running nothing of it.

    Args:
        path: A `<kernel>.pkl`, as nn-Meter publishes and writes them: a random forest, extra-trees
            forest or single tree of scikit-learn that predicts milliseconds. Or one that
            `calibrate` has written.

    Returns:
        The regressor, as an estimator of the installed scikit-learn or as nasfx's own, on one
        thread. It predicts as it did; the parameters of its fit are not kept.

    Raises:
        ProfileError: If the file cannot be read, is damaged, or holds anything else.

    Example:
        >>> predictor = read_predictor("cortexA76cpu_tflite21/fc.pkl")  # doctest: +SKIP
        >>> predictor.predict([[64, 10, 6e-4, 1e-3]])  # doctest: +SKIP
    """
    try:
        part = PlainUnpickler(Path(path).read_bytes(), _allowed()).load()
        if isinstance(part, _StandIn) and type(part).__name__ == _CALIBRATED[1]:
            return _build_calibrated(part)
        if type(part).__name__ not in (*_FORESTS, *_TREES) or not isinstance(part, _StandIn):
            raise pickle.UnpicklingError(f"it holds a {type(part).__name__}, not a regressor")
        return _build_estimator(part)
    except ProfileError as error:
        raise ProfileError(f"The predictor {path} is refused: {error}.") from error
    except Refused as error:
        raise ProfileError(
            f"The predictor {path} is refused: {error}. What it needs are the scikit-learn tree, "
            "forest or numpy names, or nasfx's own, and plain data."
        ) from error
    except ImportError as error:
        raise ProfileError("Predictors need scikit-learn: pip install nasfx[latency]") from error
    except OSError as error:
        raise ProfileError(f"The predictor {path} cannot be read: {error}.") from error
    except Exception as error:  # a damaged pickle can raise anything at all
        raise ProfileError(
            f"The predictor {path} is damaged, or is not one of scikit-learn's: "
            f"{type(error).__name__}: {error}. Remove its folder to have it downloaded again."
        ) from error


def predict(path: str | Path, rows: Sequence[Sequence[float]]) -> list[float]:
    """The latencies in milliseconds that the predictor in the file `path` gives for `rows`.

    Raises:
        ProfileError: If it cannot be read (see `read_predictor`), does not take these features, or
            predicts something that is no latency: a negative or not finite number.
    """
    predictor = read_predictor(path)
    try:
        with np.errstate(all="ignore"):
            values = [float(value) for value in predictor.predict([list(row) for row in rows])]
    except (ArithmeticError, IndexError, ValueError) as error:
        raise ProfileError(f"The predictor {path} does not take its features: {error}") from error
    for row, value in zip(rows, values, strict=True):
        if not math.isfinite(value) or value < 0:
            raise ProfileError(
                f"The predictor {path} predicts {value} ms for the features {list(row)}: it is "
                "damaged, or was fitted on something other than latencies in milliseconds."
            )
    return values
