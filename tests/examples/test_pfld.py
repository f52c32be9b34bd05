"""The landmark example: its loss and error by hand, its data, and all its steps at smoke size."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from nasfx.architecture import Architecture

FOLDER = Path(__file__).parents[2] / "examples" / "pfld"
NAMES = (
    "common",
    "compare",
    "data",
    "export",
    "losses",
    "retrain",
    "synthetic",
    "train",
    "fitting",
)


@pytest.fixture(scope="module")
def pfld() -> Iterator[Any]:
    """The modules of the example; other examples have modules of the same names."""
    path = list(sys.path)
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    sys.path[:] = path
    for name, module in before.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module


# -- loss and error --------------------------------------------------------------------------------


def batch(n: int = 4, points: int = 5) -> tuple[tuple[Any, Any], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    outputs = normal(n, 2 * points, 1, 1).requires_grad_(), normal(n, 16, 28, 28)
    attributes = torch.tensor([[1.0, 0], [1, 1], [0, 0], [0, 1]], dtype=torch.float64)
    target = {"landmarks": normal(n, 2 * points), "euler": normal(n, 3), "attributes": attributes}
    return outputs, target


@pytest.mark.parametrize("rare", [None, (4.0, 2.5)])
def test_the_loss_is_that_of_the_paper(pfld: Any, rare: tuple[float, ...] | None) -> None:
    outputs, target = batch()
    fractions = None if rare is None else 1 / torch.tensor(rare, dtype=torch.float64)
    criterion = pfld.losses.PFLDLoss(fractions=fractions).double().eval()
    angles = criterion.auxiliary(outputs[1]).detach()
    expected = 0.0
    for n in range(4):
        factor = 1.0
        if rare is not None and n != 2:  # the third face has no attribute, so it counts once
            factor = sum(r for r, a in zip(rare, target["attributes"][n], strict=True) if a)
        angle = sum(1 - math.cos(angles[n, k] - target["euler"][n, k]) for k in range(3))
        difference = outputs[0][n].detach().flatten() - target["landmarks"][n]
        expected += factor * angle * sum(float(d) ** 2 for d in difference) / 4
    assert float(criterion(outputs, target).detach()) == pytest.approx(expected, rel=1e-12)


def test_arch_steps_take_the_unweighted_loss(pfld: Any) -> None:
    outputs, target = batch()
    criterion = pfld.losses.PFLDLoss().double()
    loss = criterion.plain(outputs, target)
    difference = outputs[0].flatten(1) - target["landmarks"]
    assert float(loss.detach()) == pytest.approx(
        float((difference.detach() ** 2).sum() / 4), rel=1e-12
    )
    loss.backward()
    assert all(p.grad is None for p in criterion.parameters())
    criterion(outputs, target).backward()
    assert all(p.grad is not None for p in criterion.parameters())


@pytest.mark.parametrize("side", [16, 28])
def test_the_auxiliary_net_takes_features_of_any_side(pfld: Any, side: int) -> None:
    feature = torch.randn(2, 16, side, side, dtype=torch.bfloat16)
    assert pfld.losses.Auxiliary().eval()(feature).shape == (2, 3)


def test_the_error_is_divided_by_the_distance_of_the_eyes(pfld: Any) -> None:
    true = torch.tensor([[0.0, 0, 4, 3, 1, 1], [0, 0, 0, 2, 1, 1]], dtype=torch.float64)
    off = torch.tensor([[0.0, 0, 0, 0, 3, 4], [1, 0, 0, 1, 0, 1]], dtype=torch.float64)
    errors = pfld.losses.nme((true + off)[..., None, None], true, (0, 1))
    torch.testing.assert_close(errors, torch.tensor([5 / 3 / 5, 1 / 2], dtype=torch.float64))


def test_the_eyes_are_known_or_given(pfld: Any) -> None:
    assert pfld.losses.eyes_of(68) == (36, 45)
    assert pfld.losses.eyes_of(106) == (35, 93)
    assert pfld.losses.eyes_of(5, [0, 1]) == (0, 1)
    with pytest.raises(SystemExit, match="with 5 points give --eyes"):
        pfld.losses.eyes_of(5)


# -- synthetic faces -------------------------------------------------------------------------------


def test_the_pose_is_a_rotation_about_fixed_axes(pfld: Any) -> None:
    angles = [0.3, -0.5, 0.2]
    expected = Rotation.from_euler("xyz", angles).as_matrix()
    np.testing.assert_allclose(pfld.synthetic.rotation(*angles), expected, atol=1e-12)


def test_heads_are_symmetric_with_eyes_where_the_scheme_has_them(pfld: Any) -> None:
    points = pfld.synthetic.head_points(np.random.default_rng(3))
    assert points.shape == (68, 3)
    mirror = [-1, 1, 1]
    for a, b in ((0, 16), (17, 26), (21, 22), (31, 35), (36, 45), (39, 42), (48, 54), (60, 64)):
        np.testing.assert_allclose(points[a], points[b] * mirror, atol=1e-12)
    left, right = points[36:42, 0], points[42:48, 0]
    assert left[0] == left.min()
    assert right[3] == right.max()


def test_landmarks_are_where_the_pose_puts_them_and_the_drawing_has_them(pfld: Any) -> None:
    images, landmarks, euler = pfld.synthetic.synthetic_faces(12, 112, 5)
    assert images.dtype == np.uint8
    assert images.shape == (12, 3, 112, 112)
    rng = np.random.default_rng(0)
    mean = np.mean([pfld.synthetic.head_points(rng) for _ in range(50)], 0)
    for image, points, angles in zip(images, landmarks.reshape(-1, 68, 2), euler, strict=True):
        x, y = np.linalg.lstsq(np.c_[mean, np.ones(68)], points, rcond=None)[0][:3].T
        x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
        z = np.cross(x, y)
        found = [math.atan2(z[1], z[2]), -math.asin(z[0]), math.atan2(y[0], x[0])]
        np.testing.assert_allclose(found, angles, atol=0.2)  # heads differ from the mean head
        for eye in (points[36:42], points[42:48]):
            column, row = (112 * eye.mean(0)).round().astype(int)
            assert image[:, row, column].mean() < 70  # the pupil


def test_faces_follow_from_the_seed(pfld: Any) -> None:
    first, again, other = (pfld.synthetic.synthetic_faces(2, 32, seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


# -- files -----------------------------------------------------------------------------------------


def write_list(folder: Path, fields: list[list[Any]]) -> Path:
    (folder / "imgs").mkdir(parents=True)
    for i in range(len(fields)):
        Image.new("RGB", (8, 8), (250, 100, i)).save(folder / "imgs" / f"{i}.png")
    lines = [" ".join(map(str, (f"{i}.png", *row))) for i, row in enumerate(fields)]
    (folder / "list.txt").write_text("\n".join(lines) + "\n")
    return folder / "list.txt"


@pytest.mark.parametrize(("points", "attributes", "fields"), [(106, 0, 216), (98, 6, 206)])
def test_lists_are_read(
    pfld: Any, tmp_path: Path, points: int, attributes: int, fields: int
) -> None:
    row = [*(i / 300 for i in range(2 * points)), *[1] * attributes, 90, -45, 180]
    assert 1 + len(row) == fields
    faces = pfld.data.read_list(write_list(tmp_path, [row] * 2), points, 16)
    image, target = faces[1]
    assert (len(faces), faces.points, image.shape) == (2, points, (3, 16, 16))
    torch.testing.assert_close(image[:, 5, 5], torch.tensor([250.0, 100, 1]) / 255)
    torch.testing.assert_close(target["landmarks"], torch.arange(2 * points) / 300)
    angles = torch.tensor([0.5, -0.25, 1.0]) * math.pi
    torch.testing.assert_close(target["euler"], angles)
    assert ("attributes" in target) == (attributes > 0)
    if attributes:
        assert target["attributes"].tolist() == [1.0] * 6
    radians = pfld.data.read_list(tmp_path / "list.txt", points, 16, degrees=False)
    assert radians[0][1]["euler"].tolist() == [90, -45, 180]


def test_wrong_lists_are_refused(pfld: Any, tmp_path: Path) -> None:
    file = write_list(tmp_path, [[0.5] * 13, [0.5] * 12])
    with pytest.raises(SystemExit, match=r"list.txt:2 has 13 fields; with 5 points there are 14"):
        pfld.data.read_list(file, 5, 16)
    (tmp_path / "imgs" / "0.png").unlink()
    with pytest.raises(SystemExit, match=r"list.txt:1: there is neither .*0.png nor .*imgs"):
        pfld.data.read_list(file, 5, 16)
    with pytest.raises(SystemExit, match="there is no file"):
        pfld.data.read_list(tmp_path / "other.txt", 5, 16)


def test_the_real_faces_need_their_folder(pfld: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    args = pfld.train.arguments().parse_args(["--data", "faces68"])
    monkeypatch.delenv("NASFX_DATA", raising=False)
    with pytest.raises(SystemExit, match="set the environment variable NASFX_DATA"):
        pfld.data.load(args)
    with pytest.raises(SystemExit, match=r"give synthetic, faces68 or list\.txt FOLDER"):
        pfld.data.load(pfld.train.arguments().parse_args(["--data", "nothing"]))


# -- the scripts -----------------------------------------------------------------------------------


def test_the_learning_rate_falls_along_a_cosine(pfld: Any) -> None:
    args = pfld.train.arguments().parse_args(["--lr", "0.4"])
    optimizer = pfld.fitting.optimizer_of(args, [torch.nn.Parameter(torch.zeros(1))], steps=8)
    rates = []
    for _ in range(8):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.2 * (1 + math.cos(math.pi * i / 8)) for i in range(1, 9)])


def test_scripts_run_as_files_and_say_their_defaults() -> None:
    command = [sys.executable, str(FOLDER / "train.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = " ".join(shown.split())
    for flag, default in (("--seed SEED", "0"), ("--device DEVICE", "auto"), ("--lr LR", "0.006")):
        assert f"(default: {default})" in text.split(f" {flag} ")[1].split(" --")[0]


@pytest.mark.slow
def test_search_finetune_and_export(
    pfld: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = ["--smoke", "--output", str(tmp_path)]
    calls: list[str] = []
    for name in ("plain", "forward"):

        def counted(self: Any, *args: Any, name: str = name, was: Any = None) -> Any:
            calls.append(name)
            return was(self, *args)

        was = getattr(pfld.losses.PFLDLoss, name)
        monkeypatch.setattr(pfld.losses.PFLDLoss, name, partialmethod(counted, was=was))
    pfld.train.main(common)
    searched = json.loads((tmp_path / "search.json").read_text())
    # 38 faces in two epochs of batches of 16 for the weights, 10 in one for the architecture.
    assert calls == ["forward"] * 4 + ["plain"]
    assert Architecture.from_json(tmp_path / "architecture.json") == searched["architecture"]
    assert list(searched["architecture"]) == [f"layer{i}" for i in range(5)]
    assert len(searched["records"]) == 2
    assert searched["records"][0]["arch_loss"] is None
    assert searched["records"][1]["arch_loss"] > 0

    pfld.train.main([*common, "--resume"])  # the search is finished: nothing is trained again
    assert "going on from" in capsys.readouterr().err
    again = json.loads((tmp_path / "search.json").read_text())
    assert again["records"] == searched["records"]
    assert again["architecture"] == searched["architecture"]

    pfld.retrain.main(common)
    trained = json.loads((tmp_path / "subnet.json").read_text())
    assert trained["architecture"] == searched["architecture"]
    assert trained["nme"] == trained["records"][-1]["nme"] > 0
    assert (trained["params"], trained["macs"]) == (searched["params"], searched["macs"])

    pfld.export.main(["--output", str(tmp_path)] + ([] if find_spec("MNN") else ["--no-mnn"]))
    exported = json.loads((tmp_path / "export.json").read_text())
    assert exported["macs"] == trained["macs"]
    assert exported["onnxruntime_ms"] > 0
    session = importlib.import_module("onnxruntime").InferenceSession(tmp_path / "subnet.onnx")
    assert [o.name for o in session.get_outputs()] == ["landmarks", "feature"]
    subnet, _ = pfld.fitting.load_subnet(tmp_path / "subnet.pt")
    x = torch.rand(1, 3, 64, 64)
    landmarks, _ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(landmarks, subnet(x)[0].detach(), atol=1e-4)
    plots = {"search.png", "subnet.png", "subnet-faces.png"}
    assert plots <= {path.name for path in tmp_path.iterdir()}


def test_a_finetuning_that_was_stopped_goes_on_bit_for_bit(
    pfld: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = pfld.retrain.arguments().parse_args(["--smoke", "--output", str(tmp_path)])
    pfld.data.shrink(args)
    fabric = pfld.retrain.start(args)
    faces, test = pfld.data.load(args)
    loaders = lambda: (pfld.data.loader(faces, args, shuffle=True), pfld.data.loader(test, args))  # noqa: E731
    error_of = pfld.fitting.error_of

    def fitted(file: Path, *, fails: int | None = None, resume: bool = False) -> Any:
        calls = iter(range(9))

        def error(*given: Any) -> float:
            if next(calls) == fails:
                raise KeyboardInterrupt
            return error_of(*given)

        monkeypatch.setattr(pfld.fitting, "error_of", error)
        torch.manual_seed(0)
        net, criterion = pfld.fitting.backbone(faces.points, faces.size), pfld.losses.PFLDLoss()
        records = pfld.fitting.fit(
            net, criterion, *loaders(), args, fabric, epochs=3, eyes=(0, 1), name="net",
            checkpoint=file, resume=resume,
        )  # fmt: skip
        kept = [{k: v for k, v in record.items() if k != "seconds"} for record in records]
        return kept, {**net.state_dict(), **criterion.state_dict()}

    records, state = fitted(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "parts.pt", fails=1)
    with pytest.raises(SystemExit, match="give --resume"):
        fitted(tmp_path / "parts.pt")
    again, resumed = fitted(tmp_path / "parts.pt", resume=True)
    assert again == records
    assert all(torch.equal(value, resumed[name]) for name, value in state.items())


def test_finetuning_starts_from_the_weights_of_the_supernet(
    pfld: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = pfld.train.arguments().parse_args(["--smoke", "--output", str(tmp_path)])
    pfld.train.smoke(args)
    faces, _ = pfld.data.load(args)
    model, criterion = pfld.fitting.backbone(68, 64), pfld.losses.PFLDLoss()
    held = {"architecture": dict(pfld.fitting.REFERENCE)}
    pfld.fitting.save(tmp_path / "supernet.pt", model, criterion, faces, **held)
    seen: list[dict[str, torch.Tensor]] = []

    def fit(net: Any, *_: Any, **__: Any) -> list[dict[str, float]]:
        seen.append({name: t.clone() for name, t in net.state_dict().items()})
        return [{"epoch": 0, "loss": 1.0, "nme": 1.0, "lr": 0.0, "seconds": 0.0}]

    monkeypatch.setattr(pfld.fitting, "fit", fit)
    for more in ([], ["--from-scratch"]):
        pfld.retrain.main(["--smoke", "--output", str(tmp_path), *more])
    weights = model.state_dict()
    inherited, fresh = ({n: torch.equal(t, weights[n]) for n, t in s.items()} for s in seen)
    assert all(inherited.values())
    assert not fresh["fc.weight"]
    torch.testing.assert_close(seen[1]["fc.bias"], faces.landmarks.mean(0))


def test_a_latency_table_is_made_once_and_then_read(pfld: Any, tmp_path: Path) -> None:
    parse = pfld.train.arguments().parse_args
    flags = ["--objective", "latency", "--hardware", "torch", "--target", "900"]
    args = parse([*flags, "--latency-table", str(tmp_path / "table.json")])
    model, x = pfld.fitting.backbone(5, 32), torch.zeros(1, 3, 32, 32)
    first = pfld.train.objective(args, model, x)
    again = pfld.train.objective(args, model, x)
    assert first.name == again.name == "latency:torch"
    assert first.source.rows == again.source.rows
    assert (first.target, first.unit, first.loss) == (900, "us", "fbnet-mul")
    assert pfld.train.objective(parse(["--objective", "none"]), model, x) is None


@pytest.mark.slow
@pytest.mark.skipif(find_spec("MNN") is None, reason="MNN is not installed")
def test_the_comparison_has_a_row_for_each_net(
    pfld: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pfld.compare.main(["--smoke", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "compare.json").read_text())
    seed = results["seeds"]["0"]
    assert set(seed) == {"search", "subnet", "inherited", "reference"}
    assert seed["inherited"]["architecture"] == seed["reference"]["architecture"]
    assert len(seed["reference"]["records"]) == 2 + 1
    assert seed["subnet"]["architecture"] == seed["search"]["architecture"]
    assert 0.2 < results["constant_mean_shape_nme"] < 0.5
    assert "NME" in capsys.readouterr().out
