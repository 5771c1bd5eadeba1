"""The ranks that train together, as DeepSpeed wants them: torch's default group, and ranks in the environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from stepladder.parallel.rendezvous import open_store

__all__ = ["Ranks", "joined", "training_ranks"]


class Ranks(NamedTuple):
    """The data-parallel ranks that train together; see `training_ranks`."""

    rank: int
    size: int
    device: torch.device

    def mean(self, value: float) -> float:
        """Over the ranks; each gives its own."""
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total) / self.size

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank; all wait for it."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


@contextmanager
def training_ranks() -> Iterator[Ranks]:
    """Join the ranks that `torchrun` started, or be the only one: NCCL on CUDA, gloo on CPU.

    A lone rank meets itself at a free port.
    """
    alone = "RANK" not in os.environ
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    with joined(device, **({"store": open_store("127.0.0.1"), "rank": 0, "world_size": 1} if alone else {})) as ranks:
        yield ranks


@contextmanager
def joined(device: torch.device, **meeting: Any) -> Iterator[Ranks]:
    """Make torch's default group for training, and leave it at the end.

    Args:
        meeting: as `init_process_group` takes it: store, rank, world_size; without any, torchrun's environment.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # DeepSpeed reads it once, when it is imported
    os.environ.setdefault("LOCAL_RANK", "0")  # without it DeepSpeed looks for MPI
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **meeting)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        _leave()


def _leave() -> None:
    """Leave the default group, which DeepSpeed knows by a name of its own once an engine has been made."""
    import deepspeed

    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None
    if dist.is_initialized():
        dist.destroy_process_group()
