"""The search strategies by name; a strategy of your own is handed over as an instance."""

import difflib

from nasfx.errors import SearchError
from nasfx.strategies.base import Strategy as Strategy
from nasfx.strategies.darts import Darts as Darts
from nasfx.strategies.enas import Enas as Enas
from nasfx.strategies.fbnet import FBNet as FBNet
from nasfx.strategies.proxyless import Proxyless as Proxyless
from nasfx.strategies.random_search import RandomSearch as RandomSearch
from nasfx.strategies.single_path import SinglePath as SinglePath

STRATEGIES: dict[str, type[Strategy]] = {
    s.name: s for s in (Darts, FBNet, Proxyless, Enas, SinglePath, RandomSearch)
}


def strategy_named(strategy: str | Strategy) -> Strategy:
    """The strategy of a name, with its defaults; an instance as it is.

    Raises:
        SearchError: no strategy has the name; the nearest is offered.
    """
    if isinstance(strategy, Strategy):
        return strategy
    known = ", ".join(map(repr, STRATEGIES))
    if not isinstance(strategy, str):
        raise SearchError(f"{strategy!r} is neither a strategy's name ({known}) nor an instance")
    if strategy not in STRATEGIES:
        near = difflib.get_close_matches(strategy.lower().replace("_", "-"), STRATEGIES, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise SearchError(f"no strategy is called {strategy!r}: {hint}there are {known}")
    return STRATEGIES[strategy]()
