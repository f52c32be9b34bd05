"""Reading nn-Meter's pickled predictors without running what is in them.

A pickle can call anything. Here it can only make numpy arrays and plain stand-ins for the tree and
forest classes, from which real scikit-learn forests are then built, and for the class of nasfx's
own calibrated predictors, which hold such a forest. That is also what reads the vendor's own files:
they were written by scikit-learn 0.23.1, whose pickles today's versions refuse.
"""

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nasfx.errors import ProfileError

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
    """What a pickled scikit-learn object becomes: its arguments and its state, as plain data."""

    args: tuple[Any, ...] = ()
    state: Mapping[str, Any] = {}  # never changed, only replaced

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"the state of {type(self).__name__} is not a dictionary")
        self.state = state


def _encode(text: str, encoding: str) -> bytes:
    # Protocol 2 spells bytes as _codecs.encode(text, "latin1"); no other codec is needed.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the codec {encoding!r} is refused")
    return text.encode("latin1")


def _numpy_names() -> dict[tuple[str, str], Callable[..., Any]]:
    # Taken from numpy's own reductions: the modules they live in have been renamed.
    functions: dict[str, Any] = {
        "_reconstruct": np.zeros(0).__reduce__()[0],
        "scalar": np.float64(0).__reduce__()[0],
        "_frombuffer": np.zeros(1).__reduce_ex__(5)[0],
    }
    homes = {"_reconstruct": "multiarray", "scalar": "multiarray", "_frombuffer": "numeric"}
    names: dict[tuple[str, str], Callable[..., Any]] = {
        (f"numpy.{core}.{home}", name): functions[name]
        for name, home in homes.items()
        for core in ("core", "_core")
    }
    names["numpy", "ndarray"] = np.ndarray
    names["numpy", "dtype"] = np.dtype
    names["_codecs", "encode"] = _encode
    return names


class _Unpickler(pickle.Unpickler):
    """An unpickler whose whole world is its allow list."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.allowed = _numpy_names()
        for module, names in (*_SKLEARN.items(), (_CALIBRATED[0], _CALIBRATED[1:])):
            for name in names:
                # A class of this file's own: a pickle can set attributes on a class that it names.
                self.allowed[module, name] = type(name, (_StandIn,), {})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise ProfileError(
                f"its pickle asks for {module}.{name}, which is not one of the scikit-learn tree, "
                "forest or numpy names, nor of nasfx's own, that a predictor needs. Nothing of it "
                "was run"
            )
        return self.allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("persistent ids are refused")


def _build_tree(part: _StandIn) -> Any:
    from sklearn.tree._tree import Tree

    n_features, n_classes, n_outputs = part.args
    tree: Any = Tree(int(n_features), np.asarray(n_classes, dtype=np.intp), int(n_outputs))
    old, values = part.state["nodes"], np.asarray(part.state["values"], dtype=np.float64)
    nodes: Any = np.zeros(len(old), dtype=tree.__getstate__()["nodes"].dtype)
    for name in old.dtype.names:
        nodes[name] = old[name]  # "missing_go_to_left", which old nodes lack, stays 0
    # scikit-learn follows these indices in C, unchecked: a damaged file would read foreign memory.
    inner = nodes["left_child"] != -1
    here = np.arange(len(nodes))[inner]
    left, right = nodes["left_child"][inner], nodes["right_child"][inner]
    feature = nodes["feature"][inner]
    sound = (
        len(nodes) == part.state["node_count"] > 0
        and values.shape == (len(nodes), 1, 1)
        and bool(np.all((left > here) & (left < len(nodes))))
        and bool(np.all((right > here) & (right < len(nodes))))
        and bool(np.all((feature >= 0) & (feature < int(n_features))))
    )
    if not sound:
        raise pickle.UnpicklingError("a tree's nodes do not form a tree of one output")
    tree.__setstate__({**part.state, "nodes": nodes, "values": values})
    return tree


def _build_estimator(part: _StandIn) -> Any:
    import sklearn.ensemble
    import sklearn.tree

    name = type(part).__name__
    estimator: Any = getattr(sklearn.ensemble if name in _FORESTS else sklearn.tree, name)()
    # Only what a prediction reads is taken over: the parameters of the fit have been renamed since,
    # and the vendor's ask for up to 32 threads, which leave the order of the sum to chance.
    state = part.state
    for key, spellings in _FITTED.items():
        setattr(estimator, key, int(next(state[s] for s in spellings if s in state)))
    if name in _TREES:
        estimator.tree_ = _build_tree(state["tree_"])
        # scikit-learn hands a tree the rows of its forest without counting their columns again.
        if estimator.tree_.n_features != estimator.n_features_in_:
            raise pickle.UnpicklingError("a tree and its nodes differ in their number of features")
        return estimator
    estimator.estimator_ = getattr(sklearn.tree, _TREES[_FORESTS.index(name)])()
    if not {type(tree).__name__ for tree in state["estimators_"]} <= set(_TREES):
        raise pickle.UnpicklingError("a forest holds something other than trees")
    estimator.estimators_ = [_build_estimator(tree) for tree in state["estimators_"]]
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
    weights = np.asarray(weights, dtype=np.float64)
    made: Any = _build_estimator(forest)
    if weights.ndim != 1 or (len(weights), made.n_features_in_) != widths(kind):
        raise pickle.UnpicklingError("a calibrated predictor has too many or too few weights")
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
        with open(path, "rb") as file:
            part = _Unpickler(file).load()
        if isinstance(part, _StandIn) and type(part).__name__ == _CALIBRATED[1]:
            return _build_calibrated(part)
        if type(part).__name__ not in (*_FORESTS, *_TREES) or not isinstance(part, _StandIn):
            raise pickle.UnpicklingError(f"it holds a {type(part).__name__}, not a regressor")
        return _build_estimator(part)
    except ProfileError as error:
        raise ProfileError(f"The predictor {path} is refused: {error}.") from error
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
        values = [float(value) for value in predictor.predict([list(row) for row in rows])]
    except ValueError as error:
        raise ProfileError(f"The predictor {path} does not take its features: {error}") from error
    for row, value in zip(rows, values, strict=True):
        if not math.isfinite(value) or value < 0:
            raise ProfileError(
                f"The predictor {path} predicts {value} ms for the features {list(row)}: it is "
                "damaged, or was fitted on something other than latencies in milliseconds."
            )
    return values
