"""HTTP requests under way: each can be ended from outside, and all of them drained."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from time import monotonic

from stepladder.cluster.gateway.errors import Late, Unavailable


class InFlightRequest:
    """A request that is being served. `end(cause)` cancels what runs in its `scope`, which then raises `cause`.

    Attributes:
        owner: the hash of its API key.
        until: when its client will be gone (`time.monotonic`), if anybody knows.
    """

    def __init__(self, request_id: str, owner: str = "") -> None:
        self.id, self.owner, self.arrived = request_id, owner, monotonic()
        self.until: float | None = None
        self._timeout = asyncio.timeout(None)
        self._cause: Exception | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def end(self, cause: Exception) -> None:
        if self._cause is None:
            self._cause = cause
            self._timeout.reschedule(asyncio.get_running_loop().time())

    def must_end(self, seconds: float) -> None:
        """Nobody waits for the answer any longer than `seconds` after it was asked for."""
        self.until = self.arrived + seconds
        late = Late(f"there was no whole answer within {seconds:g} s, the time given to this request")
        self._deadline = asyncio.get_running_loop().call_later(self.until - monotonic(), self.end, late)

    @contextlib.asynccontextmanager
    async def scope(self) -> AsyncIterator[None]:
        try:
            async with self._timeout:
                yield
        except TimeoutError:
            if self._cause is None or not self._timeout.expired():
                raise  # one of those who run in it
            raise self._cause from None
        finally:
            if self._deadline:
                self._deadline.cancel()


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
    async def enter(self, request_id: str, owner: str = "") -> AsyncIterator[InFlightRequest]:
        """Serve a request. Its id is made unique, since clients choose theirs and may use one twice.

        Raises:
            Unavailable: draining.
        """
        if self.draining:
            raise shutting_down()
        unique = f"{request_id}.{secrets.token_hex(4)}" if request_id in self._requests else request_id
        request = self._requests[unique] = InFlightRequest(unique, owner)
        self._empty.clear()
        try:
            async with request.scope():
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
