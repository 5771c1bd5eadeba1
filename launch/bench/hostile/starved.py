"""How long processes wanted to run and the machine gave them no processor: no fault of theirs."""

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Self

import psutil

EVERY_SECONDS = 0.1
Waits = dict[str, float]  # by thread, seconds since it began


@dataclass
class Starvation:
    """Looks at what Linux counts of every thread of some processes, in a thread, as a context manager.

    Attributes:
        samples: (`monotonic`, all threads' waits), in order; empty waits where the kernel does not count.
    """

    processes: Mapping[str, psutil.Process]
    samples: list[tuple[float, Waits]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def longest(self, begin: float, end: float) -> float | None:
        """Seconds that one thread waited between about these two times; of the one that waited longest."""
        before = next((waits for time, waits in reversed(self.samples) if time <= begin), None)
        after = next((waits for time, waits in self.samples if time >= end), None)
        if not before or not after:
            return None
        return max((after[thread] - before[thread] for thread in before.keys() & after.keys()), default=None)

    def _run(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            waits = {
                thread: wait for process in self.processes.values() for thread, wait in _waits(process.pid).items()
            }
            self.samples.append((monotonic(), waits))


def _waits(pid: int) -> Waits:
    """The second number of /proc/PID/task/TID/schedstat, in nanoseconds there."""
    found: Waits = {}
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError, IndexError):  # it has ended, or the kernel does not count
            found[thread.name] = int((thread / "schedstat").read_text().split()[1]) / 1e9
    return found
