"""One architecture of a net: its collapsed graph, and the lowered graph with gates that pick it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from nasfx.architecture import Architecture
from nasfx.ops.gates import inclusion_gate, softmax_gate
from nasfx.passes import Canonicalize, CollapseChoices, RemoveDeadCode
from nasfx.rewriting.graph import ModelGraph
from nasfx.rewriting.passes import PassContext
from nasfx.space import SearchSpace


class OneHot(fx.Interpreter):
    """Runs a lowered graph with 0/1 weights in place of what the gates compute."""

    def __init__(self, gm: fx.GraphModule, space: SearchSpace, arch: Architecture) -> None:
        super().__init__(gm)
        self.space, self.arch = space, arch

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call `target`, or give the weights of a gate."""
        value = super().call_function(target, args, kwargs)
        if target not in (softmax_gate, inclusion_gate):
            return value
        hot = torch.zeros_like(value)
        label = kwargs["label"]
        decision = self.arch.decision(label) if label in self.arch else ()
        if isinstance(decision, str):
            hot[self.space[label].candidates.index(decision)] = 1
        elif decision:
            mean = target is inclusion_gate and args[2]
            hot[list(decision)] = 1 / len(decision) if mean else 1
        return hot


def collapsed(choice_graph: ModelGraph, arch: Mapping[str, Any]) -> ModelGraph:
    """The subnet of a canonical architecture as a graph over the tree of `choice_graph`."""
    gm = ModelGraph(choice_graph, copy.deepcopy(choice_graph.graph), "Subnet")
    ctx = PassContext()
    CollapseChoices.of(arch)(gm, ctx, check=False)
    Canonicalize()(gm, ctx, check=False)
    RemoveDeadCode()(gm, ctx, check=False)
    return gm
