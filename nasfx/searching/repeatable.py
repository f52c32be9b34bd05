"""What gives the same when it is done again: loaders, and subnets; decided without running them."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from lightning_fabric.wrappers import _FabricDataLoader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from nasfx.rewriting.graph import has_hooks
from nasfx.searching.prefixes import NORMS, Step, moving

_RANDOM_IN_TRAINING = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.RNNBase)
_RANDOM = (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
_STATEFUL = {"batch_norm", "instance_norm"}
# Not functions of ATen by their own name, and pure.
_PURE = {"interpolate", "float", "double", "half", "bfloat16", "type", "__getitem__"}


def loader_obstacle(loader: Any, batches: int | None = None) -> str:
    """Why two passes over a loader may give different batches, or "".

    They give the same if it is a list or a tuple, or a DataLoader, without a generator of its own,
    over tensors in memory (TensorDataset, a list, and subsets of them), in order. Where `batches`
    is given, which is before anything else draws, the order may also be drawn from torch's global
    generator, if one pass suffices.

    Args:
        loader: the loader.
        batches: how many are taken from it, directly after torch's global generator was seeded.
    """
    if isinstance(loader, _FabricDataLoader):
        loader = loader._dataloader
    if type(loader) in (list, tuple):
        return ""
    if type(loader) is not DataLoader:
        return f"a {type(loader).__name__} may give other batches in every pass"
    data: Any = loader.dataset
    while type(data) is Subset:
        data = data.dataset
    if type(data) not in (TensorDataset, list, tuple):
        return f"a {type(data).__name__} may give other samples in every pass"
    if loader.collate_fn is not default_collate or loader.worker_init_fn is not None:
        return "a function of the user's makes its batches"
    sampler = loader.sampler
    drawn = type(sampler) is RandomSampler and sampler.generator is None and batches is not None
    once = drawn and batches is not None and batches <= len(loader)
    if loader.generator is not None or type(loader.batch_sampler) is not BatchSampler:
        return "its order may be another in every pass"
    if type(sampler) is not SequentialSampler and not once:
        return "its order is drawn anew in every pass"
    return ""


def obstacle(steps: Iterable[Step]) -> str:
    """Why values of a subnet may depend on more than its inputs, or "".

    Known are the functions and modules of torch; batch norms in train mode may be called once.

    Args:
        steps: those that will run, with the modules in the mode in which they will.
    """
    moved: set[nn.Module] = set()
    for step in steps:
        if step.op == "placeholder" and str(step.target).startswith("*"):
            return f"{step.target} stands for any number of arguments"
        if step.writes_outside:
            return f"{_name(step)} writes to an input, or to a tensor of the model"
        if step.module is not None:
            if reason := _module_obstacle(step.module):
                return f"{step.target} {reason}"
            if moving(step.module):
                if step.module in moved:
                    return f"{step.target} is a batch norm that is called twice"
                moved.add(step.module)
        elif step.op in ("call_function", "call_method") and not _pure(step.target):
            return f"{_name(step)} is not known to draw no random numbers"
    return ""


def _name(step: Step) -> str:
    return str(getattr(step.target, "__name__", step.target))


def _module_obstacle(module: nn.Module) -> str:
    if has_hooks(module):
        return "has hooks"
    if not type(module).__module__.startswith("torch.nn.modules.") or list(module.children()):
        return f"is a {type(module).__name__}, whose code is not known"
    if next(module.buffers(), None) is not None and type(module) not in NORMS:
        return "has buffers"
    if isinstance(module, _RANDOM) or (isinstance(module, _RANDOM_IN_TRAINING) and module.training):
        return "draws random numbers"
    return ""


@cache
def _pure(target: Any) -> bool:
    """Whether a function, or a method by its name, is known to draw no random numbers."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    owner = "torch" if isinstance(target, str) else str(getattr(target, "__module__", ""))
    if owner in (operator.add.__module__, math.__name__) or target is getattr:
        return True
    if owner.partition(".")[0] != "torch" or name in _STATEFUL:
        return False
    packet: Any = getattr(torch.ops.aten, name, None)
    if packet is None:
        return name in _PURE
    random = torch.Tag.nondeterministic_seeded
    return not any(random in getattr(packet, o).tags for o in packet.overloads())
