"""What the processes of a search tell each other, through Lightning Fabric."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.single_device import SingleDeviceStrategy
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from nasfx.architecture import Architecture
from nasfx.errors import SearchError
from nasfx.ops.norms import mix_norms, shared_norms
from nasfx.supernet import Supernet

T = TypeVar("T")

_ITEM, _END, _FAILED = range(3)


class Ranks:
    """The processes of a search, each with a share of every batch; alone it does nothing.

    The net is not wrapped: the gradients of the parameters that have one, those of the path that
    all ranks have drawn, are averaged after the backward, so nothing is paid for the others.
    Averages are those of the whole batch where all ranks have as many samples and losses are means.

    Attributes:
        fabric: the launched Fabric.
        count: how many there are.
        first: whether this one writes files and shows progress.
    """

    def __init__(self, fabric: Fabric) -> None:
        """Those of a Fabric.

        Raises:
            SearchError: it divides the net itself, as FSDP does.
        """
        if not isinstance(fabric.strategy, SingleDeviceStrategy | DDPStrategy):
            raise SearchError(
                f"search runs on one device, or on several by strategy='ddp', and not with "
                f"{type(fabric.strategy).__name__}: a supernet's paths change from step to step"
            )
        self.fabric, self.count, self.first = fabric, fabric.world_size, fabric.global_rank == 0

    # -- being alike -------------------------------------------------------------------------------

    def begin(self, net: Supernet) -> None:
        """Give all ranks the weights, the architecture and the draws of the first."""
        if self.count == 1:
            return
        with torch.no_grad():
            for tensor in (*net.parameters(), *net.buffers()):
                torch.distributed.broadcast(tensor, 0)
        generator = net._arch.state.generator
        generator.set_state(self.fabric.broadcast(generator.get_state()))

    def synchronise_buffers(self, net: Supernet) -> None:
        """Average running statistics, and take all other buffers from the first rank."""
        if self.count == 1:
            return
        norms = [m for m in net.modules() if isinstance(m, _NormBase)]
        averaged = {id(b) for m in norms for b in (m.running_mean, m.running_var)}
        for buffer in net.buffers():
            if id(buffer) in averaged:
                buffer.copy_(self._mean(buffer))
            else:
                torch.distributed.broadcast(buffer, 0)

    def check_alike(self, net: Supernet, where: str) -> None:
        """Check that parameters are the same numbers on all ranks.

        Raises:
            SearchError: they are not.
        """
        if self.count == 1:
            return
        sums = [p.detach().double().sum() for p in net.parameters()]
        own = torch.stack(sums) if sums else torch.zeros(1, dtype=torch.float64)
        found = self._gathered(own)
        if not all(torch.equal(found[0].nan_to_num(), other.nan_to_num()) for other in found):
            differs = (found != found[0]).any(0).nonzero().flatten().tolist()
            name = [name for name, _ in net.named_parameters()][differs[0]]
            raise SearchError(
                f"{where}: {name} differs between the ranks: something changes it on one of them "
                "alone, as a hook or a random number of torch's global generator may; make it the "
                "same on all, or search on one process"
            )

    # -- averages ----------------------------------------------------------------------------------

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Let each be its mean over the ranks, in place; one message for each dtype."""
        if self.count == 1:
            return
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault(tensor.dtype, []).append(tensor)
        with torch.no_grad():
            for held in kinds.values():
                mean = self._mean(_flatten_dense_tensors(held))
                for tensor, part in zip(held, _unflatten_dense_tensors(mean, held), strict=True):
                    tensor.copy_(part)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """`average` of the gradients that there are, which are those of all ranks."""
        self.average([p.grad for p in parameters if p.grad is not None])

    def mean(self, value: float) -> float:
        """The mean of a number."""
        return value if self.count == 1 else float(self._mean(self._tensor([value])))

    def _mean(self, tensor: Tensor) -> Tensor:
        # Gloo has no mean of its own; a sum that is then divided is the same on every rank.
        total: Any = self.fabric.all_reduce(tensor.detach().clone(), reduce_op="sum")
        return total / self.count

    # -- agreeing ----------------------------------------------------------------------------------

    def largest(self, value: int) -> int:
        """The largest of a whole number."""
        return value if self.count == 1 else int(self._gathered(self._tensor([value])).max())

    def lead(self, call: Callable[[], T]) -> T:
        """What `call` gives on the first rank, where alone it runs; it is sent to the others."""
        if self.count == 1:
            return call()
        found = self.together(lambda: call() if self.first else None)
        return self.fabric.broadcast(found)  # type: ignore[return-value]

    def together(self, call: Callable[[], T], what: Callable[[T], str] | None = None) -> T:
        """What `call` gives, which all ranks run; where it fails on one of them, all raise.

        Args:
            call: what to run, with no message to others in it.
            what: of its value, what must be the same on all ranks, as a text.

        Raises:
            SearchError: it failed on another rank, or gave something else there.
        """
        if self.count == 1:
            return call()
        result: Any = None
        error: Exception | None = None
        try:
            result = call()
        except Exception as raised:
            error = raised
        digest = 0 if error or what is None else zlib.crc32(what(result).encode())
        found = self._gathered(self._tensor([error is not None, digest]))
        if error is not None:
            raise error
        self._check_failed(found[:, 0] != 0)
        if what is not None and bool((found[:, 1] != found[0, 1]).any()):
            raise SearchError(
                f"the ranks have drawn different paths, or trained different parameters: here "
                f"{what(result):.300}. Draw from the net's generator alone, and let all ranks run "
                "the same code"
            )
        return result

    def _check_failed(self, failed: Tensor) -> None:
        if bool(failed.any()):
            ranks = ", ".join(str(i) for i in failed.flatten().nonzero().flatten().tolist())
            raise SearchError(f"the search ended since rank {ranks} failed; see its own error")

    def in_step(self, items: Iterator[T], where: str) -> Iterator[T]:
        """`items`, one at a time on all ranks.

        Raises:
            SearchError: they end, or fail, on some ranks alone.
        """
        if self.count == 1:
            yield from items
            return
        taken = 0
        while True:
            item: Any = None
            error: Exception | None = None
            state = _ITEM
            try:
                item = next(items)
            except StopIteration:
                state = _END
            except Exception as raised:
                state, error = _FAILED, raised
            found = self._gathered(self._tensor([state]))[:, 0]
            if error is not None:
                raise error
            self._check_failed(found == _FAILED)
            if bool((found == _END).all()):
                return
            if bool((found == _END).any()):
                raise SearchError(
                    f"{where} has {taken} batches on some ranks and more on others: give all of "
                    "them as many; a DataLoader is divided evenly by itself"
                )
            taken += 1
            yield item

    # -- dividing ----------------------------------------------------------------------------------

    def divided(
        self,
        archs: Sequence[Architecture],
        evaluate: Callable[[Sequence[Architecture]], Sequence[float]],
        *,
        shared: bool,
    ) -> list[float]:
        """The scores of architectures.

        Args:
            archs: the architectures.
            evaluate: gives the scores of some of them.
            shared: whether all ranks evaluate on the same data, so that each takes a share of the
                architectures; else each takes all of them, on a share of the data.
        """
        if self.count == 1:
            return list(evaluate(archs))
        if not shared:
            scores = self._tensor(self.together(lambda: list(evaluate(archs))))
            return self._mean(scores).tolist()
        most = -(-len(archs) // self.count)
        first = most * self.fabric.global_rank
        own = archs[first : first + most]
        scores = self.together(lambda: list(evaluate(own)) if own else [])
        found = self._gathered(self._tensor([*scores, *[0.0] * (most - len(scores))]))
        return found.flatten()[: len(archs)].tolist()

    def gather(self, value: Any) -> list[Any]:
        """A value of every rank, in order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found

    def own(self, values: Sequence[T]) -> T:
        """This rank's of a list."""
        return values[self.fabric.global_rank]

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.fabric.device)

    def _gathered(self, tensor: Tensor) -> Tensor:
        """(ranks, ...): a sum of rows of which all but one's own are zeros."""
        rows = tensor.new_zeros((self.count, *tensor.shape), device=self.fabric.device)
        rows[self.fabric.global_rank] = tensor
        return self.fabric.all_reduce(rows, reduce_op="sum")  # type: ignore[return-value]


def is_whole(data: Any) -> bool:
    """Whether all ranks are given the same data, to which Fabric alone gives each a share."""
    return (
        isinstance(data, DataLoader)
        and not isinstance(data.dataset, IterableDataset)
        and not isinstance(data.sampler, DistributedSampler)
    )


def refuse_unlaunched(what: str) -> None:
    """Refuse a search by itself in one of several processes.

    Args:
        what: the function that was called.

    Raises:
        SearchError: torchrun, or the like, has started several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SearchError(
            f"this is one of {os.environ['WORLD_SIZE']} processes (WORLD_SIZE), and {what} was "
            "given no Fabric: each would search by itself. Hand over a launched one, "
            "Fabric(devices=..., strategy='ddp')"
        )


def check_synchronised(net: Supernet, fabric: Fabric) -> None:
    """Check that batch norms can be `synchronised`.

    Raises:
        SearchError: the net is on a CPU, or runs its batch norms as functions.
    """
    if fabric.device.type != "cuda":
        raise SearchError(
            f"sync_batch_norm=True on {fabric.device.type}: torch.nn.SyncBatchNorm runs on GPUs "
            "alone; leave it out, and each process normalises by its own share of the batch"
        )
    functions = mix_norms, shared_norms
    if any(node.target in functions for node in net.graph_module.graph.nodes):
        raise SearchError(
            "sync_batch_norm=True, and optimisation passes made functions of the batch norms: "
            "give nasfx.transform(..., optimize='off')"
        )


@contextmanager
def synchronised(net: nn.Module) -> Generator[None, None, None]:
    """Within the block batch norms normalise by the batches of all ranks."""
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    norms = [(m, type(m)) for m in net.modules() if type(m) in kinds]
    try:
        for norm, _ in norms:
            norm.__class__ = nn.SyncBatchNorm
            vars(norm)["process_group"] = None
        yield
    finally:
        for norm, kind in norms:
            norm.__class__ = kind
            del vars(norm)["process_group"]
