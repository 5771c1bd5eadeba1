"""The rank processes of the overlap suite: started on their hosts, asked over pipes."""

import subprocess
import sys
from contextlib import ExitStack
from typing import Self

import msgspec

from stepladder.launch.bench.overlap.task import Answer, Setup, Shapes, Task
from stepladder.launch.bench.rig.hosts import Hosts
from stepladder.launch.where import IMPORTED_FROM

COMMAND = (sys.executable, "-m", "stepladder.launch.bench.overlap.rank")


class Ranks:
    """One process per rank, each on a host of its own, or all on this machine where there are none."""

    def __init__(self, count: int, shapes: Shapes, device: str, threads: int, hosts: Hosts | None) -> None:
        self._count, self._shapes, self._device, self._threads, self._hosts = count, shapes, device, threads, hosts
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._end)
            port = 0
            for rank in range(self._count):
                port = self._start(rank, port)
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def measure(self, task: Task) -> list[Answer]:
        """Every rank's answer.

        Raises:
            RuntimeError: a rank has died; what it said is on stderr.
        """
        for process in self._processes:
            self._tell(process, task)
        return [msgspec.json.decode(self._hear(process), type=Answer) for process in self._processes]

    def _start(self, rank: int, port: int) -> int:
        """Returns the port of rank 0's store."""
        place = [self._hosts[rank].address, self._hosts[0].address] if self._hosts else ["127.0.0.1"] * 2
        prefix = self._hosts[rank].prefix if self._hosts else ()
        process = subprocess.Popen(
            [*prefix, *COMMAND], cwd=IMPORTED_FROM, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._processes.append(process)
        device = f"cuda:{rank}" if self._device == "cuda" else self._device
        self._tell(process, Setup(rank, self._count, place[1], port, place[0], device, self._threads, self._shapes))
        return int(self._hear(process))

    def _tell(self, process: subprocess.Popen, message: Setup | Task) -> None:
        assert process.stdin
        process.stdin.write(msgspec.json.encode(message).decode() + "\n")
        process.stdin.flush()

    def _hear(self, process: subprocess.Popen) -> str:
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a rank of the overlap suite ended with code {process.wait()}; see its words above")
        return line

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
