"""The parts of a model that latency is known of: calls that are always run together."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from nasfx.choice import InputChoice
from nasfx.costs.calls import reductions
from nasfx.costs.count import batch_size
from nasfx.errors import SearchError
from nasfx.fake_run import Stopped, run_on_fakes
from nasfx.places import Condition, Place, Use, places_and_uses
from nasfx.rewriting.graph import TextGraph, clone_tree, join, provenance, tensor_leaves
from nasfx.rewriting.printing import format_node, format_value, function_name

Values = Mapping[tuple[fx.Node, str, tuple[str, ...]], Any]


@dataclass(frozen=True)
class Part:
    """Connected calls that are always run together, as a network of their own; batch of one.

    Attributes:
        module: it; called with the tensors that it reads, gives those read elsewhere, in a tuple.
        inputs: shape and dtype of every tensor that it takes.
        outputs: how many tensors it gives.
        key: its calls and their shapes as text. Parts with one key compute alike, whatever their
            weights, so they cost alike.
        label: the choice in whose candidate it stands, or "".
        candidate: that candidate, or "".
        paths: the paths of the modules that it calls.
        site: the user's `file:line` of its first call.
    """

    module: fx.GraphModule
    inputs: tuple[tuple[torch.Size, torch.dtype], ...]
    outputs: int
    key: str
    label: str = ""
    candidate: str = ""
    paths: tuple[str, ...] = ()
    site: str = ""

    def example_inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """Seeded tensors that it takes: standard normal, or 0 and 1 for integers."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(shape, generator=generator, dtype=dtype)
            if dtype.is_floating_point
            else torch.randint(0, 2, shape, generator=generator).to(dtype)
            for shape, dtype in self.inputs
        )

    def __str__(self) -> str:
        """What it is, for messages."""
        where = f"candidate {self.candidate!r} of " if self.candidate else ""
        where = f"{where}choice {self.label!r}" if self.label else "fixed"
        called = self.paths[0] if self.paths else self.key
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"{called}{more} ({where}{', ' if self.site else ''}{self.site})"


@dataclass(frozen=True)
class Placed:
    """A part where it is run.

    Attributes:
        part: the part.
        condition: when it is run.
        times: how often; below zero where another condition has counted it too often.
    """

    part: Part
    condition: Condition
    times: float = 1.0


def parts_of(gm: fx.GraphModule, example_inputs: tuple[Any, ...]) -> list[Placed]:
    """All that a model runs, in parts, each with when it is run.

    A part is as large as can be: no choice lies between two of its calls, and all are run under the
    same decisions. So a runtime's fusions inside a candidate, or between two choices, are in it.

    Args:
        gm: the graph in stage CHOICE.
        example_inputs: what it takes, with a batch of one or more, of which one is taken.

    Raises:
        SearchError: a shape depends on what the tensors hold.
        TraceError: the inputs do not run.
    """
    values = _values(gm, _one_sample(example_inputs))
    places, uses = places_and_uses(gm)
    placed = [Placed(_Builder(group, values).part(), group[0].condition) for group in _groups(uses)]
    placed = [p for p in placed if p.part.key]
    for use in uses:
        if use.place is not None:
            placed += _reductions(places, use, values)
    return placed


def _one_sample(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    batch = batch_size(inputs)
    return tree_map(
        lambda x: x[:1] if isinstance(x, Tensor) and x.dim() and x.shape[0] == batch else x, inputs
    )


def _values(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> Values:
    values: dict[tuple[fx.Node, str, tuple[str, ...]], Any] = {}

    def record(node: fx.Node, candidate: str, calls: tuple[str, ...], value: Any) -> None:
        values[node, candidate, calls] = value

    try:
        run_on_fakes(gm, inputs, record, evaluating=True)
    except Stopped as stopped:
        raise SearchError(
            f"the latency of {format_node(stopped.node)} is not known: {stopped.reason} "
            f"({provenance(stopped.node).site})"
        ) from stopped
    return values


def _groups(uses: Sequence[Use]) -> Iterator[list[Use]]:
    """Uses that are connected and run under one condition, in the order of the graph."""
    index = {
        (use.owner, use.node, use.calls): i
        for i, use in enumerate(uses)
        if use.place is None and not use.candidate
    }
    root = list(range(len(uses)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    for i, use in enumerate(uses):
        if use.candidate or use.place is not None:
            continue
        for source in use.node.all_input_nodes:
            j = index.get((use.owner, source, use.calls))
            if j is not None and uses[j].condition == use.condition:
                low, high = sorted((find(i), find(j)))
                root[high] = low
    groups: dict[int, list[Use]] = {}
    for i, use in enumerate(uses):
        if use.place is None:
            groups.setdefault(find(i), []).append(use)
    yield from groups.values()


class _Builder:
    """Makes a part of the uses of one group."""

    def __init__(self, group: Sequence[Use], values: Values) -> None:
        self.group, self.values = group, values
        self.owner, self.calls = group[0].owner, group[0].calls
        self.graph: fx.Graph = TextGraph()
        self.new: dict[fx.Node, Any] = {}
        self.inputs: list[tuple[torch.Size, torch.dtype]] = []
        self.key: list[str] = []
        self.computes = False

    def part(self) -> Part:
        """The part; its key is "" where nothing is left to run."""
        own = {use.node for use in self.group} if not self.group[0].candidate else set()
        ends: list[fx.Node] = []
        paths: list[str] = []
        outputs = 0
        for use in self.group:
            for source in tensor_leaves(use.node.args, use.node.kwargs):
                if source not in own and source not in self.new:
                    self.new[source] = self._input(source)
        for use in self.group:
            node = self.graph.node_copy(use.node, self.new.__getitem__)
            node._rename(f"y{len(self.graph.nodes)}")  # parts of other places have the same key
            if use.candidate:
                node.target = join(str(use.node.target), use.candidate)
            self.key += self._described(use, node)
            if use.node.op == "call_module":
                paths.append(join(use.path, str(node.target)))
            given = [x for x in tree_leaves(self._value(use)) if isinstance(x, Tensor)]
            if given and (use.candidate or not use.node.users or set(use.node.users) - own):
                ends.append(node)
                outputs += len(given)
            if not use.candidate:
                self.new[use.node] = node
        self.graph.output(tuple(ends))
        origin = provenance(self.group[0].node)
        label, candidate = origin.label, origin.part
        if self.group[0].candidate:
            choice = self.owner.get_submodule(str(self.group[0].node.target))
            label, candidate = str(choice.label), self.group[0].candidate
        key = f"{self._takes()}{'; '.join(self.key)}" if self.computes else ""
        module = fx.GraphModule(self._own(), self.graph, "Part")
        module.eval()
        return Part(
            module, tuple(self.inputs), outputs, key, label, candidate, tuple(paths), origin.site
        )

    def _own(self) -> dict[str, Any]:
        """What the graph names, modules as clones: in eval mode whatever the model's are in."""
        own: dict[str, Any] = {}
        for node in self.graph.nodes:
            target = str(node.target)
            if node.op == "call_module":
                own[target] = clone_tree(self.owner.get_submodule(target))
            elif node.op == "get_attr":
                owner, _, name = target.rpartition(".")
                own[target] = getattr(self.owner.get_submodule(owner), name)
        return own

    def _input(self, source: fx.Node) -> Any:
        """A placeholder for each tensor that a value from elsewhere holds, constants as such."""

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            self.inputs.append((value.shape, value.dtype))
            return self.graph.placeholder(f"x{len(self.inputs) - 1}")

        return tree_map(leaf, self.values[source, "", self.calls])

    def _takes(self) -> str:
        shapes = (f"x{i}: {_shaped(*spec)}" for i, spec in enumerate(self.inputs))
        return f"{', '.join(shapes)} -> "

    def _described(self, use: Use, node: fx.Node) -> list[str]:
        """A call as the key spells it; nothing for one that computes nothing."""
        arguments = [format_value(a) for a in node.args]
        arguments += [f"{name}={format_value(value)}" for name, value in node.kwargs.items()]
        called = ", ".join(arguments)
        if node.op == "get_attr":
            value = self.values[use.node, "", self.calls]
            return [f"%{node.name} = {_shaped(value.shape, value.dtype)}"]
        if node.op != "call_module":
            tensors = any(isinstance(v, Tensor) for v in tree_leaves(self._value(use)))
            if not tensors or _takes_item(use.node, self.values, self.calls):
                return []
            self.computes = True
            name = str(node.target) if node.op == "call_method" else function_name(node.target)
            return [f"%{node.name} = {name}({called})"]
        module = self.owner.get_submodule(str(node.target))
        if isinstance(module, nn.Identity | nn.Dropout):
            return []
        self.computes = True
        text = " ".join(repr(module).split())
        if not type(module).__module__.startswith("torch."):
            # What a module of the user's own does is not in its text.
            text = f"{type(module).__module__}.{text} at {join(use.path, str(node.target))}"
        return [f"%{node.name} = {text}({called})"]

    def _value(self, use: Use) -> Any:
        return self.values[use.node, use.candidate, self.calls]


def _takes_item(node: fx.Node, values: Values, calls: tuple[str, ...]) -> bool:
    """Whether `node` takes an item of a tuple, a list or a dictionary, which costs nothing."""
    source = node.args[0] if node.args else None
    return (
        node.target is operator.getitem
        and isinstance(source, fx.Node)
        and not isinstance(values[source, "", calls], Tensor)
    )


def _shaped(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"


def _reductions(places: Sequence[Place], use: Use, values: Values) -> Iterator[Placed]:
    """The calls that reduce the chosen inputs of an input choice."""
    choice = use.owner.get_submodule(str(use.node.target))
    assert isinstance(choice, InputChoice)
    value = values[use.node, "", use.calls]
    if choice.reduction == "none":
        return
    if choice.reduction == "concat":
        chosen = choice.n_chosen or choice.n_candidates
        pieces: Any = use.node.args[0]
        specs = [values[piece, "", use.calls] for piece in pieces]
        part = _reduction(use, choice, specs[:chosen])
    else:
        part = _reduction(use, choice, [value, value])
    for condition, times in reductions(places, use, 1):
        if times:
            yield Placed(part, condition, times)


def _reduction(use: Use, choice: InputChoice, specs: Sequence[Tensor]) -> Part:
    graph: fx.Graph = TextGraph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(specs))]
    if choice.reduction == "concat":
        result = graph.call_function(torch.cat, (nodes, 1))
    else:
        result = graph.call_function(torch.add, tuple(nodes))
    graph.output((result,))
    shapes = ", ".join(f"x{i}: {_shaped(s.shape, s.dtype)}" for i, s in enumerate(specs))
    key = f"{shapes} -> {format_node(result)}"
    inputs = tuple((s.shape, s.dtype) for s in specs)
    origin = provenance(use.node)
    path = join(use.path, str(use.node.target))
    module = fx.GraphModule(nn.Module(), graph, "Part")
    return Part(module, inputs, 1, key, origin.label, origin.part, (path,), origin.site)
