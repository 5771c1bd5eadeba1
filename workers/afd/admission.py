"""Where attention ranks join the FFN pool. Every F rank makes its end of a new edge in a thread of its own.

So nobody waits for a rank that joins. The first F rank admits it with its first announcement, which it makes once it
has its edges to all F ranks: then they have theirs too, or will at once.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from hmac import compare_digest
from typing import Self

import torch.distributed as dist

from stepladder.parallel.afd.edges import GlooEdge, first_line
from stepladder.workers.afd.membership import JOINS, join_key, token

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.05  # how often an F rank looks who asks to join
TAKE_SECONDS = 5.0  # how long the end of an edge may take whose other end is there


class Admission:
    """Of one F rank, as a context manager: open while the pool runs.

    Args:
        connect: another connection to the pool's store, for another thread.
        prefix, secret: of the pool's life and of the deployment; who joins must know the latter.
        receive: makes this rank's end of the edge to the attention rank of that number.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        prefix: str,
        secret: str,
        receive: Callable[[dist.Store, int], GlooEdge],
    ) -> None:
        self._connect, self._prefix, self._secret, self._receive = connect, prefix, secret, receive
        self._joining: dict[int, Future[GlooEdge]] = {}
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, daemon=True, name="pool-admission").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def take(self, number: int) -> GlooEdge | None:
        """The edge to a rank that joins; None if it has gone again."""
        joining = self._joining.pop(number, None)
        try:
            return joining.result(TAKE_SECONDS) if joining else None
        except (RuntimeError, ValueError, TimeoutError):
            return None

    def forget(self, number: int) -> None:
        """A rank that is not expected any more."""
        self._joining.pop(number, None)

    def _watch(self) -> None:
        try:
            self._admit()
        except RuntimeError as error:
            if not self._closed.is_set():
                log.error("nobody can join this pool any more, its store is gone: %s", first_line(error))

    def _admit(self) -> None:
        """Those who ask to join and know the secret, each in a thread of its own."""
        store, known, waiting = self._connect(), 0, set[int]()
        while not self._closed.wait(LOOK_SECONDS):
            joins = store.add(JOINS, 0)
            waiting |= set(range(known + 1, joins + 1))  # some have only taken a number so far, and may have died then
            known = joins
            for number in sorted(n for n in waiting if store.check([join_key(n)])):
                waiting.remove(number)
                if compare_digest(store.get(join_key(number)).decode(), token(self._secret, self._prefix, number)):
                    self._joining[number] = Future()
                    threading.Thread(target=self._connect_to, args=(number, self._joining[number]), daemon=True).start()
                else:
                    log.warning("join %d does not know the deployment's secret; it is not admitted", number)

    def _connect_to(self, number: int, joining: Future[GlooEdge]) -> None:
        """Both ends come, or do not."""
        try:
            joining.set_result(self._receive(self._connect(), number))
        except (RuntimeError, ValueError) as error:
            log.warning("attention rank %d did not come: %s", number, first_line(error))
            joining.set_exception(error.with_traceback(None))
            self.forget(number)
