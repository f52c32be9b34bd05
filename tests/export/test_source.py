import copy
import importlib.util
import json
import operator
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

from nasfx.errors import ExportError
from nasfx.export import source
from nasfx.export.source import write_module
from nasfx.rewriting.graph import ModelGraph


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("written_subnet", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()


def run_apart(path: Path, x: Tensor) -> tuple[Tensor, list[str]]:
    """Output and keys of the written network, in a process where nasfx cannot be imported."""
    inputs, outputs = path.with_name("x.pt"), path.with_name("y.pt")
    torch.save(x, inputs)
    script = (
        "import sys, torch\n"
        # Sums are split among threads, so bits depend on how many there are.
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "sys.modules['nasfx'] = None\n"
        f"sys.path.insert(0, {str(path.parent)!r})\n"
        "from subnet import load\n"
        "model = load()\n"
        f"result = (model(torch.load({str(inputs)!r})), list(model.state_dict()))\n"
        f"torch.save(result, {str(outputs)!r})\n"
    )
    subprocess.run([sys.executable, "-I", "-B", "-c", script], check=True)
    return torch.load(outputs)


def written(model: nn.Module, folder: Path, *inputs: Any) -> tuple[fx.GraphModule, nn.Module, str]:
    """Trace, write and load; outputs must be equal to the last bit."""
    gm = model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
    path = write_module(gm, folder)
    loaded = load(path)
    torch.testing.assert_close(loaded(*inputs), gm(*inputs), rtol=0, atol=0, equal_nan=True)
    return gm, loaded, path.read_text()


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=5)


NETS = {
    "resnet18": (torchvision.models.resnet18, 64),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 64),
    "shufflenet_v2_x0_5": (torchvision.models.shufflenet_v2_x0_5, 64),
    "squeezenet1_1": (torchvision.models.squeezenet1_1, 64),
    "regnet_y_400mf": (torchvision.models.regnet_y_400mf, 64),
    "vit": (vit, 32),
}


SLOW = ("resnet18", "mobilenet_v3_small", "squeezenet1_1", "regnet_y_400mf")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NETS]
)
def test_torchvision_nets_load_without_nasfx_and_compute_the_same(
    name: str, tmp_path: Path
) -> None:
    build, size = NETS[name]
    torch.manual_seed(0)
    gm = fx.symbolic_trace(build().eval())
    path = write_module(gm, tmp_path / name)
    assert path == tmp_path / name / "subnet.py"
    assert {p.name for p in path.parent.iterdir()} == {"subnet.py", "weights.safetensors"}
    assert "nasfx." not in path.read_text()
    x = torch.randn(2, 3, size, size)
    output, keys = run_apart(path, x)
    assert torch.equal(output, gm(x))
    assert keys == list(gm.state_dict())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)) + 1
        return self.head(x.mean((2, 3)))


def test_the_text_reads_like_a_hand_written_module(tmp_path: Path) -> None:
    _, _, text = written(Small(), tmp_path / "net", torch.randn(2, 3, 4, 4))
    start, end = text.index("class Subnet"), text.index("\n\ndef load")
    assert text[start:end].rstrip() == (
        """\
class Subnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleList([
            nn.Conv2d(3, 4, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(4),
        ])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        stem_0 = self.stem[0](x)
        stem_1 = self.stem[1](stem_0)
        relu = F.relu(stem_1, inplace=False)
        add = relu + 1
        mean = add.mean((2, 3))
        head = self.head(mean)
        return head"""
    )


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A written `Small`, to copy: writing takes a process that imports torch."""
    return write_module(fx.symbolic_trace(Small()), tmp_path_factory.mktemp("small") / "net").parent


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])
        self.blocks.append(self.blocks[0])
        self.out = nn.Linear(4, 7)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def test_tied_weights_and_shared_modules_stay_one(tmp_path: Path) -> None:
    model = TiedWeights()
    # The tracer writes one path for a module that stands under two; the tree keeps both.
    tracer = fx.Tracer()
    gm = fx.GraphModule(model, tracer.trace(model))
    gm.blocks.add_module("2", gm.blocks.get_submodule("0"))
    _, loaded, text = written(gm, tmp_path / "net", torch.tensor([[1, 2]]))
    assert loaded.out.weight is loaded.embed.weight
    assert "self.out.weight = self.embed.weight" in text
    assert loaded.get_submodule("blocks.0") is loaded.get_submodule("blocks.2")
    assert list(loaded.state_dict()) == list(gm.state_dict())


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.inner = nn.Module()
        self.inner.shift = nn.Parameter(torch.randn(3))
        self.inner.register_buffer("mask", torch.tensor([True, False, True]), persistent=False)
        self.register_buffer("kept", torch.randn(()))
        self.keys = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.inner.shift
        x = torch.where(self.inner.mask, x, torch.tensor([4.0, 5.0, 6.0])) * self.kept
        return self.keys(x)


def test_parameters_and_buffers_that_the_graph_reads(tmp_path: Path) -> None:
    gm, loaded, _ = written(Reads(), tmp_path / "net", torch.randn(2, 3))
    assert list(loaded.state_dict()) == list(gm.state_dict())
    assert "inner.mask" not in loaded.state_dict()
    assert torch.equal(loaded.get_buffer("inner.mask"), torch.tensor([True, False, True]))
    assert isinstance(loaded.get_parameter("inner.shift"), nn.Parameter)


def test_a_tensor_that_is_a_plain_attribute_is_no_key_of_the_state_dict(tmp_path: Path) -> None:
    gm = fx.symbolic_trace(Reads())
    del gm.kept
    gm.kept = torch.tensor(2.0)
    gm, loaded, _ = written(gm, tmp_path / "net", torch.randn(2, 3))
    assert sorted(loaded.state_dict()) == sorted(gm.state_dict())


def test_dtypes_frozen_parameters_and_modes(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Small(), Small()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    gm = fx.symbolic_trace(Two()).double().train()
    gm.a.requires_grad_(False)
    gm.b.head.bias.requires_grad_(False)
    gm.a.stem.eval()
    path = write_module(gm, tmp_path / "net")
    loaded = load(path)
    assert "self.a.requires_grad_(False)" in path.read_text()
    assert "self.a.stem.eval()" in path.read_text()
    assert loaded.training
    assert not loaded.get_submodule("a.stem.1").training
    assert loaded.get_submodule("b.stem.1").training
    grads = {name: p.requires_grad for name, p in gm.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == grads
    for name, value in gm.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(loaded(x), gm(x))
    assert not load(write_module(gm.eval(), path.parent)).training


def test_the_memory_layout_of_the_weights_is_kept(tmp_path: Path) -> None:
    model = Small().eval().to(memory_format=torch.channels_last)
    _, loaded, _ = written(model, tmp_path / "net", torch.randn(2, 3, 4, 4))
    weight = loaded.get_parameter("stem.0.weight")
    assert weight.stride() == model.stem[0].weight.stride()


def test_the_random_state_and_the_subnet_stay_as_they_are(tmp_path: Path) -> None:
    gm = fx.symbolic_trace(Small())
    before = copy.deepcopy(gm.state_dict())
    state = torch.get_rng_state()
    load(write_module(gm, tmp_path))  # an empty folder that exists is fine
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in gm.state_dict().items())


def test_the_architecture_lies_beside_it(tmp_path: Path) -> None:
    gm = fx.symbolic_trace(Small())
    gm.architecture = {"block": "conv3", "edge": (0, 2)}
    path = write_module(gm, tmp_path / "net")
    plain = json.loads(path.with_name("architecture.json").read_text())
    assert plain == {"block": "conv3", "edge": [0, 2]}


class Containers(nn.Module):
    """Children whose names no container of torch takes, and one that is called as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(3, 3))
        self.mixed = nn.Module()
        for name in ("0", "keys", "1x1"):
            self.mixed.add_module(name, nn.Linear(3, 3))
        self.mixed.scale = nn.Parameter(torch.randn(3))
        self.skipped = nn.ModuleDict({"2": nn.Linear(3, 3), "5": nn.ReLU()})
        self.whole = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule("0")(x) * self.mixed.scale
        for name in ("0", "keys", "1x1"):
            x = self.mixed.get_submodule(name)(x)
        return self.whole(self.skipped["5"](self.skipped["2"](x)))


class WholeSequential(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        return isinstance(m, nn.Sequential) or super().is_leaf_module(m, qualname)


@pytest.mark.parametrize("kind", [fx.GraphModule, ModelGraph])
def test_containers_of_any_names_and_a_sequential_that_is_called(kind: Any, tmp_path: Path) -> None:
    model = Containers()
    gm = kind(model, WholeSequential().trace(model))
    gm, loaded, text = written(gm, tmp_path / "net", torch.randn(2, 3))
    assert list(loaded.state_dict()) == list(gm.state_dict())
    assert "self.whole(" in text
    assert 'getattr(self.mixed, "1x1")(' in text
    assert 'self.skipped["2"](' in text


class Operators(nn.Module):
    def forward(self, x: Tensor, scale: float = -2.0, *, y: Tensor | None = None) -> Any:
        a = operator.pow(x.shape[0], 2) * scale
        b = -(x[:, None, ..., 1:3] ** 2)
        c = x[torch.tensor([0, 1])].to(torch.float64).sum(dim=(0,), keepdim=True)
        d = torch.full((2, 3), float("inf")).clamp(max=float("inf"))
        e, f = torch.chunk(x, 2, dim=1)
        return {"a": a, "b": (b, [c, d], (e,)), "f": f.T, "g": 1 - x, "h": torch.maximum(e, f)}


def test_operators_slices_and_nested_outputs(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    gm, loaded, text = written(Operators(), tmp_path / "net", x)
    assert "[:, None, ..., 1:3]" in text
    assert "scale=-2.0" in text
    torch.testing.assert_close(loaded(x, scale=3.0), gm(x, scale=3.0), rtol=0, atol=0)


def test_negative_operands_keep_their_precedence(tmp_path: Path) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    power = graph.call_function(operator.pow, (-2, x))
    changed = graph.call_function(operator.iadd, (power, 1))
    graph.call_method("mul_", (changed, 3))  # no user: it is there for its effect
    taken = graph.call_function(operator.getitem, (changed, (slice(None, None, 2),)))
    operator_ = graph.create_node("call_function", torch.neg, (taken,), name="operator")
    graph.output((operator_, power))
    gm = fx.GraphModule(nn.Module(), graph)
    loaded = load(write_module(gm, tmp_path / "net"))
    x = torch.tensor([2.0, 3.0])
    # The interpreter, since fx's own generated code reads `-2 ** x`, which is -(2 ** x).
    want = fx.Interpreter(gm).run(x)
    assert want[1].tolist() == [15.0, -21.0]
    torch.testing.assert_close(loaded(x), want, rtol=0, atol=0)


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = torchvision.ops.StochasticDepth(0.5, "row")
        self.frozen = torchvision.ops.FrozenBatchNorm2d(4)
        self.edges = nn.ModuleDict({"sep-3x3": nn.Conv2d(4, 4, 3, padding="same")})

    def forward(self, x: Tensor) -> Tensor:
        return self.edges["sep-3x3"](self.frozen(self.drop(x)))


def test_functions_and_modules_of_torchvision(tmp_path: Path) -> None:
    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
            return isinstance(m, torchvision.ops.FrozenBatchNorm2d) or super().is_leaf_module(
                m, qualname
            )

    model = Kinds().eval()
    gm = fx.GraphModule(model, Leaves().trace(model))
    _, _, text = written(gm, tmp_path / "net", torch.randn(2, 4, 5, 5))
    assert "import torchvision\n" in text
    assert "torchvision.ops.stochastic_depth(" in text
    assert "torchvision.ops.FrozenBatchNorm2d(4)" in text
    assert 'self.edges["sep-3x3"](' in text


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def scaled(x: Tensor) -> Tensor:
    return 2 * x


def with_function(function: Any, *args: Any) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"), *args)))
    return fx.GraphModule(nn.Module(), graph)


def with_opaque() -> fx.GraphModule:
    root = nn.Module()
    root.add_module("body", nn.Module())
    root.get_submodule("body").add_module("gate", Opaque())
    graph = fx.Graph()
    graph.output(graph.call_module("body.gate", (graph.placeholder("x"),)))
    return fx.GraphModule(root, graph)


@pytest.mark.parametrize(
    ("gm", "words"),
    [
        (with_opaque(), r"body\.gate is a .*Opaque: .* torch\.nn modules .* traceable.*pickle"),
        (with_function(scaled), r"node scaled: .*\.scaled cannot be written.*trace it"),
        (with_function(lambda x: x), r"lambda.* cannot be written"),
        (with_function(torch.add, {1, 2}), "node add: a value of type set"),
    ],
    ids=["module", "function", "lambda", "value"],
)
def test_what_has_no_source_is_named_and_nothing_is_written(
    gm: fx.GraphModule, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=words):
        write_module(gm, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_of_other_calling_conventions_is_refused(tmp_path: Path) -> None:
    gm = fx.symbolic_trace(lambda x: x["a"] + 1, concrete_args={"x": {"a": fx.PH}})
    with pytest.raises(ExportError, match="concrete_args"):
        write_module(gm, tmp_path / "net")


def test_our_folder_is_replaced(small_folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(small_folder, tmp_path / "net"), "subnet.py")
    gm = fx.symbolic_trace(Small())
    gm.head.bias.data.fill_(7)
    assert write_module(gm, path.parent) == path
    assert torch.equal(load(path).get_parameter("head.bias"), torch.full((2,), 7.0))
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_a_folder_with_other_things_is_refused(small_folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(small_folder, tmp_path / "net"), "subnet.py")
    folder = path.parent
    gm = fx.symbolic_trace(Small())
    (folder / "notes.txt").write_text("mine")
    before = path.read_text()
    with pytest.raises(ExportError, match=r"'notes\.txt', which write_module did not write"):
        write_module(gm, folder)
    assert path.read_text() == before
    with pytest.raises(ExportError, match="is a file"):
        write_module(gm, folder / "notes.txt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "subnet.py").write_text("x = 1\n")
    with pytest.raises(ExportError, match=r"'subnet\.py', which"):
        write_module(gm, tmp_path / "other")
    assert {p.name for p in tmp_path.iterdir()} == {"net", "other"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("nn.Linear(4, 2)", "nn.Linear(4, 3, bias=False)", "does not load"),
        ("tensors[name].data = value.clone()", "tensors[name].data = value + 1", "is .* not"),
        ("super().__init__()\n", "super().__init__()\n        self.eval()\n", "subnet is False"),
    ],
)
def test_a_file_that_differs_is_found_and_the_old_one_stays(
    old: str,
    new: str,
    words: str,
    small_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gm = fx.symbolic_trace(Small())
    path = Path(shutil.copytree(small_folder, tmp_path / "net"), "subnet.py")
    before = path.read_text()
    right = source.Source.text
    monkeypatch.setattr(
        source.Source,
        "text",
        lambda self: "class Subnet".join(
            part.replace(old, new) if i else part
            for i, part in enumerate(right(self).split("class Subnet"))
        ),
    )
    with pytest.raises(ExportError, match=words):
        write_module(gm, tmp_path / "net")
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
