"""HTTP requests under way: each can be ended from outside, and all of them drained."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from time import monotonic
from types import TracebackType

from stepladder.cluster.gateway.errors import Unavailable


class InFlightRequest:
    """A context in which a request is served. `end(cause)` cancels what runs in it, and the context raises `cause`."""

    def __init__(self, request_id: str) -> None:
        self.id, self.arrived = request_id, monotonic()
        self._scope = asyncio.timeout(None)
        self._cause: Exception | None = None

    def end(self, cause: Exception) -> None:
        if self._cause is None:
            self._cause = cause
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def __aenter__(self) -> "InFlightRequest":
        await self._scope.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError:
            assert self._cause is not None
            raise self._cause from None


class InFlight:
    """The requests of one server.

    Attributes:
        draining: no more are admitted.
    """

    def __init__(self) -> None:
        self.draining = False
        self._requests: dict[str, InFlightRequest] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._requests)

    @contextlib.asynccontextmanager
    async def enter(self, request_id: str) -> AsyncIterator[InFlightRequest]:
        """Serve a request. Its id is made unique, since clients choose theirs and may use one twice.

        Raises:
            Unavailable: draining.
        """
        if self.draining:
            raise shutting_down()
        unique = f"{request_id}.{secrets.token_hex(4)}" if request_id in self._requests else request_id
        request = self._requests[unique] = InFlightRequest(unique)
        self._empty.clear()
        try:
            async with request:
                yield request
        finally:
            del self._requests[unique]
            if not self._requests:
                self._empty.set()

    async def drain(self, seconds: float) -> None:
        """Admit no more, wait for those under way, and end what is left after `seconds`."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), seconds)
        for request in self._requests.values():
            request.end(shutting_down())
        await self._empty.wait()


def shutting_down() -> Unavailable:
    return Unavailable("this server is shutting down; try again, another one may answer", retry_after=5)
