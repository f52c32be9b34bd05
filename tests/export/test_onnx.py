import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nasfx
from nasfx import InputChoice, LayerChoice
from nasfx.costs.metadata import origin_entries
from nasfx.costs.onnx_graph import simplified
from nasfx.costs.runtimes import onnxruntime_milliseconds, onnxruntime_session, run_onnxruntime
from nasfx.errors import ExportError, ProfileError
from nasfx.export.checking import mismatch
from nasfx.export.onnx import export_onnx
from nasfx.export.provenance import recorded, restore


class Cnn(nn.Module):
    """Two convolutions with batch norms that have seen data, in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 5)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            self(3 + 2 * torch.randn(4, 3, 10, 10, generator=generator))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(self.stem(image)).mean((2, 3)))


class Function(nn.Module):
    """A module around a function of the module and its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def run(path: Path, *inputs: Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime_session(path)
    names = [node.name for node in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return run_onnxruntime(session, feed)


def evaluated(module: nn.Module, *inputs: Tensor) -> Any:
    training = module.training
    with torch.no_grad():
        result = module.eval()(*inputs)
    module.train(training)
    return result


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_file_computes_the_eval_behaviour(tmp_path: Path, x: Tensor) -> None:
    net = Cnn()
    path = export_onnx(net, tmp_path / "net.onnx", x)
    assert path == tmp_path / "net.onnx"
    got = run(path, x)
    assert list(got) == ["output"]
    np.testing.assert_allclose(got["output"], evaluated(net, x).numpy(), rtol=1e-4, atol=1e-5)
    model = onnx.load(path)
    assert [node.name for node in model.graph.input] == ["image"]
    assert [opset.version for opset in model.opset_import] == [18]
    # Batch norm is folded, and neither constants nor paths of this machine are left.
    assert not {"Constant", "Identity", "BatchNormalization"} & set(operators(path))
    assert b".py" not in path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_module_is_left_as_it_is(tmp_path: Path, x: Tensor) -> None:
    net = Cnn()
    net.body.eval()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    given, rng = x.clone(), torch.get_rng_state()
    export_onnx(net, tmp_path / "net.onnx", x)
    with pytest.raises(ExportError):
        export_onnx(net, tmp_path / "net.onnx", x[:, :1])
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), rng)


def test_graph_module(tmp_path: Path, x: Tensor) -> None:
    net = Cnn()
    traced = torch.fx.symbolic_trace(net)
    path = export_onnx(traced, tmp_path / "net.onnx", x)
    np.testing.assert_allclose(
        run(path, x)["output"], evaluated(net, x).numpy(), rtol=1e-4, atol=1e-5
    )
    assert [node.name for node in onnx.load(path).graph.input] == ["image"]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda self, x: (self.conv(x), x + 1), ["output_0", "output_1"]),
        (lambda self, x: [self.conv(x)], ["output"]),
        (lambda self, x: (self.conv(x), None, x), ["output_0", "output_2"]),
        (lambda self, x: {"feat": self.conv(x), "more": (x, x)}, ["feat", "more_0", "more_1"]),
        (lambda self, x: {"only": x * 2}, ["only"]),
        (lambda self, x: (x, self.conv.weight), ["output_0", "output_1"]),
        # Names that inputs, parameters and inner values of the graph have already.
        (
            lambda self, x: {"x": self.conv(x), "conv.weight": x + 1, "conv2d": x * 2},
            ["x_1", "conv.weight", "conv2d"],
        ),
    ],
    ids=["tuple", "list-of-one", "none", "nested", "dict-of-one", "unchanged", "clashes"],
)
def test_outputs(tmp_path: Path, x: Tensor, function: Any, names: list[str]) -> None:
    net = Function(function)
    got = run(export_onnx(net, tmp_path / "net.onnx", x), x)
    assert list(got) == names
    wanted = [v for v in torch.utils._pytree.tree_leaves(evaluated(net, x)) if v is not None]
    for value, want in zip(got.values(), wanted, strict=True):
        np.testing.assert_allclose(value, want.detach().numpy(), rtol=1e-4, atol=1e-5)


class Two(nn.Module):
    def forward(self, left: Tensor, index: Tensor) -> Tensor:
        return left[:, :2] - 3 * index.unsqueeze(1)


def test_two_inputs_of_two_dtypes(tmp_path: Path) -> None:
    left, index = torch.randn(4, 3), torch.arange(4)
    path = export_onnx(Two(), tmp_path / "net.onnx", (left, index), dynamic_batch=True)
    assert [node.name for node in onnx.load(path).graph.input] == ["left", "index"]
    for size in (1, 4):
        got = run(path, left[:size], index[:size])["output"]
        np.testing.assert_allclose(got, Two()(left[:size], index[:size]).numpy(), rtol=1e-6)


class Variadic(nn.Module):
    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, 1)


def test_variadic_forward(tmp_path: Path, x: Tensor) -> None:
    path = export_onnx(Variadic(), tmp_path / "net.onnx", (x, 2 * x), dynamic_batch=True)
    assert [node.name for node in onnx.load(path).graph.input] == ["parts_0", "parts_1"]


@pytest.mark.parametrize("batch", [1, 2])
def test_dynamic_batch(tmp_path: Path, x: Tensor, batch: int) -> None:
    net = Cnn()
    path = export_onnx(net, tmp_path / "net.onnx", x[:batch], dynamic_batch=True)
    for size in (1, 2, 7):
        given = x[:1].repeat(size, 1, 1, 1) * torch.arange(1.0, size + 1).view(-1, 1, 1, 1)
        np.testing.assert_allclose(
            run(path, given)["output"], evaluated(net, given).numpy(), rtol=1e-4, atol=1e-5
        )


def test_dynamic_batch_from_an_example_of_one(tmp_path: Path, x: Tensor) -> None:
    # An expanded token: exported at batch 1, torch keeps the 1 (seen in 2.14.1).
    def token(self: Any, x: Tensor) -> Tensor:
        token = self.conv.bias.view(1, -1, 1, 1).expand(x.shape[0], -1, -1, -1)
        return torch.cat([token.flatten(1), self.conv(x).flatten(1)], 1)

    net = Function(token)
    path = export_onnx(net, tmp_path / "net.onnx", x[:1], dynamic_batch=True)
    np.testing.assert_allclose(run(path, x)["output"], evaluated(net, x).numpy(), atol=1e-5)


def test_constants_are_folded_into_initializers() -> None:
    graph = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18]>
        net (float[2,3] x) => (float[2,3] y) {
            scale = Constant <value = float[3] {1.0, 2.0, 3.0}> ()
            half = Constant <value_float = 0.25> ()
            shift = Add (half, half)
            scaled = Mul (x, scale)
            y = Add (scaled, shift)
        }""")
    proto = simplified(graph)
    assert [node.op_type for node in proto.graph.node] == ["Mul", "Add"]
    session = onnxruntime_session(proto.SerializeToString())
    got = run_onnxruntime(session, {"x": np.ones((2, 3), np.float32)})["y"]
    np.testing.assert_array_equal(got, np.full((2, 3), [1.5, 2.5, 3.5]))


def test_without_dynamic_batch_the_size_is_fixed(tmp_path: Path, x: Tensor) -> None:
    path = export_onnx(Cnn(), tmp_path / "net.onnx", x)
    with pytest.raises(ProfileError, match="ONNX Runtime cannot run"):
        run(path, x[:1])


def test_a_module_that_fixes_its_batch(tmp_path: Path, x: Tensor) -> None:
    net = Function(lambda self, x: self.conv(x).reshape(2, 400))
    with pytest.raises(ExportError, match="fixes its batch size"):
        export_onnx(net, tmp_path / "net.onnx", x, dynamic_batch=True)
    assert not list(tmp_path.iterdir())


def test_dynamic_batch_needs_one_size(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"share their first.*float32\[4, 3\], int64\[1\]"):
        export_onnx(
            Two(), tmp_path / "n.onnx", (torch.randn(4, 3), torch.tensor([1])), dynamic_batch=True
        )


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (torch.zeros(2, 4, 10, 10), r"float32\[2, 4, 10, 10\].*3 channels, but got 4"),
        ((torch.zeros(2, 3, 10, 10),) * 2, r"\(float32.*, float32.*\): TypeError.*positional"),
        ((), r"tensor or a tuple of tensors; got \(\)"),
        ([torch.zeros(2, 3, 10, 10)], r"tensor or a tuple of tensors; got \(list\)"),
        ((torch.zeros(2, 3, 10, 10), 3), r"got \(float32\[2, 3, 10, 10\], int\)"),
        (torch.zeros(2, 3, 10, 10).double(), r"float64.*parameters are torch.float32"),
    ],
    ids=["shape", "count", "none", "list", "number", "dtype"],
)
def test_wrong_inputs(tmp_path: Path, inputs: Any, match: str) -> None:
    with pytest.raises(ExportError, match=match):
        export_onnx(Cnn(), tmp_path / "net.onnx", inputs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("function", "match"),
    [
        # What the exporter sees is not what torch runs: only the comparison can find it.
        (
            lambda self, x: x + 0.01 if torch.compiler.is_exporting() else x,
            r"largest difference is 0\.01, in output 'output'",
        ),
        (lambda self, x: x if x.sum() > 0 else -x, "torch cannot export Function"),
        (lambda self, x: (x, 3), "returns a int"),
        (lambda self, x: None, "returns no tensor"),
    ],
    ids=["mismatch", "untraceable", "int", "nothing"],
)
def test_failures_leave_no_file(tmp_path: Path, x: Tensor, function: Any, match: str) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(ExportError, match=match):
        export_onnx(Function(function), path, x)
    assert not list(tmp_path.iterdir())
    path.write_text("an older file")
    with pytest.raises(ExportError, match=match):
        export_onnx(Function(function), path, x)
    assert path.read_text() == "an older file"


def test_a_batch_dependent_difference_is_found(tmp_path: Path, x: Tensor) -> None:
    # Right at the example's batch of 2, wrong at others.
    def centred(self: nn.Module, x: Tensor) -> Tensor:
        return x - x.sum() / (x.shape[0] if torch.compiler.is_exporting() else 2)

    with pytest.raises(ExportError, match=r"float32\[1, 3, 10, 10\]"):
        export_onnx(Function(centred), tmp_path / "net.onnx", x, dynamic_batch=True)


def test_constant_examples_are_not_what_is_compared(tmp_path: Path) -> None:
    net = Function(lambda self, x: x * 2 if torch.compiler.is_exporting() else x)
    with pytest.raises(ExportError, match="largest difference"):
        export_onnx(net, tmp_path / "net.onnx", torch.zeros(1, 3, 4, 4))


def test_other_dtypes(tmp_path: Path, x: Tensor) -> None:
    product = Function(lambda self, x: x @ x)
    got = run(export_onnx(product.double(), tmp_path / "d.onnx", x.double()), x.double())
    np.testing.assert_allclose(got["output"], (x.double() @ x.double()).numpy(), rtol=1e-12)
    assert got["output"].dtype == np.float64
    with pytest.raises(ExportError, match=r"float\(\)"):
        export_onnx(Cnn().double(), tmp_path / "net.onnx", x.double())
    with pytest.raises(ExportError, match=r"bfloat16.*float\(\)"):
        export_onnx(Cnn().bfloat16(), tmp_path / "net.onnx", x.bfloat16())


def test_a_module_that_writes_into_its_input(tmp_path: Path, x: Tensor) -> None:
    given = x.clone()
    path = export_onnx(Function(lambda self, x: self.conv(x.add_(1))), tmp_path / "net.onnx", x)
    assert torch.equal(x, given)
    assert operators(path) == ["Add", "Conv"]


def origins(path: Path) -> list[tuple[str, str, str]]:
    """Operator, module and choice of every node."""
    found = [(node.op_type, origin_entries(node)) for node in onnx.load(path).graph.node]
    return [(op, e.get("nasfx.module", ""), e.get("nasfx.choice", "")) for op, e in found]


def test_nodes_say_which_module_they_come_from(tmp_path: Path, x: Tensor) -> None:
    path = export_onnx(Cnn(), tmp_path / "net.onnx", x)
    # Batch norms went into convolutions, whose modules remain; the mean is the net's own.
    assert origins(path) == [
        ("Conv", "stem.0", ""),
        ("Relu", "stem.2", ""),
        ("Conv", "body.0", ""),
        ("ReduceMean", "", ""),
        ("Gemm", "head", ""),
    ]
    # Nothing else is told.
    entries = {e.key for node in onnx.load(path).graph.node for e in node.metadata_props}
    assert entries == {"nasfx.module"}


class Doubled(nn.Module):
    """A candidate that computes by itself, and holds a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.act = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.act(x) * 2, (1, 1))


class Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        conv = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.first = LayerChoice({"conv": conv, "skip": nn.Identity()}, label="one")
        self.second = LayerChoice({"doubled": Doubled(), "skip": nn.Identity()}, label="two")
        self.inputs = InputChoice(3, n_chosen=2, label="inputs")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.first(x)
        return self.second(self.inputs([x, y, self.first(y)])).mean((2, 3))


ARCH = {"one": "conv", "two": "doubled", "act": "tanh", "inputs": (0, 2)}
CHOSEN = [
    ("Conv", "stem", ""),
    ("Conv", "first.conv.0", "one: conv"),
    ("Conv", "first.conv.0", "one: conv"),
    ("Add", "", "inputs: 0, 2"),
    ("Tanh", "second.doubled.act.tanh", "act: tanh"),
    ("Mul", "second.doubled", "two: doubled"),
    ("Pad", "second.doubled", "two: doubled"),
    ("ReduceMean", "", ""),
]


def again(subnet: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(subnet))


@pytest.mark.parametrize("twin", [lambda s: s, again, copy.deepcopy], ids=["it", "pickle", "copy"])
def test_nodes_of_a_subnet_say_which_choice_they_stand_in(
    tmp_path: Path, x: Tensor, twin: Any
) -> None:
    subnet = twin(nasfx.finalize(Chosen(), ARCH))
    names, calls = dict(subnet.named_modules()).keys(), subnet.code
    path = export_onnx(subnet, tmp_path / "net.onnx", x)
    assert origins(path) == CHOSEN
    np.testing.assert_allclose(run(path, x)["output"], evaluated(subnet, x), rtol=1e-4, atol=1e-5)
    assert dict(subnet.named_modules()).keys() == names
    assert subnet.code == calls
    assert not [word for word in (b".py", b"nasfx_call") if word in path.read_bytes()]


def test_a_subnet_inside_a_module(tmp_path: Path, x: Tensor) -> None:
    net = nn.Sequential(nn.Hardtanh(), nasfx.finalize(Chosen(), ARCH))
    found = origins(export_onnx(net, tmp_path / "net.onnx", x, dynamic_batch=True))
    assert found[0][1:] == ("0", "")
    assert found[1:] == [(op, f"1.{m}".rstrip("."), choice) for op, m, choice in CHOSEN]


def test_one_module_in_two_choices(tmp_path: Path, x: Tensor) -> None:
    shared = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    net = nn.Sequential(
        LayerChoice({"a": shared, "skip": nn.Identity()}, label="left"),
        LayerChoice({"b": shared, "skip": nn.Identity()}, label="right"),
    )
    subnet = nasfx.finalize(net, {"left": "a", "right": "b"})
    assert origins(export_onnx(subnet, tmp_path / "net.onnx", x)) == [
        ("Conv", "0.a.0", "left: a"),
        ("Relu", "0.a.1", "left: a"),
        ("Conv", "1.b.0", "right: b"),
        ("Relu", "1.b.1", "right: b"),
    ]


def named(*nodes: tuple[str, str]) -> onnx.ModelProto:
    """A chain of Relu nodes of these names and outputs; each says that it comes from its name."""
    made = []
    for before, (name, value) in zip([("", "x"), *nodes], nodes, strict=False):
        made.append(onnx.helper.make_node("Relu", [before[1]], [value], name=name))
        made[-1].metadata_props.add(key="nasfx.module", value=f"of {name} {value}")
        made[-1].metadata_props.add(key="other", value="a path")
    return onnx.helper.make_model(onnx.helper.make_graph(made, "chain", [], []))


def test_what_a_simplifier_merges_keeps_the_name_or_the_value() -> None:
    before = named(("a", "1"), ("b", "2"), ("twin", "3"), ("twin", "4"), ("", "5"))
    after = named(("a", "2"), ("new", "3"), ("twin", "8"), ("", "7"), ("else", "6"), ("", "5"))
    for node in after.graph.node:
        del node.metadata_props[:]
    model = ir.from_proto(after)
    restore(model, recorded(before))
    assert [dict(node.metadata_props) for node in model.graph] == [
        {"nasfx.module": "of a 1"},
        {"nasfx.module": "of twin 3"},
        {},  # One of two.
        {},
        {},
        {"nasfx.module": "of  5"},
    ]


def test_an_edited_subnet_has_modules_but_no_choices(tmp_path: Path, x: Tensor) -> None:
    subnet = nasfx.finalize(Chosen(), ARCH)
    output = subnet.graph.output_node()
    with subnet.graph.inserting_before(output):
        value = subnet.graph.call_function(torch.abs, output.args)
    output.args = (value,)
    subnet.recompile()
    found = origins(export_onnx(subnet, tmp_path / "net.onnx", x))
    assert found[1] == ("Conv", "first.conv.0", "")
    assert not any(choice for _, _, choice in found)


# In a process of its own: torch's log handler keeps the stream that it found when imported.
LOUD = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO)
from nasfx.export.onnx import export_onnx
class Loud(torch.nn.Module):
    def forward(self, x, y):
        return x + y, None
export_onnx(Loud(), sys.argv[1], (torch.randn(2, 3), torch.randn(2, 3)), dynamic_batch=True)
"""


def test_nothing_is_printed_or_warned(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOUD, str(tmp_path / "net.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "net.onnx").is_file()


def test_missing_library(tmp_path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxsim", None)
    with pytest.raises(ExportError, match=r"onnxsim cannot be imported.*pip install nasfx"):
        export_onnx(Cnn(), tmp_path / "net.onnx", x)


def test_missing_folder(tmp_path: Path, x: Tensor) -> None:
    with pytest.raises(ExportError, match="cannot be written"):
        export_onnx(Two(), tmp_path / "no" / "net.onnx", (torch.randn(2, 3), torch.arange(2)))


def test_importing_is_light() -> None:
    code = (
        "import sys, nasfx.export.onnx, nasfx.export.mnn, nasfx.costs.runtimes; "
        "print(sorted({'onnx', 'onnxsim', 'onnxruntime', 'onnx_ir', 'MNN'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_mismatch() -> None:
    want = np.array([1.0, -200.0, np.nan, np.inf])
    assert mismatch("o", want + 0.01, want, 1e-4) is None
    assert "0.03" in (mismatch("o", want + 0.03, want, 1e-4) or "")
    assert "shape (3,)" in (mismatch("o", want[:3], want, 1e-4) or "")
    assert "infinite" in (mismatch("o", np.array([1.0, -200.0, np.nan, -np.inf]), want, 1) or "")
    assert "infinite" in (mismatch("o", np.array([np.nan, -200.0, np.nan, np.inf]), want, 1) or "")
    assert mismatch("o", np.array([5]), np.array([5]), 0.5) is None
    assert mismatch("o", np.array([4]), np.array([5]), 0.5)


def test_milliseconds(tmp_path: Path, x: Tensor) -> None:
    small = export_onnx(Cnn(), tmp_path / "small.onnx", x[:1])
    large = export_onnx(Cnn(), tmp_path / "large.onnx", torch.randn(1, 3, 200, 200))
    times = [onnxruntime_milliseconds(path, repeats=9, warmup=2) for path in (small, large)]
    assert 0 < times[0] < times[1] < 1000
    with pytest.raises(ProfileError, match="repeats=0"):
        onnxruntime_milliseconds(small, repeats=0)
    with pytest.raises(ProfileError, match="no file"):
        onnxruntime_milliseconds(tmp_path / "none.onnx")
