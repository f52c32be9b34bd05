"""The front end: from a user's model to graphs in which every choice is one node.

`trace` runs the model's `forward` on throw-away clones of its modules, so neither a tensor nor a
flag of the user's changes. What cannot be traced becomes one opaque node with the reason recorded;
a module that holds a choice must be traceable, or `TraceError` says where it is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from nasfx.choice import Choice, default_label, named_choices
from nasfx.errors import SpaceError, TraceError
from nasfx.modes import differing_modules, merge_modes
from nasfx.rewriting.graph import ModelGraph, carry_hooks, clone_tree, join, share_tree
from nasfx.scratch import Scratch
from nasfx.tracer import Frame, ModelTracer

# What a graph module keeps under these names would hide a child of the user's.
_TAKEN_BY_FX = {"graph", "code", "meta"}


class TracedModel(nn.Module):
    """A traced model: callable, under the user's names, with one graph or one for each mode.

    Attributes:
        opaque: the reason, by module path, why a module stands as one node.
        origin: the user's own module classes over the same tensors; runs eagerly, follows
            `train()`.
        leaf_modules, example_inputs: as they were given to `trace`.
        rewritten_by: the user's own passes that changed the choice graph.
    """

    opaque: dict[str, str]
    leaf_modules: tuple[type | str, ...]
    example_inputs: tuple[Any, ...] | None
    rewritten_by: tuple[str, ...]

    def __init__(
        self,
        origin: nn.Module,
        graphs: tuple[ModelGraph, ModelGraph],
        opaque: Mapping[str, str],
        example_inputs: tuple[Any, ...] | None,
        leaf_modules: tuple[type | str, ...] = (),
    ) -> None:
        super().__init__()
        self.leaf_modules = leaf_modules
        self.rewritten_by = ()
        share_tree(self, graphs[0])
        carry_hooks(self, origin)
        # In a dictionary of their own, so that nn.Module does not register them as children.
        self.__dict__["_held"] = {"origin": origin, "train": graphs[0], "eval": graphs[1]}
        self.opaque = dict(opaque)
        self.example_inputs = example_inputs
        self.training = origin.training

    @property
    def origin(self) -> nn.Module:
        """The model in the user's own classes, over the same tensors."""
        return self.__dict__["_held"]["origin"]

    @property
    def graph_modules(self) -> dict[str, ModelGraph]:
        """The graphs by mode: "train" and, only where it differs, "eval"."""
        held = self.__dict__["_held"]
        names = ("train",) if held["train"] is held["eval"] else ("train", "eval")
        return {name: held[name] for name in names}

    @property
    def graph_module(self) -> ModelGraph:
        """The graph module of the current mode."""
        return self.__dict__["_held"]["train" if self.training else "eval"]

    @property
    def graph(self) -> fx.Graph:
        """The graph of the current mode."""
        return self.graph_module.graph

    def train(self, mode: bool = True) -> TracedModel:
        """Switch the mode as the user's own `train` does, and with it the graph."""
        set_modes(self, self.origin, mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode."""
        return self.graph_module(*args, **kwargs)


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    leaf_modules: Sequence[type | str] = (),
) -> TracedModel:
    """Trace `model` in train and in eval mode; choices become single nodes.

    The tensors are the model's own: training the traced model trains `model`. Everything else of
    `model` (its modules, modes, hooks, and every tensor's bytes) stays as it is.

    Args:
        model: any module; its choices keep their active candidates.
        example_inputs: a tensor or a tuple for `model.forward`. An argument with a default that no
            example covers is fixed at its default.
        leaf_modules: module classes or paths to keep as one node each.

    Raises:
        TraceError: the forward, or that of a module which holds a choice, cannot be traced.
        SpaceError: a choice is wrong: never called, called in one mode only, or one label is used
            for choices of different candidates.

    Example:
        >>> traced = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        >>> [node.op for node in traced.graph.nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """
    return _trace(model, example_inputs, leaf_modules, through_choices=False)


def trace_active(model: nn.Module, example_inputs: Any, leaf_modules: Sequence[Any]) -> TracedModel:
    """Trace `model` through its choices: the active candidates alone, as ordinary code."""
    return _trace(model, example_inputs, leaf_modules, through_choices=True)


def _trace(
    model: nn.Module,
    example_inputs: Any,
    leaf_modules: Sequence[type | str],
    *,
    through_choices: bool,
) -> TracedModel:
    if isinstance(model, TracedModel):
        model = model.origin
    if isinstance(model, Choice):
        raise TraceError(
            f"{model.described} is the whole model; put it into a module whose forward calls it"
        )
    paths = {path for path, _ in model.named_modules()}
    if missing := [leaf for leaf in leaf_modules if isinstance(leaf, str) and leaf not in paths]:
        raise TraceError(f"leaf_modules names {missing[0]!r}, which is no module of the model")
    refuse_names(model, TracedModel)
    inputs = None if example_inputs is None else as_tuple(example_inputs)
    opaque: dict[str, str] = {}
    n_inputs = None if inputs is None else len(inputs)
    while True:
        known = dict(opaque)
        frames: list[Frame] = []
        for mode in (True, False):
            scratch = Scratch(model, mode)
            tracer = ModelTracer(opaque, leaf_modules, n_inputs, through_choices, scratch)
            frames.append(tracer.run())
        differing = differing_modules(*([list(f.frames()) for f in frames]))
        for path, what in differing.items():
            module = model.get_submodule(path)
            if path and not any(isinstance(m, Choice) for m in module.modules()):
                opaque[path] = f"behaves differently in train() and eval(): {what}"
        if opaque == known:
            break
    if not through_choices:
        _check_choices(model, frames)
    same = not differing and merge_modes(*([list(f.frames()) for f in frames]))
    memo: dict[int, nn.Module] = {}
    origin = clone_tree(model, memo)
    shared = {
        id(module): memo[id(module)]
        for frame in frames
        for sub in frame.frames()
        for module in _leaf_modules(model, sub)
    }
    trained = _assemble(clone_tree(model, dict(shared)), frames[0], {})
    evaluated = trained if same else _assemble(clone_tree(model, dict(shared)), frames[1], {})
    return TracedModel(origin, (trained, evaluated), opaque, inputs, tuple(leaf_modules))


def set_modes(module: nn.Module, origin: nn.Module, mode: bool) -> None:
    """Switch all of `module`, then leave the last word to the `train` of the user's own classes."""
    for inner in module.modules():
        inner.training = mode
    origin.train(mode)


def refuse_names(model: nn.Module, taker: type[nn.Module]) -> None:
    """Refuse a model whose own names are attributes of the class that will carry them.

    Raises:
        SpaceError: names the attribute.
    """
    own = {*dir(taker), *taker.__annotations__} - {*dir(nn.Module), *nn.Module.__annotations__}
    for path, module in model.named_modules():
        taken = own | _TAKEN_BY_FX if path == "" else _TAKEN_BY_FX
        for name in (*module._modules, *module._parameters, *module._buffers):
            if name in taken:
                raise SpaceError(
                    f"{path or 'the model'} ({type(module).__name__}) has a child or tensor "
                    f"{name!r}, a name that the rewritten module needs itself; rename it"
                )


def as_tuple(inputs: Any) -> tuple[Any, ...]:
    """Example inputs as a tuple of arguments."""
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def _leaf_modules(model: nn.Module, frame: Frame) -> Iterator[nn.Module]:
    for node in frame.graph.find_nodes(op="call_module"):
        if not node.target.startswith("_traced."):
            module = model.get_submodule(join(frame.path, node.target))
            if not isinstance(module, Choice):
                yield module
    for path, call in frame.calls.items():
        for name, candidate in call.candidates.items():
            module = model.get_submodule(join(frame.path, path, name))
            if candidate is None and not isinstance(module, Choice):
                yield module


def _assemble(root: nn.Module, frame: Frame, done: dict[int, ModelGraph]) -> ModelGraph:
    """Put the traced graphs in place of the candidates below `root`, and of `root`."""
    for path, call in frame.calls.items():
        choice = root.get_submodule(path)
        choice.label = choice.label or default_label(join(frame.path, path))  # type: ignore[assignment]
        choice.structure = call.structure  # type: ignore[assignment]
        for name, candidate in call.candidates.items():
            if candidate is not None and id(candidate) not in done:
                inner = choice._modules[name]
                assert inner is not None
                choice._modules[name] = _assemble(inner, candidate, done)
    if frame.added:
        holder = nn.Module()
        holder.training = root.training
        for name, value in frame.added.items():
            if isinstance(value, nn.Module):
                holder.add_module(name, value.train(root.training))
            else:
                holder.register_buffer(name, value, persistent=False)
        root._modules["_traced"] = holder
    gm = ModelGraph(root, frame.graph, type(root).__name__)
    done[id(frame)] = gm
    gm.graph.lint()
    return gm


def _check_choices(model: nn.Module, frames: Sequence[Frame]) -> None:
    called = [
        {
            join(sub.path, path): sub.root.get_submodule(path)
            for sub in f.frames()
            for path in sub.calls
        }
        for f in frames
    ]
    for path in called[0].keys() ^ called[1].keys():
        choice = {**called[0], **called[1]}[path]
        mode = "train" if path in called[0] else "eval"
        raise SpaceError(f"{choice.described} is called in {mode} mode only; call it in both")
    ran = {id(model.get_submodule(path)) for path in called[0]}
    by_label: dict[str, tuple[str, Choice]] = {}
    for path, choice in named_choices(model):
        if id(choice) not in ran:
            raise SpaceError(
                f"{choice.described} at {path} is never called; call it in forward, or remove it"
            )
        label = choice.label or default_label(path)
        first_path, first = by_label.setdefault(label, (path, choice))
        if first is choice:
            continue
        if (first.label is None) != (choice.label is None):
            raise SpaceError(
                f"label {label!r} of {choice.described} at {path} is also the default label of the "
                f"choice at {first_path}; give one of them another label"
            )
        if _signature(first) != _signature(choice):
            raise SpaceError(
                f"choices with label {label!r} differ: {first.described} has {_signature(first)}, "
                f"{choice.described} has {_signature(choice)}. Equal labels are one decision and "
                "need the same candidates in the same order"
            )


def _signature(choice: Choice) -> tuple[Any, ...]:
    return choice.kind, choice.candidates, choice.n_chosen, choice.relaxed_only
