"""Several subnets run at once: what they begin with in common is computed once.

The subnets of a supernet are graphs over the same modules. As long as two of them have the same
nodes in the same order they compute the same values, so a tree of common beginnings, whose leaves
are the subnets, gives every output with the very bits that the subnet alone would give. A batch
goes through the whole tree before the next one does: then only what is alive where the tree
branches, along one path, is kept, for one batch.

A batch norm in train mode has statistics of its own at every place of the tree.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from nasfx.errors import SearchError
from nasfx.rewriting.effects import Effects

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""The batch norms whose statistics are known how to move."""

KEPT_BYTES = 2**30
"""How much may be kept along a path of the tree for what branches off; more is computed again."""

# -- steps -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    """The value of the step with this index."""

    index: int


Statistics = dict[str, Tensor | None]
"""The buffers of a batch norm, by name."""


@dataclass(eq=False)
class Step:
    """A node of a subnet, with other nodes by their indices.

    Attributes:
        index: its position among the nodes.
        op: of the node.
        target: likewise.
        args: of the node, with `_Value` for nodes.
        kwargs: likewise.
        reads: the indices in them.
        module: what a call_module calls.
        same: equal for steps that compute the same, if all before them do.
        writes_outside: whether it writes in place to an input, or to a tensor of the model.
        statistics: what a batch norm works with; None for its own.
    """

    index: int
    op: str
    target: Any
    args: Any
    kwargs: Any
    reads: frozenset[int]
    module: nn.Module | None
    same: tuple[Any, ...]
    writes_outside: bool = False
    statistics: Statistics | None = None

    @property
    def key(self) -> Any:
        """Equal for steps that give the same, if all before them do."""
        return self.same, None if self.statistics is None else id(self.statistics)


Blocks = list[list[Step]]
"""The steps of a subnet, in blocks that must not be taken apart."""


def blocks(gm: fx.GraphModule) -> Blocks:
    """The steps of a subnet.

    What makes a value and all that writes to it in place are in one block: no other subnet may
    read the value in between.
    """
    nodes = list(gm.graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    steps = [_step(gm, node, index) for node in nodes]
    end: dict[int, int] = {}
    for base, writers in Effects(gm.graph).writers.items():
        end[index[base]] = max(map(index.__getitem__, writers))
        for writer in writers:
            steps[index[writer]].writes_outside = base.op in ("placeholder", "get_attr")
    made: Blocks = []
    until = -1
    for i, step in enumerate(steps):
        if i > until:
            made.append([])
        made[-1].append(step)
        until = max(until, end.get(i, i))
    return made


def _step(gm: fx.GraphModule, node: fx.Node, index: dict[fx.Node, int]) -> Step:
    to_value: Any = lambda n: _Value(index[n])  # noqa: E731
    args, kwargs = fx.map_arg((node.args, node.kwargs), to_value)
    reads = frozenset(index[n] for n in node.all_input_nodes)
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    same = index[node], node.op, node.target, repr((args, kwargs))
    return Step(index[node], node.op, node.target, args, kwargs, reads, module, same)


def until_norms(path: Blocks) -> Blocks:
    """Copies of the steps up to the last batch norm whose statistics move; none without one."""
    n = 0
    for i, block in enumerate(path, 1):
        if any(moving(step.module) for step in block):
            n = i
    return [[replace(step) for step in block] for block in path[:n]]


def moving(module: nn.Module | None) -> bool:
    """Whether `module` is a batch norm whose running statistics a call moves."""
    return (
        isinstance(module, NORMS)
        and type(module) in NORMS
        and module.training
        and getattr(module, "running_mean", None) is not None
    )


# -- the tree --------------------------------------------------------------------------------------


@dataclass(eq=False)
class Tree:
    """Steps that several subnets have in common, and what follows.

    Attributes:
        steps: the steps.
        dead: for every step, the indices whose values nobody reads afterwards.
        inputs: the indices of earlier values that are read here or further on.
        children: how it goes on.
        leaves: the numbers of the subnets that end here.
    """

    steps: list[Step]
    dead: list[set[int]] = field(default_factory=list[set[int]])
    inputs: set[int] = field(default_factory=set[int])
    children: list[Tree] = field(default_factory=list["Tree"])
    leaves: list[int] = field(default_factory=list[int])

    def walk(self, before: tuple[Tree, ...] = ()) -> Iterator[tuple[Tree, ...]]:
        """Every path from here to a tree with leaves."""
        path = (*before, self)
        if self.leaves:
            yield path
        for child in self.children:
            yield from child.walk(path)


def tree_of(paths: Sequence[Blocks]) -> Tree:
    """The tree of the common beginnings of subnets.

    Args:
        paths: the steps of every subnet.
    """
    return _tree(dict(enumerate(paths)), 0)


def _tree(paths: dict[int, Blocks], start: int) -> Tree:
    first = next(iter(paths.values()))
    depth = start
    groups: dict[Any, dict[int, Blocks]] = {}
    while True:
        groups = {}
        for i, path in paths.items():
            key = None if depth == len(path) else tuple(step.key for step in path[depth])
            groups.setdefault(key, {})[i] = path
        if len(groups) > 1 or None in groups:
            break
        depth += 1
    tree = Tree([step for block in first[start:depth] for step in block])
    tree.leaves = list(groups.pop(None, {}))
    tree.children = [_tree(group, depth) for group in groups.values()]
    needed = {i for child in tree.children for i in child.inputs}
    for step in reversed(tree.steps):
        tree.dead.append({i for i in (*step.reads, step.index) if i not in needed})
        needed = (needed | step.reads) - {step.index}
    tree.dead.reverse()
    tree.inputs = needed
    return tree


def give_statistics(tree: Tree) -> dict[int, dict[nn.Module, Statistics]]:
    """Give every batch norm that moves copies of its buffers, at every place of the tree.

    Returns:
        By the number of a subnet, the copies that its batch norms have.
    """
    found: dict[int, dict[nn.Module, Statistics]] = {}
    for path in tree.walk():
        held: dict[nn.Module, Statistics] = {}
        for step in (step for part in path for step in part.steps):
            if step.module is not None and moving(step.module):
                if step.statistics is None:
                    step.statistics = copied(step.module)
                held[step.module] = step.statistics
        found |= dict.fromkeys(path[-1].leaves, held)
    return found


def copied(module: nn.Module) -> Statistics:
    """Copies of the buffers of a module."""
    return {name: None if b is None else b.clone() for name, b in module._buffers.items()}


class Runner:
    """Runs batches through a tree."""

    def __init__(
        self,
        tree: Tree,
        attributes: nn.Module,
        limit: int,
        around: Callable[[], AbstractContextManager[Any]],
        leaf: Callable[[int, Any], None] = lambda i, outputs: None,
    ) -> None:
        """What all batches share.

        Args:
            tree: the tree.
            attributes: has the tensors that the subnets read.
            limit: how many bytes may be kept along a path, see `KEPT_BYTES`.
            around: the context in which steps run.
            leaf: is told the number of a subnet and its output, for every batch.
        """
        self.tree, self.attributes, self.limit = tree, attributes, limit
        self.around, self.leaf = around, leaf
        self.result: Any = None

    def run(self, inputs: Sequence[Any]) -> None:
        """Run one batch through all subnets.

        Raises:
            SearchError: there are more inputs than the subnets take.
        """
        taken = sum(step.op == "placeholder" for step in self.tree.steps)
        if self.tree.steps and len(inputs) > taken:
            raise SearchError(f"a batch has {len(inputs)} inputs, and the net takes {taken}")
        self.given = inputs
        self._visit(self.tree, {}, 0)

    def _visit(self, tree: Tree, entry: dict[int, Any], kept: int) -> None:
        """Run what begins with `tree`; whoever calls keeps `entry`, which is in `kept`."""
        values = self._advance(tree, entry, again=False)
        if not tree.children:
            return
        held = _bytes(values)
        if kept + held <= self.limit:
            for child in tree.children:
                self._visit(child, values, kept + held)
            return
        done: set[Tree] = set()
        for k, path in enumerate(p for child in tree.children for p in child.walk()):
            if k:
                values = self._advance(tree, entry, again=True)
            for part in path:
                values = self._advance(part, values, again=part in done)
                done.add(part)

    def _advance(self, tree: Tree, entry: dict[int, Any], *, again: bool) -> dict[int, Any]:
        """The values that are alive after the steps of `tree`; `again` moves no statistics."""
        values = {i: entry[i] for i in tree.inputs}
        with self.around():
            for step, dead in zip(tree.steps, tree.dead, strict=True):
                values[step.index] = self._call(step, values, again)
                for i in dead:
                    del values[i]
        if not again:
            for i in tree.leaves:
                self.leaf(i, self.result)
            self.result = None
        return values

    def _call(self, step: Step, values: dict[int, Any], again: bool) -> Any:
        if step.op == "placeholder":
            return self.given[step.index] if step.index < len(self.given) else step.args[0]
        if step.op == "get_attr":
            return operator.attrgetter(step.target)(self.attributes)
        args, kwargs = _filled(step.args, values), _filled(step.kwargs, values)
        if step.op == "output":
            self.result = args[0]
            return None
        if step.op == "call_method":
            return getattr(args[0], step.target)(*args[1:], **kwargs)
        if step.module is None:
            return step.target(*args, **kwargs)
        if (held := step.statistics) is not None:
            if again and step.module.training:
                held = {name: None if b is None else b.clone() for name, b in held.items()}
            step.module._buffers.update(held)
        return step.module(*args, **kwargs)


def _filled(given: Any, values: dict[int, Any]) -> Any:
    """Arguments of a node with values in the place of indices."""
    if isinstance(given, _Value):
        return values[given.index]
    if isinstance(given, list | tuple):
        filled = [_filled(item, values) for item in given]
        if isinstance(given, list):
            return filled
        return type(given)(*filled) if hasattr(given, "_fields") else tuple(filled)
    if isinstance(given, dict):
        return {key: _filled(item, values) for key, item in given.items()}
    if isinstance(given, slice):
        return slice(*(_filled(i, values) for i in (given.start, given.stop, given.step)))
    return given


def _bytes(values: dict[int, Any]) -> int:
    """The memory that the tensors in `values` hold; views share it."""
    tensors = [leaf for leaf in tree_leaves(list(values.values())) if isinstance(leaf, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
