"""EnasTrainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nasfx.errors import SearchError
from nasfx.strategies import Enas
from nasfx.trainers.base import SearchTrainer, halves


class EnasTrainer(SearchTrainer):
    """ENAS (arXiv 1802.03268), with the parameters of NNI's EnasTrainer; see `nasfx.Enas`.

    The reward also decides between the architectures that are drawn at the end.

    Args:
        model: the model, with choices.
        loss: loss(logits, target) -> 0-d tensor, a batch mean.
        metrics: metrics(logits, target) -> a dict of batch means, for `records`.
        reward_function: reward_function(logits, target) -> what the controller learns to raise, a
            batch mean.
        optimizer: of the model's parameters.
        num_epochs: how often the first half of the data is gone through.
        dataset: of (input, target). Its first half trains the weights, its second the controller.
        batch_size: of both halves.
        workers: processes that load data, for each half; 0 for none.
        device: None for a GPU where there is one, else the CPU.
        log_frequency: batches between lines with the training loss; None for no lines.
        grad_clip: norm that the gradients of the weights, and those of the controller, are clipped
            to; 0 for no clipping.
        entropy_weight: what the entropy of the draws counts beside the reward.
        skip_weight: of the penalty on the rate of skips.
        baseline_decay: the baseline becomes decay * baseline + (1 - decay) * reward.
        ctrl_lr: of the controller's Adam.
        ctrl_steps_aggregate: draws, each on a batch of its own, for a step of the controller.
        ctrl_kwargs: further options of `nasfx.Enas`, such as {"hidden": 100}.
        ctrl_steps: steps of the controller in an epoch; None for as many as its half of the data
            has batches for.

    Raises:
        SearchError: an argument that cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        metrics: Callable[[Any, Any], Mapping[str, Any]],
        reward_function: Callable[[Any, Any], Any],
        optimizer: torch.optim.Optimizer,
        num_epochs: int,
        dataset: Dataset[Any],
        batch_size: int = 64,
        workers: int = 4,
        device: torch.device | str | None = None,
        log_frequency: int | None = None,
        grad_clip: float = 5.0,
        entropy_weight: float = 0.0001,
        skip_weight: float = 0.8,
        baseline_decay: float = 0.999,
        ctrl_lr: float = 0.00035,
        ctrl_steps_aggregate: int = 20,
        ctrl_kwargs: Mapping[str, Any] | None = None,
        *,
        ctrl_steps: int | None = None,
    ) -> None:
        own: dict[str, Any] = {
            "entropy_weight": entropy_weight, "skip_weight": skip_weight,
            "baseline_decay": baseline_decay, "learning_rate": ctrl_lr, "steps": ctrl_steps,
            "aggregate": ctrl_steps_aggregate, "grad_clip": grad_clip or None,
        }  # fmt: skip
        self.reward_function = reward_function
        super().__init__(
            model,
            Enas(**own, **_checked_options(ctrl_kwargs or {}, own)),
            loss=loss,
            metrics=metrics,
            optimizer=optimizer,
            epochs=num_epochs,
            loaders=halves(dataset, batch_size, workers),
            device=device,
            log_frequency=log_frequency,
            clip_norm=grad_clip,
        )

    def _metric(self, outputs: Any, target: Any) -> Any:
        """The reward; in evaluations the metrics are kept, too."""
        if not self.net.in_step:
            self._kept_metrics(outputs, target)
        return self.reward_function(outputs, target)


def _checked_options(options: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    known = [field.name for field in fields(Enas) if field.name not in own]
    if wrong := [name for name in options if name not in known]:
        raise SearchError(
            f"ctrl_kwargs has {wrong[0]!r}: it holds options of nasfx.Enas that have no parameter "
            f"of EnasTrainer's, which are {known}"
        )
    return options
