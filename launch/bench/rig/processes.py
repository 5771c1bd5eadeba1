"""Rank processes: started on their hosts and asked over pipes, a line of JSON each way; what they run is `serve`."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Generic, Self, TypeVar

import msgspec
import torch
import torch.distributed as dist

from stepladder.launch.bench.rig.hosts import Hosts
from stepladder.launch.where import IMPORTED_FROM
from stepladder.parallel.rendezvous import open_store

M = TypeVar("M")
T = TypeVar("T")
TIMEOUT = timedelta(seconds=180)  # for the other ranks to load, or to answer


@dataclass(frozen=True)
class Start(Generic[M]):
    """The first message to a rank process; `Ranks` fills in what follows `core`.

    Attributes:
        model: what it loads. threads: of torch. core: all that it may run on; None for every core that there is.
        host: where the other ranks reach this one.
        store_host, port: of rank 0's store; port 0 for rank 0 itself.
    """

    model: M
    device: str = "cpu"
    threads: int = 1
    core: int | None = None
    rank: int = 0
    ranks: int = 1
    host: str = "127.0.0.1"
    store_host: str = "127.0.0.1"
    port: int = 0


class Ranks:
    """One process per rank, each on a host of its own, or all on this machine where there are none. As a context
    manager; they end with it.

    Args:
        module: what they run; it calls `serve`.
        starts: one for each rank.
    """

    def __init__(self, module: str, starts: Sequence[Start], hosts: Hosts | None = None) -> None:
        self._command, self._starts, self._hosts = (sys.executable, "-m", module), starts, hosts
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._end)
            port = 0
            for rank, start in enumerate(self._starts):
                port = self._start(rank, replace(start, rank=rank, ranks=len(self._starts), port=port))
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, task: Any, answer: type[T], ranks: Sequence[int] = (0, 1)) -> list[T]:
        """These ranks' answers to one task, which they begin at once.

        Raises:
            RuntimeError: a rank has died; what it said is on stderr.
        """
        for rank in ranks:
            self._tell(rank, task)
        return [msgspec.json.decode(self._hear(rank), type=answer) for rank in ranks]

    def _start(self, rank: int, start: Start) -> int:
        """Returns the port of rank 0's store."""
        popen: Callable[..., subprocess.Popen] = subprocess.Popen
        if self._hosts:
            popen = self._hosts[rank].popen
            start = replace(start, host=self._hosts[rank].address, store_host=self._hosts[0].address)
        pipe = subprocess.PIPE
        self._processes.append(popen(self._command, cwd=IMPORTED_FROM, stdin=pipe, stdout=pipe, text=True))
        self._tell(rank, start)
        return int(self._hear(rank))

    def _tell(self, rank: int, message: Any) -> None:
        pipe = self._processes[rank].stdin
        assert pipe
        try:
            _write(message, pipe)
        except BrokenPipeError:
            raise self._ended(rank) from None

    def _hear(self, rank: int) -> str:
        pipe = self._processes[rank].stdout
        assert pipe
        line = pipe.readline()
        if not line:
            raise self._ended(rank)
        return line

    def _ended(self, rank: int) -> RuntimeError:
        code = self._processes[rank].wait()
        return RuntimeError(f"rank {rank} of {self._command[-1]} ended with code {code}; see its words above")

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def serve(make: Callable[[Start[M], dist.Store], Callable[[T], object]], start: type[Start[M]], task: type[T]) -> None:
    """A rank process. make: loads the rank, joins the others, and returns what answers a task."""
    mine = msgspec.json.decode(sys.stdin.readline(), type=start)
    if mine.core is not None:
        os.sched_setaffinity(0, {mine.core})
    torch.set_num_threads(mine.threads)
    store = dist.TCPStore(mine.store_host, mine.port, None, False) if mine.rank else open_store(mine.store_host)
    _write(store.port, sys.stdout)
    with torch.inference_mode():
        answer = make(mine, store)
        for line in sys.stdin:
            _write(answer(msgspec.json.decode(line, type=task)), sys.stdout)


def _write(value: object, pipe: Any) -> None:
    pipe.write(msgspec.json.encode(value).decode() + "\n")
    pipe.flush()
