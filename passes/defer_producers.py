"""defer-producers: what feeds only inputs that are not chosen is not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import fx, nn

from nasfx.choice import EMPTY
from nasfx.ops.arch_state import ArchState
from nasfx.ops.function import is_graph_function
from nasfx.ops.select import Demanded, InputSwitch, Switch, demanded
from nasfx.ops.stages import SUPERNET
from nasfx.rewriting.effects import Effects, inputs_read
from nasfx.rewriting.graph import (
    ModelGraph,
    free_name,
    graphs,
    provenance,
    set_provenance,
    tensor_leaves,
)
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import Stage

Clause = frozenset[tuple[fx.Node, frozenset[Any]]]
"""Draws that must all hold: (the node of a draw, the values of which one must be drawn)."""
Need = frozenset[Clause]
"""Alternatives of which one suffices."""

ALWAYS: Need = frozenset({frozenset()})
MAX_CLAUSES = 64


@dataclass(frozen=True)
class DeferProducers(Pass):
    """Move nodes that only some draws need into a part of the graph that runs on demand.

    Rule::

        %y = call_module[edge](...)                        read by input 1 of %s alone
        %s = call_module[skips](%drawn_skips, [%x, %y])
        ->
        %needed = nasfx.ops.demanded([%drawn_skips], [[(0, (1,))]])
        %y = call_module[_deferred_0](%needed, %x, ...)    holds the nodes; skipped unless needed
        %s = call_module[skips](%drawn_skips, [%x, %y])

    Declines a node whose need takes more than 64 alternatives to say, and nodes whose memory is
    written in place elsewhere, since their order matters; these always run.
    """

    name: ClassVar[str] = "defer-producers"
    consumes: ClassVar[Stage] = SUPERNET
    produces: ClassVar[Stage] = SUPERNET
    exactness: ClassVar[Exactness] = Exactness.BITWISE

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Defer in every graph."""
        changed = False
        for _, inner in list(graphs(gm)):
            effects = Effects(inner.graph)
            pinned: set[fx.Node] = set()
            while True:
                needs = self._needs(inner, effects, pinned, ctx)
                regions = _regions(inner.graph, effects, needs)
                written = [nodes for nodes in regions if _order_matters(effects, nodes)]
                for nodes in written:
                    ctx.skip(nodes[-1], "memory that it shares is written in place elsewhere")
                    pinned.update(nodes)
                if not written:
                    break
            for nodes in regions:
                self._outline(inner, nodes, needs[nodes[-1]])
                changed = True
        return changed

    def _needs(
        self, gm: fx.GraphModule, effects: Effects, pinned: Set[fx.Node], ctx: PassContext
    ) -> dict[fx.Node, Need]:
        needs: dict[fx.Node, Need] = {}
        every: dict[fx.Node, frozenset[Any]] = {}
        for node in reversed(gm.graph.nodes):
            need: set[Clause] = set()
            if effects.always_needed(node) or _is_gate(gm, node) or node in pinned:
                need = set(ALWAYS)
            for user in effects.observers(node):
                when = _reads_when(gm, user, node, every)
                for clause in needs[user]:
                    if when is None:
                        need.add(clause)
                    elif when[1]:
                        need.add(clause | {when})
            _merge(need, every)
            if frozenset() in need:
                needs[node] = ALWAYS
            elif len(need) > MAX_CLAUSES:
                ctx.skip(node, f"its need takes {len(need)} alternatives to say")
                needs[node] = ALWAYS
            else:
                needs[node] = frozenset(need)
        return needs

    def _outline(self, gm: fx.GraphModule, nodes: Sequence[fx.Node], need: Need) -> None:
        graph, last = gm.graph, nodes[-1]
        within = set(nodes)
        outside = dict.fromkeys(
            n for node in nodes for n in node.all_input_nodes if n not in within
        )
        body = fx.Graph()
        new_of: dict[fx.Node, fx.Node] = {}
        for n in outside:
            new_of[n] = set_provenance(body.placeholder(n.name), provenance(n))
        for node in nodes:
            new_of[node] = body.node_copy(node, new_of.__getitem__)
        body.output(new_of[last])
        name = free_name(gm, "_deferred")
        gm._modules[name] = Demanded(ModelGraph(gm, body, "Deferred"))
        draws = sorted({drawn for clause in need for drawn, _ in clause})
        clauses = sorted(
            sorted((draws.index(d), tuple(sorted(values))) for d, values in clause)
            for clause in need
        )
        with graph.inserting_before(last):
            needed = graph.call_function(demanded, (draws, clauses))
            call = graph.call_module(name, (needed, *outside))
        for new in (needed, call):
            set_provenance(new, provenance(last), made_by="")
        last.replace_all_uses_with(call)
        for node in reversed(nodes):
            graph.erase_node(node)


def _order_matters(effects: Effects, nodes: Sequence[fx.Node]) -> bool:
    """Whether `nodes` touch memory that is written in place, and not by and for them alone."""
    inside, last = set(nodes), nodes[-1]
    first_touch: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for touched in (node, *node.all_input_nodes):
            first_touch.setdefault(effects.base[touched], node)
    for base, first in first_touch.items():
        writers = effects.writers.get(base, [])
        if any(writer not in inside and first < writer for writer in writers):
            return True
        if any(writer in inside for writer in writers) and any(
            other not in inside and other < last for other in effects.sharing[base]
        ):
            return True
    return False


def _regions(
    graph: fx.Graph, effects: Effects, needs: Mapping[fx.Node, Need]
) -> list[list[fx.Node]]:
    """Nodes of one need with one result, in order: every node but the last is read inside alone."""
    region_of: dict[fx.Node, list[fx.Node]] = {}
    found: list[list[fx.Node]] = []
    for node in reversed(graph.nodes):
        if needs[node] == ALWAYS or not needs[node]:
            continue
        users = list(effects.observers(node))
        homes = {id(region_of.get(user)) for user in users}
        home = region_of.get(users[0])
        if home is not None and len(homes) == 1 and needs[home[0]] == needs[node]:
            region_of[node] = home
        else:
            region_of[node] = []
            found.append(region_of[node])
        region_of[node].append(node)
    return [list(reversed(nodes)) for nodes in reversed(found)]


def _merge(need: set[Clause], every: Mapping[fx.Node, frozenset[Any]]) -> None:
    """Join alternatives that differ in the values of one draw; drop draws that may be anything."""
    while True:
        by_rest: dict[tuple[Clause, fx.Node], list[Clause]] = {}
        for clause in need:
            for literal in clause:
                by_rest.setdefault((clause - {literal}, literal[0]), []).append(clause)
        for (rest, drawn), clauses in by_rest.items():
            values = frozenset(v for c in clauses for d, vs in c - rest if d is drawn for v in vs)
            joined = rest if values == every[drawn] else rest | {(drawn, values)}
            if len(clauses) > 1 or joined == rest:
                need.difference_update(clauses)
                need.add(joined)
                break
        else:
            return


def _is_gate(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node only draws or weighs: cheap, and read by several parts of the graph."""
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), ArchState)
    return node.op == "get_attr" or is_graph_function(node.target)


def _reads_when(
    gm: fx.GraphModule, user: fx.Node, value: fx.Node, every: dict[fx.Node, frozenset[Any]]
) -> tuple[fx.Node, frozenset[Any]] | None:
    """The draws under which `user` reads `value`; None for any. Notes all values in `every`."""
    module = gm.get_submodule(str(user.target)) if user.op == "call_module" else None
    if isinstance(module, InputSwitch):
        if value is user.args[0]:
            return None
        inputs = cast("Sequence[Any]", user.args[1])
        indices = {i for i, x in enumerate(inputs) if x is value}
        possible = set(range(len(inputs)))
        if module.n_chosen is None:
            possible.add(EMPTY)
            indices |= {EMPTY} if 0 in indices else set()
        drawn = cast("fx.Node", user.args[0])
        every[drawn] = frozenset(possible)
        return drawn, frozenset(indices)
    if isinstance(module, Switch):
        tensors = tensor_leaves(user.args[1], user.args[2])
        if value not in tensors or value in tensor_leaves((user.args[0], user.args[3]), {}):
            return None
        drawn = cast("fx.Node", user.args[0])
        every[drawn] = frozenset(module.names)
        reading = (n for n in module.names if _takes(module._modules[n], tensors, value))
        return drawn, frozenset(reading)
    return None


def _takes(candidate: nn.Module | None, tensors: Sequence[fx.Node], value: fx.Node) -> bool:
    if not isinstance(candidate, fx.GraphModule):
        return True
    # The draws of choices inside are further placeholders.
    used = inputs_read(candidate.graph)
    return any(t is value and use for t, use in zip(tensors, used, strict=False))
