"""The unrolled arch step: what the architecture does to the weights' next step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from nasfx.errors import SearchError
from nasfx.ops.select import unmoved_buffers

METHODS = ("finite-difference", "exact")

Average = Callable[[Sequence[Tensor]], None]
"""Lets each tensor be its mean over the processes of a search, in place."""


@contextmanager
def unrolled(
    weights: Sequence[nn.Parameter],
    alphas: Sequence[nn.Parameter],
    modules: Sequence[nn.Module],
    inner: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    method: str,
    epsilon: float = 0.01,
    average: Average | None = None,
) -> Generator[None, None, None]:
    """Within the block the weights are where the optimizer's next step would take them.

    With g(w, alpha) the gradient of the training loss by the weights, SGD's step gives w'. Run the
    validation loss at w' and its `backward()` inside the block: the first term of equation 7 lands
    in `alpha.grad`, and v, the gradient at w', in `weight.grad`. On exit the second term is added
    to `alpha.grad`: -d/dalpha <g(w, alpha), c v>, where c, a number for each weight, is -dw'/dg: lr
    for plain SGD. Momentum, dampening, weight decay, nesterov and maximize are the optimizer's;
    clipping and step hooks are not part of the step.

    Afterwards the weights and their `.grad`, all buffers and the optimizer are as they were, bit
    for bit, also where `inner` or the block raises; then nothing is added. The block, and `inner`
    in each of its calls, start from the buffers as they were found. Every call of `inner` sees the
    same numbers of torch's global generators, on the CPU and on the weights' CUDA devices. These
    end as after one call and the block; other generators are not replayed.

    Args:
        weights: those that require grad are differentiated, and must do so in the block too; those
            that the optimizer does not hold, or that `inner` does not use, do not move.
        alphas: the architecture parameters; those that require grad get the second term.
        modules: the roots of the modules whose buffers are kept.
        inner: runs the net as it is and gives the training loss, 0-d. It is called once by
            "exact" and twice by "finite-difference" after the first time, and not again where c v
            is zero.
        optimizer: the weights' optimizer, a torch.optim.SGD, or what wraps one as `.optimizer`.
        method: "finite-difference" for equation 8 with the authors' step; "exact" differentiates
            twice, which needs more memory and, of every operation, a second derivative.
        epsilon: the norm of the change of the weights in equation 8, whose step is
            epsilon / ||c v||. For one c this is the authors' 0.01 / ||v||.
        average: where each process has a share of the batches: lets tensors be their means over
            the processes, in place. g and v are; `alpha.grad` is left to the caller.

    Raises:
        SearchError: the optimizer is not SGD or holds none of the weights, there is no such
            method, epsilon is not positive, or `inner` gives no 0-d loss of these weights.

    Source: DARTS (arXiv 1806.09055), equations 6 to 8.
    """
    sgd = _sgd(optimizer)
    if method not in METHODS:
        known = " or ".join(map(repr, METHODS))
        raise SearchError(f"unrolled: method={method!r} must be {known}")
    if not epsilon > 0:
        raise SearchError(f"unrolled: epsilon={epsilon!r} must be positive")
    trained = [w for w in weights if w.requires_grad]
    learned = [a for a in alphas if a.requires_grad]
    groups = _groups(trained, sgd)
    held = list(groups)
    random = _RandomState([w.device for w in trained])
    kept = {w: w.detach().clone() for w in held}
    stashed = [w.grad for w in trained]

    @contextmanager
    def training_again() -> Generator[Tensor, None, None]:
        with random.replayed(), _training_loss(inner, modules) as loss:
            yield loss

    try:
        for w in trained:
            w.grad = None
        with _training_loss(inner, modules) as loss:
            grads = _weight_gradients(loss, held)
        if average is not None:
            average([grad for grad in grads if grad is not None])
        slopes = _step(groups, grads, sgd)
        with unmoved_buffers(*modules):
            yield
        _restore(kept)
        if average is not None:
            average([w.grad for w in held if w.grad is not None])
        pulled = {
            w: slope * w.grad.detach()
            for w, slope in zip(held, slopes, strict=True)
            if w.grad is not None
        }
        norm = float(get_total_norm(list(pulled.values())))
        if learned and norm != 0:
            if method == "exact":
                terms = _exact(training_again, learned, pulled)
            else:
                terms = _finite_difference(training_again, learned, pulled, kept, epsilon / norm)
            _subtract(learned, terms)
    finally:
        _restore(kept)
        for w, grad in zip(trained, stashed, strict=True):
            w.grad = grad


Training = Callable[[], AbstractContextManager[Tensor]]


# -- the step of the weights -----------------------------------------------------------------------


def _sgd(optimizer: torch.optim.Optimizer) -> torch.optim.SGD:
    bare = getattr(optimizer, "optimizer", optimizer)  # Fabric's wrapper has one
    if type(bare) is torch.optim.SGD:
        return bare
    raise SearchError(
        f"unrolled: the step of {type(bare).__name__} cannot be unrolled, only that of "
        "torch.optim.SGD itself: its new weights are linear in the gradient, one number for each "
        "weight, which need not hold for others. Train the weights with SGD, or search in first "
        "order"
    )


def _groups(
    trained: Sequence[nn.Parameter], sgd: torch.optim.SGD
) -> dict[nn.Parameter, dict[str, Any]]:
    """The parameter groups of the weights that the optimizer holds."""
    group_of = {p: group for group in sgd.param_groups for p in group["params"]}
    groups = {w: group_of[w] for w in trained if w in group_of}
    if not groups:
        raise SearchError(
            f"unrolled: the optimizer holds none of the {len(trained)} weights that require grad, "
            "so there is no step to unroll: give the optimizer that trains the weights"
        )
    return groups


def _step(
    groups: Mapping[nn.Parameter, Mapping[str, Any]],
    grads: Sequence[Tensor | None],
    sgd: torch.optim.SGD,
) -> list[float]:
    """Move the weights as `sgd` would, and give c = -dw'/dg for each; without a gradient 0."""
    slopes: list[float] = []
    with torch.no_grad():
        for (w, group), grad in zip(groups.items(), grads, strict=True):
            if grad is None:
                slopes.append(0.0)
                continue
            # Not state[w], which would make an entry.
            average = sgd.state.get(w, {}).get("momentum_buffer")
            direction, slope = _direction(w, grad, group, average)
            lr = _number(group["lr"])
            w.add_(direction, alpha=-lr)
            slopes.append(lr * slope)
    torch.clear_autocast_cache()
    return slopes


def _direction(
    w: Tensor, grad: Tensor, group: Mapping[str, Any], average: Tensor | None
) -> tuple[Tensor, float]:
    """What SGD subtracts from `w`, divided by lr, and its derivative by `grad`."""
    momentum, decay = group["momentum"], _number(group["weight_decay"])
    direction, slope = (-grad, -1.0) if group["maximize"] else (grad, 1.0)
    if decay != 0:
        direction = direction.add(w, alpha=decay)
    if momentum == 0:
        return direction, slope
    if average is None:  # the first step is not dampened
        fed, average = 1.0, direction
    else:
        fed = 1 - group["dampening"]
        average = average.mul(momentum).add(direction, alpha=fed)
    if group["nesterov"]:
        return direction.add(average, alpha=momentum), slope * (1 + momentum * fed)
    return average, slope * fed


def _number(value: float | Tensor) -> float:
    return float(value.item()) if isinstance(value, Tensor) else value


def _restore(kept: Mapping[nn.Parameter, Tensor]) -> None:
    with torch.no_grad():
        for w, value in kept.items():
            w.copy_(value)
    # In an autocast block around the step, casts of the moved weights would go on being used.
    torch.clear_autocast_cache()


# -- the training loss -----------------------------------------------------------------------------


class _RandomState:
    """The state of the CPU's global generator and of those of the CUDA devices among `devices`."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = [d for d in dict.fromkeys(devices) if d.type == "cuda"]
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(d) for d in self.devices]

    @contextmanager
    def replayed(self) -> Generator[None, None, None]:
        """Within the block the generators start from this state; they return to their own."""
        with torch.random.fork_rng(self.devices, device_type="cuda"):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


@contextmanager
def _training_loss(
    inner: Callable[[], Tensor], modules: Sequence[nn.Module]
) -> Generator[Tensor, None, None]:
    """The loss; differentiate it inside, as checkpointing runs modules, and their buffers, then."""
    with unmoved_buffers(*modules), torch.enable_grad():
        loss = inner()
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
            raise SearchError(
                f"unrolled: inner() returned a {type(loss).__name__}{shape}; it must return the "
                "training loss as a 0-d tensor, as in `lambda: F.cross_entropy(net(x), y)`"
            )
        yield loss


def _weight_gradients(loss: Tensor, held: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
    grads = _gradients(loss, held) if loss.requires_grad else ()
    if all(grad is None for grad in grads):
        raise SearchError(
            "unrolled: the loss that inner() returned does not depend on any weight that requires "
            "grad and is the optimizer's: run the net inside inner(), and neither under no_grad() "
            "nor on detached values"
        )
    return grads


def _gradients(
    loss: Tensor, inputs: Sequence[Tensor], create_graph: bool = False
) -> Sequence[Tensor | None]:
    return torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True)


# -- d/dalpha <g(w, alpha), c v> -------------------------------------------------------------------


def _exact(
    training: Training, alphas: Sequence[nn.Parameter], pulled: Mapping[nn.Parameter, Tensor]
) -> Sequence[Tensor | None]:
    """Differentiate twice. `pulled` holds c v by weight."""
    with training() as loss:
        grads = _gradients(loss, list(pulled), create_graph=True)
        pairs = [
            (grad, v)
            for grad, v in zip(grads, pulled.values(), strict=True)
            if grad is not None and grad.requires_grad
        ]
        if not pairs:
            return [None] * len(alphas)
        outputs, vectors = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, alphas, vectors, allow_unused=True)


def _finite_difference(
    training: Training,
    alphas: Sequence[nn.Parameter],
    pulled: Mapping[nn.Parameter, Tensor],
    kept: Mapping[nn.Parameter, Tensor],
    step: float,
) -> Sequence[Tensor | None]:
    """Equation 8: the alphas' gradient at w + step * c v less that at w - step * c v."""
    ends: list[Sequence[Tensor | None]] = []
    for signed in (step, -step):
        _restore(kept)
        with torch.no_grad():
            for w, v in pulled.items():
                w.add_(v, alpha=signed)
        with training() as loss:
            ends.append(_gradients(loss, alphas))
    return [_slope(plus, minus, 2 * step) for plus, minus in zip(*ends, strict=True)]


def _slope(plus: Tensor | None, minus: Tensor | None, width: float) -> Tensor | None:
    if plus is None or minus is None:
        alone = plus if minus is None else -minus
        return None if alone is None else alone / width
    return (plus - minus) / width


def _subtract(alphas: Sequence[nn.Parameter], terms: Sequence[Tensor | None]) -> None:
    with torch.no_grad():
        for alpha, term in zip(alphas, terms, strict=True):
            if term is not None:
                alpha.grad = -term if alpha.grad is None else alpha.grad.sub_(term)
