"""infer-shapes: the shape of every value, from the example inputs, without computing anything."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils import _pytree as pytree

from nasfx.choice import Choice, LayerChoice, call_candidate, tensor_arguments
from nasfx.errors import TraceError
from nasfx.ops.stages import CHOICE
from nasfx.rewriting.graph import graphs, provenance
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.printing import format_node
from nasfx.rewriting.verifier import Stage

_DATA_DEPENDENT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)


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
        placeholders = gm.graph.find_nodes(op="placeholder")
        needed = sum(not node.args for node in placeholders)
        if not needed <= len(ctx.example_inputs) <= len(placeholders):
            names = ", ".join(str(node.target) for node in placeholders)
            raise TraceError(
                f"the example inputs do not run: there are {len(ctx.example_inputs)}, and the "
                f"model takes {names or 'none'}"
            )
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            with FakeCopyMode(mode):
                fake = copy.deepcopy(gm, _unused(gm))
                inputs = copy.deepcopy(ctx.example_inputs)
            originals = {
                new: old
                for (_, a), (_, b) in zip(graphs(gm), graphs(fake), strict=True)
                for old, new in zip(a.graph.nodes, b.graph.nodes, strict=True)
            }
            with torch.no_grad():
                try:
                    _ShapeInterpreter(fake, originals).run(*inputs)
                except _Stopped as stopped:
                    if not isinstance(stopped.error, _DATA_DEPENDENT) and not stopped.opaque:
                        raise TraceError(
                            f"the example inputs do not run: {format_node(stopped.node)} "
                            f"{stopped.candidate}({provenance(stopped.node).site}): {stopped.error}"
                        ) from stopped.error
                    ctx.skip(stopped.node, f"its shape depends on values ({stopped.error})")
        return False


def _unused(gm: fx.GraphModule) -> dict[int, Any]:
    """A memo for deepcopy that leaves out the children which the graph does not name."""
    named = {
        str(n.target).split(".")[0] for n in gm.graph.nodes if n.op in ("call_module", "get_attr")
    }
    return {id(child): child for name, child in gm.named_children() if name not in named}


class _Stopped(Exception):  # noqa: N818  # not an error by itself
    def __init__(
        self, node: fx.Node, error: Exception, module: nn.Module | None, candidate: str = ""
    ) -> None:
        super().__init__(node, error)
        self.node, self.error = node, error
        self.candidate = f"candidate {candidate!r} " if candidate else ""
        # A module of the user's own, whose code may need real values.
        ours = module is None or isinstance(module, Choice)
        self.opaque = not ours and not type(module).__module__.startswith("torch.nn")


class _ShapeInterpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, originals: dict[fx.Node, fx.Node]) -> None:
        super().__init__(gm)
        self.gm = gm
        self.originals = originals
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and of a choice every candidate."""
        original = self.originals[n]
        choice = self.gm.get_submodule(str(n.target)) if n.op == "call_module" else None
        try:
            if isinstance(choice, LayerChoice):
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                outputs = {
                    name: self._candidate(original, choice, name, args, kwargs)
                    for name in choice.candidates
                }
                original.meta["candidate_shapes"] = {k: shape(v) for k, v in outputs.items()}
                result = outputs[choice.active]
            else:
                result = super().run_node(n)
        except _Stopped:
            raise
        except Exception as error:
            called = self.gm.get_submodule(str(n.target)) if n.op == "call_module" else None
            raise _Stopped(original, error, called) from error
        original.meta["shape"] = shape(result)
        return result

    def _candidate(
        self, call: fx.Node, choice: LayerChoice, name: str, args: Any, kwargs: Any
    ) -> Any:
        candidate = choice._modules[name]
        if isinstance(candidate, fx.GraphModule) and choice.structure is not None:
            tensors = tensor_arguments(choice.structure, args, kwargs)
            return _ShapeInterpreter(candidate, self.originals).run(*tensors)
        try:
            return call_candidate(candidate, choice.structure, args, kwargs)
        except Exception as error:
            raise _Stopped(call, error, candidate, name) from error


def shape(value: Any) -> Any:
    """The shape of a tensor, or a structure of shapes."""
    return pytree.tree_map(
        lambda leaf: leaf.shape if isinstance(leaf, torch.Tensor) else type(leaf).__name__, value
    )
