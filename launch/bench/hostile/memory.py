"""How large processes are, over time."""

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from time import monotonic
from typing import Self

import psutil

EVERY_SECONDS = 0.5


@dataclass
class MemoryWatch:
    """Looks at the resident memory of processes, in a thread, as a context manager.

    Attributes:
        samples: by process, (`monotonic`, MiB), in order; none any longer once it is gone.
    """

    processes: Mapping[str, psutil.Process]
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.samples = {name: [] for name in self.processes}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def median(self, name: str, begin: float, end: float) -> float | None:
        """MiB between two times; None if nobody looked."""
        sizes = [size for time, size in self.samples[name] if begin <= time <= end]
        return median(sizes) if sizes else None

    def _run(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            for name, process in self.processes.items():
                with suppress(psutil.NoSuchProcess):
                    self.samples[name].append((monotonic(), process.memory_info().rss / 2**20))
