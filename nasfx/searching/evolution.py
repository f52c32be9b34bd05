"""`evolve`: evolutionary search over the subnets of a trained supernet, as single path one-shot."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import Precision
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from nasfx.architecture import Architecture
from nasfx.errors import CheckpointError, SearchError
from nasfx.searching.checkpoint import Plain
from nasfx.searching.data_order import Randomness
from nasfx.searching.distributed import Ranks, refuse_unlaunched
from nasfx.searching.evaluation import Metric, progress_bar
from nasfx.searching.recalibration import Judge, checked_recalibration
from nasfx.searching.result import SearchResult
from nasfx.searching.resuming import Resumable, hidden_buffers
from nasfx.searching.saving import Resume, Saving
from nasfx.space import SearchSpace
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
    checkpoint_dir: str | Path | None = None,
    resume: Resume = "auto",
    checkpoint_every: int | None = None,
    keep: int = 2,
    fabric: Fabric | None = None,
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

    Where the data and the net allow it, the architectures of a generation are evaluated at once:
    each batch is read once, and what subnets begin with in common is computed once. The scores are
    the very bits of those of one by one. It needs a `valid` and a loader of `recalibrate` that give
    the same batches in every pass (a list, or a DataLoader over tensors in memory; shuffled only in
    `recalibrate`), subnets of functions and modules of torch, without hooks, that draw no random
    numbers before the last batch norm, and a metric that depends on its arguments alone. Else they
    are evaluated one by one.

    On several processes, those of `fabric`, every one is given the same weights and the same data,
    and evaluates a share of each generation; the result is that of one process, and a search that
    was stopped may go on with another number of them.

    Nothing of the net changes: buffers that move are copies, and modes, drawn path and generators
    are as they were, also after an error. Dropout, and loaders without a generator of their own,
    draw from torch's global generators, which are seeded for each evaluation and restored.

    With a `checkpoint_dir` the search may be stopped at any time: called again with the same
    arguments and the same weights it goes on, and ends with the very bits of a run that was not
    stopped (on one machine with as many threads, on the CPU). A search that is finished returns its
    result. SIGTERM and Ctrl-C let what is being evaluated finish, save, and end the process with
    SystemExit(143) or KeyboardInterrupt.

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
        checkpoint_dir: the folder of the checkpoints of this search alone; None for none. They hold
            what was evaluated, and of the net's weights a digest.
        resume: "auto": go on from the newest whole checkpoint there, or start if there is none.
            True: it is an error if there is none. False: start, which is an error if there is one.
            A path: go on from this file.
        checkpoint_every: evaluations between checkpoints, so at most as many architectures are
            evaluated at once; each generation ends with one anyway, and with None there are no
            others.
        keep: how many of the last checkpoints are kept.
        fabric: a launched Lightning Fabric, of several processes; the net and the batches are on
            its device. The first process shows progress and writes the checkpoints.

    Raises:
        SearchError: wrong arguments; several processes without a `fabric`, or with other weights on
            some of them; no `recalibrate` for a net with batch norms; no architecture
            satisfies the constraints; an empty loader; a metric that is no number or not finite;
            a parameter that is not finite where a checkpoint is to be written.
        CheckpointError: a checkpoint cannot be read or written, or belongs to another search, or to
            other weights.

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
    if fabric is None:
        refuse_unlaunched("evolve")
        fabric = Fabric(accelerator="cpu", devices=1)
        fabric.launch()
    ranks = Ranks(fabric)
    weights = digest(net)
    if len(set(ranks.gather(weights))) > 1:
        raise SearchError(
            "evolve on several processes: the weights are not the same on all of them; load the "
            "same, or hand over the net that a search on these processes has trained"
        )
    recalibration = checked_recalibration(net, recalibrate)
    judge = Judge(net, valid, metric, recalibration, seed)
    pool = Population(net.space, constraints, population, torch.Generator().manual_seed(seed))
    console = (console or Console(stderr=True)) if ranks.first else Console(quiet=True)
    saving = Saving(checkpoint_dir, resume, checkpoint_every, keep, console, ranks)
    state = EvolutionState(pool)
    options = {
        "made by": "nasfx.evolve", "population": population, "generations": generations,
        "seed": seed, "constraints": len(constraints),
        "recalibrate": recalibration.batches if recalibration else None, "weights": weights,
    }  # fmt: skip
    randomness = Randomness(recalibration.loader if recalibration else None, valid)
    run: Any = state
    saving.open(_Resumable(net, {}, None, Precision(), run, {}, randomness, options, ranks))
    with progress_bar(console) as progress, saving.watching():
        _Evolution(judge, state, saving, ranks, progress).run(generations)
    return state.result()


class _Evolution:
    """The generations, one after the other, from where the state stands."""

    def __init__(
        self, judge: Judge, state: EvolutionState, saving: Saving, ranks: Ranks, progress: Progress
    ) -> None:
        self.judge, self.state, self.saving, self.progress = judge, state, saving, progress
        self.ranks = ranks
        self.pool = state.pool

    def run(self, generations: int) -> None:
        """Evaluate until there are so many, or until nothing new is found."""
        self.task = self.progress.add_task(
            "evolve",
            total=self.pool.size * generations,
            completed=self.state.evaluations,
            figures="",
        )
        for _ in self.pool.run(generations, self._score):
            self.state.ready.clear()
            self.saving.after_epoch()
        self.state.finished = True
        self.saving.after_end()

    def _score(self, arch: Architecture) -> float:
        """The score of an architecture of the current generation."""
        if arch not in self.state.ready:
            self._evaluate_generation()
        return self.state.ready[arch]

    def _evaluate_generation(self) -> None:
        """Evaluate what is left of the current generation, and save in between."""
        pool, ready = self.pool, self.state.ready
        left = [a for a in pool.current or () if a not in pool.scores and a not in ready]
        where = f"in generation {len(pool.records)}"
        for group in self.judge.groups(left, self.saving.every, self.ranks.count):
            found = self.ranks.divided(
                group, lambda own: self.judge.evaluate_all(own, where), shared=True
            )
            ready.update(zip(group, found, strict=True))
            best = max([*ready.values(), *pool.scores.values()])
            figures = f"generation {len(pool.records)} best {best:.4f}"
            self.progress.update(self.task, advance=len(group), figures=figures)
            self.saving.after_step()


# -- what a checkpoint holds -----------------------------------------------------------------------


class EvolutionState:
    """Where an evolution stands.

    Attributes:
        pool: the population, with the scores that it has been told.
        ready: scores of the current generation that it may not have been told yet.
        finished: whether the search is over.
    """

    best_is_last = False  # no generation is the best: the last knows all that were before

    def __init__(self, pool: Population) -> None:
        self.pool = pool
        self.ready: dict[Architecture, float] = {}
        self.finished = False

    @property
    def evaluations(self) -> int:
        """How many architectures were evaluated."""
        return len(self.pool.scores.keys() | self.ready.keys())

    @property
    def steps(self) -> int:
        """Evaluations and ends of generations; it grows with everything that can be saved."""
        return self.evaluations + len(self.pool.records) + self.finished

    def __str__(self) -> str:
        if self.finished:
            return "the end"
        n = len(self.pool.records)
        return f"generation {n}, with {self.evaluations} architectures evaluated"

    def result(self) -> SearchResult:
        """What a finished search returns."""
        scores = self.pool.scores
        best = self.pool.best()[0]
        return SearchResult(best, tuple(self.pool.records), scores[best], dict(scores))

    def state_dict(self) -> dict[str, Any]:
        """Plain data, and one tensor."""
        return {
            "steps": self.steps,
            "population": self.pool.state_dict(),
            "ready": [[dict(arch), score] for arch, score in self.ready.items()],
            "finished": self.finished,
        }

    def load_state_dict(self, state: Mapping[str, Any], space: SearchSpace) -> None:
        """Become what gave `state`.

        Raises:
            CheckpointError: it has other entries, or its population is another.
            SpaceError: an architecture is not of the space.
        """
        if set(state) != {"steps", "population", "ready", "finished"}:
            raise CheckpointError(f"the state of an evolution has other entries than {list(state)}")
        ready = {space.validate(arch): float(score) for arch, score in state["ready"]}
        self.pool.load_state_dict(state["population"])
        self.ready, self.finished = ready, bool(state["finished"])


class _Resumable(Resumable):
    """An evolution: nothing of the net moves, so its weights are not saved but compared."""

    def content(self, randomness: Plain | None = None) -> Plain:
        return {**super().content(randomness), "net": {}, "hidden": {}}

    def _of_this_rank(self) -> Plain:
        return {}

    def _load(self, content: Plain) -> None:
        self.run.load_state_dict(content["run"], self.net.space)
        self.randomness.load_state(content["ranks"][0]["random"])


def digest(net: Supernet) -> str:
    """A digest (SHA-256) of everything in the net that an evaluation may read.

    Parameters and buffers, also those that are in no state_dict, but not the drawn path.
    """
    hashed = hashlib.sha256()
    for name, value in {**net.state_dict(), **hidden_buffers(net)}.items():
        if isinstance(value, Tensor) and not name.startswith("arch.state."):
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            hashed.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            hashed.update(content.numpy().tobytes())
    return hashed.hexdigest()
