"""NASConfig and LookUpTable: the constants of an FBNet search, and what its candidates cost."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from nasfx.costs.calls import Call
from nasfx.costs.objectives import CustomCost
from nasfx.errors import SearchError
from nasfx.reading import read_json
from nasfx.transforming import transform

_FLOOR = 0.001  # the cost of what has no multiply-accumulates, in NNI
_SUFFIXES = {"json": "json", "numpy": "npy"}
_MODES = ("mul", "add")


@dataclass(frozen=True)
class NASConfig:
    """The constants of an FBNet search, with the names and defaults of NNI's NASConfig.

    Attributes:
        perf_metric: what the table holds: "flops", which it counts itself, as multiply-accumulates,
            or another name for a table that is loaded, such as "latency".
        lut_load: load the table from a file, and do not count.
        lut_load_format: of the file: "json" for `<model_dir>/lut/lut.json`, "numpy" for
            `<model_dir>/lut/lut.npy`.
        model_dir: the folder of the table and of the checkpoint; None to write neither.
        nas_lr: learning rate of the architecture's AdamW.
        nas_weight_decay: likewise.
        mode: with E the expected cost, "mul" for loss * alpha * log(E) ** beta (arXiv 1812.03443,
            equation 2), "add" for loss + alpha * E ** beta.
        alpha: see mode.
        beta: see mode.
        start_epoch: epochs at the start in which only weights are trained.
        init_temperature: of the Gumbel-softmax.
        exp_anneal_rate: what it is multiplied with after each epoch with arch steps.
        search_space: the stages of NNI's form: {"stages": [name, ...], name: {"ops": [...]}, ...}.
            With it, candidates may only be these. None for those of the model.

    Raises:
        SearchError: an option that is out of range, or a `search_space` of another form.

    Example:
        >>> NASConfig(mode="add").alpha
        0.25
    """

    perf_metric: str = "flops"
    lut_load: bool = False
    lut_load_format: str = "json"
    model_dir: str | Path | None = None
    nas_lr: float = 0.01
    nas_weight_decay: float = 5e-4
    mode: str = "mul"
    alpha: float = 0.25
    beta: float = 0.6
    start_epoch: int = 50
    init_temperature: float = 5.0
    exp_anneal_rate: float = math.exp(-0.045)
    search_space: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, values in (("mode", _MODES), ("lut_load_format", tuple(_SUFFIXES))):
            if getattr(self, name) not in values:
                raise SearchError(
                    f"NASConfig({name}={getattr(self, name)!r}): it must be one of {values}"
                )
        if self.start_epoch < 0:
            raise SearchError(f"NASConfig(start_epoch={self.start_epoch}): it must not be negative")
        if self.lut_load and self.model_dir is None:
            raise SearchError("NASConfig(lut_load=True) needs model_dir, where the table is")
        if self.perf_metric != "flops" and not self.lut_load:
            raise SearchError(
                f"NASConfig(perf_metric={self.perf_metric!r}): only 'flops' are counted; write "
                "what the candidates cost into a table and load it with lut_load=True"
            )
        self.operations()

    def operations(self) -> tuple[str, ...] | None:
        """The candidates of all stages of `search_space`, each once; None without one."""
        if self.search_space is None:
            return None
        space = self.search_space
        try:
            names = [str(op) for stage in space["stages"] for op in space[stage]["ops"]]
        except (KeyError, TypeError) as error:
            raise SearchError(
                f"NASConfig(search_space=...) must be {{'stages': [name, ...], name: {{'ops': "
                f"[...]}}, ...}}; reading it failed with {error!r}"
            ) from error
        return tuple(dict.fromkeys(names))

    @property
    def lut_file(self) -> Path | None:
        """The file of the table."""
        if self.model_dir is None:
            return None
        return Path(self.model_dir) / "lut" / f"lut.{_SUFFIXES[self.lut_load_format]}"


class LookUpTable:
    """What every candidate costs, {label: {candidate: cost}}.

    The table is loaded where the config says so. Else it is empty until `count`, which the trainer
    calls.

    Args:
        config: the constants of the search.
        primitives: the known candidates, by name; None for any.

    Attributes:
        config: likewise.
        costs: the table; it may be edited before the trainer is made.
        fixed: what every architecture costs beside, in the same unit. NNI counts nothing there.

    Raises:
        SearchError: an operation of the search space, or a candidate of the table, that is not
            among the primitives; a file that holds no table.
    """

    def __init__(self, config: NASConfig, primitives: Collection[str] | None = None) -> None:
        self.config = config
        self.primitives = None if primitives is None else tuple(primitives)
        self.costs: dict[str, dict[str, float]] = {}
        self.fixed = 0.0
        self._check(config.operations() or (), "search_space")
        if config.lut_load:
            self.load()

    def count(self, model: nn.Module, example_inputs: Any) -> None:
        """Fill the table with multiply-accumulates on one sample, from the shapes of the inputs.

        Of a candidate without any it is 0.001, as in NNI. Where choices share a label it is the
        mean over their calls, so that the sum over all is right.

        Args:
            model: the model, which stays as it is.
            example_inputs: a tensor or a tuple for `model.forward`.

        Raises:
            SearchError: the model has a candidate that the search space, or the primitives, lack.
        """
        counted: dict[tuple[str, str], float] = {}

        def note(call: Call) -> float:
            key = call.label, call.candidate
            counted[key] = counted.get(key, 0.0) + call.count.flops
            return 0.0

        objective = CustomCost(costs=note)
        net = transform(model, "fbnet", example_inputs=example_inputs, objective=objective)
        (costs,) = net.space.costs.values()
        calls = Counter(place.label for place in costs.places)  # type: ignore[attr-defined]
        self.costs = {
            choice.label: {
                name: max(counted.get((choice.label, name), 0.0) / calls[choice.label], _FLOOR)
                for name in choice.candidates
            }
            for choice in net.space.choices
            if choice.kind == "layer"
        }
        self.check()

    def check(self) -> None:
        """Check the names of the candidates.

        Raises:
            SearchError: the search space, or the primitives, lack one.
        """
        names = tuple(name for row in self.costs.values() for name in row)
        self._check(names, "the table")
        allowed = self.config.operations()
        if allowed is not None and (wrong := [name for name in names if name not in allowed]):
            raise SearchError(f"candidate {wrong[0]!r} is in no stage of the search_space")

    def _check(self, names: Collection[str], where: str) -> None:
        if self.primitives is None:
            return
        if wrong := [name for name in names if name not in self.primitives]:
            raise SearchError(f"{wrong[0]!r} of {where} is not among the primitives")

    # -- files -------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write the table to the config's file; the file.

        JSON is {label: {candidate: cost}}; .npy is an array of (label, candidate, cost).

        Raises:
            SearchError: the config has no `model_dir`.
        """
        file = self._file()
        file.parent.mkdir(parents=True, exist_ok=True)
        if self.config.lut_load_format == "json":
            file.write_text(json.dumps(self.costs, indent=2) + "\n", encoding="utf-8")
            return file
        rows = [(label, name, cost) for label, r in self.costs.items() for name, cost in r.items()]
        width = max((len(text) for row in rows for text in row[:2]), default=1)
        kinds = [("label", f"U{width}"), ("candidate", f"U{width}"), ("cost", "f8")]
        np.save(file, np.array(rows, dtype=kinds), allow_pickle=False)
        return file

    def load(self) -> None:
        """Read the table from the config's file.

        Raises:
            SearchError: there is no such file, it holds no table, or names that may not be there.
        """
        file = self._file()
        try:
            if self.config.lut_load_format == "json":
                table = read_json(file)
            else:
                table: dict[str, dict[str, float]] = {}
                for label, name, cost in np.load(file, allow_pickle=False).tolist():
                    table.setdefault(label, {})[name] = cost
            self.costs = {
                str(label): {str(name): float(cost) for name, cost in row.items()}
                for label, row in table.items()
            }
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise SearchError(
                f"{file} cannot be read as a table of costs ({error}); LookUpTable.save() writes "
                "one"
            ) from error
        self.check()

    def _file(self) -> Path:
        file = self.config.lut_file
        if file is None:
            raise SearchError("the table has no file: give NASConfig a model_dir")
        return file
