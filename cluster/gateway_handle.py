"""The gateway as the controller sees it: it starts, is adopted, answers, and is replaced on the same port."""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from stepladder.cluster import placement
from stepladder.cluster.config import Deployment
from stepladder.cluster.endpoint import Endpoint
from stepladder.cluster.error_text import error_text
from stepladder.cluster.processes import GRACE_SECONDS, kill_process
from stepladder.cluster.ray_wait import wait_for
from stepladder.workers.actors import Place

log = logging.getLogger(__name__)

EVERY_ADDRESS = ("0.0.0.0", "::")  # where to listen, but not where to reach it


@dataclass
class GatewayHandle:
    """One gateway.

    Attributes:
        life: which actor of this name it is. port: where it listens, 0 until it first has.
        program: the class of its actor. Gateways are a program of their own, which the control plane does not import.
    """

    deployment: Deployment
    name: str
    life: int = 0
    port: int = 0
    program: type | None = None
    actor: ActorHandle | None = None
    place: Place | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    _told: tuple[list[Endpoint], bool] | None = None
    _here: Place = field(default_factory=Place.here)

    @property
    def url(self) -> str:
        host = self.deployment.gateway.host
        if host in EVERY_ADDRESS and self.place is not None:
            host = self.place.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def start(self, go: Callable[[], bool]) -> None:
        """A new actor on the same port as before.

        Raises:
            ValueError: the port is taken, or the tokenizer unusable. TimeoutError, RayError: it is silent, or died.
            Cancelled: `go` turned False.
        """
        self.life += 1
        self._told = None
        resource = self.deployment.gateway.resource
        self.actor = (
            ray.remote(num_cpus=0, max_concurrency=1000)(self.program)
            .options(name=self._actor_name, lifetime="detached", resources={resource: 0.001} if resource else None)
            .remote(self.deployment, self._actor_name)
        )
        seconds = self.deployment.cluster.start_seconds
        (self.place,) = wait_for([self.actor.where.remote()], seconds, go)
        port = self.port or self.deployment.gateway.port
        (self.port,) = wait_for([self.actor.start.remote(port)], seconds, go)

    def homeless(self) -> str | None:
        """Why no node can take it now; None if one can."""
        resource = self.deployment.gateway.resource
        why = placement.lacking(resource) if resource else None
        return f"gateway.resource is {resource!r}, but {why}" if why else None

    def adopt(self) -> bool:
        """Take over the gateway that an earlier controller left running."""
        try:
            self.actor = ray.get_actor(self._actor_name)
            self.place = self._answer(self.actor.where.remote())
        except (ValueError, RayError, TimeoutError):
            return False
        return self.alive()

    def alive(self) -> bool:
        """Whether it answers; notes how it is."""
        if self.actor is None:
            return False
        try:
            self.stats = self._answer(self.actor.ping.remote(self._here))
        except (RayError, TimeoutError) as error:
            log.error("%s does not answer: %s", self._actor_name, error_text(error))
            return False
        return True

    def show(self, table: list[Endpoint], admit: bool) -> None:
        """Tell it which engines there are and whether to admit new requests, if that has changed."""
        if self.actor is not None and (table, admit) != self._told:
            with suppress(RayError, TimeoutError):
                self._answer(self.actor.update.remote(table, admit))
                self._told = (table, admit)

    def take_figures(self) -> dict[str, Any]:
        """What happened since the last time this was asked; empty if it does not answer."""
        with suppress(RayError, TimeoutError):
            return self._answer(self.actor.take_figures.remote()) if self.actor else {}
        return {}

    def drain(self, seconds: float, meanwhile: Callable[[], None]) -> None:
        """Let it finish what is in flight, then end it. Until then it is pinged, and `meanwhile` called in between."""
        if self.actor is not None:
            drained, deadline = [self.actor.drain.remote(seconds)], monotonic() + seconds + 10
            every = self.deployment.cluster.ping_seconds
            while not ray.wait(drained, timeout=every)[0] and monotonic() < deadline and self.alive():
                meanwhile()
        self.kill()

    def kill(self) -> None:
        """End it, even if it hangs, and wait until its port is free again, unless its node is gone."""
        if self.actor is not None:
            with suppress(RayError):
                ray.kill(self.actor)
        if self.place is not None:
            kill_process(self.place, self.deployment.cluster.hang_seconds, GRACE_SECONDS)
        self.actor, self.place, self.stats = None, None, {}

    def _answer(self, call: Any) -> Any:
        """Raises TimeoutError or RayError: it hangs or is dead."""
        (answer,) = wait_for([call], self.deployment.cluster.hang_seconds)
        return answer

    @property
    def _actor_name(self) -> str:
        return f"{self.deployment.name}/{self.name}/{self.life}"
