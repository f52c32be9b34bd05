"""share-subexpressions: what is computed twice from the same inputs is computed once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from nasfx.ops.stages import SUPERNET
from nasfx.rewriting.editing import replace
from nasfx.rewriting.effects import Effects
from nasfx.rewriting.graph import graphs, has_hooks
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import Stage

# fmt: off
_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Softmax, nn.LogSoftmax,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink, nn.Threshold, nn.GLU,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.Flatten, nn.Unflatten, nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d,
    nn.ReplicationPad2d, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
)
"""Modules without tensors of their own whose output their settings and inputs decide."""

_NAMES = {
    "abs", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "add", "amax",
    "amin", "avg_pool1d", "avg_pool2d", "avg_pool3d", "cat", "celu", "chunk", "clamp", "div",
    "elu", "exp", "flatten", "gelu", "getitem", "hardshrink", "hardsigmoid", "hardswish",
    "hardtanh", "interpolate", "leaky_relu", "log", "log_softmax", "logsigmoid", "matmul",
    "max_pool1d", "max_pool2d", "max_pool3d", "mean", "mish", "mul", "neg", "pad", "permute",
    "pixel_shuffle", "pow", "relu", "relu6", "reshape", "rsqrt", "selu", "sigmoid", "silu",
    "softmax", "softplus", "softshrink", "softsign", "split", "sqrt", "square", "squeeze", "stack",
    "sub", "sum", "tanh", "transpose", "truediv", "unsqueeze",
}
# fmt: on
"""Functions and methods whose output their arguments decide, and which do nothing else."""

_FUNCTIONS: dict[Any, str] = {
    getattr(namespace, name): name
    for namespace in (torch, F, operator)
    for name in _NAMES
    if hasattr(namespace, name)
}


@dataclass(frozen=True)
class ShareSubexpressions(Pass):
    """Let equal pure calls that read the same values be one call.

    Rule, across candidates, edges and cells::

        %a = call_module[edge.0.conv3.relu](%x) ... read by call_module[edge.0.conv3.conv]
        %b = call_module[edge.1.conv3.relu](%x) ... read by call_module[edge.1.conv3.conv]
        ->
        %a = call_module[edge.0.conv3.relu](%x)     read by both

    Pure are functions, methods and modules of torch that are known to depend on their arguments and
    settings alone; a module must have equal settings. The gradient of a shared value is the sum of
    those that its users give, added up before it goes on.

    Declines modules with hooks, which are the user's code, memory that is written in place, values
    that read a tensor of the model, which others may write to, and values that the graph returns.
    """

    name: ClassVar[str] = "share-subexpressions"
    consumes: ClassVar[Stage] = SUPERNET
    produces: ClassVar[Stage] = SUPERNET
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Walk every graph in order, so that the inputs of a call are shared before it is."""
        changed = False
        for _, inner in graphs(gm):
            effects = Effects(inner.graph)
            first: dict[Hashable, fx.Node] = {}
            for node in list(inner.graph.nodes):
                key = _key(inner, node)
                known = node if key is None else first.setdefault(key, node)
                if known is node:
                    continue
                reason = sharing_obstacle(inner, known, effects) or sharing_obstacle(
                    inner, node, effects
                )
                if reason:
                    ctx.skip(node, f"it equals %{known.name}, but {reason}")
                    continue
                replace(node, known)
                changed = True
        return changed


def sharing_obstacle(gm: fx.GraphModule, node: fx.Node, effects: Effects) -> str:
    """Why the value of a pure call may not be that of an equal one, or ""."""
    if node.op == "call_module" and has_hooks(gm.get_submodule(str(node.target))):
        return "the module has hooks"
    touched = {effects.base[n] for n in (node, *node.all_input_nodes)}
    if any(base in effects.writers for base in touched):
        return "memory that it reads or gives is written in place"
    if any(base.op == "get_attr" for base in touched):
        return "it reads a tensor of the model"
    shared = effects.sharing[effects.base[node]]
    if any(user.op == "output" for alias in shared for user in alias.users):
        return "it is returned, and the caller may write to it"
    return ""


def _key(gm: fx.GraphModule, node: fx.Node) -> Hashable:
    """What equal pure calls have in common; None for calls that are not known to be pure."""
    called: Hashable = None
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if type(module) in _MODULES:
            settings = {k: v for k, v in vars(module).items() if k[0] != "_" and k != "training"}
            called = type(module), _frozen(settings)
    elif node.op == "call_function":
        called = _FUNCTIONS.get(node.target) and node.target
    elif node.op == "call_method" and node.target in _NAMES:
        called = node.target
    if called is None:
        return None
    try:
        hash(key := (node.op, called, _frozen(node.args), _frozen(node.kwargs)))
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Hashable:
    """`value` as something to compare: 1, 1.0 and True differ, and so do lists and tuples."""
    freeze: Callable[[Any], Hashable] = _frozen
    if isinstance(value, list | tuple):
        return type(value), tuple(map(freeze, value))
    if isinstance(value, dict):
        return dict, tuple((k, freeze(v)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return slice, tuple(map(freeze, (value.start, value.stop, value.step)))
    return value if isinstance(value, fx.Node) else (type(value), value)
