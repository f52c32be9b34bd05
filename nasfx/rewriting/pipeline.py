"""Pipelines of passes, and the history of what each of them did."""

from __future__ import annotations

import difflib
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from torch import fx

from nasfx.errors import PassError
from nasfx.rewriting.passes import Pass, PassContext, Skip
from nasfx.rewriting.printing import Line, lines
from nasfx.rewriting.verifier import ANY, Stage, verify


@dataclass(frozen=True)
class Record:
    """What one pass did.

    Attributes:
        name: the pass, with its options; "trace" for the graph that the history starts with.
        stage: the stage that the graph is in afterwards.
        changed: whether the pass changed the graph.
        seconds: how long it took, verification included.
        exactness: how outputs compare with those before.
        skips: what the pass declined to rewrite, and why.
    """

    name: str
    stage: str
    changed: bool
    seconds: float
    exactness: str
    skips: tuple[Skip, ...]
    snapshot: bytes = field(repr=False)


@dataclass
class History:
    """The graph after every pass, as text.

    Example:
        >>> # print(net.history)           a line for every pass
        >>> # print(net.history.text(0))   the graph as traced
        >>> # print(net.history.diff(2, 3))
    """

    records: list[Record] = field(default_factory=list[Record])

    def __len__(self) -> int:
        return len(self.records)

    def __str__(self) -> str:
        rows = []
        for i, r in enumerate(self.records):
            what = "" if i == 0 else "changed" if r.changed else "nothing to do"
            if i and r.changed:
                plus, minus = self._counts(i)
                what = f"+{plus} -{minus} lines, {r.exactness}"
            rows.append(f"{i:3d}  {r.name:<28} {r.stage:<9} {r.seconds * 1e3:9.1f} ms  {what}")
            rows += [f"       skipped %{s.node}: {s.reason} {s.site}".rstrip() for s in r.skips]
        return "\n".join(rows)

    def lines(self, index: int) -> list[Line]:
        """The lines of the graph after pass `index`, with the labels of their nodes."""
        text = zlib.decompress(self.records[index].snapshot).decode()
        return [Line(*reversed(line.split("\t", 1))) for line in text.split("\n")]

    def text(self, index: int = -1) -> str:
        """The graph after pass `index`; 0 is the graph as traced."""
        return "\n".join(line.text for line in self.lines(index))

    def diff(self, before: int, after: int) -> str:
        """A unified diff of the graph after pass `before` and after pass `after`."""
        return "\n".join(
            difflib.unified_diff(
                self.text(before).split("\n"),
                self.text(after).split("\n"),
                self.records[before].name,
                self.records[after].name,
                lineterm="",
            )
        )

    def _counts(self, index: int) -> tuple[int, int]:
        old, new = (self.text(i).split("\n") for i in (index - 1, index))
        # Multisets, not a diff: exact enough for a summary, and linear in the graph's size.
        left = dict[str, int]()
        for line in old:
            left[line] = left.get(line, 0) + 1
        added = 0
        for line in new:
            if left.get(line, 0):
                left[line] -= 1
            else:
                added += 1
        return added, sum(left.values())


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; every one must consume the stage that the one before it produces."""

    passes: tuple[Pass, ...]

    def with_passes(self, extra: Sequence[Pass]) -> Pipeline:
        """This pipeline with `extra` passes, each after the last pass that produces its stage.

        Raises:
            PassError: something is no pass instance, or its stage does not occur.
        """
        passes = list(self.passes)
        for new in extra:
            if not isinstance(new, Pass):
                raise PassError(
                    f"{new!r} is no pass: hand over an instance of a nasfx.rewriting.Pass subclass"
                )
            stages = self._stages(passes)
            places = [i for i, stage in enumerate(stages) if new.consumes in (stage, ANY)]
            if not places or new.produces != new.consumes:
                raise PassError(
                    f"pass {new.name} goes from {new.consumes} to {new.produces}; this pipeline "
                    f"has room for passes within {', '.join(dict.fromkeys(map(str, stages)))}"
                )
            passes.insert(places[-1], new)
        return Pipeline(tuple(passes))

    @staticmethod
    def _stages(passes: Sequence[Pass]) -> list[Stage]:
        """The stage before every pass, and the last one after all."""
        stages = [next((p.consumes for p in passes if p.consumes != ANY), ANY)]
        for p in passes:
            stages.append(stages[-1] if p.produces == ANY else p.produces)
        return stages

    def run(
        self,
        gm: fx.GraphModule,
        ctx: PassContext,
        *,
        verify_each: bool = True,
        dump: str = "",
        history: History | None = None,
    ) -> History:
        """Run all passes on `gm`, in place, and record them; in a `history` that is given, further.

        With the environment variable NASFX_DUMP set to a folder, the graph after every pass is
        written there as `<dump><number>-<pass>.txt`.

        Raises:
            PassError, VerifyError: as `Pass.__call__`; the stages do not fit together.
        """
        stage = self._stages(self.passes)[0]
        if history is None:
            history = History()
            if verify_each:
                verify(gm, stage, "trace")
            _append(history, gm, "trace", stage, True, 0.0, "", (), dump)
        for rewrite in self.passes:
            if rewrite.consumes not in (stage, ANY):
                raise PassError(
                    f"pass {rewrite.name} takes a graph in stage {rewrite.consumes}, but here it "
                    f"is in stage {stage}"
                )
            ctx.skips.clear()
            ctx.stage = stage
            start = time.perf_counter()
            changed = rewrite(gm, ctx, check=verify_each).modified
            seconds = time.perf_counter() - start
            stage = stage if rewrite.produces == ANY else rewrite.produces
            _append(
                history, gm, _described(rewrite), stage, changed, seconds,
                str(rewrite.exactness), tuple(ctx.skips), dump,
            )  # fmt: skip
        return history


def _described(rewrite: Pass) -> str:
    options = [
        f"{f.name}={getattr(rewrite, f.name)!r}"
        for f in fields(rewrite)
        if getattr(rewrite, f.name) != f.default
    ]
    return rewrite.name + (f"({', '.join(options)})" if options else "")


def _append(
    history: History,
    gm: fx.GraphModule,
    name: str,
    stage: Stage,
    changed: bool,
    seconds: float,
    exactness: str,
    skips: tuple[Skip, ...],
    dump: str,
) -> None:
    if changed or not history.records:
        text = "\n".join(f"{line.label}\t{line.text}" for line in lines(gm))
        snapshot = zlib.compress(text.encode(), 1)
    else:
        snapshot = history.records[-1].snapshot
    history.records.append(Record(name, stage.name, changed, seconds, exactness, skips, snapshot))
    folder = os.environ.get("NASFX_DUMP")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = f"{dump}{len(history) - 1:02d}-{name.split('(')[0]}.txt"
        (Path(folder) / file).write_text(history.text() + "\n", encoding="utf-8")
