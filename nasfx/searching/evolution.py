"""`evolve`: evolutionary search over the subnets of a trained supernet, as single path one-shot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from rich.console import Console
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nasfx.architecture import Architecture, SpaceChoice
from nasfx.choice import Decision
from nasfx.errors import SearchError
from nasfx.ops.select import unmoved_buffers
from nasfx.searching.evaluation import Metric, batches, evaluate, progress_bar
from nasfx.searching.result import SearchResult
from nasfx.space import SearchSpace
from nasfx.subnet import kept_modes
from nasfx.supernet import Supernet

Constraint = Callable[[Architecture], bool]
"""Whether an architecture may be evaluated."""

_MUTATION = 0.1  # the probability that a gene is drawn anew
_TRIES = 10  # proposals for each architecture that is wanted


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
    each kind at most ten times as many are tried as are wanted. Constraints are checked first, and
    no architecture is evaluated twice. The search ends after `generations`, or when a generation
    finds nothing new, as in a space that has been evaluated completely.

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
        constraints: architecture -> bool, called once for each architecture that is met; what
            does not satisfy all of them is not evaluated.
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
    judge = _Judge(net, valid, metric, _checked_recalibration(net, recalibrate), seed)
    pool = _Pool(net.space, constraints, population, torch.Generator().manual_seed(seed))
    records: list[dict[str, Any]] = []
    with progress_bar(console or Console(stderr=True)) as progress:
        task = progress.add_task("evolve", total=population * generations, figures="")
        for generation in range(generations):
            start = time.perf_counter()
            new = pool.generation()
            if not new:
                break
            for arch in new:
                where = f"in generation {generation}, for the architecture {dict(arch)}"
                pool.scores[arch] = judge.evaluate(arch, where)
                figures = f"generation {generation} best {max(pool.scores.values()):.4f}"
                progress.update(task, advance=1, figures=figures)
            records.append(
                {
                    "generation": generation,
                    "best": max(pool.scores.values()),
                    "mean": sum(pool.scores[arch] for arch in new) / len(new),
                    "evaluated": len(new),
                    "seconds": time.perf_counter() - start,
                }
            )
    if not pool.scores:
        raise SearchError(
            f"no architecture satisfies the constraints: all {len(pool.seen)} different ones that "
            f"were drawn, of {net.space.size:,}, were refused; loosen the constraints, or draw "
            "more with a larger population"
        )
    best = pool.best()[0]
    return SearchResult(best, tuple(records), pool.scores[best])


# -- proposing -------------------------------------------------------------------------------------


class _Pool:
    """All architectures that were met, and how the next ones are made from the best of them."""

    def __init__(
        self,
        space: SearchSpace,
        constraints: Sequence[Constraint],
        population: int,
        generator: torch.Generator,
    ) -> None:
        self.space, self.constraints = space, constraints
        self.population, self.generator = population, generator
        self.seen: set[Architecture] = set()
        self.scores: dict[Architecture, float] = {}

    def best(self) -> list[Architecture]:
        """The parents: the population/5 best so far, the earlier of equals first."""
        ranked = sorted(self.scores, key=self.scores.__getitem__, reverse=True)
        return ranked[: max(1, self.population // 5)]

    def generation(self) -> list[Architecture]:
        """The next architectures to evaluate; fewer than wanted where no more are found."""
        space, generator = self.space, self.generator
        new: list[Architecture] = []
        if parents := self.best():

            def parent() -> Architecture:
                return parents[int(torch.randint(len(parents), (), generator=generator))]

            half = self.population // 2
            new += self._new(half, lambda: space.mutate(parent(), _MUTATION, generator))
            new += self._new(half, lambda: crossover(space, parent(), parent(), generator))
        new += self._new(self.population - len(new), lambda: space.sample(generator))
        missing = self.population - len(new)
        if missing and space.size <= _TRIES * self.population:
            # Few are left, or they are hardly ever drawn: take from a list of them.
            left = [arch for arch in space.enumerate() if arch not in self.seen]
            order = iter(torch.randperm(len(left), generator=generator).tolist())
            new += self._new(missing, lambda: left[next(order)], tries=len(left))
        return new

    def _new(
        self, n: int, propose: Callable[[], Architecture], tries: int | None = None
    ) -> list[Architecture]:
        """Up to `n` proposals that were not met before and satisfy the constraints."""
        proposals = (propose() for _ in range(_TRIES * n if tries is None else tries))
        return list(islice(filter(self._accept, proposals), n))

    def _accept(self, arch: Architecture) -> bool:
        if arch in self.seen:
            return False
        self.seen.add(arch)
        return all(constraint(arch) for constraint in self.constraints)


def crossover(
    space: SearchSpace,
    one: Architecture,
    two: Architecture,
    generator: torch.Generator | None = None,
) -> Architecture:
    """A canonical architecture with each decision from either of two, at equal chances.

    A decision that only one of them has is taken from that one; what becomes active by the mix and
    neither has is drawn uniformly.

    Args:
        space: the space of both.
        one: a canonical architecture.
        two: likewise.
        generator: for the draws.
    """

    def decide(choice: SpaceChoice) -> Decision:
        having = [parent for parent in (one, two) if choice.label in parent]
        if not having:
            return choice.draw(generator)
        which = int(torch.randint(len(having), (), generator=generator))
        return having[which].decision(choice.label)

    # Decided whether active or not, which leaves the law of the active ones as it is.
    return space.validate({choice.label: decide(choice) for choice in space.choices})


# -- judging ---------------------------------------------------------------------------------------


def _checked_recalibration(net: Supernet, given: Any) -> tuple[Iterable[Any], int] | None:
    """The loader and the number of batches, or None for no recalibration."""
    if given is False:
        return None
    if given is None:
        if name := next((n for n, m in net.named_modules() if _has_statistics(m)), None):
            raise SearchError(
                f"{name} is a batch norm, whose running statistics are an average over all paths "
                "that were trained and fit no single one: give recalibrate=(train_loader, 200), "
                "or refuse it on purpose with recalibrate=False"
            )
        return None
    pair: Sequence[Any] = given if isinstance(given, tuple) else ()
    if len(pair) != 2 or not isinstance(pair[1], int) or isinstance(pair[1], bool) or pair[1] < 1:
        raise SearchError(
            "recalibrate must be (loader, batches) with batches >= 1, or False for none, not "
            f"{pair or type(given).__name__}"
        )
    return pair[0], pair[1]


def _has_statistics(module: nn.Module) -> bool:
    """Whether `module` is a batch norm that keeps running statistics."""
    return (
        isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
    )


class _Judge:
    """Evaluates architectures under the shared weights and leaves the net as it is."""

    def __init__(
        self,
        net: Supernet,
        valid: Iterable[Any],
        metric: Metric,
        recalibration: tuple[Iterable[Any], int] | None,
        seed: int,
    ) -> None:
        self.net, self.valid, self.metric = net, valid, metric
        self.recalibration, self.seed = recalibration, seed
        devices = {tensor.device for tensor in (*net.parameters(), *net.buffers())}
        self.device = next(iter(devices), torch.device("cpu"))
        self.cuda = [device for device in devices if device.type == "cuda"]

    def _move(self, batch: Any) -> Any:
        return move_data_to_device(batch, self.device)

    def evaluate(self, arch: Architecture, when: str) -> float:
        """The metric of `arch` on the validation data, with statistics of its own if asked for."""
        net = self.net
        graphs = net.choice_graph("train"), net.choice_graph("eval")
        with unmoved_buffers(net, *graphs), torch.random.fork_rng(self.cuda):
            torch.manual_seed(self.seed)
            if self.recalibration is not None:
                self._recalibrate(arch, *self.recalibration)
            data = batches(self.valid, "valid", self._move)
            return evaluate(net, arch, data, self.metric, when=when)

    def _recalibrate(self, arch: Architecture, loader: Iterable[Any], n: int) -> None:
        """Give the batch norms of `arch` the average statistics of `n` batches."""
        net = self.net
        with kept_modes(net), net.forced(arch), torch.no_grad():
            net.train()
            norms = _running_norms(net.subnet_graph(arch))
            if not norms:
                return
            momenta = {norm: norm.momentum for norm in norms}
            try:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # the cumulative average
                left = n
                while left:
                    for inputs, _ in islice(batches(loader, "recalibrate", self._move), left):
                        net(*inputs)
                        left -= 1
            finally:
                for norm, momentum in momenta.items():
                    norm.momentum = momentum


def _running_norms(graph: Any) -> list[_BatchNorm]:
    """The batch norms that `graph` calls and that train mode moves, each once."""
    called = dict.fromkeys(str(n.target) for n in graph.graph.find_nodes(op="call_module"))
    modules = (m for path in called for m in graph.get_submodule(path).modules())
    return [m for m in dict.fromkeys(modules) if _has_statistics(m) and m.training]
