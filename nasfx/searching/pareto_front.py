"""`pareto`: the metric under shared weights against costs, by NSGA-II, and the front it finds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isnan
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from nasfx.architecture import Architecture
from nasfx.errors import SearchError
from nasfx.searching.evaluation import Metric, progress_bar
from nasfx.searching.recalibration import Judge, checked_recalibration
from nasfx.space import SearchSpace
from nasfx.strategies.population import crossover, nothing_fits
from nasfx.supernet import Supernet

_CROSSOVER = 0.9  # the probability that a child has two parents
_TRIES = 10  # proposals for each architecture that is wanted

# -- the front ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """An architecture that was evaluated.

    Attributes:
        architecture: canonical.
        metric: on the validation data, under the shared weights; higher is better.
        costs: by the objective's name, in its unit; lower is better.
    """

    architecture: Architecture
    metric: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Front:
    """What no other evaluated architecture beats: in the metric and in all costs.

    A point is left out only where another one is at least as good in everything and better in
    something, so architectures that are equal in everything are all kept.

    Attributes:
        points: sorted by the first cost, then by the others.
        evaluated: everything that was evaluated, in order.
    """

    points: tuple[Point, ...]
    evaluated: tuple[Point, ...]

    @classmethod
    def of(cls, evaluated: Iterable[Point]) -> Front:
        """The front of some points.

        Args:
            evaluated: at least one point; all have the same costs.

        Raises:
            SearchError: there is no point, or they have different costs.
        """
        points = tuple(evaluated)
        if not points or any(list(p.costs) != list(points[0].costs) for p in points):
            raise SearchError("a front is made of points, at least one, which have the same costs")
        figures = np.array([_figures(point) for point in points])
        best = [p for p, f in zip(points, figures, strict=True) if not _beaten(f, figures)]
        return cls(tuple(sorted(best, key=lambda p: tuple(p.costs.values()))), points)

    @property
    def costs(self) -> tuple[str, ...]:
        """The names of the costs."""
        return tuple(self.points[0].costs)

    def best(self, max: Mapping[str, float] | None = None) -> Point:
        """The point of the highest metric that keeps within bounds; the cheapest of equals.

        Args:
            max: by a cost's name, what it may be at most, in the unit of its objective.

        Raises:
            SearchError: no point keeps within them, or a name that is no cost of the front.
        """
        bounds = dict(max or {})
        for name, bound in bounds.items():
            if name not in self.costs:
                raise SearchError(
                    f"max={bounds}: the front has no cost {name!r}; it has {', '.join(self.costs)}"
                )
            if not isinstance(bound, int | float) or isnan(bound):
                raise SearchError(f"max={bounds}: the bound of {name!r} must be a number")
        within = [p for p in self.points if all(p.costs[n] <= b for n, b in bounds.items())]
        if not within:
            lowest = ", ".join(f"{n} {min(p.costs[n] for p in self.points):g}" for n in bounds)
            raise SearchError(
                f"no point of the front keeps within max={bounds}; the lowest costs, each on its "
                f"own, are {lowest}: loosen the bounds, or search longer"
            )
        return sorted(within, key=lambda p: -p.metric)[0]

    # -- showing -----------------------------------------------------------------------------------

    def table(self) -> Table:
        """The points as a rich table."""
        table = Table(title=f"front of {len(self.evaluated)} evaluated architectures")
        for name in (*self.costs, "metric"):
            table.add_column(name, justify="right")
        table.add_column("architecture", overflow="fold")
        for point in self.points:
            decisions = ", ".join(f"{label}: {v}" for label, v in point.architecture.items())
            table.add_row(*map(_cell, point.costs.values()), f"{point.metric:.4f}", decisions)
        return table

    def __str__(self) -> str:
        console = Console(width=100, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    def plot(self, path: str | Path) -> Path:
        """Draw the metric against each cost into an image file.

        All evaluated architectures are pale, and the front's are strong. The line is the highest
        metric of what costs at most so much; with several costs, points of the front may lie
        beneath it, since they are better in another cost.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4 * len(self.costs), 3.5), layout="constrained")
        FigureCanvasAgg(figure)
        every_axes = figure.subplots(1, len(self.costs), squeeze=False)[0]
        for axes, name in zip(every_axes, self.costs, strict=True):
            axes.plot(
                [p.costs[name] for p in self.evaluated], [p.metric for p in self.evaluated],
                "o", color="0.8", markersize=3, label="evaluated",
            )  # fmt: skip
            pairs = sorted((p.costs[name], p.metric) for p in self.points)
            x, y = [cost for cost, _ in pairs], [metric for _, metric in pairs]
            axes.plot(x, y, "o", color="C0", markersize=4, label="front")
            axes.plot(x, list(accumulate(y, max)), color="C0", drawstyle="steps-post")
            axes.set_xlabel(name)
            axes.set_ylabel("metric")
            axes.legend()
        figure.savefig(path)
        return Path(path)

    def to_json(self, path: str | Path) -> None:
        """Write the points, and everything that was evaluated, to a file."""
        data = {
            name: [
                {"architecture": dict(p.architecture), "metric": p.metric, "costs": dict(p.costs)}
                for p in points
            ]
            for name, points in (("points", self.points), ("evaluated", self.evaluated))
        }
        Path(path).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _figures(point: Point) -> list[float]:
    """What NSGA-II makes small."""
    return [-point.metric, *point.costs.values()]


def _beaten(figures: Any, others: Any) -> bool:
    """Whether a row of `others` is at least as small everywhere and smaller somewhere."""
    return bool(((others <= figures).all(1) & (others < figures).any(1)).any())


def _cell(cost: float) -> str:
    return f"{cost:,.0f}" if cost == round(cost) else f"{cost:.4g}"


# -- the search -----------------------------------------------------------------------------------


def pareto(
    net: Supernet,
    valid: Iterable[Any],
    *,
    metric: Metric,
    costs: str | Sequence[str] | None = None,
    recalibrate: tuple[Iterable[Any], int] | Literal[False] | None = None,
    population: int = 50,
    generations: int = 20,
    seed: int = 0,
    console: Console | None = None,
) -> Front:
    """The best metrics under the shared weights at every cost, by NSGA-II.

    The first generation is drawn at random. In every later one, parents win tournaments of two by
    dominance, then by crowding distance; a child takes each decision from either of two parents
    with probability 0.9, or is a copy of one, and each of its decisions is drawn anew with
    probability 1/n, where n is the number of choices. Children that were met before are replaced:
    at most ten times as many are tried as are wanted, then architectures are drawn at random, and
    in a space of at most ten populations they are taken from the list of what is left. The bounds
    declared at `transform` are checked first: what breaks one is not evaluated. No architecture is
    evaluated twice. The search ends after `generations`, or when a generation finds nothing new,
    as in a space that has been evaluated completely.

    Costs are exact, of the architecture itself. Nothing of the net changes, as with `evolve`.

    Source: Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE
    Transactions on Evolutionary Computation 6(2), 2002, with its probabilities of crossover and
    mutation (section IV); the library pymoo.

    Args:
        net: what `transform` made, with trained weights, by any strategy, and with objectives.
        valid: batches (inputs, target), a DataLoader or any iterable that can be gone through again
            for each architecture; inputs are a tensor or a tuple of them.
        metric: metric(outputs, target) -> a batch mean, higher is better; in eval mode. Batches
            count by their size.
        costs: names of the net's objectives, "flops" for `nasfx.Flops`; by default all of them.
        recalibrate: (loader, batches), False, or None where there is no batch norm; see `evolve`.
        population: architectures in a generation, at least 2.
        generations: how many, the first included.
        seed: for all draws.
        console: where progress goes; by default the terminal, and nowhere if there is none.

    Raises:
        SearchError: wrong arguments; a net without objectives; no `recalibrate` for a net with
            batch norms; no architecture keeps within the bounds; an empty loader; a metric that is
            no number or not finite; pymoo is not installed.

    Example:
        >>> # net = nasfx.transform(model, "single-path", example_inputs=x, objective=nasfx.Flops())
        >>> # front = pareto(net, valid, metric=accuracy, recalibrate=(train, 200))
        >>> # subnet = nasfx.finalize(net, front.best(max={"flops": 300e6}).architecture)
    """
    if not isinstance(net, Supernet):
        raise SearchError(f"pareto needs a net from nasfx.transform, not a {type(net).__name__}")
    if net.in_step:
        raise SearchError("pareto inside a step, where gradients are switched off; close it first")
    if population < 2 or generations < 1:
        raise SearchError(
            f"population={population} must be at least 2 and generations={generations} at least 1"
        )
    names = _checked_costs(net.space, costs)
    judge = Judge(net, valid, metric, checked_recalibration(net, recalibrate), seed)
    pool = _Pool(net.space, population, torch.Generator().manual_seed(seed))
    algorithm = _nsga2(pool, 1 + len(names))
    found: list[Point] = []
    with progress_bar(console or Console(stderr=True)) as progress:
        task = progress.add_task("pareto", total=population * generations, figures="")

        def evaluate(arch: Architecture, generation: int) -> Point:
            where = f"in generation {generation}, for the architecture {dict(arch)}"
            score = judge.evaluate(arch, where)
            found.append(Point(arch, score, {n: float(net.space.costs[n](arch)) for n in names}))
            best = max(point.metric for point in found)
            progress.update(task, advance=1, figures=f"generation {generation} best {best:.4f}")
            return found[-1]

        for generation in range(generations):
            new = algorithm.ask()
            if new is None or not len(new):
                break
            points = [evaluate(one.X[0], generation) for one in new]
            new.set("F", np.array([_figures(point) for point in points]))
            algorithm.tell(infills=new)
    if not found:
        raise nothing_fits(net.space, len(pool.met), "population")
    return Front.of(found)


def _checked_costs(space: SearchSpace, given: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names of the costs to search over."""
    if not space.costs:
        raise SearchError(
            "pareto needs a cost to weigh the metric against, and this net has none: declare it by "
            "transform(model, strategy, example_inputs=x, objective=nasfx.Flops()), or with "
            "nasfx.Params() or nasfx.CustomCost(...); Flops(max=...) bounds it as well"
        )
    if given is not None and not isinstance(given, str | list | tuple):
        raise SearchError(f"costs={given!r} must be a list of names, of {', '.join(space.costs)}")
    names = tuple(space.costs) if given is None else (given,) if isinstance(given, str) else given
    if unknown := [name for name in names if name not in space.costs]:
        raise SearchError(
            f"costs: the net has no objective {unknown[0]!r}; it has {', '.join(space.costs)}"
        )
    if not names or len(set(names)) < len(names):
        raise SearchError(f"costs={given!r} must name at least one cost, and each of them once")
    return tuple(names)


class _Pool:
    """All architectures that the search has met, and those that it may meet yet."""

    def __init__(self, space: SearchSpace, size: int, generator: torch.Generator) -> None:
        self.space, self.size, self.generator = space, size, generator
        self.met: dict[Architecture, None] = {}

    def accept(self, arch: Architecture) -> bool:
        """Whether to evaluate `arch`: it was not met before and keeps within the bounds."""
        if arch in self.met:
            return False
        self.met[arch] = None
        return self.space.fits(arch)

    def fresh(self, n: int) -> list[Architecture]:
        """Up to `n` architectures that chance finds; in a small space, as many as there are."""
        space, new = self.space, list[Architecture]()
        tries = _TRIES * n
        while len(new) < n and tries:
            tries -= 1
            if self.accept(arch := space.sample(self.generator)):
                new.append(arch)
        if len(new) < n and space.size <= _TRIES * self.size:
            left = [arch for arch in space.enumerate() if arch not in self.met]
            for i in torch.randperm(len(left), generator=self.generator).tolist():
                if len(new) < n and self.accept(left[i]):
                    new.append(left[i])
        return new


def _nsga2(pool: _Pool, n_figures: int) -> Any:
    """NSGA-II of pymoo, ready to be asked; its individuals hold one architecture each."""
    try:
        from pymoo.algorithms.moo.nsga2 import NSGA2, binary_tournament
        from pymoo.core.crossover import Crossover
        from pymoo.core.duplicate import DuplicateElimination
        from pymoo.core.mating import Mating
        from pymoo.core.mutation import Mutation
        from pymoo.core.population import Population
        from pymoo.core.problem import Problem
        from pymoo.core.sampling import Sampling
        from pymoo.core.termination import NoTermination
        from pymoo.operators.selection.tournament import TournamentSelection
    except ImportError as error:
        raise SearchError("pareto needs pymoo: pip install nasfx[pareto]") from error

    space, generator = pool.space, pool.generator
    rate = 1 / max(1, len(space.choices))

    class Random(Sampling):
        def _do(self, problem: Any, n_samples: int, *args: Any, **kwargs: Any) -> Any:
            return _column(pool.fresh(n_samples))

    class Cross(Crossover):
        def _do(self, problem: Any, X: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N803
            pairs = zip(X[0, :, 0], X[1, :, 0], strict=True)
            return _column([crossover(space, a, b, generator) for a, b in pairs])[None]

    class Mutate(Mutation):
        def _do(self, problem: Any, X: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N803
            return _column([space.mutate(arch, rate, generator) for (arch,) in X])

    class Unmet(DuplicateElimination):
        def do(self, pop: Any, *args: Any, **kwargs: Any) -> Any:
            return pop[np.array([pool.accept(one.X[0]) for one in pop], dtype=bool)]

    class Mate(Mating):
        def do(self, problem: Any, pop: Any, n_offsprings: int, *args: Any, **kwargs: Any) -> Any:
            children = super().do(problem, pop, n_offsprings, *args, **kwargs)
            others = _column(pool.fresh(n_offsprings - len(children)))
            return Population.merge(children, Population.new("X", others))

    sampling: Any = Random()
    mating = Mate(
        TournamentSelection(func_comp=binary_tournament), Cross(2, 1, prob=_CROSSOVER), Mutate(),
        eliminate_duplicates=Unmet(), n_max_iterations=_TRIES,
    )  # fmt: skip
    algorithm = NSGA2(
        pop_size=pool.size, sampling=sampling, mating=mating, eliminate_duplicates=False,
        seed=int(torch.randint(2**31, (), generator=generator)),
    )  # fmt: skip
    return algorithm.setup(Problem(n_var=1, n_obj=n_figures), termination=NoTermination())


def _column(archs: Sequence[Architecture]) -> Any:
    """The architectures as an array of objects [n, 1]; numpy would go into them, as mappings."""
    column = np.empty((len(archs), 1), dtype=object)
    for i, arch in enumerate(archs):
        column[i, 0] = arch
    return column
