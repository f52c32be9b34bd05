"""A step of a search: gradients, checked and averaged over the ranks, and an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nasfx.searching.distributed import Ranks
from nasfx.searching.evaluation import Batch, Metric, checked, requires_grad
from nasfx.searching.nonfinite import nonfinite_error
from nasfx.supernet import Supernet

Loss = Callable[[Any, Any], Tensor]


class Steps:
    """Weight steps and arch steps of a net.

    Attributes:
        position: where the search is, for messages: "in epoch 3, batch 17".
    """

    def __init__(
        self,
        net: Supernet,
        loss: Loss,
        metric: Metric | None,
        clip_norm: float | None,
        optimizers: tuple[Any, Any],
        ranks: Ranks,
        check_evaluation: Callable[[], None],
    ) -> None:
        """Steps of a net.

        Args:
            net: what `transform` made.
            loss: loss(outputs, target) -> 0-d tensor.
            metric: what a strategy that learns from rewards is given; None: minus the loss.
            clip_norm: clip the weights' gradients to this norm.
            optimizers: (of the weights, of the architecture), set up by Fabric.
            ranks: the processes that take the same steps.
            check_evaluation: called before every forward; it may end the search.
        """
        self.net, self.loss, self.metric, self.clip_norm = net, loss, metric, clip_norm
        self.weights, self.arch = optimizers
        self.ranks, self.fabric, self.check_evaluation = ranks, ranks.fabric, check_evaluation
        self.position = ""

    def outputs(self, inputs: tuple[Any, ...]) -> Any:
        """The net's, in the fabric's precision."""
        self.check_evaluation()
        with self.fabric.autocast():
            return self.net(*inputs)

    def _checked(self, value: Any, inputs: tuple[Any, ...], what: str) -> float:
        return checked(self.net, value, inputs, what, self.position)

    def arch_step(self, valid: Iterator[Batch], following: Sequence[Batch]) -> float:
        """An optimizer step of the architecture, over as many draws as the strategy wants.

        `following` are the batches of the next weight step, where there is one.
        """
        losses: list[float] = []
        batch: Batch | None = None
        for _ in range(self.net.strategy.schedule.draws):
            if batch is None or not self.net.strategy.schedule.same_batch:
                batch = self.ranks.together(lambda: next(valid))
            losses.append(self._arch_gradient(*batch, following))
        self.ranks.average_gradients(self.net.arch_parameters())
        self.arch.step()
        self.arch.zero_grad()
        return sum(losses) / len(losses)

    def _arch_gradient(
        self, inputs: tuple[Any, ...], target: Any, following: Sequence[Batch]
    ) -> float:
        net, ranks = self.net, self.ranks

        def gradient() -> None:
            self.fabric.backward(net.objective(value, reward))
            self._check_arch_gradient(inputs)

        def forward() -> tuple[Tensor, float, Any]:
            outputs = self.outputs(inputs)
            value = self.loss(outputs, target)
            number = self._checked(value, inputs, "the validation loss")
            reward = None
            if net.strategy.rewarded and self.metric is not None:
                reward = self.metric(outputs, target)
            return value, number, reward

        with net.arch_step(**self._unrolled(following)):
            value, number, reward = ranks.together(forward, lambda _: str(net._arch.state.drawn))
            if net.strategy.rewarded and ranks.count > 1:
                reward = ranks.mean(-number if reward is None else float(reward))
            ranks.together(gradient)
        return number

    def _check_arch_gradient(self, inputs: tuple[Any, ...]) -> None:
        # With scaled losses (16-mixed) an overflow is normal: the scaler skips the step.
        scaled = getattr(self.fabric.strategy.precision, "scaler", None) is not None
        for p in () if scaled else self.net.arch_parameters():
            if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                raise nonfinite_error(
                    self.net,
                    inputs,
                    f"the architecture's gradient became not finite {self.position}",
                    backward=True,
                )

    def _unrolled(self, following: Sequence[Batch]) -> dict[str, Any]:
        """What a second-order arch step is given."""
        if not self.net.strategy.second_order:
            return {}

        def loss() -> Tensor:
            losses = [self.loss(self.outputs(inputs), target) for inputs, target in following]
            return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

        def inner() -> Tensor:
            return self.ranks.together(loss)

        average = None if self.ranks.count == 1 else self.ranks.average
        return {
            "inner": inner, "weight_optimizer": self.weights.optimizer, "average": average
        }  # fmt: skip

    def weight_step(self, batches: Sequence[Batch]) -> float:
        """An optimizer step of the weights of one path, over so many batches."""
        net, ranks = self.net, self.ranks

        def gradients() -> float:
            return sum(self._weight_gradient(*batch, len(batches)) for batch in batches)

        def trained(_: float) -> str:
            moved = [name for name, p in net.named_parameters() if p.grad is not None]
            return f"{net._arch.state.drawn} {moved}"

        with net.weight_step():
            total = ranks.together(gradients, trained)
        ranks.average_gradients(net.weight_parameters())
        if self.clip_norm is not None:
            self.fabric.strategy.precision.unscale_gradients(self.weights.optimizer)
            with_grad = [p for p in net.weight_parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(with_grad, self.clip_norm)
        self.weights.step()
        self.weights.zero_grad()
        return total / len(batches)

    def _weight_gradient(self, inputs: tuple[Any, ...], target: Any, share: int) -> float:
        """Add the gradient of a batch, divided by `share`."""
        outputs = self.outputs(inputs)
        value = self.loss(outputs, target)
        number = self._checked(value, inputs, "the training loss")
        # A drawn path may hold no weights at all: then there is nothing to train.
        if value.requires_grad or requires_grad(outputs):
            self.fabric.backward(value / share if share > 1 else value)
        return number
