"""Threads for what would hold the event loop up: judging bodies, tokenizing, writing long answers."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from stepladder.cluster.gateway.errors import Overloaded

T = TypeVar("T")


class WorkPool:
    """A few threads, and a bounded queue before them. What runs there gives Python's lock away now and then, since it
    is Python, or a library that does so.

    Args:
        threads: more would only take the lock from one another.
        waiting: pieces of work that may wait.
    """

    def __init__(self, threads: int = 2, waiting: int = 512) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gateway-work")
        self._most, self._count = threads + waiting, 0

    async def run(self, work: Callable[..., T], *args: object) -> T:
        """What `work` returns.

        Raises:
            Overloaded: too much waits already.
        """
        if self._count >= self._most:
            raise Overloaded("this server reads too many requests at once; try again later", retry_after=1)
        self._count += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)
        finally:
            self._count -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
