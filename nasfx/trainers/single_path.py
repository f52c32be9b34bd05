"""SinglePathTrainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nasfx.strategies import SinglePath
from nasfx.trainers.base import SearchTrainer, loader


class SinglePathTrainer(SearchTrainer):
    """SPOS (arXiv 1904.00420), with the parameters of NNI's SinglePathTrainer.

    Every batch trains one uniformly drawn path. Where NNI's trainer exports a random architecture,
    this one ends with the paper's evolution, over `dataset_valid`; see `nasfx.SinglePath`.

    Args:
        model: the model, with choices.
        loss: loss(logits, target) -> 0-d tensor, a batch mean.
        metrics: metrics(logits, target) -> a dict of batch means; the first one, higher is better,
            is the metric of the search, all are in `records`.
        optimizer: of the model's parameters.
        num_epochs: how often `dataset_train` is gone through.
        dataset_train: of (input, target), for the weights; shuffled.
        dataset_valid: of (input, target), on which architectures are compared.
        batch_size: of both.
        workers: processes that load data, for each dataset; 0 for none.
        device: None for a GPU where there is one, else the CPU.
        log_frequency: batches between lines with the training loss; None for no lines.

    Raises:
        SearchError: an argument that cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        metrics: Callable[[Any, Any], Mapping[str, Any]],
        optimizer: torch.optim.Optimizer,
        num_epochs: int,
        dataset_train: Dataset[Any],
        dataset_valid: Dataset[Any],
        batch_size: int = 64,
        workers: int = 4,
        device: torch.device | str | None = None,
        log_frequency: int | None = None,
    ) -> None:
        train = loader(dataset_train, batch_size, workers)
        valid = loader(dataset_valid, batch_size, workers, shuffle=False)
        super().__init__(
            model,
            SinglePath(),
            loss=loss,
            metrics=metrics,
            optimizer=optimizer,
            epochs=num_epochs,
            loaders=(train, valid),
            device=device,
            log_frequency=log_frequency,
        )
