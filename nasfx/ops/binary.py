"""ProxylessNAS's binary gates: one path forward, a gradient for every gate backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nasfx.errors import SearchError
from nasfx.ops.gates import Gate
from nasfx.ops.mix import _dot, unlike_shapes
from nasfx.ops.select import (
    Deferred,
    InputSwitch,
    Switch,
    forced,
    reduce_drawn,
    refuse_proxies,
    unmoved_buffers,
)

Others = Callable[[int, list[Tensor]], Any]
"""(k, tensors) -> output k, computed from the saved tensors without a graph for gradients."""


class _GateGradient(torch.autograd.Function):
    """Passes the active outputs through; in backward gives the gates b_k = sum(o_k * dL/do).

    The active path is ordinary autograd, so it works under DDP and keeps only its own activations;
    the others are computed here, in backward, one after the other, from the saved inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, wanted: tuple[int, ...], output_k: Others, label: str,
        n_inputs: int, *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        inputs, outputs = tensors[:n_inputs], tensors[n_inputs:]
        ctx.output_k, ctx.label, ctx.n_inputs, ctx.dtype = output_k, label, n_inputs, weights.dtype
        ctx.n_gates, ctx.wanted = len(weights), wanted
        device = outputs[0].device.type
        known = torch.amp.is_autocast_available(device)
        enabled = known and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if enabled else None
        ctx.autocast = (device if known else "cpu", dtype, enabled)
        ctx.save_for_backward(*inputs, *outputs)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        inputs, outputs = list(saved[: ctx.n_inputs]), saved[ctx.n_inputs :]
        grads = tuple(_laid_out_as(o, g) for o, g in zip(outputs, grads, strict=True))
        device, dtype, enabled = ctx.autocast
        b = torch.zeros(ctx.n_gates, dtype=ctx.dtype, device=grads[0].device)
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            for k in ctx.wanted:
                value = ctx.output_k(k, inputs)
                candidate = outputs if value is None else pytree.tree_leaves(value)
                tensors = [v for v in candidate if isinstance(v, Tensor)]
                if [t.shape for t in tensors] != [g.shape for g in grads]:
                    shapes = [g.shape for g in grads[:1]] + [t.shape for t in tensors[:1]]
                    raise SearchError(unlike_shapes(ctx.label, shapes, k))
                pairs = zip(tensors, grads, strict=True)
                b[k] = sum(_dot(o.to(ctx.dtype), g.to(ctx.dtype)) for o, g in pairs)
        return (b, None, None, None, None, *(None,) * ctx.n_inputs, *grads)


def _laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    """`x` with its channels last in memory if those of `like` are.

    The backward of a slice gives rows, in which all that comes before it would be slower.
    """
    last = torch.channels_last
    if like.dim() == 4 and like.is_contiguous(memory_format=last) and not like.is_contiguous():
        return x.contiguous(memory_format=last)
    return x


def with_gate_gradient(
    gate: Gate, output: Any, output_k: Others, label: str, inputs: Sequence[Tensor]
) -> Any:
    """`output`, through which the weights of `gate` receive their gradient.

    Args:
        gate: the drawn gate.
        output: what the active path gave: a tensor or a structure of tensors.
        output_k: computes candidate k from `inputs`; None for the active one, whose output is kept.
        label: for errors.
        inputs: the tensors that `output_k` needs; saved by autograd, which notices if they change.
    """
    leaves, spec = pytree.tree_flatten(output)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in where]
    wanted = tuple(range(len(gate.weights))) if gate.wanted is None else gate.wanted
    given = gate.weights, wanted, output_k, label, len(inputs)
    passed = _GateGradient.apply(*given, *inputs, *tensors)
    for i, tensor in zip(where, passed, strict=True):
        leaves[i] = tensor
    return pytree.tree_unflatten(leaves, spec)


def _wants_gradient(gate: Gate) -> bool:
    return torch.is_grad_enabled() and gate.weights.requires_grad


class BinaryGate(Switch):
    """A LayerChoice under ProxylessNAS: one path is trained, the wanted gates get a gradient.

    While the gate's weights need no gradient (a weight step, evaluation) it is a plain switch. The
    inactive candidates run without a graph and leave their buffers as they are: in backward, one
    after the other, or with `eager` in forward, which keeps all their outputs.

    Source: ProxylessNAS (arXiv 1812.00332), section 3.2; dL/dg_k = sum(o_k * dL/do).
    """

    def __init__(
        self,
        label: str,
        structure: tuple[Any, ...] | None,
        names: tuple[str, ...],
        eager: bool = False,
    ) -> None:
        super().__init__(label, structure, names)
        self.eager = eager

    def forward(self, drawn: Gate, args: Any, kwargs: Any, gates: Mapping[str, Any]) -> Any:
        """Run the drawn candidate."""
        refuse_proxies(self, drawn, args, kwargs)
        active = str(drawn.decision)
        output = self.run(active, args, kwargs, gates)
        if not _wants_gradient(drawn):
            return output
        leaves, spec = pytree.tree_flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        names = self.names
        constants = [None if i in where else leaf for i, leaf in enumerate(leaves)]
        inner = {
            label: Gate(g.weights.detach(), g.decision) if isinstance(g, Gate) else g
            for label, g in gates.items()
        }

        def output_k(k: int, tensors: list[Tensor]) -> Any:
            if names[k] == active:
                return None
            values = list(constants)
            for i, tensor in zip(where, tensors, strict=True):
                values[i] = tensor
            values = [forced(value) for value in values]
            candidate = self._modules[names[k]]
            assert candidate is not None
            again_args, again_kwargs = pytree.tree_unflatten(values, spec)
            with unmoved_buffers(candidate):
                return self.run(names[k], again_args, again_kwargs, inner)

        tensors = [leaves[i] for i in where]
        if not self.eager:
            return with_gate_gradient(drawn, output, output_k, self.label, tensors)
        with torch.no_grad():
            outputs = [output_k(k, tensors) for k in range(len(names))]
        return with_gate_gradient(drawn, output, lambda k, _: outputs[k], self.label, ())


class InputBinaryGate(InputSwitch):
    """An InputChoice under ProxylessNAS: the drawn inputs are reduced, every gate gets a gradient.

    dL/dg_k is the derivative of the reduction by the weight of input k: <x_k, dL/do>, divided by
    the number of chosen inputs for a mean. Inputs that were deferred are computed in backward.
    """

    def forward(self, drawn: Gate, inputs: Sequence[Any]) -> Any:
        """Reduce the drawn ones of `inputs`."""
        refuse_proxies(self, drawn, inputs)
        output = reduce_drawn(inputs, drawn.decision, self.reduction)
        if not _wants_gradient(drawn):
            return output
        where = [i for i, x in enumerate(inputs) if not isinstance(x, Deferred)]
        chosen = len(drawn.decision) if self.reduction == "mean" else 1
        mean_of_any = self.reduction == "mean" and self.n_chosen is None and chosen > 0

        def output_k(k: int, tensors: list[Tensor]) -> Any:
            x = tensors[where.index(k)] if k in where else forced(inputs[k])
            if mean_of_any:  # d(sum g x / sum g)/dg_k = (x_k - mean) / sum g
                mean = reduce_drawn(
                    [tensors[where.index(i)] if i in where else None for i in range(len(inputs))],
                    drawn.decision,
                    "mean",
                )
                return (x - mean) / chosen
            return x / max(chosen, 1)

        tensors = [inputs[i] for i in where]
        return with_gate_gradient(drawn, output, output_k, self.label, tensors)
