"""Keeps one group of ranks alive: a thread per gang, so that no start delays looking after the others."""

import logging
import threading
from collections.abc import Callable

from ray.exceptions import RayActorError, RayError

from stepladder.cluster.checkpoint_agreement import CheckpointAgreement
from stepladder.cluster.config import Deployment, Group
from stepladder.cluster.endpoint import Endpoint
from stepladder.cluster.gang import Gang
from stepladder.cluster.journal import Journal
from stepladder.cluster.ray_wait import Cancelled
from stepladder.cluster.start_retry import StartRetry
from stepladder.workers.rank import Notice, PoolAddress

log = logging.getLogger(__name__)


class Keeper:
    """Starts (or adopts) a gang, pings it, and puts it back under a new generation when it has died.

    Args:
        group: what to keep; its generation lies in the journal under its name.
        agreement: what the nodes have of the model; all keepers share it.
        changed: called whenever `endpoint` or `starts` has changed.

    Attributes:
        endpoint: where the gang is to be reached, while it serves.
        starts: how starting it goes.
        restarts: how often it was lost. broke: what ended this keeper's thread, if it was not asked to end.
    """

    def __init__(
        self,
        deployment: Deployment,
        group: Group,
        journal: Journal,
        agreement: CheckpointAgreement,
        changed: Callable[[], None],
    ) -> None:
        self._deployment, self.group, self._journal, self._changed = deployment, group, journal, changed
        self.name = group.name
        self.gang = Gang(deployment, group, journal.get(f"generation of {self.name}", 0), agreement)
        self.endpoint: Endpoint | None = None
        self.starts = StartRetry(self.name, worked=journal.get("served", False) or not group.needed)
        self.restarts = 0
        self._telling = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run_noting, daemon=True, name=f"keeper-{self.name}")
        self.broke: Exception | None = None

    @property
    def pool(self) -> PoolAddress | None:
        """Of the FFN pool's keeper: what its attention ranks are told."""
        gang = self.gang  # the keeper's thread may put another in its place
        if not self.endpoint or not gang.address:
            return None
        return PoolAddress(gang.generation, gang.address, gang.group, self.group.size)

    def tell(self, notice: Notice, again: bool = False) -> None:
        """News for the ranks, if they serve and have not been told, or again. From any thread."""
        with self._telling:
            gang = self.gang  # before the endpoint, which another would not have yet
            if self.endpoint:
                gang.tell(notice, again)

    def adopt(self) -> None:
        """After a restart of the controller: take the gang over if it is whole and ours, remove it if not."""
        if not self.gang.generation:
            return
        if self.gang.adopt() and self._journal.resumed:
            self._serve()
        else:
            self._clear()

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Stop looking after the gang, and take it down."""
        self._ending.set()
        self._thread.join()
        self.gang.stop()

    def _run_noting(self) -> None:
        try:
            self._run()
        except Exception as error:  # a mistake of ours; the supervisor's thread raises it
            self.broke = error
            self._changed()

    def _run(self) -> None:
        while not self._ending.is_set() and not self.starts.over:
            try:
                self._look()
            except Cancelled:
                return
            except (ValueError, TimeoutError, RayError) as error:
                self.starts.failed(error)
                self._clear()
            self._ending.wait(max(self._deployment.cluster.ping_seconds, self.starts.pause))

    def _look(self) -> None:
        """Ping the gang; if it has died, or there is none, start one."""
        if self.gang.ranks and not self.gang.alive():
            self.restarts += 1
            log.error("%s was lost; starting another", self.gang.group)
            self._clear()
        if not self.gang.ranks:
            self._start()

    def _start(self) -> None:
        """A new generation."""
        generation = self.gang.generation + 1
        self._journal.set(**{f"generation of {self.name}": generation})
        self.gang = Gang(self._deployment, self.group, generation, self.gang.agreement)
        self.gang.start(lambda: not self._ending.is_set())
        if not self.gang.alive():
            raise RayActorError(error_msg=f"{self.gang.group} died as soon as it had started; see its log")
        self._serve()

    def _clear(self) -> None:
        """Nothing is left of the gang."""
        self.endpoint = None
        self._changed()
        self.gang.kill()

    def _serve(self) -> None:
        self.starts.succeeded()
        assert self.gang.address
        self.endpoint = Endpoint(self.name, self.gang.generation, self.gang.address)
        self._changed()
