"""Functions that stay one node under any fx tracer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.fx.proxy import Proxy
from torch.overrides import handle_torch_function
from torch.utils import _pytree as pytree

P = ParamSpec("P")
R = TypeVar("R")


def graph_function(function: Callable[P, R]) -> Callable[P, R]:
    """Make `function` record itself as one node when it meets an fx proxy.

    A plain function is traced *through*, and a custom backward inside it is then lost without a
    word; `fx.wrap` only protects callers in modules that call it. This dispatches through
    `__torch_function__`, which every fx tracer honours.
    """

    @functools.wraps(function)
    def dispatching(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            proxies = [
                leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Proxy)
            ]
            if proxies:
                return handle_torch_function(dispatching, proxies, *args, **kwargs)
        return function(*args, **kwargs)

    if function.__module__.startswith("nasfx."):
        # The public name, under which the function is printed and pickled.
        dispatching.__module__ = "nasfx.ops"
    dispatching.__dict__["is_graph_function"] = True
    return dispatching


def is_graph_function(target: Any) -> bool:
    """Whether `target` was made by `graph_function`, here or in a user's own file."""
    return getattr(target, "is_graph_function", False)
