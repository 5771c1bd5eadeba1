"""One rank's tensor-parallel group. The only place that chooses a communication backend: NCCL on CUDA, gloo on CPU.

Groups are objects, made from a store; there is no default group and no global state. So several generations, or
several ranks as threads of one test, live in one process.
"""

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from stepladder.parallel.clock import Clock
from stepladder.parallel.meter import ReduceMeter
from stepladder.parallel.residual import Done, Pending
from stepladder.parallel.shards import ALONE, Shard

RUN_LOOPS = 2  # threads of a gloo group that run collectives: two reduces are in flight at most


class _Reducing:
    """A sum over the ranks under way: all-reduced in one tensor, or gathered in `parts`, which are then added up in the
    ranks' order, whatever their size."""

    def __init__(self, work: dist.Work, parts: list[Tensor], waiting: AbstractContextManager) -> None:
        self.work, self._parts, self._waiting = work, parts, waiting

    def wait(self) -> Tensor:
        with self._waiting:
            self.work.wait()
        total = self._parts[0]
        for part in self._parts[1:]:
            total = total + part
        return total


class Mesh:
    """What the executor and the model ask of a group. This is a group of one, which has nothing to do; `Group` is real.

    Attributes:
        shard: this rank's place. meter: of its reduces. clock: of its life.
        loaded: the share of this rank's weights that has been read, for whoever wonders how long it takes.
    """

    loaded = 0.0

    def __init__(self, device: torch.device | str = "cpu", shard: Shard = ALONE) -> None:
        self.shard, self.device, self.meter, self.clock = shard, torch.device(device), ReduceMeter(), Clock()

    def all_reduce(self, partial: Tensor) -> Pending:
        """Start the sum of `partial` over the ranks, in place. Every rank calls in the same order."""
        return Done(partial)

    def gather(self, columns: Tensor) -> Tensor | None:
        """Equal [R, C] parts joined to [R, C * ranks] on rank 0; None elsewhere."""
        return columns

    def broadcast(self, values: list[int] | None) -> list[int]:
        """Rank 0's integers, on every rank; the others pass None and wait, on their own clock's account."""
        assert values is not None
        return values

    def exchange(self, rows: Tensor, going: list[int], coming: list[int]) -> Tensor:
        """Rows [n, ...] to the ranks, `going` to each in their order; what the ranks have sent here, `coming` from
        each. Every rank calls it."""
        return rows

    def share(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, from device to device; the others pass one of its shape to be filled."""
        return tensor

    def note_loaded(self, share: float) -> None:
        self.loaded = share

    def close(self) -> None:
        """Leave the group, once; the others' collectives fail. Not while this rank is in a collective itself."""


SingleRank = Mesh


class Group(Mesh):
    """A real group of ranks.

    Args:
        store: shared by all ranks, with a prefix of their own (the deployment's generation).
        shard: this rank's place.
        device: CUDA ranks reduce with NCCL on its own stream, CPU ranks with gloo.
        host: the address of this machine that the others can reach.
        timeout: how long a collective may take before it fails.
        ordered: sum in the ranks' order. An all-reduce of more than two ranks adds up each part of a tensor in an
            order of its own, so that a row's rounding would depend on how many rows there are.
    """

    FIRST = 1024  # integers in the first message of a broadcast; most plans need no second

    def __init__(
        self,
        store: dist.Store,
        shard: Shard,
        device: torch.device | str = "cpu",
        host: str = "127.0.0.1",
        timeout: timedelta = timedelta(seconds=30),
        ordered: bool = False,
    ) -> None:
        super().__init__(device, shard)
        self._ordered = ordered and shard.size > 2
        # on CUDA `wait` lets the device wait, not this thread
        self._waiting = nullcontext() if self.device.type == "cuda" else self.clock.waiting
        self._control = gloo_group(dist.PrefixStore("control", store), shard.rank, shard.size, host, timeout)
        self._tensors = self._control
        if self.device.type == "cuda":
            self._tensors = _nccl(dist.PrefixStore("tensors", store), shard, timeout)

    def all_reduce(self, partial: Tensor) -> Pending:
        parts, work = [partial], None
        if self._ordered:
            parts = [torch.empty_like(partial) for _ in range(self.shard.size)]
            work = self._tensors.allgather([parts], [partial.contiguous()])
        pending = _Reducing(work or self._tensors.allreduce([partial]), parts, self._waiting)
        return self.meter.watch(pending, pending.work) if self.meter.on else pending

    def gather(self, columns: Tensor) -> Tensor | None:
        options = dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(columns) for _ in range(self.shard.size)] if self.shard.rank == 0 else []
        with self._waiting:
            self._tensors.gather([parts] if parts else [], [columns.contiguous()], options).wait()
        return torch.cat(parts, dim=-1) if parts else None

    def broadcast(self, values: list[int] | None) -> list[int]:
        first = torch.zeros(self.FIRST, dtype=torch.int64)
        if values is not None:
            head = torch.tensor([len(values), *values[: self.FIRST - 1]])
            first[: len(head)] = head
        self._broadcast(first)
        total = int(first[0])
        if total < self.FIRST:
            return first[1 : total + 1].tolist()
        rest = torch.empty(total - self.FIRST + 1, dtype=torch.int64)
        if values is not None:
            rest.copy_(torch.tensor(values[self.FIRST - 1 :]))
        self._broadcast(rest)
        return first[1:].tolist() + rest.tolist()

    def exchange(self, rows: Tensor, going: list[int], coming: list[int]) -> Tensor:
        came = rows.new_empty(sum(coming), *rows.shape[1:])
        with self._waiting:
            self._tensors.alltoall_base(came, rows.contiguous(), coming, going).wait()
        return came

    def share(self, tensor: Tensor) -> Tensor:
        with self._waiting:
            self._tensors.broadcast(tensor, 0).wait()
        return tensor

    def close(self) -> None:
        if self.device.type == "cuda":
            self._tensors.abort()
        # Gloo's abort does nothing: its sockets close, and the peers' collectives fail, when the object goes.
        del self._control, self._tensors

    def _broadcast(self, tensor: Tensor) -> None:
        self._control.broadcast(tensor, 0).wait()


def join(
    store: dist.Store | None,
    shard: Shard,
    device: torch.device | str = "cpu",
    host: str = "127.0.0.1",
    timeout: timedelta = timedelta(seconds=30),
    ordered: bool = False,
) -> Mesh:
    """The mesh of one rank; a group of one needs no store."""
    if shard.size == 1:
        return SingleRank(device)
    assert store is not None
    return Group(store, shard, device, host, timeout, ordered)


def gloo_group(store: dist.Store, rank: int, size: int, host: str, timeout: timedelta) -> dist.ProcessGroup:
    """A group of CPU ranks. host: the address of this machine that the others can reach."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._threads = RUN_LOOPS
    return cast(dist.ProcessGroup, dist.ProcessGroupGloo(store, rank, size, options))


def _nccl(store: dist.Store, shard: Shard, timeout: timedelta) -> dist.ProcessGroup:
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    return cast(dist.ProcessGroup, dist.ProcessGroupNCCL(store, shard.rank, shard.size, options))
