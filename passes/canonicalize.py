"""canonicalize: one form for what can be written in several ways."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from nasfx.rewriting.editing import is_identity, replace
from nasfx.rewriting.graph import graphs, has_hooks
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import ANY, Stage


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Read every tensor by one node, drop identities, and take literals apart.

    Rules::

        %a = get_attr[w] ... %b = get_attr[w]     ->  %a = get_attr[w], read in both places
        %y = call_module[identity](%x)            ->  %x
        %y = operator.getitem((%a, %b), 1)        ->  %b

    Declines an identity that has hooks: they are the user's code.
    """

    name: ClassVar[str] = "canonicalize"
    consumes: ClassVar[Stage] = ANY
    produces: ClassVar[Stage] = ANY
    exactness: ClassVar[Exactness] = Exactness.BITWISE

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Apply the rules to every graph."""
        changed = False
        for _, inner in graphs(gm):
            changed |= self._merge_reads(inner)
            changed |= self._drop_identities(inner, ctx)
            changed |= self._take_apart(inner)
        return changed

    def _merge_reads(self, gm: fx.GraphModule) -> bool:
        first: dict[str, fx.Node] = {}
        changed = False
        for node in list(gm.graph.find_nodes(op="get_attr")):
            known = first.setdefault(str(node.target), node)
            if known is not node:
                node.replace_all_uses_with(known)
                gm.graph.erase_node(node)
                changed = True
        return changed

    def _take_apart(self, gm: fx.GraphModule) -> bool:
        """Inlined candidates that return a tuple or a dict leave its items to be taken out."""
        changed = False
        for node in list(gm.graph.find_nodes(op="call_function", target=operator.getitem)):
            container: Any = node.args[0]
            if isinstance(container, tuple | list | dict):
                replace(node, container[node.args[1]])
                changed = True
        return changed

    def _drop_identities(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        changed = False
        for node in list(gm.graph.find_nodes(op="call_module")):
            module = gm.get_submodule(str(node.target))
            if not is_identity(module) or len(node.args) != 1:
                continue
            if has_hooks(module):
                ctx.skip(node, "the identity has hooks")
                continue
            (value,) = node.args
            if isinstance(value, fx.Node):
                node.replace_all_uses_with(value)
                gm.graph.erase_node(node)
                changed = True
        return changed
