"""`nasfx.cost`: a model or net as it stands, and its space."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import nn

import nasfx
from nasfx import Count, NasfxError
from tests.conftest import fingerprint
from tests.models import MODELS, Block, example

FIELDS = ("flops", "params", "activation_bytes")


@pytest.mark.parametrize("name", [n for n in MODELS if n != "darts"])
def test_over_the_space_it_is_exact(name: str) -> None:
    model = MODELS[name]()
    found = nasfx.cost(model, example())
    net = nasfx.transform(model, "single-path")
    counts = [nasfx.count(nasfx.finalize(net, a), example()) for a in net.space.enumerate()]
    for field in FIELDS:
        values = [getattr(c, field) for c in counts]
        assert getattr(found.min, field) == min(values)
        assert getattr(found.max, field) == max(values)
        assert isinstance(getattr(found.mean, field), float)


def test_as_it_stands() -> None:
    model = Block()
    for name in ("conv3", "conv5", "skip"):
        with nasfx.activated(model, {"block": name}):
            assert nasfx.cost(model, example()).flops == nasfx.count(model, example()).flops
    net = nasfx.transform(model, "proxyless")
    subnet = nasfx.finalize(net, net.path)
    assert nasfx.cost(net, example()).flops == nasfx.count(subnet, example()).flops
    mixture = nasfx.cost(nasfx.transform(model, "darts"), example())
    assert mixture.flops > mixture.max.flops


@pytest.mark.parametrize(
    "made", [Block, lambda: nasfx.transform(Block(), "darts"), lambda: nn.Conv2d(4, 4, 3)]
)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_module_changes(made: Callable[[], nn.Module], training: bool) -> None:
    module = made().train(training)
    before, state = fingerprint(module), torch.get_rng_state()
    nasfx.cost(module, example())
    assert fingerprint(module) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_without_choices_all_are_the_same() -> None:
    found = nasfx.cost(nn.Linear(4, 2), torch.zeros(3, 4))
    assert found.min == found.max == Count(8, 10, 8)
    assert found.mean == (8.0, 10.0, 8.0)


def test_the_table_has_every_candidate() -> None:
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        console.print(nasfx.cost(Block(), example()).table())
    text = capture.get()
    assert "fixed" in text
    rows = [line.split("│") for line in text.splitlines() if "│" in line]
    cells = {(r[1].strip(), r[2].strip()): r[3].strip() for r in rows}
    assert cells["block", "conv3"] == f"{25 * 4 * 4 * 9:,}"
    assert cells["block", "conv5"] == f"{25 * 4 * 4 * 25:,}"
    assert cells["fixed", ""] == f"{25 * 4 * 4 * 9 + 12:,}"


def test_inputs_without_a_batch_are_an_error() -> None:
    with pytest.raises(NasfxError, match="batch"):
        nasfx.cost(Block(), torch.zeros(()))
