"""Load on an endpoint: open loop (requests arrive whether it keeps up or not) and closed loop (a fixed number of
clients, each of which waits for its answer).

A request's arrival is the moment it was due. The time until it is sent is the client's own queue; it is reported apart
from the server's latency, since a client that waits for a slow server sends less, and would otherwise hide how slow it
was (coordinated omission).
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from stepladder.launch.streaming import Timing


@dataclass(frozen=True, kw_only=True)
class Case:
    """One load.

    Attributes:
        request_rate: arrivals per second; None: all are due at once (with max_concurrency, a closed loop).
        burstiness: shape of the gamma distribution of the gaps; 1 is a Poisson process, less comes in bursts.
        max_concurrency: at most so many requests are under way; None: no limit.
        num_requests: how many are sent.
    """

    request_rate: float | None = None
    burstiness: float = 1.0
    max_concurrency: int | None = None
    num_requests: int = 32

    def __post_init__(self) -> None:
        for name in ("request_rate", "burstiness", "max_concurrency", "num_requests"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"a case's {name} is {value}; it must be above 0")

    def arrivals(self, seed: int) -> list[float]:
        """When each request is due, in seconds from the start; at the end exactly num_requests / request_rate."""
        if self.request_rate is None:
            return [0.0] * self.num_requests
        scale = 1 / (self.request_rate * self.burstiness)
        due = np.cumsum(np.random.default_rng(seed).gamma(self.burstiness, scale, self.num_requests))
        return (due * (self.num_requests / self.request_rate / due[-1])).tolist()


async def apply(
    case: Case, seed: int, requests: Sequence[Any], send: Callable[[Any], Awaitable[Timing]]
) -> tuple[list[Timing], float]:
    """Send the requests as the case says; returns their timings, in order, and the seconds it took."""
    places = asyncio.Semaphore(case.max_concurrency) if case.max_concurrency else contextlib.nullcontext()
    start = perf_counter()

    async def one(request: Any, due: float) -> Timing:
        async with places:
            timing = await send(request)
        timing.client_queue_time = max(0.0, timing.start_time - due)
        return timing

    tasks = []
    for request, offset in zip(requests, case.arrivals(seed), strict=True):
        if (pause := start + offset - perf_counter()) > 0:
            await asyncio.sleep(pause)
        tasks.append(asyncio.create_task(one(request, start + offset)))
    timings = await asyncio.gather(*tasks)
    return timings, perf_counter() - start
