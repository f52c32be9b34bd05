"""remove-dead-code: drop the nodes whose value and effects nobody sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from nasfx.rewriting.effects import needed_nodes
from nasfx.rewriting.graph import graphs
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import ANY, Stage


@dataclass(frozen=True)
class RemoveDeadCode(Pass):
    """Erase every node that no needed node observes.

    A node is needed if it is an input or the output, if it writes to a buffer, a parameter or an
    input, if it asserts, if a needed node reads its value, or if it writes to a value that a needed
    node reads later::

        %y = call_module[unused](%x)           ->  (gone)
        %c = get_attr[counter]
        %d = call_method[add_](%c, 1)          ->  kept: the buffer outlives the graph

    A module whose result nobody reads is dropped, and with it what it does to its own buffers and
    the random numbers that it draws.
    """

    name: ClassVar[str] = "remove-dead-code"
    consumes: ClassVar[Stage] = ANY
    produces: ClassVar[Stage] = ANY
    exactness: ClassVar[Exactness] = Exactness.BITWISE

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Sweep every graph once, users before what they read."""
        changed = False
        for _, inner in graphs(gm):
            needed = needed_nodes(inner.graph)
            for node in reversed(inner.graph.nodes):
                if node not in needed:
                    inner.graph.erase_node(node)
                    changed = True
        return changed
