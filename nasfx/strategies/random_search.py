"""Random search with shared weights, and the best of several drawn architectures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from nasfx.architecture import Architecture
from nasfx.ops.arch_state import ArchState
from nasfx.space import SearchSpace
from nasfx.strategies.base import Evaluate, check_whole, expect
from nasfx.strategies.population import nothing_fits
from nasfx.strategies.single_path import UniformPaths, generator_of

_TRIES = 100  # draws for each architecture that is wanted


@dataclass(frozen=True)
class RandomSearch(UniformPaths):
    """Random search with weight sharing (arXiv 1902.07638): the best of uniformly drawn subnets.

    Every weight step trains one uniformly drawn path, as in single path. `search` ends by
    evaluating different, uniformly drawn architectures under the shared weights, among those that
    keep within the bounds declared at `transform`, and returns the best.

    Attributes:
        final_samples: how many are evaluated at the end, at least 1; all of a smaller space.
        recalibrate: see `UniformPaths`.

    Raises:
        SearchError: an option that is out of range.
    """

    final_samples: int = 50

    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, 1, "final_samples")

    def conclude(self, space: SearchSpace, arch: ArchState, evaluate: Evaluate) -> Architecture:
        """The best of `final_samples` architectures; the first of equals.

        The draws start where the net's generator stands, which stays there.

        Raises:
            SearchError: none that was drawn keeps within the bounds.
        """
        return best_of(space, generator_of(arch), self.final_samples, evaluate, "final_samples")


def best_of(
    space: SearchSpace,
    generator: torch.Generator,
    n: int,
    evaluate: Evaluate,
    option: str = "number of samples",
) -> Architecture:
    """The best of `n` different, uniformly drawn architectures; of all if there are no more.

    Only those that keep within the bounds of `space` count, and are evaluated. At most 100 n are
    drawn, so there may be fewer.

    Args:
        space: where they are drawn.
        generator: draws them.
        n: how many are evaluated, at least 1.
        evaluate: gives each a score, higher is better; the first of equals wins.
        option: what the user must raise for a larger `n`, for the message.

    Raises:
        SearchError: none that was drawn keeps within the bounds.
    """
    everything = space.size <= n
    drawn: Iterable[Architecture] = (
        space.enumerate() if everything else (space.sample(generator) for _ in range(_TRIES * n))
    )
    seen: set[Architecture] = set()
    fitting: list[Architecture] = []
    for arch in drawn:
        if arch in seen:
            continue
        seen.add(arch)
        if space.fits(arch):
            fitting.append(arch)
        if len(fitting) == n:
            break
    if not fitting:
        raise nothing_fits(space, len(seen), option)
    expect(evaluate, fitting)
    return max(fitting, key=evaluate)
