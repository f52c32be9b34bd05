"""Predictors and their folders: read to what predicts, or refused; nothing of them is run."""

import json
import pickle
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import strategies as st

from nasfx.costs import nnmeter
from nasfx.costs.calibration.regressor import fit
from nasfx.costs.predictors import predict, read_predictor
from nasfx.errors import ProfileError
from tests.fuzz.harness import Canary, counts, damaged, explore, loaded

ensemble = pytest.importorskip("sklearn.ensemble", reason="scikit-learn is not installed")

_ROWS = [[64.0, 10.0, 6e-4, 1e-3], [8.0, 8.0, 1e-4, 1e-3]]


def _forest() -> Any:
    x = np.random.default_rng(0).random((20, 4)) * 50
    return ensemble.RandomForestRegressor(3, max_depth=3, random_state=0).fit(x, x.sum(1))


_FOREST = _forest()
_FILES = [pickle.dumps(_FOREST, protocol) for protocol in (2, 3, 4, 5)]
_FILES.append(pickle.dumps(fit("fc", np.random.default_rng(1).random((30, 4)) * 99, range(30)), 4))
_PIECES = (
    b"cos\nsystem\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"R", b"b", b"\x81",
    b"(J\xff\xff\xff\x7ft",
    b"r\xff\xff\xff\xff", b"\x96\xff\xff\xff\xff\x0f\x00\x00\x00", b"X\x01\x00\x00\x00O",
)  # fmt: skip


def _check(folder: Path, data: bytes) -> bool:
    path = folder / "fc.pkl"
    path.write_bytes(data)
    values = loaded(folder, lambda: predict(path, _ROWS))
    assert values is None or (len(values) == 2 and all(0 <= v < np.inf for v in values))
    return values is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predictors")


@counts
def test_damaged_files(folder: Path, count: int) -> None:
    rng = random.Random(0)
    assert all(_check(folder, data) for data in _FILES)
    taken = sum(
        _check(folder, damaged(rng, rng.choice(_FILES), (*_PIECES, *_FILES))) for _ in range(count)
    )
    assert 0 < taken < count


def _state(tree: Any) -> dict[str, Any]:
    return tree.tree_.__getstate__()


class _Tree:
    """Pickles as scikit-learn's Tree, with any arguments and state."""

    def __init__(self, args: tuple[Any, ...], state: Any) -> None:
        self.args, self.state = args, state

    def __reduce__(self) -> tuple[Any, ...]:
        return type(_FOREST.estimators_[0].tree_), self.args, self.state


def _with_tree(args: tuple[Any, ...], state: Any, times: int = 1) -> bytes:
    """A forest, all of whose trees hold this."""
    trees = [pickle.loads(pickle.dumps(_FOREST.estimators_[0]))]
    trees[0].__dict__["tree_"] = _Tree(args, state)
    forest = pickle.loads(pickle.dumps(_FOREST))
    forest.estimators_ = trees * times
    return pickle.dumps(forest, 4)


@counts
def test_trees_of_any_nodes(folder: Path, count: int) -> None:
    good = _state(_FOREST.estimators_[0])
    size = len(good["nodes"])
    index = st.integers(-3, size + 2) | st.integers(-(2**63), 2**63 - 1)
    changes = st.lists(
        st.tuples(st.sampled_from(["left_child", "right_child", "feature"]),
                  st.integers(0, size - 1), index),
        max_size=4,
    )  # fmt: skip
    odd = st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=3)

    def check(value: tuple[Any, Any, Any, Any, Any]) -> None:
        made, features, outputs, classes, depth = value
        nodes = good["nodes"].copy()
        for name, at, to in made:
            nodes[name][at] = to
        state = good | {"nodes": nodes, "max_depth": depth}
        _check(folder, _with_tree((features, classes, outputs), state))

    ones = st.just(np.array([1]))
    explore(
        count,
        st.tuples(
            changes, st.just(4) | odd, st.just(1) | odd,
            ones | odd | st.integers(1, 10**9).map(lambda n: np.array([n])), st.just(3) | odd,
        ),
        check,
    )  # fmt: skip


def _dtype(code: str, state: tuple[Any, ...]) -> bytes:
    """An array of 8 bytes with a dtype of any state, as scikit-learn's nodes."""

    class Dtype:
        def __reduce__(self) -> tuple[Any, ...]:
            return np.dtype, (code, False, True), state

    class Array:
        def __reduce__(self) -> tuple[Any, ...]:
            function, args = np.zeros(0).__reduce__()[:2]
            return function, args, (1, (1,), Dtype(), False, bytes(8))

    good = _state(_FOREST.estimators_[0])
    return _with_tree((4, np.array([1]), 1), good | {"nodes": Array()})


_NDARRAY = b"(cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85U\x01OtR."


def _far() -> dict[str, Any]:
    return {"feature": (np.dtype("i8"), 10**6)}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (_dtype("V8", (3, "|", None, ("feature",), _far(), 8, 1, 0)), "damaged"),
        (_dtype("O", (3, "|", None, None, None, -1, -1, 63)), "'O', and no numbers"),
        (_dtype("f8", (3, "<", (np.dtype("f8"), (10**9,)), None, None, 8, 1, 0)), "damaged"),
        (_with_tree((4, np.array([1]), 10**9), _state(_FOREST.estimators_[0])), "several outputs"),
        (_with_tree((4, np.array([10**9]), 1), _state(_FOREST.estimators_[0])), "several outputs"),
        (_with_tree((4, np.array([1]), 1), _state(_FOREST.estimators_[0]), 20_000), "20000 trees"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n" + _NDARRAY, "not a regressor"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "not a regressor"),
        (b"\x80\x05\x96" + b"\xff" * 4 + b"\x0f\x00\x00\x00.", "damaged"),
        (b"\x80\x05\x8e" + b"\xff" * 4 + b"\x0f\x00\x00\x00.", "damaged"),
        (b"\x80\x04\x95" + b"\xff" * 4 + b"\x0f\x00\x00\x00.", "damaged"),
        (b"\x80\x04\x82\x01.", "damaged|refused"),
        (b"\x80\x04\x8f.", "not a regressor"),
        (b"", "damaged"),
    ],
    ids=["offsets", "objects", "subarray", "outputs", "classes", "trees", "ndarray", "memo",
         "bytearray8", "bytes8", "frame", "extension", "set", "empty"],
)  # fmt: skip
def test_files_that_ask_for_more(data: bytes, words: str, folder: Path) -> None:
    assert not _check(folder, data)
    with pytest.raises(ProfileError, match=words):
        read_predictor(folder / "fc.pkl")


def test_a_tree_that_is_named_often_is_built_once(folder: Path) -> None:
    nodes = 50_000
    good = _state(_FOREST.estimators_[0])
    many = np.zeros(nodes, dtype=good["nodes"].dtype)
    many["left_child"] = many["right_child"] = -1
    state = good | {"nodes": many, "node_count": nodes, "values": np.ones((nodes, 1, 1))}
    assert _check(folder, _with_tree((4, np.array([1]), 1), state, 5000))


def test_a_file_that_runs_code_is_not_run(folder: Path) -> None:
    canary = folder / "canary"
    for protocol in range(6):
        forest = _forest()
        forest.estimators_[0].__dict__["tree_"] = Canary(canary)
        evil = pickle.dumps(forest, protocol)
        assert not _check(folder, evil)
        assert not _check(folder, pickle.dumps(Canary(canary), protocol))
        assert not canary.exists()
    pickle.loads(evil)
    assert canary.exists()


# -- folders ---------------------------------------------------------------------------------------

_META = {"name": "mine", "version": 1.0, "kernel_predictors": ["fc"], "package_location": "/etc"}
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=9), s, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device's folder beside a file that is none of its own."""
    if find_spec("nn_meter") is None:
        pytest.skip("nn-meter is not installed")
    monkeypatch.setenv("HOME", str(folder))
    (folder / "secret.pkl").write_bytes(_FILES[0])
    made = folder / "device"
    made.mkdir(exist_ok=True)
    (made / "fc.pkl").write_bytes(_FILES[0])
    (made / "fusion_rules.json").write_text(json.dumps({"RT": {"obey": False}}))
    (made / "meta.yaml").write_text(yaml.safe_dump(_META))
    assert nnmeter.predictor_folder(made) == made  # and what nn-Meter imports is imported
    return made


@counts
def test_any_meta(device: Path, count: int) -> None:
    names = st.sampled_from(["fc", "../secret", "/etc/passwd", "..", ""]) | st.text() | _json
    meta = st.builds(lambda value: _META | {"kernel_predictors": value}, st.lists(names) | _json)

    def check(value: Any) -> None:
        (device / "meta.yaml").write_text(yaml.safe_dump(value, allow_unicode=True))
        found = loaded(device.parent, lambda: nnmeter.predictor_folder(device))
        assert found is None or set(value.get("kernel_predictors", [])) <= {"fc"}

    explore(count, meta | _json, check)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../fc", ".."])
def test_no_name_leaves_the_folder(name: str, device: Path) -> None:
    (device / "meta.yaml").write_text(yaml.safe_dump(_META | {"kernel_predictors": [name]}))
    with pytest.raises(ProfileError, match="no list of names"):
        nnmeter.predictor_folder(device)


@counts
def test_any_rules(device: Path, count: int) -> None:
    from onnx import TensorProto, helper

    names = ["RBC", "MON", "RT", "BF_conv_relu", "BF_relu_conv", "BF_", "BF_x_y_z"]
    rule = st.fixed_dictionaries({"obey": st.booleans() | st.none()}) | _json
    rules = st.dictionaries(st.sampled_from(names) | st.text(max_size=4), rule) | _json
    node = helper.make_node("Relu", ["x"], ["y"], "n0")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, 8, 8]) for n in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:])

    def check(value: Any) -> None:
        (device / "fusion_rules.json").write_text(json.dumps(value))
        model = helper.make_model(graph)
        loaded(device.parent, lambda: nnmeter.price(model, {}, device))

    explore(count, rules, check)
