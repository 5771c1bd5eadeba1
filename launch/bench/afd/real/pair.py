"""Two rank processes, one on each host, started and asked over pipes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from stepladder.launch.bench.afd.real.task import Setup, Task
from stepladder.launch.bench.rig.hosts import Hosts
from stepladder.launch.where import IMPORTED_FROM

T = TypeVar("T")


class Pair:
    """Two processes of one module, each on a core of its own. As a context manager; they end with it.

    Args:
        module: what they run, `stepladder.launch.bench.afd.real.apart` or `colocated`.
        path: of the checkpoint.
    """

    def __init__(self, module: str, path: Path, hosts: Hosts) -> None:
        self._command = (sys.executable, "-m", module)
        self._path, self._hosts = str(path), hosts
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._end)
            port = 0
            for rank, core in enumerate(cores()):
                port = self._start(rank, core, port)
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, task: Task, answer: type[T], ranks: Sequence[int] = (0, 1)) -> list[T]:
        """These ranks' answers to one task, which they begin at once.

        Raises:
            RuntimeError: a rank has died; what it said is on stderr.
        """
        for rank in ranks:
            self._tell(rank, task)
        return [msgspec.json.decode(self._hear(rank), type=answer) for rank in ranks]

    def _start(self, rank: int, core: int, port: int) -> int:
        """Returns the port of rank 0's store."""
        host, pipe = self._hosts[rank], subprocess.PIPE
        self._processes.append(host.popen(self._command, cwd=IMPORTED_FROM, stdin=pipe, stdout=pipe, text=True))
        self._tell(rank, Setup(rank, self._hosts[0].address, port, host.address, core, self._path))
        return int(self._hear(rank))

    def _tell(self, rank: int, message: Any) -> None:
        pipe = self._processes[rank].stdin
        assert pipe
        try:
            pipe.write(msgspec.json.encode(message).decode() + "\n")
            pipe.flush()
        except BrokenPipeError:
            raise self._ended(rank) from None

    def _hear(self, rank: int) -> str:
        process = self._processes[rank]
        assert process.stdout
        line = process.stdout.readline()
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


def cores() -> list[int]:
    """Two, one for each rank.

    Raises:
        ValueError: this process may run on fewer.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise ValueError(f"suite=afd takes two cores for real models, and this process may run on {len(allowed)} only")
    return allowed[:2]
