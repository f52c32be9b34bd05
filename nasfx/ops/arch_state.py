"""The architecture parameters of a net, and the path that was drawn last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nasfx.choice import Decision
from nasfx.errors import CheckpointError, SpaceError


class ArchState(nn.Module):
    """Parameters under their labels; `forward(label)` gives the drawn decision.

    Everything that a search changes beside the weights is in its state_dict, as tensors: the
    parameters as `<label>`, the generator as `state.generator` and the draws as
    `state.path.<label>` (labels hold no dot, so the names cannot meet).

    Attributes:
        path_generator: draws the paths.
        drawn_decisions: the drawn decision for every label, inactive ones too.
        candidate_names: by label what may be chosen: names, or the indices of inputs.
        n_chosen: by label how many inputs are chosen; None, or no entry, for any number.
    """

    def __init__(
        self,
        alphas: Mapping[str, Tensor],
        candidate_names: Mapping[str, tuple[Any, ...]],
        seed: int,
        n_chosen: Mapping[str, int | None] | None = None,
    ) -> None:
        super().__init__()
        self.n_chosen = dict(n_chosen or {})
        self.candidate_names = dict(candidate_names)
        self.drawn_decisions: dict[str, Decision] = {}
        self.path_generator = torch.Generator().manual_seed(seed)
        for label in (*alphas, *candidate_names):
            if hasattr(self, label):
                raise SpaceError(f"label {label!r} is reserved; give the choice another one")
        for label, alpha in alphas.items():
            self.register_parameter(label, nn.Parameter(alpha))

    def forward(self, label: str) -> Decision:
        """The decision that is drawn for `label`."""
        return self.drawn_decisions[label]

    def alpha_parameters(self) -> dict[str, nn.Parameter]:
        """The architecture parameters by label."""
        return {label: p for label, p in self._parameters.items() if p is not None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "state.generator"] = self.path_generator.get_state()
        for label, decision in self.drawn_decisions.items():
            names = self.candidate_names[label]
            indices = [names.index(decision)] if isinstance(decision, str) else list(decision)
            destination[f"{prefix}state.path.{label}"] = torch.tensor(indices, dtype=torch.int64)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = f"{prefix}state."
        unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(own)]
        if f"{own}generator" in state_dict:
            self.path_generator.set_state(state_dict[f"{own}generator"].cpu())
        elif strict:
            missing_keys.append(f"{own}generator")
        if strict:
            drawn = (f"{own}path.{label}" for label in self.drawn_decisions)
            missing_keys += [key for key in drawn if key not in state_dict]
        for key in [k for k in state_dict if k.startswith(own) and k != f"{own}generator"]:
            label = key.removeprefix(f"{own}path.")
            if label in self.candidate_names:
                self.drawn_decisions[label] = self._decision(key, label, state_dict[key])
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
        return {**self.__dict__, "path_generator": self.path_generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator()
        generator.set_state(state["path_generator"])
        super().__setstate__({**state, "path_generator": generator})
