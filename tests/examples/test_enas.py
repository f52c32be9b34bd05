"""The ENAS example: its recipe by hand, and its scripts at smoke size."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import nasfx
from nasfx.spaces import enas

FOLDER = Path(__file__).parents[2] / "examples"


@contextmanager
def example(folder: str, *scripts: str) -> Generator[SimpleNamespace]:
    """The modules of an example and those that all share; others have modules of the same names."""
    names = ("common", "images", "training", *scripts)
    path, before = list(sys.path), {name: sys.modules.pop(name, None) for name in names}
    sys.path[:0] = [str(FOLDER / folder), str(FOLDER)]
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path[:] = path
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    with example("enas", "search", "retrain") as modules:
        yield modules


def parsed(scripts: Any, step: str, *given: str) -> Any:
    script, space = getattr(scripts, step), scripts.search.space_in(given)
    return scripts.training.parse(script.arguments(space), script.PRESETS[space], {}, given)


def results_of(file: Path) -> dict[str, Any]:
    assert file.with_suffix(".png").is_file()
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_learning_rate_restarts_after_1_2_and_4_periods(scripts: Any) -> None:
    rate = scripts.search.restarts(1.0, 0.2, first=2, every=3)
    # By epochs: a cosine of 2, one of 4, the start of one of 8.
    shares = [0, 1 / 2, 0, 1 / 4, 2 / 4, 3 / 4, 0, 1 / 8]
    expected = [0.2 + 0.4 * (1 + math.cos(math.pi * share)) for share in shares]
    assert [rate(3 * epoch) for epoch in range(8)] == pytest.approx(expected, rel=1e-12)
    assert rate(0) == rate(2) == rate(6) == 1.0  # only between epochs, of 3 steps


def test_the_last_restart_ends_with_the_paper_s_epochs(scripts: Any) -> None:
    for space in ("macro", "micro"):
        args = parsed(scripts, "retrain", "--preset", "paper", "--search-for", space)
        rate = scripts.search.restarts(args.lr, args.last_lr, first=args.restart, every=1)
        assert rate(args.epochs - 1) < 1.05 * args.last_lr
        assert rate(args.epochs) == args.lr


def test_the_optimizer_is_the_authors(scripts: Any) -> None:
    args = parsed(scripts, "search", "--preset", "paper")
    optimizer = scripts.search.sgd(args, [nn.Parameter(torch.zeros(1))], 10)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.05, 0.9, True)
    assert group["weight_decay"] == 2 * 2.5e-4  # they decay by the square, not by half of it


def test_the_strategies_have_the_authors_constants(scripts: Any) -> None:
    macro = scripts.search.strategy(parsed(scripts, "search", "--preset", "paper"))
    assert macro == nasfx.Enas.macro(steps=50, aggregate=20)
    args = parsed(scripts, "search", "--preset", "paper", "--search-for", "micro")
    micro = scripts.search.strategy(args)
    assert (micro.steps, micro.aggregate, micro.learning_rate) == (30, 10, 0.0035)
    assert micro.op_bias == {"sep_conv_3x3": 10.0, "sep_conv_5x5": 10.0}
    (pattern,) = micro.fixed_bias
    assert pattern == "normal/*/op"
    assert sum(micro.fixed_bias[pattern].values()) == pytest.approx(2 * 0.25 - 3 * 0.25)


def test_the_auxiliary_loss_has_its_weight_and_earns_no_reward(scripts: Any) -> None:
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    y = logits[0].argmax(1)
    args = SimpleNamespace(label_smoothing=0.0, auxiliary=0.4)
    of = nn.functional.cross_entropy
    loss = scripts.search.loss_of(args)
    torch.testing.assert_close(
        loss((logits[0], logits[1]), y), of(logits[0], y) + 0.4 * of(logits[1], y)
    )
    assert scripts.search.reward((logits[0], -logits[0]), y) == 1.0
    assert scripts.search.reward(logits[0], y) == 1.0


def test_flags_that_a_space_has_no_use_for(scripts: Any) -> None:
    with pytest.raises(SystemExit, match="macro net has no auxiliary head"):
        scripts.search.space_of(parsed(scripts, "search", "--auxiliary", "0.4"), 10)
    args = parsed(scripts, "retrain", "--drop-path", "0.2")
    with pytest.raises(SystemExit, match="macro net has no drop paths"):
        scripts.retrain.before_epoch_of(args, nn.Identity())
    with pytest.raises(SystemExit, match="is none of this space"):
        scripts.retrain.subnet_of(parsed(scripts, "retrain"), enas.ENAS_MICRO, 10)


def test_macro(scripts: Any, tmp_path: Path) -> None:
    smoke = ["--smoke", "--output", str(tmp_path), "--device", "cpu"]
    scripts.search.main(smoke)
    found = results_of(tmp_path / "search.json")
    assert len(found["records"]) == 2
    arch = nasfx.Architecture.from_json(tmp_path / "architecture.json")
    assert dict(arch) == found["architecture"]
    assert {"op/0", "op/1", "op/2", "skip/2"} <= set(arch)
    scripts.retrain.main(smoke)
    retrained = results_of(tmp_path / "retrain.json")
    assert retrained["architecture"] == found["architecture"]
    state = torch.load(tmp_path / "retrain.pt")
    assert state["classifier.3.weight"].shape == (10, 8)  # channels double where it halves
    with pytest.raises(nasfx.CheckpointError, match="is there, of a search that could go on"):
        scripts.search.main(smoke)


def test_a_macro_net_has_the_layers_of_its_architecture(scripts: Any) -> None:
    args = parsed(scripts, "retrain", "--channels", "2", "--size", "8")
    arch = enas.macro_arch([0, 1, 1, 2, 0, 0, 3, 0, 0, 0])
    net = scripts.retrain.subnet_of(args, arch, 10)
    assert {name.split(".")[1] for name, _ in net.named_parameters() if "layers" in name} == {
        "0", "1", "2", "3"
    }  # fmt: skip


@pytest.mark.slow
def test_micro_search(scripts: Any, tmp_path: Path) -> None:
    space = ["--search-for", "micro", "--auxiliary", "0.4", "--size", "32"]
    scripts.search.main(["--smoke", *space, "--output", str(tmp_path), "--device", "cpu"])
    arch = nasfx.Architecture.from_json(tmp_path / "architecture.json")
    assert len(arch) == 40
    assert len(results_of(tmp_path / "search.json")["records"]) == 2


@pytest.mark.slow
def test_micro_retrain(scripts: Any, tmp_path: Path) -> None:
    given = ["--smoke", "--search-for", "micro", "--fixed-arc", "ENAS_MICRO"]
    scripts.retrain.main([*given, "--output", str(tmp_path), "--device", "cpu"])
    results = results_of(tmp_path / "retrain.json")
    assert results["architecture"] == dict(enas.ENAS_MICRO)
    # Parameters are counted without the auxiliary head, which is trained.
    state = torch.load(tmp_path / "retrain.pt")
    learnt = sum(v.numel() for n, v in state.items() if n.endswith(("weight", "bias")))
    assert 0 < results["params"] < learnt
