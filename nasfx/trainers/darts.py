"""DartsTrainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nasfx.errors import SearchError
from nasfx.strategies import Darts
from nasfx.trainers.base import SearchTrainer, halves

_LEARNING_RATE = 0.0025


class DartsTrainer(SearchTrainer):
    """DARTS (arXiv 1806.09055), with the parameters of NNI's DartsTrainer; see `nasfx.Darts`.

    Args:
        model: the model, with choices.
        loss: loss(logits, target) -> 0-d tensor, a batch mean.
        metrics: metrics(logits, target) -> a dict of batch means; the first one, higher is better,
            is the metric of the search, all are in `records`.
        optimizer: of the model's parameters; None for SGD(learning_rate, momentum=0.9).
        num_epochs: how often the first half of the data is gone through.
        dataset: of (input, target). Its first half trains the weights, its second the architecture.
        grad_clip: norm that the weights' gradients are clipped to; 0 for no clipping.
        learning_rate: of the weights where `optimizer` is None.
        batch_size: of both halves.
        workers: processes that load data, for each half; 0 for none.
        device: None for a GPU where there is one, else the CPU.
        log_frequency: batches between lines with the training loss; None for no lines.
        arc_learning_rate: of the architecture's Adam.
        unrolled: second order, by the authors' finite difference.

    Raises:
        SearchError: an argument that cannot be used; a learning rate beside an optimizer that has
            another one.

    Example:
        >>> # trainer = DartsTrainer(model, F.cross_entropy, metrics, optimizer, 50, dataset)
        >>> # trainer.fit(); trainer.export("architecture.json")
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        metrics: Callable[[Any, Any], Mapping[str, Any]],
        optimizer: torch.optim.Optimizer | None,
        num_epochs: int,
        dataset: Dataset[Any],
        grad_clip: float = 5.0,
        learning_rate: float = _LEARNING_RATE,
        batch_size: int = 64,
        workers: int = 4,
        device: torch.device | str | None = None,
        log_frequency: int | None = None,
        arc_learning_rate: float = 0.0003,
        unrolled: bool = False,
    ) -> None:
        if optimizer is None:
            optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9)
        elif learning_rate != _LEARNING_RATE:
            _check_rate(optimizer, learning_rate)
        super().__init__(
            model,
            Darts(unrolled="finite-difference" if unrolled else False),
            loss=loss,
            metrics=metrics,
            optimizer=optimizer,
            epochs=num_epochs,
            loaders=halves(dataset, batch_size, workers),
            device=device,
            log_frequency=log_frequency,
            clip_norm=grad_clip,
            arch={"lr": arc_learning_rate},
        )


def _check_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    rates = [group["lr"] for group in getattr(optimizer, "param_groups", ())]
    if any(rate != learning_rate for rate in rates):
        raise SearchError(
            f"learning_rate={learning_rate} beside an optimizer whose rates are {rates}: leave it "
            "out, or give optimizer=None for SGD with this rate"
        )
