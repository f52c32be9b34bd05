"""What a search goes on from: its net, optimizers, random generators and place, as plain data."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nasfx.errors import CheckpointError, NasfxError
from nasfx.searching.checkpoint import FORMAT, Plain, plain
from nasfx.searching.data_order import Randomness, Reader
from nasfx.searching.distributed import Ranks
from nasfx.searching.result import RunState
from nasfx.supernet import Supernet

# -- optimizers, by the names of parameters --------------------------------------------------------


def parameter_names(net: Supernet, optimizer: torch.optim.Optimizer, what: str) -> list[str]:
    """The names of the optimizer's parameters, in its order.

    Raises:
        CheckpointError: it holds one that is not the net's.
    """
    known = {id(p): name for name, p in net.named_parameters()}
    names: list[str] = []
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if id(p) not in known and p.numel():
            raise CheckpointError(
                f"the optimizer of the {what} holds a parameter of shape {tuple(p.shape)} that the "
                "net does not have, so no checkpoint has it: make it a parameter of the model"
            )
        names.append(known.get(id(p), f"(empty {len(names)})"))
    return names


def optimizer_state(net: Supernet, optimizer: torch.optim.Optimizer, what: str) -> Plain:
    """The optimizer's state under the names of parameters."""
    names = parameter_names(net, optimizer, what)
    state = optimizer.state_dict()
    groups = [
        {**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]
    ]
    return {"state": {names[i]: held for i, held in state["state"].items()}, "groups": groups}


def load_optimizer_state(
    net: Supernet, optimizer: torch.optim.Optimizer, saved: Plain, what: str
) -> None:
    """Give the optimizer what `optimizer_state` gave, whatever the order of its parameters is.

    Raises:
        CheckpointError: its groups hold other parameters.
    """
    names = parameter_names(net, optimizer, what)
    groups = optimizer.state_dict()["param_groups"]
    own = [[names[i] for i in group["params"]] for group in groups]
    theirs = [list(group["params"]) for group in saved["groups"]]
    if list(map(sorted, own)) != list(map(sorted, theirs)):
        differing = sorted({n for g in own for n in g} ^ {n for g in theirs for n in g})
        raise CheckpointError(
            f"the optimizer of the {what} has other parameters, or other groups of them, than the "
            f"checkpoint{f': {differing[0]} is in one of the two only' if differing else ''}"
        )
    index = {name: i for i, name in enumerate(names)}
    merged: list[Plain] = []
    for group, held in zip(groups, saved["groups"], strict=True):
        kept = {key: group[key] for key in ("params", "param_names") if key in group}
        merged.append({**held, **kept})
    state = {index[name]: held for name, held in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": merged})


# -- the net ---------------------------------------------------------------------------------------


def net_state(net: Supernet) -> Plain:
    """Everything in the net's state_dict; it keeps what it says of its versions."""
    state = net.state_dict()
    metadata = plain(getattr(state, "_metadata", {}))
    return {"values": plain(state, "the net's state"), "metadata": metadata}


def load_net_state(net: Supernet, saved: Plain) -> None:
    """Load what `net_state` gave."""
    state: Any = OrderedDict(saved["values"])
    state._metadata = OrderedDict(saved["metadata"])
    net.load_state_dict(state)


def hidden_buffers(net: Supernet) -> dict[str, Tensor]:
    """The buffers that are in no state_dict, which may move all the same."""
    shown = net.state_dict().keys()
    return {name: b.detach() for name, b in net.named_buffers() if name not in shown}


# -- what a checkpoint belongs to ------------------------------------------------------------------


def description(net: Supernet, options: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What must be the same when a search goes on, as texts by part and name.

    Args:
        net: the net.
        options: of the search, and what its loaders and optimizers are.
    """
    choices = {
        c.label: f"{c.kind} choice of {c.n_chosen} among {list(c.candidates)}, never chosen "
        f"{list(c.relaxed_only)}, at {list(c.places)}"
        for c in net.space.choices
    }
    tensors = {
        name: f"{t.dtype} of shape {tuple(t.shape)}"
        for name, t in net.state_dict().items()
        if isinstance(t, Tensor) and not name.startswith("arch.state.")
    }
    modules = {path: type(module).__name__ for path, module in net.named_modules() if path}
    objectives = {f"objective {i}": _described(o) for i, o in enumerate(net.objectives)}
    return {
        "the space": {"the labels": ", ".join(choices), **choices},
        "the strategy": {"its name": net.strategy.name, **_fields(net.strategy)},
        "the objectives": {"their number": str(len(objectives)), **objectives},
        "the model": tensors | {f"module {path}": kind for path, kind in modules.items()},
        "the search": {name: _described(value) for name, value in options.items()},
    }


def _fields(value: Any) -> dict[str, str]:
    names = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    return {name: _described(getattr(value, name)) for name in names}


def _loader(loader: Any) -> dict[str, int | None]:
    """The sizes by which other data are told from the same."""
    return {
        "batches": length(loader),
        "batch_size": getattr(loader, "batch_size", None),
        "samples": length(getattr(loader, "dataset", None)),
    }


def length(data: Any) -> int | None:
    """`len(data)`, or None where it has none."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _described(value: Any) -> str:
    """`value` as a text that is the same in every process."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_described(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_described, value))})"
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return str(value.tolist()) if isinstance(value, Tensor) else repr(value)
    return f"{type(value).__name__}({', '.join(f'{k}={v}' for k, v in _fields(value).items())})"


def check_same(
    saved: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]
) -> None:
    """Check that a checkpoint belongs to this search.

    Raises:
        CheckpointError: it does not; the first difference is named.
    """
    for part, entries in now.items():
        theirs = saved.get(part, {})
        for name in (*entries, *theirs):
            if entries.get(name) != theirs.get(name):
                raise CheckpointError(
                    f"it belongs to another search; {part} differs in {name}: "
                    f"{theirs.get(name, 'not there')} in the checkpoint, "
                    f"{entries.get(name, 'not there')} now; give what it was made with, or another "
                    "checkpoint_dir"
                )


# -- all of it -------------------------------------------------------------------------------------


@dataclass
class Resumable:
    """Everything that a search goes on from.

    Attributes:
        net: the net.
        optimizers: by what they train, without Fabric's wrapper.
        scheduler: of the learning rate, or None.
        precision: Fabric's, which may scale gradients.
        run: where the search stands.
        readers: the passes over the loaders, by what they are for.
        randomness: the random generators.
        options: of the search, which must be the same when it goes on.
        ranks: the processes of the search; None for one.
    """

    net: Supernet
    optimizers: Mapping[str, torch.optim.Optimizer]
    scheduler: Any
    precision: Any
    run: RunState
    readers: Mapping[str, Reader]
    randomness: Randomness
    options: Mapping[str, Any]
    ranks: Ranks | None = None

    @cached_property
    def of(self) -> dict[str, dict[str, str]]:
        """What the search is, see `description`."""
        loaders = zip(("train", "valid"), self.randomness.loaders, strict=True)
        made = {f"the optimizer of the {what}": o for what, o in self.optimizers.items()}
        optimizers = {what: {"kind": type(o).__name__, **o.defaults} for what, o in made.items()}
        return description(
            self.net,
            {**self.options, **{what: _loader(loader) for what, loader in loaders}, **optimizers},
        )

    def check(self) -> None:
        """Check, before the search begins, that it can be saved.

        Raises:
            CheckpointError: something of it cannot.
        """
        self.content()

    def content(self, randomness: Plain | None = None) -> Plain:
        """The content of a checkpoint.

        Args:
            randomness: where the random generators stood, if not where they stand now.

        Raises:
            CheckpointError: something is no plain data.
        """
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return {
            "format": FORMAT,
            "versions": versions(),
            "of": self.of,
            "net": net_state(self.net),
            "hidden": hidden_buffers(self.net),
            "optimizers": {
                what: plain(optimizer_state(self.net, o, what), f"the optimizer of the {what}")
                for what, o in self.optimizers.items()
            },
            "scheduler": plain(scheduler, "the scheduler"),
            "precision": plain(self.precision.state_dict(), "the precision"),
            "run": plain(self.run.state_dict(), "the state of the search"),
            "ranks": self._each_rank(
                {
                    "readers": {name: reader.state() for name, reader in self.readers.items()},
                    "random": randomness or self.randomness.state(),
                    **({} if self._alone else self._of_this_rank()),
                }
            ),
        }

    @property
    def _alone(self) -> bool:
        return self.ranks is None or self.ranks.count == 1

    def _of_this_rank(self) -> Plain:
        """Running statistics, and the losses of the epoch so far."""
        losses = [list(self.run.train_losses), list(self.run.arch_losses)]
        return {"buffers": _all_buffers(self.net), "losses": losses}

    def _each_rank(self, own: Plain) -> list[Plain]:
        """What differs between the processes, of all of them in order."""
        return [own] if self.ranks is None else self.ranks.gather(own)

    def load(self, file: Path, content: Plain) -> None:
        """Put everything where it was.

        Raises:
            CheckpointError: the checkpoint belongs to another search, or its content is broken.
        """
        try:
            check_same(content["of"], self.of)
            self._load(content)
        except NasfxError as error:
            raise CheckpointError(f"{file}: {error}") from error
        except (
            ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError,
        ) as error:  # fmt: skip
            raise CheckpointError(
                f"{file} does not hold what a search writes: {type(error).__name__}: {error}"
            ) from error

    def _load(self, content: Plain) -> None:
        self.run.load_state_dict(content["run"], self.net.space)
        load_net_state(self.net, content["net"])
        hidden = hidden_buffers(self.net)
        _check_entries("buffers", content["hidden"], hidden)
        for name, value in content["hidden"].items():
            hidden[name].copy_(value)
        for what, optimizer in self.optimizers.items():
            load_optimizer_state(self.net, optimizer, content["optimizers"][what], what)
            # Else the first step of a scheduler warns that no optimizer has stepped before.
            vars(optimizer)["_opt_called"] = True
        if self.scheduler is not None:
            _check_entries("scheduler", content["scheduler"], self.scheduler.state_dict())
            self.scheduler.load_state_dict(content["scheduler"])
        self.precision.load_state_dict(content["precision"])
        own = content["ranks"][0] if self.ranks is None else self.ranks.own(content["ranks"])
        if not self._alone:
            buffers = _all_buffers(self.net)
            _check_entries("buffers", own["buffers"], buffers)
            for name, value in own["buffers"].items():
                buffers[name].copy_(value)
            self.run.train_losses, self.run.arch_losses = map(list, own["losses"])
        for name, reader in self.readers.items():
            reader.load_state(own["readers"][name])
        self.randomness.load_state(own["random"])


def _all_buffers(net: Supernet) -> dict[str, Tensor]:
    """The buffers, in the state_dict or not; each process has running statistics of its own."""
    return dict(net.named_buffers())


def _check_entries(what: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if saved.keys() != own.keys():
        raise CheckpointError(f"its {what} are {sorted(saved)}, and this search has {sorted(own)}")


def versions() -> dict[str, str]:
    """What wrote a checkpoint."""
    return {"nasfx": metadata.version("nasfx"), "torch": str(torch.__version__)}
