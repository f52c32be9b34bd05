"""What a generation of an evolution costs at once, against its architectures one by one.

    python benchmarks/evolution.py [--batch 64] [--size 64] [--rounds 3]

On the ShuffleNet space of SPOS with random weights: recalibration of the batch norms and
evaluation of the architectures of a generation. Collapsing the subnets counts for both. The
generations are those of an evolution with a synthetic fitness, a sum of a random value for every
candidate. Both take turns; the scores of both must be the same bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from common import (
    Milliseconds,
    Row,
    Times,
    add_options,
    by_clock,
    ratio,
    report,
    set_up,
    spread,
    timed,
)

import nasfx
from nasfx.searching.recalibration import Judge, Recalibration
from nasfx.spaces import shufflenet
from nasfx.strategies.population import Population


def generations(
    space: nasfx.SearchSpace, size: int, numbers: list[int], seed: int
) -> dict[int, list[nasfx.Architecture]]:
    """The architectures of some generations of an evolution with a synthetic fitness."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        choice.label: {v: float(torch.randn((), generator=generator)) for v in choice.values()}
        for choice in space.choices
    }

    def fitness(arch: nasfx.Architecture) -> float:
        return sum(values[label][value] for label, value in arch.items())

    pool = Population(space, (), size, generator)
    for _ in pool.run(max(numbers) + 1, fitness):
        pass
    scored = list(pool.scores)
    return {n: scored[n * size : (n + 1) * size] for n in numbers}


def scored(evaluate: Callable[[], list[float]]) -> tuple[Milliseconds, list[float]]:
    """The time of an evaluation, and its scores."""
    scores: list[float] = []
    return timed(lambda: scores.extend(evaluate())), scores


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--population", type=int, default=50)
    parser.add_argument("--generations", type=int, nargs="+", default=[0, 3, 7])
    parser.add_argument("--recalibrate", type=int, default=2, help="batches")
    parser.add_argument("--valid", type=int, default=1, help="batches")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser, rounds=3)
    args = parser.parse_args(argv)
    set_up(args)
    torch.manual_seed(args.seed)
    net = nasfx.transform(shufflenet.spos(), "single-path")
    data = [
        (torch.randn(args.batch, 3, args.size, args.size), torch.randint(1000, (args.batch,)))
        for _ in range(args.recalibrate + args.valid)
    ]
    train, valid = data[: args.recalibrate], data[args.recalibrate :]

    def metric(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(outputs.double(), target)

    judge = Judge(net, valid, metric, Recalibration(train, args.recalibrate), args.seed)
    chosen = generations(net.space, args.population, args.generations, args.seed)
    times: dict[int, Times] = {n: {"alone": [], "at_once": []} for n in chosen}
    judge.evaluate_all(chosen[args.generations[0]][:2], "first")
    for _ in range(args.rounds):
        for n, archs in chosen.items():
            alone, one = scored(lambda archs=archs: [judge.evaluate(a, "alone") for a in archs])
            at_once, all_ = scored(lambda archs=archs: judge.evaluate_all(archs, "at once"))
            if one != all_:
                raise SystemExit(f"generation {n}: the scores differ")
            times[n]["alone"].append(alone)
            times[n]["at_once"].append(at_once)
    rows: list[Row] = [
        {
            "generation": n,
            "architectures": len(chosen[n]),
            "clock": clock,
            "alone": spread(taken["alone"]),
            "at_once": spread(taken["at_once"]),
            "alone_to_at_once": ratio(taken["alone"], taken["at_once"]),
        }
        for n in chosen
        for clock, taken in by_clock(times[n], args.threads).items()
    ]
    report(__file__, args, rows, {"a generation, ms": tuple(rows[0])})


if __name__ == "__main__":
    main()
