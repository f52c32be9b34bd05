import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nasfx
from nasfx import LayerChoice

FILE = Path(__file__).parents[2] / "examples" / "custom_pass.py"


@pytest.fixture
def example() -> dict[str, Any]:
    return runpy.run_path(str(FILE))


def test_the_example_runs_and_shows_what_changed(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FILE), run_name="__main__")
    shown = capsys.readouterr().out
    for line in (
        "+%_drop_skips = call_module[_drop_skips](%stem_2)",
        "+%block1 = nasfx.ops.mix(%gate_block1, [%block1_conv3_2, %_drop_skips], label='block1')",
        "+%_drop_skips_1 = call_module[_drop_skips_1](%block1)",
        "Dropout in the final network: none",
    ):
        assert line in shown.split("\n"), line
    assert "drop-skips(probability=0.5)" in shown


def test_dropout_follows_the_mode_and_hits_skips_alone(example: dict[str, Any]) -> None:
    model = example["Net"]().double()
    plain = nasfx.transform(model, "darts").eval()
    net = nasfx.transform(model, "darts", extra_passes=[example["DropSkips"](1.0)]).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(net(x), plain(x))
    with torch.no_grad():
        for alpha in net.arch_parameters():
            alpha.zero_()
    h = model.block1.get_submodule("conv3")(model.stem(x)) / 2
    h = model.block2.get_submodule("conv5")(h) / 2
    torch.testing.assert_close(net.train()(x), model.head(h.mean((2, 3))), rtol=1e-12, atol=1e-12)


class Structured(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.tanh(), x


class Structures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice({"a": Structured(), "b": Structured()}, label="op")

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)[0]


def test_mixtures_of_structures_are_declined(example: dict[str, Any]) -> None:
    net = nasfx.transform(Structures(), "darts", extra_passes=[example["DropSkips"]()])
    (skip,) = net.history.records[-1].skips
    assert skip.reason == "its candidates do not give single tensors"
