"""Batch norms of candidates: folded into the mixture, and shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nasfx.ops.function import graph_function
from nasfx.ops.mix import add_mixed, check_alike
from nasfx.rewriting.graph import has_hooks


@graph_function
def mix_norms(
    gate: Tensor, outputs: Sequence[Any], norms: Sequence[_BatchNorm | None], label: str = "",
    counted: bool = True,
) -> Tensor:  # fmt: skip
    """`mix` of candidates that end in a batch norm: w n(y) is n(y) with a gain w times as large.

    So the outputs of these batch norms are not kept for the backward, and neither multiplied by the
    weights nor their gradients by them.

    Args:
        gate: the weights, shape (candidates,).
        outputs: for each weight what its batch norm reads, or where it has none its output; the
            number 0 stands for zeros.
        norms: the batch norms, whose running statistics move in train mode as their own call does.
        label: the choice's label.
        counted: whether they count the batch; else `count_batches_` does.

    Raises:
        SearchError: shapes differ, as for `mix`.
    """
    check_alike(outputs, label)
    if counted:
        count_batches_(*(norm for norm in norms if norm is not None))
    rest = [0 if norm is not None else y for y, norm in zip(outputs, norms, strict=True)]
    total: Tensor | None = None
    for weight, y, norm in zip(gate.unbind(0), outputs, norms, strict=True):
        if norm is None:
            continue
        term = _scaled(norm, y, weight)
        # In place, since no backward reads what a batch norm gave.
        total = term if total is None else total.add_(term)
    assert total is not None, "the pass leaves mixtures without batch norms"
    if any(isinstance(y, Tensor) for y in rest):
        return add_mixed(total, gate, rest, label)
    return total


def _scaled(norm: _BatchNorm, x: Tensor, weight: Tensor) -> Tensor:
    """`weight` times what `norm` gives, its running statistics moved as its own call does."""
    own_gain: Tensor | None = getattr(norm, "weight")  # noqa: B009  # typed as never None
    own_shift: Tensor | None = getattr(norm, "bias")  # noqa: B009
    if own_gain is None:
        # Dense: on CPU the gradients of an expanded gain are wrong in torch 2.14.
        dtype = x.dtype if norm.running_mean is None else norm.running_mean.dtype
        gain, shift = weight.to(dtype).repeat(norm.num_features), None
    else:
        weight = weight.to(own_gain.dtype)
        gain, shift = weight * own_gain, None if own_shift is None else weight * own_shift
    return _normalised(norm, x, gain, shift)


def _normalised(norm: _BatchNorm, x: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    training = norm.training or norm.running_mean is None
    tracked = norm.track_running_stats or not norm.training
    return F.batch_norm(
        x,
        norm.running_mean if tracked else None,
        norm.running_var if tracked else None,
        gain,
        shift,
        training,
        norm.momentum or 0.0,
        norm.eps,
    )


@graph_function
def uncounted_norm(x: Tensor, norm: _BatchNorm) -> Tensor:
    """What a batch norm with a momentum gives; `count_batches_` counts the batch.

    Args:
        x: (N, C, ...).
        norm: the batch norm, whose running statistics move in train mode.
    """
    return _normalised(norm, x, norm.weight, norm.bias)


@graph_function
def count_batches_(*norms: _BatchNorm) -> None:
    """Add one to the number of batches that each has seen, of those in train mode, in one call."""
    counts = [n.num_batches_tracked for n in norms if n.training]
    known = [count for count in counts if count is not None]
    if known:
        torch._foreach_add_(known, 1)  # pyright: ignore[reportPrivateImportUsage]


@graph_function
def shared_norms(
    x: Tensor, norms: Sequence[_BatchNorm], counted: bool = True
) -> tuple[Tensor, ...]:
    """What batch norms without gain, of one eps, give for one input.

    In train mode all of them give the same, so it is computed once; each one's running statistics
    move as its own call moves them. In eval mode each has its own statistics and is called.

    Args:
        x: (N, C, ...).
        norms: the batch norms, of equal settings.
        counted: whether they count the batch; else `count_batches_` does.

    Returns:
        One output for each; in train mode they are one tensor.
    """
    alike = all(norm.training for norm in norms) and x.dtype in (torch.float32, torch.float64)
    count = x.numel() // norms[0].num_features
    if counted:
        count_batches_(*norms)
    if not alike or count < 2 or torch.compiler.is_compiling():
        return tuple([uncounted_norm(x, norm) for norm in norms])
    eps = norms[0].eps
    y, mean, inverse_deviation = torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)
    with torch.no_grad():
        unbiased = (inverse_deviation**-2 - eps) * (count / (count - 1))
        for norm in norms:
            _move_statistics(norm, mean, unbiased)
    return (y,) * len(norms)


def _move_statistics(norm: _BatchNorm, mean: Tensor, unbiased: Tensor) -> None:
    if norm.running_mean is None or norm.running_var is None or norm.momentum is None:
        return
    for kept, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        # As in torch's own update no version is counted: in train mode no backward reads them.
        kept.data.lerp_(new.to(kept.dtype), norm.momentum)


def norm_obstacle(module: nn.Module, calls: int) -> str:
    """Why `mix_norms` or `shared_norms` does not stand for a call of a batch norm, or "".

    Args:
        module: the batch norm.
        calls: how often the graph calls it.
    """
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    if type(module) not in kinds or cast("_BatchNorm", module).momentum is None:
        return f"{type(module).__name__} is no plain batch norm with a momentum"
    if has_hooks(module):
        return "the batch norm has hooks"
    if calls > 1:
        return "the batch norm is called more than once, and the order of its batches counts"
    return ""
