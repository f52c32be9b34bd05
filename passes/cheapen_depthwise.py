"""cheapen-depthwise: depthwise convolutions get a backward that is fast on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from nasfx.ops.depthwise import depthwise_conv
from nasfx.ops.stages import SUPERNET
from nasfx.rewriting.editing import attribute, replace
from nasfx.rewriting.graph import graphs, has_hooks, provenance, set_provenance
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import Stage


@dataclass(frozen=True)
class CheapenDepthwise(Pass):
    """Call wide and dilated depthwise convolutions as a function with gradients of its own.

    Rule, for kernels wider than 3 or dilated, with a group per channel::

        %y = call_module[conv](%x)
        ->
        %conv_weight = get_attr[conv.weight]
        %y = nasfx.ops.depthwise_conv(%x, %conv_weight, None, stride, padding, dilation)

    The gradients are the same sums in another order; see `nasfx.ops.depthwise_conv`. The settings
    are those of the module when the pass runs.

    Declines modules with hooks, settings that differ between height and width, padding with other
    values than zeros, and models that are not on a CPU.
    """

    name: ClassVar[str] = "cheapen-depthwise"
    consumes: ClassVar[Stage] = SUPERNET
    produces: ClassVar[Stage] = SUPERNET
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Replace the calls of the graph, and of the graphs of sampled candidates within it."""
        changed = [self._run(inner, ctx) for _, inner in graphs(gm)]
        return any(changed)

    def _run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        changed = False
        tensors: dict[str, fx.Node] = {}
        for node in list(gm.graph.find_nodes(op="call_module")):
            module = gm.get_submodule(str(node.target))
            if type(module) is not nn.Conv2d or not _has_slow_backward(module):
                continue
            if reason := _obstacle(node, module):
                ctx.skip(node, reason)
                continue
            self._replace(gm, node, module, tensors)
            changed = True
        return changed

    def _replace(
        self, gm: fx.GraphModule, node: fx.Node, module: nn.Conv2d, tensors: dict[str, fx.Node]
    ) -> None:
        with gm.graph.inserting_before(node):
            for name in ("weight", "bias"):
                target = f"{node.target}.{name}"
                if getattr(module, name) is not None and target not in tensors:
                    tensors[target] = attribute(gm.graph, target)
                    set_provenance(tensors[target], provenance(node), made_by="")
        weight, bias = (tensors.get(f"{node.target}.{name}") for name in ("weight", "bias"))
        settings = module.stride[0], int(module.padding[0]), module.dilation[0]
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(depthwise_conv, (node.args[0], weight, bias, *settings))
        set_provenance(new, provenance(node), made_by="")
        replace(node, new, take_name=True)


def _has_slow_backward(conv: nn.Conv2d) -> bool:
    per_channel = conv.groups == conv.in_channels == conv.out_channels > 1
    return per_channel and (max(conv.kernel_size) > 3 or max(conv.dilation) > 1)


def _obstacle(node: fx.Node, conv: nn.Conv2d) -> str:
    """Why the function does not stand for the module, or ""."""
    if conv.weight.device.type != "cpu":
        return f"it is on {conv.weight.device}, not on a CPU"
    if has_hooks(conv):
        return "the module has hooks"
    if len(node.args) != 1 or node.kwargs:
        return "it is called with keywords"
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return f"its padding is {conv.padding!r} with {conv.padding_mode}"
    settings = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    if any(height != width for height, width in settings):
        return "its height and width differ in kernel, stride, padding or dilation"
    return ""
