"""Where the nodes of an exported graph come from: the user's module, and the choice it stands in.

Torch's exporter notes the stack of modules that a node was called in. In a subnet, a graph whose
functions have lost the module that called them, every call gets a module around it while it is
exported, and these stand in the stack; what they stand for is what `finalize` recorded.
"""

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from nasfx.costs.metadata import CHOICE, MODULE, origin_entries
from nasfx.subnet import origins

_SCOPE = "_nasfx_call_{}"
_SCOPES = "pkg.torch.onnx.name_scopes"
# Operators into whose weights the exporter folds what follows them, and the functions they are of.
_FOLDING = {"Conv": ("conv",), "ConvTranspose": ("conv",), "Gemm": ("linear", "mm", "matmul")}


@dataclass(frozen=True)
class Origin:
    """Where a call of a subnet comes from: its module's path, its choice, whether it is a leaf."""

    module: str
    choice: str
    is_module: bool


class _Call(nn.Module):
    """A call of its own in the stack of modules; what it calls stays a child of the subnet."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = (call,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call[0](*args, **kwargs)


class _Method:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, owner: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(owner, self.name)(*args, **kwargs)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of what fx loses in copies of unpickled subnets."""
    new = copy.deepcopy(model)
    for old, twin in zip(model.modules(), new.modules(), strict=True):
        if isinstance(old, fx.GraphModule) and "_origins" in old.__dict__:
            twin.__dict__["_origins"] = old.__dict__["_origins"]
    return new


def scoped(model: nn.Module) -> tuple[nn.Module, dict[str, Origin]]:
    """The model with a module around every call of the subnets in it, and what they stand for.

    A model without subnets is returned itself, another as a copy.
    """
    if not any(_subnets(model)):
        return model, {}
    model = copied(model)
    found: dict[str, Origin] = {}
    for subnet in list(_subnets(model)):
        for node, (module, choice) in origins(subnet).items():
            name = _SCOPE.format(len(found))
            found[name] = Origin(module, choice, node.op == "call_module")
            subnet.add_module(name, _Call(_callable(subnet, node)).train(subnet.training))
            node.op, node.target = "call_module", name
            # An unpickled graph holds the stack of when it was read, which torch would take.
            node.meta.pop("nn_module_stack", None)
        subnet.recompile()
    return model, found


def _subnets(model: nn.Module) -> Iterator[fx.GraphModule]:
    return (m for m in model.modules() if isinstance(m, fx.GraphModule) and origins(m))


def _callable(gm: fx.GraphModule, node: fx.Node) -> Callable[..., Any]:
    if node.op == "call_module":
        return gm.get_submodule(str(node.target))
    return _Method(str(node.target)) if node.op == "call_method" else node.target  # type: ignore[return-value]


def record(program: Any, scopes: Mapping[str, Origin]) -> None:
    """Write module and choice into the metadata of every node that torch's exporter made."""
    calls = {node.name: node for node in program.exported_program.graph.nodes}
    for node in program.model.graph.all_nodes():
        stack = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        call = _carrier(node.op_type, calls.get(stack[-1])) if stack else None
        if call is None:
            continue
        paths = [path for path, _ in call.meta.get("nn_module_stack", {}).values()]
        module, choice = _origin(paths, scopes)
        node.metadata_props.update(
            {key: text for key, text in ((MODULE, module), (CHOICE, choice)) if text}
        )


def _carrier(op_type: str, call: fx.Node | None) -> fx.Node | None:
    """The call that the operator is of: a batch norm may have been folded into a convolution."""
    words = _FOLDING.get(op_type, ())
    while call is not None and words and not any(word in str(call.target) for word in words):
        inputs = [n for n in call.all_input_nodes if n.op == "call_function"]
        call = inputs[0] if len(inputs) == 1 else None
    return call


def _origin(paths: list[str], scopes: Mapping[str, Origin]) -> tuple[str, str]:
    """Module and choice of a call in this stack of modules, outermost first."""
    for i, path in enumerate(paths):
        parent, _, name = path.rpartition(".")
        if name not in scopes:
            continue
        origin, below = scopes[name], paths[i + 1 :]
        module = ".".join(part for part in (parent, origin.module) if part)
        if origin.is_module and below and f"{below[-1]}.".startswith(f"{below[0]}."):
            # One module may be called under several paths, and torch knows the first of them.
            module += below[-1].removeprefix(below[0])
        return module, origin.choice
    return (paths[-1] if paths else ""), ""


Names = dict[tuple[str, str], dict[str, str]]
"""Modules and choices by ("node", its name) and ("value", the name of an output)."""


def recorded(proto: Any) -> Names:
    """What `record` wrote; without the names that are empty or that two nodes have."""
    found: Names = {}
    seen: Counter[tuple[str, str]] = Counter()
    for node in proto.graph.node:
        for key in [("node", node.name), *(("value", name) for name in node.output)]:
            found[key] = origin_entries(node)
            seen[key] += 1
    return {key: entries for key, entries in found.items() if key[1] and seen[key] == 1}


def restore(model: Any, names: Names) -> None:
    """Write what was `recorded` to the nodes that a simplifier has left.

    A node that others were merged into has kept its name, or else that of the value it computes.
    """
    for node in model.graph:
        keys = [("node", node.name), *(("value", value.name) for value in node.outputs)]
        node.metadata_props.update(next((names[key] for key in keys if key in names), {}))
