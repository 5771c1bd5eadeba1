"""What the controller does all day: keep the deployment as it should be, and take it down in the end."""

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time
from typing import Any

from ray.exceptions import GetTimeoutError, RayError

from cluster import placement
from cluster.config import Deployment
from cluster.front import Front
from cluster.gang import Gang
from cluster.journal import Journal
from cluster.monitor import Monitor
from cluster.waiting import Cancelled

log = logging.getLogger(__name__)


class StartFailed(Exception):
    """Something came up and went down before the deployment was ever ready."""


@dataclass(frozen=True)
class Status:
    """How a deployment is.

    Attributes:
        phase: starting, ready, mending, draining, failed or ended.
        detail: what a person should read.
        url: where the gateway listens, once it does.
        generation: which life of the engine this is. restarts: how often something died and was put back.
    """

    phase: str
    detail: str
    url: str | None
    generation: int
    restarts: int


class Supervisor:
    """One thread (`run`) that looks after everything in turns; other threads only call the short methods."""

    MAX_FAILED_STARTS = 3  # of a deployment that has never been ready

    def __init__(self, deployment: Deployment, monitor: Monitor) -> None:
        self.deployment, self._monitor = deployment, monitor
        self._journal = Journal(Path(deployment.run_dir) / "journal.json")
        self._gang = Gang(deployment, "engine-0", self._journal.get("generation", 0))
        self._front = Front(deployment, "gateway-0", self._journal.get("gateway_life", 0), self._journal.get("port", 0))
        if not self._journal.get("began"):
            self._journal.set(began=time())
        self._ending = threading.Event()
        self._driver_heard = self._logged = monotonic()
        self._phase, self._detail = "starting", "placing the ranks"
        self._restarts = self._failed_starts = 0
        self._was_ready = False

    def status(self) -> Status:
        url = self._front.url if self._front.port else None
        return Status(self._phase, self._detail, url, self._gang.generation, self._restarts)

    def driver_alive(self) -> None:
        """Note the driver's sign of life."""
        self._driver_heard = monotonic()

    def shut_down(self) -> None:
        """Drain and remove everything, soon."""
        self._ending.set()

    def run(self) -> None:
        """Until told to end; returns when nothing of the deployment is left but the controller itself."""
        self._adopt()
        while self._go():
            try:
                self._turn()
            except Cancelled:
                break
            except (ValueError, TimeoutError) as error:
                self._give_up(str(error))
            except (RayError, GetTimeoutError, StartFailed) as error:
                self._failed_start(error)
            self._ending.wait(self.deployment.cluster.ping_seconds)
        self._finish()

    def _turn(self) -> None:
        """Look at everything once, and mend what is broken."""
        if self._phase == "failed":
            return
        if not self._gang.ranks or not self._gang.alive():
            self._restart_gang()
        if not self._front.alive():
            self._restart_front()
        self._front.show([self._gang.endpoint])
        if self._front.stats.get("ready"):
            self._set("ready", f"serving {self.deployment.model.name} at {self._front.url}")
            self._was_ready, self._failed_starts = True, 0
        self._log()

    def _restart_gang(self) -> None:
        if self._gang.ranks:
            self._restarts += 1
            if not self._was_ready:
                self._gang.kill()
                self._gang.ranks.clear()
                raise StartFailed(f"{self._gang.group} died as soon as it had started; its log says why")
            self._set("mending", f"generation {self._gang.generation} of {self._gang.name} was lost; starting another")
        self._front.show([])
        self._gang.kill()
        generation = self._gang.generation + 1
        self._journal.set(generation=generation)
        self._gang = Gang(self.deployment, self._gang.name, generation)
        self._gang.start(self._go_on_starting)

    def _restart_front(self) -> None:
        if self._front.actor is not None:
            self._restarts += 1
            self._front.kill()
        self._journal.set(gateway_life=self._front.life + 1)
        self._front.start()
        self._journal.set(port=self._front.port)

    def _adopt(self) -> None:
        """After a restart of the controller: keep what is whole, remove what is not."""
        if self._gang.generation and not self._gang.adopt():
            self._gang.kill()
            self._gang.ranks.clear()
        if self._front.life and not self._front.adopt():
            self._front.kill()
        for name in placement.names(f"{self.deployment.name}/"):
            if name != self._gang.group or not self._gang.ranks:
                placement.remove(name)

    def _failed_start(self, error: Exception) -> None:
        """A process died while something was being put back: try again, but not for ever if it never worked."""
        self._failed_starts += 1
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.error("start %d failed: %s", self._failed_starts, reason)
        if not self._was_ready and self._failed_starts >= self.MAX_FAILED_STARTS:
            self._give_up(f"{self._failed_starts} starts failed, the last one with: {error}")
        self._ending.wait(min(2.0**self._failed_starts, 30.0))

    def _give_up(self, why: str) -> None:
        log.error("giving up: %s", why)
        self._set("failed", why)
        self._gang.kill()
        self._front.kill()

    def _go(self) -> bool:
        """Whether to carry on: nobody has asked to end, and the driver (if it must be there) is."""
        if not self.deployment.detach and monotonic() - self._driver_heard > self.deployment.cluster.driver_seconds:
            log.warning("the driver has been silent for %.0f s", self.deployment.cluster.driver_seconds)
            self._ending.set()
        return not self._ending.is_set()

    def _go_on_starting(self) -> bool:
        self._front.touch()
        return self._go()

    def _finish(self) -> None:
        self._set("draining", "finishing what is in flight")
        self._front.drain(self.deployment.gateway.drain_seconds)
        self._gang.stop()
        for name in placement.names(f"{self.deployment.name}/"):
            placement.remove(name)
        self._monitor.close()
        self._set("ended", "everything is removed")

    def _set(self, phase: str, detail: str) -> None:
        if (phase, detail) != (self._phase, self._detail):
            log.info("%s: %s", phase, detail)
        self._phase, self._detail = phase, detail

    def _log(self) -> None:
        if monotonic() - self._logged < self.deployment.monitor.every_seconds:
            return
        self._logged = monotonic()
        numbers = figures(self._gang.stats, self._front.stats)
        clock = round(time() - self._journal.get("began"), 1)  # goes on over a restart of the controller
        self._monitor.log({"serve/seconds": clock, "serve/restarts": self._restarts, **numbers})


def figures(engine: dict[str, Any], gateway: dict[str, Any]) -> dict[str, float]:
    """What is watched over time, in W&B's namespaces."""
    total = engine.get("reduce_seconds", 0.0)
    numbers = {f"engine/{key}": float(value) for key, value in engine.items()}
    numbers |= {key: float(value) for key, value in gateway.items() if key.startswith("serve/") and value is not None}
    if total:
        numbers["engine/reduce_hidden_share"] = 1 - engine["exposed_seconds"] / total
    return numbers
