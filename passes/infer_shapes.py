"""infer-shapes: the shape of every value, from the example inputs, without computing anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from nasfx.fake_run import Stopped, run_on_fakes
from nasfx.ops.stages import CHOICE
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import Stage


@dataclass(frozen=True)
class InferShapes(Pass):
    """Record in `meta["shape"]` what shape every node gives, and of choices every candidate's.

    Runs the graph, all candidates included, on fake copies of the model and of the example inputs:
    nothing is computed and no buffer moves. Without example inputs it does nothing. Declines from
    the first node whose shape depends on values (an opaque module that reads its input's contents).
    """

    name: ClassVar[str] = "infer-shapes"
    consumes: ClassVar[Stage] = CHOICE
    produces: ClassVar[Stage] = CHOICE
    exactness: ClassVar[Exactness] = Exactness.BITWISE

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Interpret a fake copy and note the shapes on the nodes of `gm`; no node changes."""
        if ctx.example_inputs is None:
            return False

        def record(node: fx.Node, candidate: str, calls: tuple[str, ...], value: Any) -> None:
            if not candidate:
                node.meta["shape"] = shape(value)
            elif "." not in candidate:  # those of a directly nested choice are its own affair
                node.meta.setdefault("candidate_shapes", {})[candidate] = shape(value)

        try:
            run_on_fakes(gm, ctx.example_inputs, record)
        except Stopped as stopped:
            ctx.skip(stopped.node, stopped.reason)
        return False


def shape(value: Any) -> Any:
    """The shape of a tensor, or a structure of shapes."""
    return pytree.tree_map(
        lambda leaf: leaf.shape if isinstance(leaf, torch.Tensor) else type(leaf).__name__, value
    )
