"""The architecture parameters of a net, and everything else that a search remembers."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nasfx.choice import Decision
from nasfx.errors import CheckpointError, SpaceError


class SearchState(nn.Module):
    """What a search remembers beside parameters by label; the child `state` of an `ArchState`.

    In its state_dict everything is a tensor: the generator as `generator`, the draws as
    `path.<label>`, and the buffers and children that a strategy registers (a temperature, a
    baseline, a controller) under their own names.

    Attributes:
        generator: draws paths and noise.
        drawn: the drawn decision for every label, inactive ones too.
        candidate_names: by label what may be chosen: names, or the indices of inputs.
        n_chosen: by label how many inputs are chosen; None, or no entry, for any number.
        fresh: what a strategy keeps from the start of a step to the optimizer's; not saved.
    """

    def __init__(
        self,
        candidate_names: Mapping[str, tuple[Any, ...]],
        n_chosen: Mapping[str, int | None],
        seed: int,
    ) -> None:
        super().__init__()
        self.candidate_names, self.n_chosen = dict(candidate_names), dict(n_chosen)
        self.drawn: dict[str, Decision] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.fresh: dict[str, Any] = {}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "generator"] = self.generator.get_state()
        for label, decision in self.drawn.items():
            names = self.candidate_names[label]
            indices = [names.index(decision)] if isinstance(decision, str) else list(decision)
            destination[f"{prefix}path.{label}"] = torch.tensor(indices, dtype=torch.int64)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        generator, path = f"{prefix}generator", f"{prefix}path."
        unexpected_keys[:] = [
            key for key in unexpected_keys if key != generator and not key.startswith(path)
        ]
        if generator in state_dict:
            self.generator.set_state(state_dict[generator].cpu())
        elif strict:
            missing_keys.append(generator)
        if strict:
            missing_keys += [k for label in self.drawn if (k := path + label) not in state_dict]
        for key in [key for key in state_dict if key.startswith(path)]:
            label = key.removeprefix(path)
            if label in self.candidate_names:
                self.drawn[label] = self._decision(key, label, state_dict[key])
            elif strict:
                unexpected_keys.append(key)

    def _decision(self, key: str, label: str, value: Tensor) -> Decision:
        names = self.candidate_names[label]
        indices = [int(i) for i in value]
        named = isinstance(names[0], str)
        count = 1 if named else self.n_chosen.get(label)
        fits = count in (None, len(indices)) and len(set(indices)) == len(indices)
        if not fits or any(not 0 <= i < len(names) for i in indices):
            raise CheckpointError(f"{key} = {indices} is no decision of {label!r}")
        return names[indices[0]] if named else tuple(sorted(indices))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "generator": self.generator.get_state(), "fresh": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator()
        generator.set_state(state["generator"])
        super().__setstate__({**state, "generator": generator})


class ArchState(nn.Module):
    """Parameters under their labels; `forward(label)` gives the drawn decision.

    Attributes:
        state: the rest of what a search remembers.
    """

    state: SearchState

    def __init__(
        self,
        alphas: Mapping[str, Tensor],
        candidate_names: Mapping[str, tuple[Any, ...]],
        seed: int,
        n_chosen: Mapping[str, int | None] | None = None,
    ) -> None:
        super().__init__()
        self.state = SearchState(candidate_names, n_chosen or {}, seed)
        for label in (*alphas, *candidate_names):
            if hasattr(self, label):
                raise SpaceError(f"label {label!r} is reserved; give the choice another one")
            if label in alphas and keyword.iskeyword(label):
                raise SpaceError(
                    f"label {label!r} is reserved: a graph cannot read a parameter that is named "
                    "by a Python keyword; give the choice another one"
                )
        for label, alpha in alphas.items():
            self.register_parameter(label, nn.Parameter(alpha))

    def forward(self, label: str, what: str = "decision") -> Any:
        """The decision that is drawn for `label`; or what else the step has drawn, by its name."""
        return self.state.drawn[label] if what == "decision" else self._fresh(label, what)

    def _fresh(self, label: str, what: str) -> Any:
        return self.state.fresh.get(what, {}).get(label)

    def alpha_parameters(self) -> dict[str, nn.Parameter]:
        """The architecture parameters by label."""
        return {label: p for label, p in self._parameters.items() if p is not None}
