"""The architecture parameters of a net, and the path that was drawn last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nasfx.choice import Decision
from nasfx.errors import CheckpointError


class ArchState(nn.Module):
    """Parameters under their labels; `forward(label)` gives the drawn decision.

    Everything that a search changes beside the weights is in its state_dict, as tensors: the
    parameters as `<label>`, the generator as `state.generator` and the draws as
    `state.path.<label>` (labels hold no dot, so the names cannot meet).

    Attributes:
        generator: draws the paths.
        decisions: the drawn decision for every label, inactive ones too.
        names: the candidates' names by label; None for inputs.
    """

    def __init__(
        self, alphas: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...] | None], seed: int
    ) -> None:
        super().__init__()
        for label, alpha in alphas.items():
            self.register_parameter(label, nn.Parameter(alpha))
        self.names = dict(names)
        self.decisions: dict[str, Decision] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, label: str) -> Decision:
        """The decision that is drawn for `label`."""
        return self.decisions[label]

    def alphas(self) -> dict[str, nn.Parameter]:
        """The architecture parameters by label."""
        return {label: p for label, p in self._parameters.items() if p is not None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "state.generator"] = self.generator.get_state()
        for label, decision in self.decisions.items():
            names = self.names[label]
            indices = [names.index(decision)] if names and isinstance(decision, str) else decision
            destination[f"{prefix}state.path.{label}"] = torch.tensor(
                list(indices), dtype=torch.int64
            )

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        own = {key[len(prefix) :]: state_dict[key] for key in state_dict if key.startswith(prefix)}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        unexpected_keys[:] = [
            key for key in unexpected_keys if not key.startswith(f"{prefix}state.")
        ]
        if "state.generator" in own:
            self.generator.set_state(own.pop("state.generator").cpu())
        elif strict:
            missing_keys.append(f"{prefix}state.generator")
        for key, value in own.items():
            if not key.startswith("state."):
                continue
            label = key.removeprefix("state.path.")
            if label not in self.names:
                unexpected_keys.append(prefix + key)
                continue
            names = self.names[label]
            indices = [int(i) for i in value]
            n = len(names) if names else 1 << 20
            in_range = all(0 <= i < n for i in indices) and len(set(indices)) == len(indices)
            if not in_range or (names and len(indices) != 1):
                raise CheckpointError(f"{prefix}{key} = {indices} is no decision of {label!r}")
            self.decisions[label] = names[indices[0]] if names else tuple(indices)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__
        return {**state, "generator": self.generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator()
        generator.set_state(state["generator"])
        super().__setstate__({**state, "generator": generator})
