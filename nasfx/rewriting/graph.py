"""Graphs over a module tree: what passes rewrite, and how it is copied, walked and pickled.

`fx.GraphModule` copies the attributes that its graph names into containers of its own. A
compiler that rewrites a user's model needs the opposite: several graphs (before and after
lowering, in train and in eval mode) over *one* set of tensors that keeps the user's names, so that
`.to()`, `load_state_dict` and training reach all of them. `ModelGraph` is that graph module.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import fx, nn


@dataclass(frozen=True)
class Provenance:
    """Where a node comes from.

    Attributes:
        site: the user's `file:line`, or "" where there is none.
        module: the path of the module whose `forward` made the node.
        label: the construct (for nasfx: the choice) that the node belongs to, or "".
        part: the part of it (for nasfx: the candidate), or "".
        made_by: the pass that made the node; "" for tracing.
    """

    site: str = ""
    module: str = ""
    label: str = ""
    part: str = ""
    made_by: str = ""


_NOWHERE = Provenance()

_TREE = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


def provenance(node: fx.Node) -> Provenance:
    """The provenance of `node`; an empty one where nothing was recorded."""
    return node.meta.get("nasfx", _NOWHERE)


def set_provenance(node: fx.Node, origin: Provenance, **changes: str) -> fx.Node:
    """Record `origin`, with `changes`, as the provenance of `node`."""
    node.meta["nasfx"] = replace(origin, **changes) if changes else origin
    return node


class TextGraph(fx.Graph):
    """A graph that prints in nasfx's own, stable form, with the graphs inside its nodes beneath."""

    def __str__(self) -> str:
        from nasfx.rewriting.printing import format_graph

        owner = self.owning_module
        return super().__str__() if owner is None else format_graph(owner)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> fx.Graph:
        copied = super().__deepcopy__(memo)
        copied.__class__ = TextGraph
        return copied


class ModelGraph(fx.GraphModule):
    """A graph module that shares its tree's dictionaries instead of copying what it names.

    Children, parameters and buffers are the very dictionaries of `root`, so the whole tree stays
    reachable under the user's names and a tensor rebound in one graph is rebound in all. Code is
    generated at the first call, which keeps building thousands of small graphs cheap. Pickling
    stores the nodes themselves (names and provenance survive), not source to be traced again.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "ModelGraph") -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name)
        share_tree(self, root)
        self.__dict__.update(_plain_tensors(root))
        if type(graph) is fx.Graph:
            graph.__class__ = TextGraph  # the same object with another way to print
        self.graph = graph
        self.training = root.training
        self.meta.update(copy.copy(getattr(root, "meta", None) or {}))

    def recompile(self) -> Any:
        """Forget the generated code; the next call generates it anew."""
        if "forward" in vars(type(self)):
            del type(self).forward
        self.__dict__["_code"] = ""

    def generate_code(self) -> None:
        """Generate the code, if that was not done since the last `recompile`."""
        if "forward" not in vars(type(self)):
            super().recompile()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Generate the code, then run it; `recompile` installs it in place of this method."""
        self.generate_code()
        return type(self).forward(self, *args, **kwargs)

    @property
    def code(self) -> str:
        """The generated Python source."""
        self.generate_code()
        return self._code

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelGraph:
        shell = nn.Module()
        memo[id(self)] = new = type(self).__new__(type(self))
        for name in _TREE:
            shell.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        shell.__dict__.update(copy.deepcopy(_plain_tensors(self), memo))
        shell.training = self.training
        ModelGraph.__init__(new, shell, copy.deepcopy(self.graph), type(self).__name__)
        new.meta = copy.deepcopy(self.meta, memo)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: self.__dict__[name] for name in _TREE}
        state |= {"training": self.training, "meta": self.meta, **_plain_tensors(self)}
        return _unpickled, (state, dump_graph(self.graph), type(self).__name__)


def _plain_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that are mere attributes, which a graph may read all the same."""
    return {k: v for k, v in module.__dict__.items() if isinstance(v, torch.Tensor)}


def _unpickled(state: dict[str, Any], nodes: list[tuple[Any, ...]], name: str) -> ModelGraph:
    shell = nn.Module()
    shell.__dict__.update(state)
    return ModelGraph(shell, load_graph(nodes), name)


@dataclass(frozen=True)
class _Ref:
    index: int


def dump_graph(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The nodes of `graph` as plain tuples, with references by position."""
    index = {node: i for i, node in enumerate(graph.nodes)}
    to_ref: Any = lambda node: _Ref(index[node])  # noqa: E731
    return [
        (
            node.op,
            node.target,
            fx.map_arg(node.args, to_ref),
            fx.map_arg(node.kwargs, to_ref),
            node.name,
            provenance(node),
        )
        for node in graph.nodes
    ]


def load_graph(nodes: list[tuple[Any, ...]]) -> fx.Graph:
    """The graph that `dump_graph` wrote."""
    graph = fx.Graph()
    made: list[fx.Node] = []

    def from_ref(arg: Any) -> Any:
        return made[arg.index] if isinstance(arg, _Ref) else arg

    for op, target, args, kwargs, name, origin in nodes:
        node = graph.create_node(
            op,
            target,
            fx.node.map_aggregate(args, from_ref),  # type: ignore[arg-type]
            fx.node.map_aggregate(kwargs, from_ref),  # type: ignore[arg-type]
            name,
        )
        made.append(set_provenance(node, origin))
    return graph


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_OPTIONS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)


def has_hooks(module: nn.Module) -> bool:
    """Whether the user hung code on calls of `module`, forward or backward."""
    return any(getattr(module, hooks, None) for hooks in _HOOKS)


def carry_hooks(new: nn.Module, old: nn.Module) -> None:
    """Let calls of `new` run the hooks of `old`."""
    for name in (*_HOOKS, *_HOOK_OPTIONS):
        if name in old.__dict__:
            new.__dict__[name] = old.__dict__[name]


def share_tree(new: nn.Module, old: nn.Module) -> None:
    """Let `new` have the children, parameters and buffers of `old`: the dictionaries themselves."""
    for name in _TREE:
        new.__dict__[name] = old.__dict__[name]


def is_region(module: nn.Module) -> bool:
    """Whether `module` is called as one node but holds graphs that passes rewrite."""
    return getattr(module, "holds_graphs", False)


def find_module(root: nn.Module, path: str) -> nn.Module | None:
    """The module at `path` below `root`, or None where there is none."""
    module: nn.Module | None = root
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module


def region_children(module: nn.Module) -> Mapping[str, nn.Module]:
    """What a region holds by name: graphs, leaf modules and regions; nothing for other modules."""
    if not is_region(module):
        return {}
    own = getattr(module, "graph_children", None)
    return {k: v for k, v in module._modules.items() if v is not None} if own is None else own()


def graphs(gm: fx.GraphModule, path: str = "") -> Iterator[tuple[str, fx.GraphModule]]:
    """All graph modules at and below `gm` with their paths, inner ones first, each once."""
    seen: set[int] = set()

    def below(gm: fx.GraphModule, path: str) -> Iterator[tuple[str, fx.GraphModule]]:
        if id(gm) in seen:
            return
        seen.add(id(gm))
        for target in dict.fromkeys(n.target for n in gm.graph.nodes if n.op == "call_module"):
            module = find_module(gm, str(target))
            if module is not None:
                yield from inside(module, join(path, str(target)))
        yield path, gm

    def inside(module: nn.Module, path: str) -> Iterator[tuple[str, fx.GraphModule]]:
        for name, child in region_children(module).items():
            if isinstance(child, fx.GraphModule):
                yield from below(child, join(path, name))
            else:
                yield from inside(child, join(path, name))

    yield from below(gm, path)


def join(*parts: str) -> str:
    """Module paths joined by dots, empty ones left out."""
    return ".".join(part for part in parts if part)


def _shallow(module: nn.Module) -> nn.Module:
    """A new module object with a child dictionary of its own and the same tensor dictionaries."""
    new = object.__new__(type(module))
    new.__dict__.update(module.__dict__)
    new.__dict__["_modules"] = module.__dict__["_modules"].copy()
    return new


def _own_attributes(module: nn.Module, memo: Mapping[int, nn.Module]) -> None:
    """Give `module` containers of its own, in which old modules are replaced by the new ones."""
    for name, value in module.__dict__.items():
        if name not in _TREE:
            module.__dict__[name] = _own(value, memo)


def _own(value: Any, memo: Mapping[int, nn.Module]) -> Any:
    kind = type(value)
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if kind in (list, set):
        return kind(_own(v, memo) for v in value) if value else value.copy()
    if kind is deque:
        return deque((_own(v, memo) for v in value), value.maxlen)
    if kind in (dict, OrderedDict):
        return kind((k, _own(v, memo)) for k, v in value.items()) if value else value.copy()
    if kind is tuple:
        return tuple(_own(v, memo) for v in value)
    if kind is MethodType and id(value.__self__) in memo:
        return MethodType(value.__func__, memo[id(value.__self__)])
    return value


def clone_tree(module: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """New module objects for the whole tree over the same tensor dictionaries.

    Modules that stand under two paths stay one module. `memo` maps the ids of old modules to the
    new ones; entries given beforehand are used instead of a clone.
    """
    memo = {} if memo is None else memo
    order: list[nn.Module] = []
    stack = [module]
    while stack:
        current = stack.pop()
        if id(current) in memo:
            continue
        if isinstance(current, fx.GraphModule):
            # A GraphModule's class holds its code: over a shared class one graph would be rewritten
            # for all. The tree below it stays shared with the shallow copy that follows.
            shell = shallow_container(current)
            memo[id(current)] = ModelGraph(
                shell, copy.deepcopy(current.graph), type(current).__name__
            )
        else:
            memo[id(current)] = _shallow(current)
        order.append(current)
        stack.extend(child for child in current._modules.values() if child is not None)
    for current in order:
        children = memo[id(current)].__dict__["_modules"]
        for name, child in current._modules.items():
            children[name] = None if child is None else memo[id(child)]
        if not isinstance(current, fx.GraphModule):
            _own_attributes(memo[id(current)], memo)
    return memo[id(module)]


def shallow_container(module: nn.Module) -> nn.Module:
    """A plain module with a child dictionary of its own and the same tensor dictionaries."""
    shell = nn.Module()
    share_tree(shell, module)
    shell.__dict__["_modules"] = dict(module._modules)
    shell.__dict__.update(_plain_tensors(module))
    shell.training = module.training
    meta = getattr(module, "meta", None)
    if isinstance(meta, dict):
        shell.__dict__["meta"] = copy.copy(meta)
    return shell


def copy_graph_module(gm: ModelGraph) -> ModelGraph:
    """A copy with graphs and containers of its own, over the same leaf module objects."""
    memo: dict[int, nn.Module] = {}
    for _, inner in graphs(gm):
        for leaf in leaves(inner):
            if not is_region(leaf):
                memo[id(leaf)] = leaf
    new = clone_tree(gm, memo)
    assert isinstance(new, ModelGraph)
    return new


def leaves(gm: fx.GraphModule) -> Iterator[nn.Module]:
    """The modules that the graph of `gm` calls, each once."""
    for target in dict.fromkeys(n.target for n in gm.graph.nodes if n.op == "call_module"):
        yield gm.get_submodule(str(target))


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, whatever stands there."""
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = module


def free_name(root: nn.Module, wanted: str) -> str:
    """`wanted`, or the first of `wanted_1`, `wanted_2`, ... that is no attribute of `root`."""
    name, i = wanted, 0
    while hasattr(root, name):
        i += 1
        name = f"{wanted}_{i}"
    return name


def tensor_leaves(args: Any, kwargs: Any) -> list[fx.Node]:
    """The nodes among the arguments of a call, in order, repeated where they are repeated."""
    found: list[fx.Node] = []
    fx.map_arg((args, kwargs), lambda node: found.append(node) or node)
    return found
