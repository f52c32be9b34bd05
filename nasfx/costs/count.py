"""Multiply-accumulates, parameters and activation memory of one module, by running it once."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from nasfx.errors import NasfxError


@dataclass(frozen=True)
class Count:
    """What a network costs on one sample.

    Attributes:
        flops: multiply-accumulates (MACs) of convolutions, linear layers and matrix products.
        params: elements of the parameters, frozen ones too, shared ones once; no buffers.
        activation_bytes: bytes of the outputs of all leaf calls.
    """

    flops: int
    params: int
    activation_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.flops:,} MACs, {self.params:,} parameters, "
            f"{self.activation_bytes:,} activation bytes per sample"
        )


def count(module: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> Count:
    """Count what `module` costs per sample, by running a copy of it in eval mode.

    MACs are those of convolutions, linear layers and matrix products (products of two activations,
    as in attention, too), without bias, norm, activation and pooling. Activation bytes are summed
    over the leaf calls: for a GraphModule every call node whose output is a tensor (one that
    returns several counts through the nodes that take them out); for another module every tensor
    that a module without children returns, so functions called in a `forward` are not seen. Views
    and in-place results count like any output: it is the traffic, not the peak of memory.

    Args:
        module: any module, in any mode; it, its buffers and the random state stay as they are.
        example_inputs: what `forward` takes: a tensor, or a tuple. The first dimension of its first
            tensor is the batch size.

    Raises:
        NasfxError: the module does not run on the inputs, there is no batch in them, or what is
            counted is not a whole number per sample.

    Example:
        >>> count(nn.Linear(8, 4), torch.zeros(2, 8))
        Count(flops=32, params=36, activation_bytes=16)
    """
    if isinstance(example_inputs, Tensor):
        inputs: tuple[Any, ...] = (example_inputs,)
    elif isinstance(example_inputs, tuple):
        inputs = example_inputs
    else:
        kind = type(example_inputs).__name__
        raise NasfxError(
            f"example_inputs is a tensor or a tuple of what forward takes, not a {kind}"
        )
    batch = batch_size(inputs)
    name = type(module).__name__
    try:
        inputs = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, inputs)
        flops, moved = _run(copy.deepcopy(module).eval(), inputs)
    except Exception as error:
        raise NasfxError(
            f"{name} does not run on example_inputs {_describe(inputs)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    params = sum(p.numel() for p in module.parameters())
    return per_sample(name, batch, flops, params, moved)


def batch_size(inputs: tuple[Any, ...]) -> int:
    """The first dimension of the first tensor.

    Raises:
        NasfxError: there is none.
    """
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    batch = tensors[0].shape[0] if tensors and tensors[0].dim() else 0
    if not batch:
        raise NasfxError(
            f"example_inputs {_describe(inputs)} has no batch: its first tensor needs a first "
            "dimension of one or more"
        )
    return batch


def per_sample(what: str, batch: int, flops: int, params: int, moved: int) -> Count:
    """The count for one sample of a batch, from what torch's counter and the outputs say.

    Raises:
        NasfxError: there is no whole number per sample.
    """
    # A MAC is a multiplication and an addition; torch counts both.
    macs, odd = divmod(flops, 2 * batch)
    sample_bytes, rest = divmod(moved, batch)
    if odd or rest:
        raise NasfxError(
            f"{what} computes something once per batch of {batch}, so there is no whole number per "
            "sample: give example_inputs of batch size one"
        )
    return Count(macs, params, sample_bytes)


def _describe(inputs: tuple[Any, ...]) -> str:
    texts = [
        f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
        if isinstance(x, Tensor)
        else type(x).__name__
        for x in inputs
    ]
    return f"({', '.join(texts)})"


def _run(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[int, int]:
    """FLOPs and bytes of all leaf outputs of one forward."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), FlopCounter() as counter:
        if isinstance(module, fx.GraphModule):
            moved = _CountingInterpreter(module)
            moved.run(*inputs)
            return counter.get_total_flops(), moved.bytes
        sizes: list[int] = []
        for leaf in module.modules():
            if not any(True for _ in leaf.children()):
                leaf.register_forward_hook(lambda _, __, out: sizes.append(size_in_bytes(out)))
        module(*inputs)
        return counter.get_total_flops(), sum(sizes)


class _CountingInterpreter(fx.Interpreter):
    bytes = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op.startswith("call_") and isinstance(result, Tensor):
            self.bytes += size_in_bytes(result)
        return result


def size_in_bytes(output: Any) -> int:
    """The size of all tensors in `output`."""
    tensors = (x for x in tree_leaves(output) if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in tensors)


@contextmanager
def _unfused() -> Generator[None, None, None]:
    """Attention by its matrix products: torch's counter gives fused kernels on a CPU nothing."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _vector_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a)


def _added_vector_flops(_: Any, a: Any, *__: Any, **___: Any) -> int:
    return 2 * math.prod(a)


def _lstm_flops(x: Any, w_input: Any, w_hidden: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * (math.prod(w_input) + math.prod(w_hidden))


def _bilinear_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * math.prod(weight)


# What torch's counter has no formula for and would silently leave out.
_FORMULAS = {
    torch.ops.aten.mv: _vector_flops,
    torch.ops.aten.dot: _vector_flops,
    torch.ops.aten.addmv: _added_vector_flops,
    torch.ops.aten.mkldnn_rnn_layer: _lstm_flops,
    torch.ops.aten._trilinear: _bilinear_flops,
}


class FlopCounter(FlopCounterMode):
    """torch's counter, with formulas for what it would leave out; a MAC is two to it."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_FORMULAS)
        self._slow = ExitStack()

    def __enter__(self) -> Self:
        self._slow.enter_context(_unfused())
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._slow.close()
