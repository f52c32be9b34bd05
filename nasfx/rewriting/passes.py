"""The pass: one named rewrite with a declared contract, which the base class enforces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from nasfx.errors import NasfxError, PassError
from nasfx.rewriting.graph import graphs, provenance, set_provenance
from nasfx.rewriting.verifier import ANY, Stage, verify


class Exactness(StrEnum):
    """How the outputs after a pass compare with those before it."""

    BITWISE = "bitwise"  # the same operations on the same values
    REASSOCIATES = "reassociates"  # equal in exact arithmetic
    APPROXIMATE = "approximate"  # or not meant to be equal at all
    LOWERS = "lowers"  # a change of stage: the two graphs answer different questions


@dataclass(frozen=True)
class Skip:
    """A node that a pass declined to rewrite, and why."""

    node: str
    reason: str
    site: str


@dataclass
class PassContext:
    """What a pass may know beyond the graph, and where it says what it declined.

    Attributes:
        example_inputs: the model's example inputs, or None.
        training: whether the graph is the one for train mode.
        stage: the stage that the graph is in when the pass runs.
        skips: filled by `skip`.
    """

    example_inputs: tuple[Any, ...] | None = None
    training: bool = True
    stage: Stage = ANY
    skips: list[Skip] = field(default_factory=list[Skip])

    def skip(self, node: fx.Node, reason: str) -> None:
        """Record that the running pass leaves `node` as it is because of `reason`."""
        self.skips.append(Skip(node.name, reason, provenance(node).site))


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a graph module, in place. Subclasses are frozen dataclasses; fields are options.

    Class attributes:
        name: in kebab-case, as history shows it.
        consumes, produces: the stage before and after; ANY for both where the stage stays as it is.
        exactness: how outputs compare.

    Example:
        >>> from torch import nn
        >>> class Nothing(Pass):
        ...     name, exactness = "nothing", Exactness.BITWISE
        ...     consumes = produces = ANY
        ...     def run(self, gm, ctx):
        ...         return False
        >>> gm = fx.symbolic_trace(nn.ReLU())
        >>> Nothing()(gm, PassContext()).modified
        False
    """

    name: ClassVar[str]
    consumes: ClassVar[Stage]
    produces: ClassVar[Stage]
    exactness: ClassVar[Exactness]

    @abstractmethod
    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Rewrite `gm` in place and return whether anything changed."""

    def __call__(self, gm: fx.GraphModule, ctx: PassContext, *, check: bool = True) -> PassResult:
        """Run the pass within its contract.

        Args:
            gm: a graph module in stage `consumes`; rewritten in place.
            ctx: the context.
            check: verify the result against stage `produces`.

        Raises:
            PassError: `run` failed; other errors of nasfx pass through with the pass's name added.
            VerifyError: the result breaks a rule.
        """
        before = {id(node) for _, inner in graphs(gm) for node in inner.graph.nodes}
        try:
            changed = self.run(gm, ctx)
        except NasfxError as error:
            error.add_note(f"while running pass {self.name}")
            raise
        except Exception as error:
            raise PassError(
                f"pass {self.name} failed: {type(error).__name__}: {error}. This is a mistake in "
                "the pass, not in the model"
            ) from error
        if not isinstance(changed, bool):
            raise PassError(f"pass {self.name}: run must return True or False, not {changed!r}")
        if changed:
            for _, inner in graphs(gm):
                for node in inner.graph.nodes:
                    if id(node) not in before and not provenance(node).made_by:
                        set_provenance(node, provenance(node), made_by=self.name)
                inner.recompile()
        if check:
            verify(gm, ctx.stage if self.produces == ANY else self.produces, self.name)
        return PassResult(gm, changed)
