"""Latency tables: our own and the ProxylessNAS authors'."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nasfx
from nasfx import Latency, LayerChoice, ProfileError
from nasfx.costs import LatencyTable
from tests.models import Block, example

DATA = os.environ.get("NASFX_DATA", "")


# -- our own ---------------------------------------------------------------------------------------


def test_a_saved_table_is_loaded_as_it_was(tmp_path: Path) -> None:
    table = nasfx.latency_table(Block(), example(), lambda part: 0.1 + len(part.paths) / 3)
    loaded = LatencyTable.load(table.save(tmp_path / "table.json"))
    assert loaded.rows == table.rows
    assert loaded.name == table.name == "custom"
    objective = Latency(loaded, max=100)
    net = nasfx.transform(Block(), "darts", example_inputs=example(), objective=objective)
    assert objective.name == "latency:custom"
    assert net.space.costs["latency:custom"]({"block": "skip"}) == pytest.approx(
        0.2 + 1 + 1 / 3, rel=1e-12
    )


def test_a_missing_row_is_named_with_the_nearest_ones(tmp_path: Path) -> None:
    table = nasfx.latency_table(Block(), example(), lambda part: 1.0)
    rows = {key: ms for key, ms in table.rows.items() if "kernel_size=(5, 5)" not in key}
    path = LatencyTable(rows, "phone").save(tmp_path / "phone.json")
    with pytest.raises(ProfileError) as caught:
        nasfx.transform(
            Block(),
            "darts",
            example_inputs=example(),
            objective=Latency(LatencyTable.load(path), max=9),
        )
    message = str(caught.value)
    assert str(path) in message
    assert "block.conv5.0 and 2 more (candidate 'conv5' of choice 'block'" in message
    assert "needs\n  x0: float32[1, 4, 5, 5] -> %y2 = Conv2d(4, 4, kernel_size=(5, 5)" in message
    assert "and has\n  x0: float32[1, 4, 5, 5] -> %y2 = Conv2d(4, 4, kernel_size=(3, 3)" in message


GOOD = {"format": "nasfx latency table", "version": 1, "hardware": "h", "unit": "ms", "rows": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("\xff\xfe", "is no latency table|cannot be read"),
        ("[1, 2]", "is no latency table"),
        ({"rows": {}}, "is no latency table"),
        (GOOD | {"version": 2}, "version 2"),
        (GOOD | {"unit": "us"}, "unit 'us'"),
        (GOOD | {"rows": [1]}, "has no rows"),
        (GOOD | {"rows": {"a": -1.0}}, r"row 'a' of .* is -1.0"),
        (GOOD | {"rows": {"a": "1"}}, r"row 'a' of .* is '1'"),
        (GOOD | {"rows": {"a": True}}, r"row 'a' of .* is True"),
        (
            '{"format": "nasfx latency table", "version": 1, "unit": "ms", "rows": {"a": NaN}}',
            "nan",
        ),
    ],
    ids=[str(i) for i in range(12)],
)
def test_files_that_are_no_table(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), "latin1")
    with pytest.raises(ProfileError, match=message):
        LatencyTable.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for load in (LatencyTable.load, LatencyTable.proxyless):
        with pytest.raises(ProfileError, match=r"none\.json cannot be read"):
            load(tmp_path / "none.json")


# -- the ProxylessNAS authors' ---------------------------------------------------------------------


def mobile(channels: int, out: int, expand: int, kernel: int, stride: int) -> nn.Sequential:
    hidden = channels * expand
    wide = [nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
    return nn.Sequential(
        *(wide if expand > 1 else []),
        nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU6(),
        nn.Conv2d(hidden, out, 1, bias=False),
        nn.BatchNorm2d(out),
    )


class Residual(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.first = mobile(8, 4, 1, 3, 1)
        self.down = LayerChoice(
            {"k3e3": mobile(4, 6, 3, 3, 2), "k5e6": mobile(4, 6, 6, 5, 2)}, label="down"
        )
        self.same = LayerChoice(
            {"k7e3": Residual(mobile(6, 6, 3, 7, 1)), "zero": nn.Identity()}, label="same"
        )
        self.last = nn.Sequential(nn.Conv2d(6, 16, 1), nn.BatchNorm2d(16), nn.ReLU6())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.down(self.first(self.stem(x))))
        return self.head(self.last(x).mean(3).mean(2))


ROWS = {
    "Conv-input:32x32x3-output:16x16x8": 1.0,
    "expanded_conv-input:16x16x8-output:16x16x4-expand:1-kernel:3-stride:1-idskip:0": 2.0,
    "expanded_conv-input:16x16x4-output:8x8x6-expand:3-kernel:3-stride:2-idskip:0": 4.0,
    "expanded_conv-input:16x16x4-output:8x8x6-expand:6-kernel:5-stride:2-idskip:0": 8.0,
    "expanded_conv-input:8x8x6-output:8x8x6-expand:3-kernel:7-stride:1-idskip:1": 16.0,
    "Conv_1-input:8x8x6-output:8x8x16": 32.0,
    "Logits-input:8x8x16-output:5": 64.0,
}


def written(rows: dict[str, float], folder: Path) -> Path:
    path = folder / "pixel.yaml"
    path.write_text(
        "".join(f"{k}:\n  count: 3\n  mean: {v}\n  var: 0.1\n" for k, v in rows.items())
    )
    return path


def test_parts_are_taken_apart_into_the_authors_rows(tmp_path: Path) -> None:
    table = LatencyTable.proxyless(written(ROWS, tmp_path))
    assert table.name == "pixel"
    net = nasfx.transform(
        Mobile(),
        "proxyless",
        example_inputs=torch.zeros(2, 3, 32, 32),
        objective=Latency(table, 99),
    )
    cost = net.space.costs["latency:pixel"]
    assert cost({"down": "k3e3", "same": "k7e3"}) == 1 + 2 + 4 + 16 + 32 + 64
    assert cost({"down": "k5e6", "same": "zero"}) == 1 + 2 + 8 + 32 + 64


def test_a_row_that_the_authors_did_not_measure(tmp_path: Path) -> None:
    rows = {k: v for k, v in ROWS.items() if "kernel:5" not in k}
    table = LatencyTable.proxyless(written(rows, tmp_path))
    with pytest.raises(ProfileError, match=r"no row for down\.k5e6\.0 and 7 more") as caught:
        nasfx.latency_table(Mobile(), torch.zeros(1, 3, 32, 32), table)
    assert "expand:6-kernel:5-stride:2-idskip:0" in str(caught.value)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.ConvTranspose2d(4, 4, 1), "a ConvTranspose2d"),
        (nn.Conv2d(4, 4, 3, 1, 1, groups=4), "a depthwise convolution that no pointwise"),
    ],
)
def test_what_the_authors_form_has_no_row_for(
    module: nn.Module, message: str, tmp_path: Path
) -> None:
    table = LatencyTable.proxyless(written(ROWS, tmp_path))
    model = nn.Sequential(LayerChoice({"a": module, "b": nn.Identity()}, label="x"))
    with pytest.raises(ProfileError, match=message):
        nasfx.latency_table(model, example(), table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "no table of the ProxylessNAS authors' form"),
        ("Conv: 3\n", "'mean' of row 'Conv'"),
        ("Conv:\n  mean: .nan\n", "nan"),
        ("Conv:\n  mean: -1\n", "-1"),
        ("Conv: [\n", "cannot be read"),
        ("!!python/object/apply:os.system ['touch pwned']\n", "cannot be read"),
    ],
)
def test_yaml_that_is_no_table(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "table.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=message):
        LatencyTable.proxyless(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.skipif(not DATA, reason="NASFX_DATA does not name the folder of real data")
def test_the_real_table_prices_the_whole_space() -> None:
    """Every candidate of the authors' space has a row in the table that they measured."""
    from nasfx.spaces import proxyless

    table = LatencyTable.proxyless(Path(DATA) / "proxyless_pixel1_lut.yaml")
    found = nasfx.latency_table(proxyless.mobile(), torch.zeros(1, 3, 224, 224), table)
    # 6 first blocks and 5 kinds of repeated ones, 6 candidates each; stem and head.
    assert len(found.rows) == (6 + 5) * 6 + 2
    assert all(ms > 0 for ms in found.rows.values())
