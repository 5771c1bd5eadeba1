"""A client that insists: it sends its request again, under the same X-Request-Id, until it has the whole text."""

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from time import monotonic
from typing import Any

import aiohttp

from stepladder.launch.streaming import Timing, session, stream

PAUSE_SECONDS = 0.1  # between two tries
PASSING = (429, 503)  # statuses that another try may not meet


@dataclass
class RetryingClient:
    """One streamed completion, on whatever number of tries it takes.

    Attributes:
        arrivals: when a chunk with text came, over all tries (`monotonic`).
        text: of the last try. broken: texts of tries that had begun and were cut off, and when.
        retries: tries after the first.
        failure: why the last try failed; empty if it did not.
    """

    url: str
    request_id: str
    body: Mapping[str, Any]
    seconds: float
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    broken: list[tuple[float, str]] = field(default_factory=list)
    retries: int = 0
    failure: str = ""

    @property
    def longest_pause(self) -> float:
        """Between two chunks, in seconds."""
        return max((later - earlier for earlier, later in pairwise(self.arrivals)), default=0.0)

    def run(self) -> "RetryingClient":
        deadline = monotonic() + self.seconds
        while not self._try() and monotonic() < deadline:
            self.retries += 1
            threading.Event().wait(PAUSE_SECONDS)
        return self

    def _try(self) -> bool:
        """Whether the text is whole.

        Raises:
            RuntimeError: the server refuses the request itself.
        """
        timing = asyncio.run(self._send())
        if timing.status not in (None, 200, *PASSING):
            raise RuntimeError(timing.error)
        self.text, self.failure = timing.text, timing.error
        if self.failure and self.text:
            self.broken.append((monotonic(), self.text))
        return not self.failure

    async def _send(self) -> Timing:
        limits = aiohttp.ClientTimeout(total=None, sock_connect=self.seconds, sock_read=self.seconds)
        async with session(timeout=limits, headers={"X-Request-Id": self.request_id}) as opened:
            url = f"{self.url}/v1/completions"
            return await stream(opened, url, self.body, show=lambda _: self.arrivals.append(monotonic()))
