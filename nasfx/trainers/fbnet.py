"""FBNetTrainer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from logging import Logger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from nasfx.costs.objectives import CustomCost
from nasfx.errors import CheckpointError, SearchError
from nasfx.searching.checkpoint import read_tensors
from nasfx.strategies import FBNet
from nasfx.trainers.base import SearchTrainer, first_inputs
from nasfx.trainers.lookup import LookUpTable, NASConfig


class FBNetTrainer(SearchTrainer):
    """FBNet (arXiv 1812.03443), with the parameters of NNI 2's FBNetTrainer; see `nasfx.FBNet`.

    The first `start_epoch` epochs train the weights alone. The cost is weighed in by the arch steps
    only; in NNI by the weight steps, too. `fit` writes a checkpoint, `<model_dir>/checkpoint.pt`,
    where the config has a `model_dir`.

    Args:
        model: the model, with choices.
        model_optim: of the model's parameters; its learning rate follows a cosine to 0 over the
            epochs, and is as before after `fit`.
        criterion: criterion(logits, target) -> 0-d tensor, a batch mean.
        device: None for a GPU where there is one, else the CPU.
        device_ids: the index of the GPU, in a list, or None: one process drives one device.
        lookup_table: what the candidates cost, with the config. An empty one is filled with
            multiply-accumulates, and saved where the config has a `model_dir`.
        train_loader: batches (input, target) that train the weights.
        valid_loader: likewise, for the architecture.
        n_epochs: how often `train_loader` is gone through, the first `start_epoch` ones included.
        load_ckpt: start from the checkpoint, without those first epochs.
        arch_path: where `fit` writes the found architecture, as JSON.
        logger: is given a line with the training loss for every epoch.

    Raises:
        SearchError: an argument that cannot be used.
        CheckpointError: there is no checkpoint, or it belongs to something else.
    """

    def __init__(
        self,
        model: nn.Module,
        model_optim: torch.optim.Optimizer,
        criterion: Callable[[Any, Any], Tensor],
        device: torch.device | str | None,
        device_ids: Sequence[int] | None,
        lookup_table: LookUpTable,
        train_loader: DataLoader[Any],
        valid_loader: DataLoader[Any],
        n_epochs: int = 300,
        load_ckpt: bool = False,
        arch_path: str | Path | None = None,
        logger: Logger | None = None,
    ) -> None:
        self.config, self.arch_path, self.logger = lookup_table.config, arch_path, logger
        inputs = first_inputs(train_loader, model)
        _fill(lookup_table, model, inputs)
        warm = self.config.start_epoch
        with _explained():
            super().__init__(
                model,
                FBNet(temperature=self.config.init_temperature, anneal=self.config.exp_anneal_rate),
                loss=criterion,
                metrics=None,
                optimizer=model_optim,
                epochs=n_epochs - warm if load_ckpt else n_epochs,
                loaders=(train_loader, valid_loader),
                device=_one_device(device, device_ids),
                log_frequency=None if logger is None else len(train_loader),
                warmup=0 if load_ckpt else warm,
                arch=_arch_options(self.config),
                objective=_objective(lookup_table),
                example_inputs=inputs,
            )
        if load_ckpt:
            _load(_checkpoint(self.config), self.net, self.optimizers)

    def fit(self) -> None:
        """Search, then write the checkpoint and the architecture where they are asked for."""
        batches = len(self.train_loader)
        with _cosine(self.optimizers[0], self.epochs, lambda: self._steps % batches == 0):
            super().fit()
        if self.config.model_dir is not None:
            _save(_checkpoint(self.config), self.net, self.optimizers)
        if self.arch_path is not None:
            self.export(self.arch_path)

    def _log(self, line: str) -> None:
        assert self.logger is not None
        self.logger.info(line)


def _fill(table: LookUpTable, model: nn.Module, inputs: Any) -> None:
    """Count an empty table, and save it where the config has a `model_dir`."""
    if table.costs:
        return
    table.count(model, inputs)
    if table.config.model_dir is not None:
        table.save()


@contextmanager
def _explained() -> Generator[None, None, None]:
    """Within the block, the error of a cost that is too small says where costs come from."""
    try:
        yield
    except SearchError as error:
        if "of the cost, which must be above" in str(error):
            error.add_note(
                "the costs are those of the lookup table: set its `fixed` to what every "
                "architecture costs beside the choices"
            )
        raise


@contextmanager
def _cosine(
    optimizer: torch.optim.Optimizer, epochs: int, epoch_is_over: Callable[[], bool]
) -> Generator[None, None, None]:
    """Within the block, the learning rate falls after the last step of every epoch."""
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = CosineAnnealingLR(optimizer, epochs)

    def after_step(*_: Any) -> None:
        if epoch_is_over():
            schedule.step()

    hook = optimizer.register_step_post_hook(after_step)
    try:
        yield
    finally:
        hook.remove()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _checkpoint(config: NASConfig) -> Path:
    if config.model_dir is None:
        raise SearchError("load_ckpt=True needs NASConfig(model_dir=...), where it is")
    return Path(config.model_dir) / "checkpoint.pt"


def _save(file: Path, net: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    held = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"net": net.state_dict(), "optimizers": held}, file)


def _load(file: Path, net: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    try:
        state = read_tensors(file)
        net.load_state_dict(state["net"])
        for optimizer, held in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
    except Exception as error:  # what is no checkpoint can make the reader raise anything
        raise CheckpointError(
            f"{file} is no checkpoint of this search ({error}); fit() with load_ckpt=False "
            "writes one"
        ) from error


def _arch_options(config: NASConfig) -> dict[str, Any]:
    rates = {"lr": config.nas_lr, "weight_decay": config.nas_weight_decay}
    return {"cls": torch.optim.AdamW, **rates}


def _objective(table: LookUpTable) -> CustomCost:
    config = table.config
    return CustomCost(
        loss=f"fbnet-{config.mode}",
        alpha=config.alpha,
        beta=config.beta,
        costs=table.costs,
        title=config.perf_metric,
        fixed=table.fixed,
    )


def _one_device(
    device: torch.device | str | None, device_ids: Sequence[int] | None
) -> torch.device | str | None:
    """`device`, with the index that `device_ids` holds."""
    if not device_ids:
        return device
    if len(device_ids) > 1:
        raise SearchError(
            f"device_ids={list(device_ids)}: one process drives one device; give one index"
        )
    kind = "cuda" if device is None else torch.device(device).type
    if kind == "cpu":
        raise SearchError(f"device_ids={list(device_ids)} on the CPU, which has none; give None")
    return torch.device(kind, device_ids[0])
