"""Running a graph, all candidates of its choices included, without computing anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from nasfx.choice import Choice, LayerChoice, call_candidate, tensor_arguments
from nasfx.errors import TraceError
from nasfx.rewriting.graph import graphs, join, provenance
from nasfx.rewriting.printing import format_node

_DATA_DEPENDENT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

Record = Callable[[fx.Node, str, tuple[str, ...], Any], None]
"""(node, candidate, calls, value): what a node gave, or, where `candidate` is not "", a candidate
of the choice that it calls; `calls` names the choice calls around the node, outer ones first. A
directly nested choice's candidates are named `outer.inner`."""


class Stopped(Exception):  # noqa: N818  # not an error by itself
    """A node's value depends on what the tensors hold.

    Attributes:
        node: the node.
        reason: why.
    """

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(node, reason)
        self.node, self.reason = node, reason


def run_on_fakes(
    gm: fx.GraphModule,
    example_inputs: tuple[Any, ...],
    record: Record,
    *,
    evaluating: bool = False,
    within: AbstractContextManager[Any] | None = None,
) -> None:
    """Run a fake copy of `gm` on fake copies of the inputs; no buffer of the user's moves.

    Args:
        gm: a graph module of stage CHOICE.
        example_inputs: what it takes.
        record: called after every node and after every candidate, with the nodes of `gm`.
        evaluating: run in eval mode and not in the mode that `gm` is in.
        within: a context for the run itself.

    Raises:
        TraceError: the example inputs do not run.
        Stopped: they do up to a node whose value depends on what the tensors hold.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    needed = sum(not node.args for node in placeholders)
    if not needed <= len(example_inputs) <= len(placeholders):
        names = ", ".join(str(node.target) for node in placeholders)
        raise TraceError(
            f"the example inputs do not run: there are {len(example_inputs)}, and the "
            f"model takes {names or 'none'}"
        )
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with FakeCopyMode(mode):
            fake = copy.deepcopy(gm, _unused(gm))
            inputs = copy.deepcopy(example_inputs)
        if evaluating:
            fake.eval()
        originals = {
            new: old
            for (_, a), (_, b) in zip(graphs(gm), graphs(fake), strict=True)
            for old, new in zip(a.graph.nodes, b.graph.nodes, strict=True)
        }
        with torch.no_grad(), within or nullcontext():
            try:
                _Interpreter(fake, originals, record, ()).run(*inputs)
            except _Failed as failed:
                if not isinstance(failed.error, _DATA_DEPENDENT) and not failed.opaque:
                    raise TraceError(
                        f"the example inputs do not run: {format_node(failed.node)} "
                        f"{failed.candidate}({provenance(failed.node).site}): {failed.error}"
                    ) from failed.error
                reason = f"its shape depends on values ({failed.error})"
                raise Stopped(failed.node, reason) from failed.error


def _unused(gm: fx.GraphModule) -> dict[int, Any]:
    """A memo for deepcopy that leaves out the children which the graph does not name."""
    named = {
        str(n.target).split(".")[0] for n in gm.graph.nodes if n.op in ("call_module", "get_attr")
    }
    return {id(child): child for name, child in gm.named_children() if name not in named}


class _Failed(Exception):  # noqa: N818  # not an error by itself
    def __init__(
        self, node: fx.Node, error: Exception, module: nn.Module | None, candidate: str = ""
    ) -> None:
        super().__init__(node, error)
        self.node, self.error = node, error
        self.candidate = f"candidate {candidate!r} " if candidate else ""
        # A module of the user's own, whose code may need real values.
        ours = module is None or isinstance(module, Choice)
        self.opaque = not ours and not type(module).__module__.startswith("torch.nn")


class _Interpreter(fx.Interpreter):
    def __init__(
        self,
        gm: fx.GraphModule,
        originals: dict[fx.Node, fx.Node],
        record: Record,
        calls: tuple[str, ...],
    ) -> None:
        super().__init__(gm)
        self.gm, self.originals, self.record, self.calls = gm, originals, record, calls
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and of a choice every candidate."""
        original = self.originals[n]
        module = self.gm.get_submodule(str(n.target)) if n.op == "call_module" else None
        try:
            if isinstance(module, LayerChoice):
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                result = self._choice(original, module, "", args, kwargs)
            else:
                result = super().run_node(n)
        except _Failed:
            raise
        except Exception as error:
            raise _Failed(original, error, module) from error
        self.record(original, "", self.calls, result)
        return result

    def _choice(
        self, call: fx.Node, choice: LayerChoice, prefix: str, args: Any, kwargs: Any
    ) -> Any:
        outputs = {
            name: self._candidate(call, choice, name, join(prefix, name), args, kwargs)
            for name in choice.candidates
        }
        return outputs[choice.active]

    def _candidate(
        self, call: fx.Node, choice: LayerChoice, name: str, where: str, args: Any, kwargs: Any
    ) -> Any:
        candidate = choice._modules[name]
        if isinstance(candidate, LayerChoice):
            value = self._choice(call, candidate, where, args, kwargs)
        elif isinstance(candidate, fx.GraphModule) and choice.structure is not None:
            tensors = tensor_arguments(choice.structure, args, kwargs)
            inner = _Interpreter(candidate, self.originals, self.record, (*self.calls, call.name))
            value = inner.run(*tensors)
        else:
            try:
                value = call_candidate(candidate, choice.structure, args, kwargs)
            except Exception as error:
                raise _Failed(call, error, candidate, where) from error
        self.record(call, where, self.calls, value)
        return value
