"""`evolve`: evolutionary search over the subnets of a trained supernet, as single path one-shot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from rich.console import Console

from nasfx.architecture import Architecture
from nasfx.errors import SearchError
from nasfx.searching.evaluation import Metric, progress_bar
from nasfx.searching.recalibration import Judge, checked_recalibration
from nasfx.searching.result import SearchResult
from nasfx.strategies.population import Constraint, Population
from nasfx.supernet import Supernet


def evolve(
    net: Supernet,
    valid: Iterable[Any],
    *,
    metric: Metric,
    recalibrate: tuple[Iterable[Any], int] | Literal[False] | None = None,
    constraints: Sequence[Constraint] = (),
    population: int = 50,
    generations: int = 20,
    seed: int = 0,
    console: Console | None = None,
) -> SearchResult:
    """The best architecture under the shared weights, by the evolutionary search of SPOS.

    The first generation is drawn at random. In every later one population/2 are mutations, in
    which each decision of a parent is drawn anew with probability 0.1, and population/2 are
    crossovers, which take each decision from either of two parents; parents are drawn from the
    population/5 best so far. Architectures drawn at random take the places that are left over. For
    each kind at most ten times as many are tried as are wanted. The bounds declared at `transform`
    and the constraints are checked first, and no architecture is evaluated twice. The search ends
    after `generations`, or when a generation finds nothing new, as in a space that has been
    evaluated completely.

    Nothing of the net changes: buffers that move are copies, and modes, drawn path and generators
    are as they were, also after an error. Dropout, and loaders without a generator of their own,
    draw from torch's global generators, which are seeded for each evaluation and restored.

    Source: arXiv 1904.00420, section 3.4, with the constants of the authors' code (population 50:
    the best 10, 25 mutations, 25 crossovers, 20 generations).

    Args:
        net: what `transform` made, with trained weights, by any strategy.
        valid: batches (inputs, target), a DataLoader or any iterable that can be gone through again
            for each architecture; inputs are a tensor or a tuple of them.
        metric: metric(outputs, target) -> a batch mean, higher is better; in eval mode. Batches
            count by their size.
        recalibrate: (loader, batches): before an architecture is evaluated, the running statistics
            of its batch norms become the plain average over so many batches in train mode (the
            authors' 200 batches of 128), since those of a supernet are averages over all paths. A
            shorter loader is gone through again. A batch norm that the model's own `train()` keeps
            in eval mode is left alone. False: use the statistics as they are.
        constraints: architecture -> bool, called once for each architecture that is met and keeps
            within the bounds; what does not satisfy all of them is not evaluated.
        population: architectures in a generation, at least 2.
        generations: how many, the first included.
        seed: for all draws.
        console: where progress goes; by default the terminal, and nowhere if there is none.

    Raises:
        SearchError: wrong arguments; no `recalibrate` for a net with batch norms; no architecture
            satisfies the constraints; an empty loader; a metric that is no number or not finite.

    Example:
        >>> # found = evolve(net, valid, metric=accuracy, recalibrate=(train, 200))
        >>> # subnet = nasfx.finalize(net, found.architecture)
    """
    if not isinstance(net, Supernet):
        raise SearchError(f"evolve needs a net from nasfx.transform, not a {type(net).__name__}")
    if net.in_step:
        raise SearchError("evolve inside a step, where gradients are switched off; close it first")
    if population < 2 or generations < 1:
        raise SearchError(
            f"population={population} must be at least 2 and generations={generations} at least 1"
        )
    if not isinstance(constraints, Sequence) or not all(map(callable, constraints)):
        raise SearchError("constraints must be a list of functions, architecture -> bool")
    judge = Judge(net, valid, metric, checked_recalibration(net, recalibrate), seed)
    pool = Population(net.space, constraints, population, torch.Generator().manual_seed(seed))
    with progress_bar(console or Console(stderr=True)) as progress:
        task = progress.add_task("evolve", total=population * generations, figures="")

        def scored(arch: Architecture) -> float:
            generation = len(pool.records)
            where = f"in generation {generation}, for the architecture {dict(arch)}"
            score = judge.evaluate(arch, where)
            best = max([score, *pool.scores.values()])
            progress.update(task, advance=1, figures=f"generation {generation} best {best:.4f}")
            return score

        records = tuple(pool.run(generations, scored))
    best = pool.best()[0]
    return SearchResult(best, records, pool.scores[best], dict(pool.scores))
