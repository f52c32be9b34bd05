"""ProxylessTrainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nasfx.costs.latency import Latency
from nasfx.costs.objectives import Flops, Objective
from nasfx.costs.sources import LatencySource
from nasfx.errors import NasfxError, SearchError
from nasfx.strategies import Proxyless
from nasfx.trainers.base import SearchTrainer, halves

_PARAMETERS = {"mul#log": ("alpha", "beta"), "add#linear": ("lambda",)}  # by type of the loss


class ProxylessTrainer(SearchTrainer):
    """ProxylessNAS (arXiv 1812.00332), with the parameters of NNI's ProxylessTrainer.

    See `nasfx.Proxyless`. The regulariser is of the whole net: its expected latency where there is
    `applied_hardware`, else its expected multiply-accumulates.

    Args:
        model: the model, with choices.
        loss: loss(logits, target) -> 0-d tensor, a batch mean.
        metrics: metrics(logits, target) -> a dict of batch means; the first one, higher is better,
            is the metric of the search, all are in `records`.
        optimizer: of the model's parameters.
        num_epochs: how often the first half of the data is gone through, warm-up included.
        dataset: of (input, target). Its first half trains the weights, its second the architecture.
        warmup_epochs: epochs at the start in which only weights are trained.
        batch_size: of both halves.
        workers: processes that load data, for each half; 0 for none.
        device: None for a GPU where there is one, else the CPU.
        log_frequency: batches between lines with the training loss; None for no lines.
        arc_learning_rate: of the architecture's Adam.
        grad_reg_loss_type: with E the expected cost, "mul#log" for loss * alpha * (log E / log
            ref_latency) ** beta, "add#linear" for loss + lambda * (E - ref_latency) / ref_latency,
            or None for the loss alone.
        grad_reg_loss_params: "alpha" and "beta" for "mul#log", "lambda" for "add#linear".
        applied_hardware: what E is: the latency in ms on this device, one of
            `nasfx.known_hardware()`, the folder of a predictor, or a source of `nasfx.costs`. None
            for multiply-accumulates in millions.
        dummy_input: the shape of the input that costs are counted for, whatever its batch size.
        ref_latency: the target of E.

    Raises:
        SearchError: an argument that cannot be used.
        ProfileError: a latency that is not known for `applied_hardware`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        metrics: Callable[[Any, Any], Mapping[str, Any]],
        optimizer: torch.optim.Optimizer,
        num_epochs: int,
        dataset: Dataset[Any],
        warmup_epochs: int = 0,
        batch_size: int = 64,
        workers: int = 4,
        device: torch.device | str | None = None,
        log_frequency: int | None = None,
        arc_learning_rate: float = 0.001,
        grad_reg_loss_type: str | None = None,
        grad_reg_loss_params: Mapping[str, float] | None = None,
        applied_hardware: str | LatencySource | None = None,
        dummy_input: Sequence[int] = (1, 3, 224, 224),
        ref_latency: float = 65.0,
    ) -> None:
        objective = _objective(
            grad_reg_loss_type, grad_reg_loss_params or {}, applied_hardware, ref_latency
        )
        try:
            super().__init__(
                model,
                Proxyless(),
                loss=loss,
                metrics=metrics,
                optimizer=optimizer,
                epochs=num_epochs,
                loaders=halves(dataset, batch_size, workers),
                device=device,
                log_frequency=log_frequency,
                warmup=warmup_epochs,
                arch={"lr": arc_learning_rate},
                objective=objective,
                example_inputs=_dummy(model, dummy_input) if objective else None,
            )
        except NasfxError as error:
            if objective:
                error.add_note(f"costs are counted for dummy_input={tuple(dummy_input)}")
            raise


def _objective(
    kind: str | None,
    given: Mapping[str, float],
    hardware: str | LatencySource | None,
    target: float,
) -> Objective | None:
    if kind is not None and kind not in _PARAMETERS:
        known = (*_PARAMETERS, None)
        raise SearchError(f"grad_reg_loss_type={kind!r} must be one of {known}")
    names = _PARAMETERS[kind] if kind else ()
    if set(given) != set(names):
        raise SearchError(
            f"grad_reg_loss_params={dict(given)}: grad_reg_loss_type={kind!r} needs exactly "
            f"{list(names)}"
        )
    if kind is None:
        if hardware is not None:
            raise SearchError(
                f"applied_hardware={hardware!r} has no effect without grad_reg_loss_type, which "
                "says how the latency is weighed against the loss"
            )
        return None
    constants: dict[str, Any] = {
        "lambda_" if name == "lambda" else name: value for name, value in given.items()
    }
    if hardware is not None:
        return Latency(hardware, target, loss=kind, **constants)
    return Flops(target, unit="M", loss=kind, **constants)


def _dummy(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Zeros of `shape`, as the model's parameters are; two samples, for batch norms."""
    parameter = next(model.parameters(), torch.zeros(()))
    kind = {"dtype": parameter.dtype, "device": parameter.device}
    return torch.zeros((2, *shape[1:]), **kind)  # type: ignore[arg-type]
