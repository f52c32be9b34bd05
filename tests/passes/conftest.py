"""What the tests of passes share: a traced model, and a graph that one pass has rewritten."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import nasfx
from nasfx.rewriting.graph import ModelGraph, copy_graph_module
from nasfx.rewriting.passes import Pass, PassContext
from nasfx.space import space_of
from nasfx.strategies import strategy_named

Lower = Callable[..., tuple[ModelGraph, PassContext]]


@pytest.fixture
def lower() -> Lower:
    """`lower(model, *passes, strategy=, **context)`: the rewritten graph and the context.

    The graph has the architecture state of `strategy` at `arch`, in float64.
    """

    def run(
        model: nn.Module, *passes: Pass, strategy: str = "darts", **context: Any
    ) -> tuple[ModelGraph, PassContext]:
        traced = nasfx.trace(model)
        gm = copy_graph_module(traced.graph_module)
        arch = strategy_named(strategy).arch_state(space_of(traced), 0, torch.float64)
        gm._modules["arch"] = arch
        ctx = PassContext(**context)
        for rewrite in passes:
            ctx.skips.clear()
            rewrite(gm, ctx)
        return gm, ctx

    return run
