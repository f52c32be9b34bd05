"""cheapen-pools: average pools become depthwise convolutions, which are faster on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from nasfx.ops.pooling import average_pool
from nasfx.ops.stages import SUPERNET
from nasfx.rewriting.editing import replace
from nasfx.rewriting.graph import graphs, has_hooks, provenance, set_provenance
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import Stage


@dataclass(frozen=True)
class CheapenPools(Pass):
    """Call average pools that move by one pixel as a convolution with equal weights.

    Rule::

        %y = call_module[pool](%x)
        ->
        %y = nasfx.ops.average_pool(%x, kernel, padding, count_include_pad)

    The sums are taken in another order; see `nasfx.ops.average_pool`. The settings are those of the
    module when the pass runs. Other strides stay: their gradients are no cheaper as convolutions.

    Declines modules with hooks, settings that differ between height and width, a divisor of the
    user's, and models that are not on a CPU.
    """

    name: ClassVar[str] = "cheapen-pools"
    consumes: ClassVar[Stage] = SUPERNET
    produces: ClassVar[Stage] = SUPERNET
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Replace the calls of the graph, and of the graphs of sampled candidates within it."""
        elsewhere = next((p.device for p in gm.parameters() if p.device.type != "cpu"), None)
        changed = [self._run(inner, ctx, elsewhere) for _, inner in graphs(gm)]
        return any(changed)

    def _run(self, gm: fx.GraphModule, ctx: PassContext, elsewhere: torch.device | None) -> bool:
        changed = False
        for node in list(gm.graph.find_nodes(op="call_module")):
            module = gm.get_submodule(str(node.target))
            if type(module) is not nn.AvgPool2d or _pair(module.stride) != (1, 1):
                continue
            reason = _obstacle(node, module)
            if elsewhere is not None:
                reason = f"the model is on {elsewhere}, not on a CPU"
            if reason:
                ctx.skip(node, reason)
                continue
            settings = _pair(module.kernel_size)[0], _pair(module.padding)[0]
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(
                    average_pool, (node.args[0], *settings, module.count_include_pad)
                )
            set_provenance(new, provenance(node), made_by="")
            replace(node, new, take_name=True)
            changed = True
        return changed


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _obstacle(node: fx.Node, pool: nn.AvgPool2d) -> str:
    """Why the function does not stand for the module, or ""."""
    if has_hooks(pool):
        return "the module has hooks"
    if len(node.args) != 1 or node.kwargs:
        return "it is called with keywords"
    if pool.divisor_override is not None:
        return "its divisor is not the number of pixels"
    if any(len(set(_pair(value))) > 1 for value in (pool.kernel_size, pool.padding)):
        return "its height and width differ in kernel or padding"
    return ""
