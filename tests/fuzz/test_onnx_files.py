"""ONNX files: read without their external weights and split into kernels, or refused."""

import faulthandler
import multiprocessing
import os
import pickle
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import strategies as st
from onnx import TensorProto, helper

import nasfx
from nasfx.costs import nnmeter, onnx_graph
from nasfx.costs.onnx_graph import read_onnx
from nasfx.costs.runtimes import onnxruntime_session
from nasfx.errors import NasfxError, ProfileError
from tests.fuzz.harness import counts, damaged, explore, guarded, loaded

ensemble = pytest.importorskip("sklearn.ensemble", reason="scikit-learn is not installed")
pytestmark = pytest.mark.skipif(find_spec("nn_meter") is None, reason="nn-meter is not installed")

_SIZES = st.integers(-2, 9) | st.sampled_from([2**31, 2**62, 2**63 - 1, -(2**63)])


def _model(
    nodes: list[Any],
    shape: list[Any] | None = None,
    initializers: tuple[Any, ...] = (),
    functions: tuple[Any, ...] = (),
) -> Any:
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape or [1, 3, 8, 8])
    gives = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [given], [gives], list(initializers))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions))


def _weight(name: str, *shape: int) -> Any:
    return onnx.numpy_helper.from_array(np.ones(shape, np.float32), name)


def _valid() -> Any:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "c", kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "r"),
        helper.make_node("Slice", ["b", "s", "e", "axes"], ["d"], "s0"),
        helper.make_node("ReduceMean", ["d", "axes"], ["m"], "g", keepdims=0),
        helper.make_node("Gemm", ["m", "f"], ["y"], "fc"),
    ]
    ints = {"s": [0, 0], "e": [8, 8], "axes": [2, 3]}
    lists = [onnx.numpy_helper.from_array(np.array(v), n) for n, v in ints.items()]
    return _model(nodes, None, (_weight("w", 4, 3, 3, 3), _weight("f", 4, 5), *lists))


_VALID = _valid().SerializeToString()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a device's predictors in it."""
    made = tmp_path_factory.mktemp("onnx")
    x = np.random.default_rng(0).random((20, 7))
    for name, width in {"conv-bn-relu": 7, "fc": 4, "relu": 2, "global-avgpool": 2}.items():
        forest = ensemble.RandomForestRegressor(2, random_state=0).fit(x[:, :width], x[:, 0])
        (made / f"{name}.pkl").write_bytes(pickle.dumps(forest))
    (made / "fusion_rules.json").write_text('{"BF_conv_relu": {"obey": true}}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(made))
        _price(made, _write(made, _VALID))  # imports all that is needed
    return made


def _write(folder: Path, data: bytes) -> Path:
    path = folder / "net.onnx"
    path.write_bytes(data)
    return path


class _Worker:
    """As `inferred_apart`, in one process for many models: another is forked where it dies."""

    connection: Any = None

    def __call__(self, model: Any) -> Any:
        if self.connection is None:
            self._start()
        try:
            self.connection.send_bytes(model.SerializeToString())
            answer = self.connection.recv_bytes()
        except (EOFError, OSError) as error:
            self.stop()
            raise ProfileError("the process ended") from error
        if not answer:
            raise ProfileError("the process raised")
        return onnx.load_model_from_string(answer)

    def _start(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.child = os.fork()
        if self.child:
            theirs.close()
            return
        self.connection.close()
        faulthandler.disable()  # crashes are expected
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            while True:
                model = onnx.load_model_from_string(theirs.recv_bytes())
                try:
                    answer = onnx.shape_inference.infer_shapes(model).SerializeToString()
                except Exception:
                    answer = b""
                theirs.send_bytes(answer)
        finally:
            os._exit(0)

    def stop(self) -> None:
        if self.connection is not None:
            self.connection.close()
            os.waitpid(self.child, 0)
            self.connection = None


@pytest.fixture(autouse=True)
def worker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Worker]:
    """What infers shapes; in the tests of many inputs it takes the place of `inferred_apart`."""
    made = _Worker()
    if "count" in request.fixturenames:
        monkeypatch.setattr(onnx_graph, "inferred_apart", made)
    yield made
    made.stop()


def _price(folder: Path, path: Path) -> list[nnmeter.Kernel]:
    model = read_onnx(path)
    for i, node in enumerate(model.graph.node):
        node.name = f"n{i}"
    return nnmeter.price(model, {"n0": 5}, folder)


def _check(folder: Path, data: bytes) -> bool:
    path = _write(folder, data)
    kernels = loaded(folder, lambda: _price(folder, path))
    if kernels is None:
        return False
    names = sorted(name for kernel in kernels for name in kernel.nodes)
    assert names == sorted(f"n{i}" for i in range(len(read_onnx(path).graph.node)))
    assert all(k.milliseconds is None or 0 <= k.milliseconds < np.inf for k in kernels)
    return True


@counts
def test_damaged_files(folder: Path, count: int) -> None:
    rng = random.Random(0)
    pieces = (b"Loop", b"If", b"Split", b"Reshape", b"../x", b"Concat", _VALID)
    assert _check(folder, _VALID)
    taken = sum(_check(folder, damaged(rng, _VALID, pieces)) for _ in range(count))
    assert 0 < taken < count


@counts
def test_graphs_of_any_nodes(folder: Path, count: int) -> None:
    names = st.sampled_from(["x", "y", "a", "b", "w", "i", ""])
    kinds = ["Conv", "Relu", "Add", "MaxPool", "Gemm", "MatMul", "Reshape", "Concat", "Slice",
             "ReduceMean", "Split", "Transpose", "GlobalAveragePool", "../fc", "ConstantOfShape",
             "Expand", "Unsqueeze", "Resize", "Tile", "Pad", "Flatten",
             "ConvTranspose"]  # fmt: skip
    values = _SIZES | st.lists(_SIZES, min_size=1, max_size=5) | st.floats(width=32)
    options = ["group", "axis", "axes", "strides", "kernel_shape", "pads", "num_outputs"]
    nodes = st.builds(
        lambda kind, ins, outs, options: helper.make_node(kind, ins, outs, **options),
        st.sampled_from(kinds),
        st.lists(names, max_size=3),
        st.lists(names, min_size=1, max_size=2),
        st.dictionaries(st.sampled_from(options), values, max_size=3),
    )
    shapes = st.lists(_SIZES, max_size=5) | st.just([1, 3, 8, 8])

    def check(value: tuple[Any, Any, Any]) -> None:
        made, shape, ints = value
        numbers = helper.make_tensor("i", TensorProto.INT64, [len(ints)], ints)
        model = _model(made, shape, (_weight("w", 4, 3, 3, 3), numbers))
        _check(folder, model.SerializeToString())

    ints = st.lists(_SIZES, max_size=5)
    explore(count, st.tuples(st.lists(nodes, min_size=1, max_size=6), shapes, ints), check)


@counts
def test_profile_of_damaged_files(
    folder: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    rng = random.Random(5)
    for _ in range(count):
        path = _write(folder, damaged(rng, _VALID, (_VALID,)))
        loaded(folder, lambda path=path: nasfx.profile(path, folder, minimum_coverage=0))


def test_inputs_too_large_to_make_are_refused(folder: Path) -> None:
    relu = [helper.make_node("Relu", ["x"], ["y"])]
    path = _write(folder, _model(relu, [1, 10**6, 10**6, 10**3]).SerializeToString())
    with pytest.raises(ProfileError, match="elements"):
        nasfx.onnxruntime_milliseconds(path)


def _outside(where: str) -> Any:
    tensor = TensorProto(name="axes", data_type=TensorProto.INT64, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=where)
    return _model(
        [helper.make_node("ReduceMean", ["x", "axes"], ["y"], "m", keepdims=0)], None, (tensor,)
    )


@pytest.mark.parametrize("where", ["../secret", "/etc/passwd", "secret", "/dev/zero"])
def test_external_data_is_not_read(
    where: str, folder: Path, worker: _Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = folder.parent / "elsewhere"
    outside.mkdir(exist_ok=True)
    (outside / "secret").write_bytes(np.array([2, 3]).tobytes())
    monkeypatch.chdir(outside)  # onnx looks for it beside the working directory
    path = _write(folder, _outside(where).SerializeToString())
    read_onnx(path)  # in a process of its own, which the guard takes for an attempt
    monkeypatch.setattr(onnx_graph, "inferred_apart", worker)
    with guarded(folder):
        kernels = _price(folder, path)
    assert kernels[0].type == "reducemean"  # whose axes are not known


@pytest.mark.parametrize("where", ["../secret", "/etc/passwd"])
def test_weights_are_read_from_the_files_folder_alone(where: str, folder: Path) -> None:
    (folder.parent / "secret").write_bytes(bytes(16))
    path = _write(folder, _outside(where).SerializeToString())
    for read in (lambda: read_onnx(path, weights=True), lambda: onnxruntime_session(path)):
        with pytest.raises(ProfileError):
            read()
    (folder / "own").write_bytes(np.array([2, 3]).tobytes())
    model = read_onnx(_write(folder, _outside("own").SerializeToString()), weights=True)
    assert onnx.numpy_helper.to_array(model.graph.initializer[0]).tolist() == [2, 3]


def test_weights_behind_a_link_are_not_read(folder: Path) -> None:
    link = folder / "link"
    os.symlink("/etc/passwd", link)
    path = _write(folder, _outside("link").SerializeToString())
    with pytest.raises(NasfxError):
        read_onnx(path, weights=True)
    link.unlink()


def _aborting() -> Any:
    """onnx 1.23 aborts on a slice of what has a negative size."""
    model = _valid()
    model.graph.node[0].attribute[0].ints[0] = 112
    return model


def _functions(count: int, calls: int) -> Any:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    functions = [
        helper.make_function(
            "own", f"F{i}", ["x"], ["y"],
            [helper.make_node(f"F{(i + 1) % count}", ["x"], [f"t{j}"], domain="own")
             for j in range(calls)] + [helper.make_node("Relu", ["t0"], ["y"])],
            opsets,
        )
        for i in range(count)
    ]  # fmt: skip
    node = helper.make_node("F0", ["x"], ["y"], domain="own")
    return _model([node], functions=tuple(functions))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (_functions(30, 2), "functions of its own"),
        (_functions(1, 1), "functions of its own"),
        (_model([helper.make_node("Split", ["x"], ["y"], num_outputs=2**30)]), "splits into"),
        (_model([helper.make_node("Relu", ["b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]),
         "which a later node gives"),
        (_model([helper.make_node("Relu", [name], ["y"]) for name in "xy"]),
         "two nodes give one value"),
        (_model([helper.make_node("Relu", ["x"], ["y"])], [2**62] * 40), "cannot split"),
        (_model([]), "without nodes"),
        (_aborting(), "Assertion|SIGABRT"),
    ],
    ids=["exponential", "recursive", "split", "cycle", "itself", "overflow", "empty", "abort"],
)  # fmt: skip
def test_files_that_ask_for_more(model: Any, words: str, folder: Path) -> None:
    path = _write(folder, model.SerializeToString())
    with pytest.raises(ProfileError, match=words):
        _price(folder, path)
