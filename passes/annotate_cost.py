"""annotate-cost: what every call costs, from the example inputs, without computing anything."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from nasfx.choice import InputChoice, LayerChoice
from nasfx.costs.count import FlopCounter, batch_size, per_sample, size_in_bytes
from nasfx.errors import NasfxError, SpaceError
from nasfx.fake_run import Stopped, run_on_fakes
from nasfx.ops.stages import CHOICE
from nasfx.rewriting.editing import is_identity
from nasfx.rewriting.graph import graphs, has_hooks, join, provenance
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.printing import format_node
from nasfx.rewriting.verifier import Stage


@dataclass(frozen=True)
class AnnotateCost(Pass):
    """Record in `meta["costs"]` what every call node costs on one sample.

    `meta["costs"]` maps (calls, candidate) to a `nasfx.Count` of multiply-accumulates, parameters
    and bytes of the output; `calls` are the names of the choice calls around the node, since a
    choice may be called twice, and `candidate` is "" but for candidates without a graph, which are
    recorded at the node that calls their choice. Parameters are those of the called module. For an
    input choice the bytes are those of what it gives.

    Runs the graph, all candidates included, on fake copies of the model in eval mode and of the
    example inputs. Needs these; refuses a node whose cost depends on what tensors hold, and
    candidates whose outputs differ in shape.
    """

    name: ClassVar[str] = "annotate-cost"
    consumes: ClassVar[Stage] = CHOICE
    produces: ClassVar[Stage] = CHOICE
    exactness: ClassVar[Exactness] = Exactness.BITWISE

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Interpret a fake copy and note the costs on the nodes of `gm`; no node changes."""
        if ctx.example_inputs is None:
            raise NasfxError("costs need example_inputs, from which the shapes come")
        batch = batch_size(ctx.example_inputs)
        counter = FlopCounter()
        seen = 0
        shapes = _Shapes()

        def record(node: fx.Node, candidate: str, calls: tuple[str, ...], value: Any) -> None:
            nonlocal seen
            total = counter.get_total_flops()
            flops, seen = total - seen, total
            shapes.note(node, candidate, calls, value)
            module = _called(node, candidate)
            if not node.op.startswith("call_") or isinstance(module, LayerChoice | fx.GraphModule):
                return
            if candidate and is_identity(module) and not has_hooks(module):
                return  # no call is left of it in a subnet
            counted = candidate or isinstance(module, InputChoice) or isinstance(value, Tensor)
            moved = size_in_bytes(value) if counted and not _of_a_candidate(node) else 0
            params = sum(p.numel() for p in module.parameters())
            what = f"{format_node(node)} ({provenance(node).site})"
            count = per_sample(what, batch, flops, params, moved)
            node.meta.setdefault("costs", {})[calls, candidate] = count

        for _, inner in graphs(gm):
            for node in inner.graph.nodes:
                node.meta.pop("costs", None)
        try:
            run_on_fakes(gm, ctx.example_inputs, record, evaluating=True, within=counter)
        except Stopped as stopped:
            raise NasfxError(
                f"the cost of {format_node(stopped.node)} is not known: {stopped.reason} "
                f"({provenance(stopped.node).site})"
            ) from stopped
        shapes.check()
        return False


class _Shapes:
    """The shapes of all values, of which those that a choice chooses among must be alike."""

    def __init__(self) -> None:
        self.of: dict[tuple[fx.Node, tuple[str, ...]], object] = {}
        self.first: dict[tuple[fx.Node, str, tuple[str, ...]], tuple[str, object]] = {}
        self.wrong: list[SpaceError] = []

    def note(self, node: fx.Node, candidate: str, calls: tuple[str, ...], value: Any) -> None:
        shape = tree_map(lambda x: list(x.shape) if isinstance(x, Tensor) else None, value)
        choice = _called(node, candidate)
        if candidate:
            outer, _, name = candidate.rpartition(".")
            self._compare(node, outer, calls, f"candidate {name!r}", shape)
        else:
            self.of[node, calls] = shape
        if isinstance(choice, InputChoice) and choice.n_chosen != choice.n_candidates:
            for i, source in enumerate(cast("Sequence[fx.Node]", node.args[0])):
                self._compare(node, "", calls, f"input {i}", self.of[source, calls])

    def _compare(
        self, node: fx.Node, outer: str, calls: tuple[str, ...], name: str, shape: object
    ) -> None:
        first, alike = self.first.setdefault((node, outer, calls), (name, shape))
        if alike != shape:
            self.wrong.append(
                SpaceError(
                    f"choice {_called(node, outer).label!r} ({provenance(node).site}): {first} "
                    f"gives {alike} and {name} gives {shape}. Then what follows costs more or less "
                    "by what is chosen here, and costs do not add up: give them one shape, or "
                    "search without an objective"
                )
            )

    def check(self) -> None:
        if self.wrong:
            raise self.wrong[0]


_NOTHING = nn.Module()


def _called(node: fx.Node, candidate: str) -> nn.Module:
    """The module that `node` calls, or its choice's candidate; an empty one for functions."""
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return _NOTHING
    return owner.get_submodule(join(str(node.target), candidate))


def _of_a_candidate(node: fx.Node) -> bool:
    """Whether `node` takes out an item that a candidate's graph returns: no subnet has it."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        choice = _called(node, "")
        if isinstance(choice, LayerChoice):
            return all(isinstance(c, fx.GraphModule) for _, c in choice.named_candidates())
    return False
