"""What tracing may run code on: a clone of the model whose every change is noticed and undone.

A graph keeps the operations on tensors that `forward` performs. What it does beside them (assign a
buffer, draw from a generator, switch gradients off) happens once, while tracing, and never again;
so it must be noticed.
"""

from __future__ import annotations

import copy as copying
import inspect
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from nasfx.rewriting.graph import clone_tree

_GENERATORS = (torch.Generator, random.Random, np.random.Generator)


class Scratch:
    """A clone of a model with tensors, dictionaries and random generators of its own.

    Attributes:
        model: the clone, in train or eval mode.
    """

    def __init__(self, model: nn.Module, mode: bool) -> None:
        self.model = clone_tree(model)
        # By module and dictionary ("" for attributes), by name: the clone's value and the original.
        self._state: dict[int, dict[str, dict[str, tuple[Any, Any]]]] = {}
        copies: dict[int, Any] = {}

        def own(value: Any) -> Any:
            if id(value) not in copies:
                # What an earlier forward left in an attribute is no leaf and cannot be deep-copied.
                computed = isinstance(value, torch.Tensor) and not value.is_leaf
                copies[id(value)] = value.detach().clone() if computed else copying.deepcopy(value)
            return copies[id(value)]

        for module in self.model.modules():
            state = self._state[id(module)] = {}
            for kind in ("_parameters", "_buffers"):
                originals = module.__dict__[kind]
                values = {n: None if t is None else own(t) for n, t in originals.items()}
                module.__dict__[kind] = values
                state[kind] = {n: (values[n], t) for n, t in originals.items()}
            state[""] = {}
            for name, value in list(module.__dict__.items()):
                if isinstance(value, (torch.Tensor, *_GENERATORS)):
                    module.__dict__[name] = own(value)
                    state[""][name] = (module.__dict__[name], value)
        _set_class_forward(self.model)
        self.model.train(mode)

    def moved(self, m: nn.Module) -> str:
        """What running the code of `m` did to its state outside of the graph; now undone."""
        return next((what for inner in m.modules() if (what := self._moved_own(inner))), "")

    def _moved_own(self, m: nn.Module) -> str:
        what = ""
        for kind, state in self._state.get(id(m), {}).items():
            values = m.__dict__ if kind == "" else m.__dict__[kind]
            for name, (value, original) in state.items():
                if values.get(name) is not value:
                    what = f"assigns {name} in forward, which a graph would do once and for all"
                    values[name] = value
                elif not _same_state(value, original):
                    what = f"changes {name} in forward outside of the graph"
                    if isinstance(value, _GENERATORS):
                        what = f"draws random numbers from {name} outside of the graph"
                    _set_state(value, original)
            for name in [n for n in values if kind and n not in state]:
                what = f"makes {name} in forward, which a graph would do once and for all"
                del values[name]
        return what


def _set_class_forward(root: nn.Module) -> None:
    """Fx traces the class's forward; one that was set on the instance becomes the class's."""
    own = root.__dict__.get("forward")
    if own is None:
        return

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [
        p.replace(kind=p.POSITIONAL_ONLY) if p.kind is p.POSITIONAL_OR_KEYWORD else p
        for p in inspect.signature(own).parameters.values()
    ]
    forward.__signature__ = inspect.Signature([self_parameter, *parameters])
    root.__class__ = type(type(root).__name__, (type(root),), {"forward": forward})


def _same_state(value: Any, original: Any) -> bool:
    if value is None or original is None:
        return value is original
    if isinstance(value, torch.Tensor):
        if value.shape != original.shape:
            return False
        if value.is_meta or original.is_meta:
            return value.is_meta and original.is_meta and value.dtype == original.dtype
        return torch.equal(value, original) or bool(
            ((value == original) | ((value != value) & (original != original))).all()
        )
    return repr(_generator_state(value)) == repr(_generator_state(original))


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state


def _set_state(value: Any, original: Any) -> None:
    if isinstance(value, torch.Tensor):
        value.data.copy_(original)
    elif isinstance(value, torch.Generator):
        value.set_state(original.get_state())
    elif isinstance(value, random.Random):
        value.setstate(original.getstate())
    else:
        value.bit_generator.state = original.bit_generator.state


def context() -> tuple[Any, ...]:
    """What code may switch for a while, and a graph would not: gradients, autocast."""
    cast = [
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    ]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast


def rng_state() -> tuple[Any, ...]:
    """The states of the global random generators."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def restore_rng(state: tuple[Any, ...]) -> bool:
    """Restore the global generators; whether they had moved."""
    torch_state, python_state, numpy_state = state
    now = np.random.get_state()
    moved = (
        not torch.equal(torch.get_rng_state(), torch_state)
        or random.getstate() != python_state
        or now[2] != numpy_state[2]  # type: ignore[index]
        or not np.array_equal(now[1], numpy_state[1])  # type: ignore[index]
    )
    if moved:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
    return moved
