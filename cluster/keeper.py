"""Keeps one engine, or the FFN pool, alive: a thread per gang, so that no start delays looking after the others."""

import logging
import threading
from collections.abc import Callable

from ray.exceptions import RayError

from cluster.config import Deployment
from cluster.gang import Gang
from cluster.journal import Journal
from cluster.waiting import Cancelled
from cluster.wire import Endpoint
from workers.membership import PoolAddress

log = logging.getLogger(__name__)


class Keeper:
    """Starts (or adopts) a gang, pings it, and puts it back under a new generation when it has died.

    Args:
        name: the engine's; its generation lies in the journal under this name.
        go: whether the deployment is to go on; asked often.
        changed: called whenever `endpoint` or `failure` has changed.

    Attributes:
        endpoint: where the engine takes requests, or the pool its members; None while it does not.
        failure: why it will not be tried again; None while it will.
        restarts: how often it was put back. broke: what ended this keeper's thread, if it was not asked to end.
    """

    MAX_FAILED_STARTS = 3  # of an engine that has never worked

    def __init__(
        self, deployment: Deployment, name: str, journal: Journal, go: Callable[[], bool], changed: Callable[[], None]
    ) -> None:
        self._deployment, self.name, self._journal, self._go, self._changed = deployment, name, journal, go, changed
        self.gang = Gang(deployment, name, journal.get(f"generation of {name}", 0))
        self.endpoint: Endpoint | None = None
        self.failure: str | None = None
        self.restarts = self._failed_starts = 0
        self._worked = False
        self._met: tuple[int, PoolAddress | None] | None = None
        self._meeting = threading.Lock()
        self._pause = threading.Event()
        self._thread = threading.Thread(target=self._run_noting, daemon=True, name=f"keeper-{name}")
        self.broke: Exception | None = None

    @property
    def pool(self) -> PoolAddress | None:
        """Of the FFN pool's keeper: what its attention ranks are told."""
        gang = self.gang  # the keeper's thread may put another in its place
        return gang.pool if self.endpoint and gang.address else None

    def meet(self, pool: PoolAddress | None) -> None:
        """Of an attention rank's keeper: tell it which pool there is, if it has not been told. From any thread."""
        with self._meeting:
            endpoint, gang = self.endpoint, self.gang
            if endpoint and self._met != (now := (endpoint.generation, pool)):
                gang.meet(pool)
                self._met = now

    def adopt(self) -> None:
        """After a restart of the controller: take the gang over if it is whole, remove it if not."""
        if self.gang.generation and self.gang.adopt():
            self._worked = True
            self._show(self.gang.endpoint)
        elif self.gang.generation:
            self.gang.kill()
            self.gang.ranks.clear()

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Stop looking after the gang, and take it down."""
        self._pause.set()
        self._thread.join()
        self.gang.stop()

    def _run_noting(self) -> None:
        try:
            self._run()
        except Exception as error:  # a mistake of ours; the supervisor's thread raises it
            self.broke = error
            self._changed()

    def _run(self) -> None:
        while self._go() and not self._pause.is_set() and not self.failure:
            try:
                if not self.gang.ranks or not self.gang.alive():
                    self._put_back()
            except Cancelled:
                return
            except (ValueError, TimeoutError) as error:
                self._give_up(str(error))
            except RayError as error:
                self._failed_start(error)
            self._pause.wait(self._deployment.cluster.ping_seconds)

    def _put_back(self) -> None:
        """A new generation in place of whatever there was."""
        if self.gang.ranks:
            self.restarts += 1
            log.error("%s was lost; starting another", self.gang.group)
            self._show(None)
            self._failed_starts += not self._worked
        self.gang.kill()
        if self._failed_starts >= self.MAX_FAILED_STARTS:
            raise ValueError(f"{self.name} died {self._failed_starts} times as soon as it had started; see its log")
        generation = self.gang.generation + 1
        self._journal.set(**{f"generation of {self.name}": generation})
        self.gang = Gang(self._deployment, self.name, generation)
        self.gang.start(lambda: self._go() and not self._pause.is_set())
        self._worked = self._worked or self.gang.alive()
        self._show(self.gang.endpoint)

    def _failed_start(self, error: Exception) -> None:
        """A process died while it was being started: try again, but not for ever if it never worked."""
        self._failed_starts += 1
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.error("start %d of %s failed: %s", self._failed_starts, self.name, reason)
        if not self._worked and self._failed_starts >= self.MAX_FAILED_STARTS:
            self._give_up(f"{self._failed_starts} starts of {self.name} failed, the last one with: {reason}")
        self._pause.wait(min(2.0**self._failed_starts, 30.0))

    def _give_up(self, why: str) -> None:
        self.failure = why
        self.gang.kill()
        self._show(None)

    def _show(self, endpoint: Endpoint | None) -> None:
        self.endpoint = endpoint
        self._changed()
