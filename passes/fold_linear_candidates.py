"""fold-linear-candidates: convolutions that a mixture sums are one convolution."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import fx, nn

from nasfx.ops.folding import folded_conv
from nasfx.ops.mix import mix
from nasfx.ops.stages import SUPERNET
from nasfx.rewriting.editing import attribute, replace
from nasfx.rewriting.graph import has_hooks, provenance, set_provenance
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import Stage

Settings = tuple[Any, ...]


@dataclass(frozen=True)
class FoldLinearCandidates(Pass):
    """Sum the kernels of candidates that are convolutions, in place of their outputs.

    Rule, for two or more that read one value and that the mixture alone reads::

        %k3 = call_module[block.k3](%x)
        %k5 = call_module[block.k5](%x)
        %block = nasfx.ops.mix(%gate, [%k3, %k5, %x], label='block')
        ->
        %block_k3_weight = get_attr[block.k3.weight]
        %block_k5_weight = get_attr[block.k5.weight]
        %folded = nasfx.ops.folded_conv(%gate, [0, 1], %x, [%block_k3_weight, %block_k5_weight],
                                        [None, None], stride, padding, dilation, groups)
        %mix = nasfx.ops.mix(%gate, [0, 0, %x], label='block')
        %block = operator.add(%mix, %folded)

    Convolution is linear, so this is the same sum. It costs one convolution of the widest kernel.

    Those of one stride, dilation and number of groups whose kernels have one centre are folded.
    Declines modules with hooks, kernels and settings that differ between height and width, even
    kernels, and padding with other values than zeros.
    """

    name: ClassVar[str] = "fold-linear-candidates"
    consumes: ClassVar[Stage] = SUPERNET
    produces: ClassVar[Stage] = SUPERNET
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Fold the mixtures of the graph."""
        changed = False
        for node in list(gm.graph.find_nodes(op="call_function", target=mix)):
            groups: dict[Settings, list[int]] = {}
            for k, value in enumerate(cast("Sequence[Any]", node.args[1])):
                if (settings := _settings(gm, value, node)) is not None:
                    groups.setdefault(settings, []).append(k)
            for candidates in groups.values():
                if len(candidates) > 1 and not _refused(gm, node, candidates, ctx):
                    node = _fold(gm, node, candidates)
                    changed = True
        return changed


def _fold(gm: fx.GraphModule, node: fx.Node, candidates: list[int]) -> fx.Node:
    """Fold candidates of a mixture; the mixture of the others, or else the folded one."""
    graph, gate, outputs = gm.graph, node.args[0], list(cast("Sequence[Any]", node.args[1]))
    calls = [cast("fx.Node", outputs[k]) for k in candidates]
    convs = [_conv(gm, call) for call in calls]
    widest = max(convs, key=lambda conv: conv.kernel_size[0])
    with graph.inserting_before(node):
        tensors = [[_read(graph, c, m, name) for c, m in zip(calls, convs, strict=True)]
                   for name in ("weight", "bias")]  # fmt: skip
        settings = widest.stride[0], int(widest.padding[0]), widest.dilation[0], widest.groups
        folded = graph.call_function(
            folded_conv, (gate, candidates, calls[0].args[0], *tensors, *settings)
        )
        set_provenance(folded, provenance(node), made_by="")
        others = [0 if k in candidates else value for k, value in enumerate(outputs)]
        rest, result = node, folded
        if any(value != 0 for value in others):
            rest = graph.call_function(mix, (gate, others), node.kwargs)
            result = graph.call_function(operator.add, (rest, folded))
            for new in (rest, result):
                set_provenance(new, provenance(node), made_by="")
    replace(node, result, take_name=True)
    for call in calls:
        graph.erase_node(call)
    return rest if rest is not node else folded


def _read(graph: fx.Graph, call: fx.Node, conv: nn.Conv2d, name: str) -> fx.Node | None:
    if getattr(conv, name) is None:
        return None
    node = attribute(graph, f"{call.target}.{name}")
    set_provenance(node, provenance(call), made_by="")
    return node


def _conv(gm: fx.GraphModule, call: fx.Node) -> nn.Conv2d:
    return cast("nn.Conv2d", gm.get_submodule(str(call.target)))


def _settings(gm: fx.GraphModule, value: Any, mixture: fx.Node) -> Settings | None:
    """What convolutions that are folded have in common; None for what may not be folded."""
    if not isinstance(value, fx.Node) or value.op != "call_module":
        return None
    conv = gm.get_submodule(str(value.target))
    if type(conv) is not nn.Conv2d or len(value.args) != 1 or value.kwargs:
        return None
    reads = cast("Sequence[Any]", mixture.args[1]).count(value)
    if len(value.users) > 1 or reads > 1 or isinstance(conv.padding, str):
        return None
    centre = conv.padding[0] - conv.dilation[0] * (conv.kernel_size[0] - 1) // 2
    return value.args[0], conv.stride, conv.dilation, conv.groups, centre


def _refused(
    gm: fx.GraphModule, mixture: fx.Node, candidates: Sequence[int], ctx: PassContext
) -> bool:
    """Whether a module among them is in the way; all reasons are recorded."""
    calls = [cast("Sequence[fx.Node]", mixture.args[1])[k] for k in candidates]
    reasons = [(call, _obstacle(_conv(gm, call))) for call in calls]
    for call, reason in reasons:
        if reason:
            ctx.skip(call, reason)
    return any(reason for _, reason in reasons)


def _obstacle(conv: nn.Conv2d) -> str:
    if has_hooks(conv):
        return "the module has hooks"
    if conv.padding_mode != "zeros":
        return f"its padding is {conv.padding!r} with {conv.padding_mode}"
    settings = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    if any(height != width for height, width in settings):
        return "its height and width differ in kernel, stride, padding or dilation"
    if conv.kernel_size[0] % 2 == 0:
        return f"its kernel has no centre: it is {conv.kernel_size[0]} pixels wide"
    return ""
