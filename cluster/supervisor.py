"""What the controller does all day: keep the deployment as it should be, and take it down in the end."""

import logging
import threading
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from time import monotonic, time
from typing import Any

from ray.exceptions import RayError

from cluster import placement
from cluster.config import Deployment
from cluster.front import Front
from cluster.journal import Journal
from cluster.keeper import Keeper
from cluster.monitor import Monitor
from workers.rank import FFN

log = logging.getLogger(__name__)

STARTING = "placing the ranks and loading the model"
NO_FIGURES = ("loop_runs", "pool_resumed_block", "micro_batches")  # of an engine's counters: no sense in adding them up


@dataclass(frozen=True)
class Status:
    """How a deployment is.

    Attributes:
        phase: starting, ready, mending, draining, failed or ended.
        detail: what a person should read.
        url: where the gateway listens, once it does.
        generations: which life each engine is in. restarts: how often something died and was put back.
    """

    phase: str
    detail: str
    url: str | None
    generations: dict[str, int]
    restarts: int


class Supervisor:
    """One thread (`run`) looks after gateway, figures and driver; a keeper per engine looks after that engine."""

    def __init__(self, deployment: Deployment, monitor: Monitor) -> None:
        self.deployment, self._monitor = deployment, monitor
        self._journal = Journal(Path(deployment.run_dir) / "journal.json")
        if not self._journal.get("began"):
            self._journal.set(began=time())
        self._ending, self._wake = threading.Event(), threading.Event()
        self._driver_heard = self._logged = monotonic()
        names = [f"engine-{index}" for index in range(deployment.layout.engines)]
        pools = [FFN] if deployment.layout.kind == "afd" else []
        self._keepers = [Keeper(deployment, n, self._journal, self._go, self._changed) for n in [*names, *pools]]
        self._engines, self._pools = self._keepers[: len(names)], self._keepers[len(names) :]
        self._front = Front(deployment, "gateway-0", self._journal.get("gateway_life", 0), self._journal.get("port", 0))
        self._phase, self._detail = "starting", STARTING
        self._front_restarts = self._failed_fronts = 0
        self._figures: dict[str, float] = {}

    def status(self) -> Status:
        url = self._front.url if self._front.port else None
        generations = {keeper.name: keeper.gang.generation for keeper in self._keepers}
        restarts = self._front_restarts + sum(keeper.restarts for keeper in self._keepers)
        return Status(self._phase, self._detail, url, generations, restarts)

    def report(self) -> dict[str, Any]:
        """The status and more, as plain data.

        in_flight: HTTP requests being answered. draining: no more are admitted, by order. engines: by name,
        generation, whether it serves, restarts and the counters of its last ping; pools: the same of the FFN pool, if
        there is one. figures: the monitor's newest row.
        """
        engines, pools = (
            {
                keeper.name: {
                    "generation": keeper.gang.generation,
                    "serves": keeper.endpoint is not None,
                    "restarts": keeper.restarts,
                    **keeper.gang.stats,
                }
                for keeper in keepers
            }
            for keepers in (self._engines, self._pools)
        )
        in_flight = self._front.stats.get("in_flight", 0)
        more = {"in_flight": in_flight, "draining": self._draining, "engines": engines, "figures": self._figures}
        more |= {"pools": pools} if pools else {}
        return {"name": self.deployment.name, "model": self.deployment.model.name, **asdict(self.status()), **more}

    def drain(self, draining: bool) -> None:
        """Admit no more requests, or again; in the journal, so that it outlives a restart of controller or gateway."""
        self._journal.set(draining=self._identity if draining else None)
        self._wake.set()

    @property
    def _draining(self) -> bool:
        """By order to this deployment, not to an earlier one of the same run directory."""
        return self._journal.get("draining") == self._identity

    @property
    def _identity(self) -> str:
        return blake2b(self.deployment.secret.encode(), digest_size=8).hexdigest()

    def driver_alive(self) -> None:
        """Note the driver's sign of life."""
        self._driver_heard = monotonic()

    def shut_down(self) -> None:
        """Drain and remove everything, soon."""
        self._ending.set()
        self._wake.set()

    def run(self) -> None:
        """Until told to end; returns when nothing of the deployment is left but the controller itself."""
        self._adopt()
        for keeper in self._keepers:
            keeper.start()
        while self._go():
            try:
                self._turn()
            except (ValueError, TimeoutError) as error:
                self._fail(str(error))
            except RayError as error:
                self._failed_front(error)
            self._wake.wait(self.deployment.cluster.ping_seconds)
            self._wake.clear()
        self._finish()

    def _turn(self) -> None:
        """Look at everything once, and mend what is broken."""
        if self._phase == "failed":
            return
        if broke := next((keeper.broke for keeper in self._keepers if keeper.broke), None):
            raise broke
        self._introduce()
        endpoints = [keeper.endpoint for keeper in self._engines]
        table = [endpoint for endpoint in endpoints if endpoint]
        serving = len(table) + sum(keeper.endpoint is not None for keeper in self._pools)
        admit = not self._draining
        self._front.show(table, admit)
        if not self._front.alive():
            self._restart_front()
            self._front.show(table, admit)
        if failure := next((keeper.failure for keeper in self._keepers if keeper.failure), None):
            self._fail(failure)
        elif not admit:
            self._set("draining", "by order, no new requests are admitted (`launch.ctl resume` undoes it)")
        elif serving == len(self._keepers) and self._front.stats.get("ready"):
            self._set("ready", f"serving {self.deployment.model.name} at {self._front.url}")
        elif self._phase == "starting":
            self._set("starting", STARTING + self._full())
        else:
            parts = "engines and FFN pool" if self._pools else "engines"
            rest = "starting the rest again" + self._full()
            self._set("mending", f"{serving} of {len(self._keepers)} {parts} serve; {rest}")
        self._log()

    def _full(self) -> str:
        """Who waits for room, for a person who wonders why it takes so long."""
        waiting = [f"{keeper.gang.size} of {keeper.name}" for keeper in self._keepers if keeper.gang.waits_for_room]
        seconds = f"{self.deployment.cluster.start_seconds:.0f} s"
        return f"; no room in the cluster yet for ranks: {', '.join(waiting)} (up to {seconds})" if waiting else ""

    def _changed(self) -> None:
        """In a keeper's thread: attention ranks hear of a pool at once, whatever the supervisor waits for."""
        self._introduce()
        self._wake.set()

    def _introduce(self) -> None:
        for pool in self._pools:
            for keeper in self._engines:
                keeper.meet(pool.pool)

    def _restart_front(self) -> None:
        if self._front.actor is not None:
            self._front_restarts += 1
            if self._phase != "starting":
                self._set("mending", "the gateway was lost; starting it again")
            self._front.kill()
        self._journal.set(gateway_life=self._front.life + 1)
        self._front.start()
        self._failed_fronts = 0
        self._journal.set(port=self._front.port)

    def _failed_front(self, error: Exception) -> None:
        self._failed_fronts += 1
        log.error("start %d of the gateway failed: %s", self._failed_fronts, str(error).splitlines()[0])
        if self._failed_fronts >= Keeper.MAX_FAILED_STARTS and self._phase == "starting":
            self._fail(f"{self._failed_fronts} starts of the gateway failed, the last one with: {error}")

    def _adopt(self) -> None:
        """After a restart of the controller: keep what is whole, remove what is not."""
        for keeper in self._keepers:
            keeper.adopt()
        if self._front.life and not self._front.adopt():
            self._front.kill()
        whole = {keeper.gang.group for keeper in self._keepers if keeper.endpoint}
        for name in placement.names(f"{self.deployment.name}/"):
            if name not in whole:
                placement.remove(name)

    def _fail(self, why: str) -> None:
        """Nothing can be done: take everything down but ourselves, until the driver has read why."""
        self._set("failed", why)
        for keeper in self._keepers:
            keeper.end()
        self._front.kill()

    def _go(self) -> bool:
        """Whether to carry on: nobody has asked to end, and the driver (if it must be there) is."""
        if not self.deployment.detach and monotonic() - self._driver_heard > self.deployment.cluster.driver_seconds:
            log.warning("the driver has been silent for %.0f s", self.deployment.cluster.driver_seconds)
            self._ending.set()
        return not self._ending.is_set()

    def _finish(self) -> None:
        self._set("draining", "finishing what is in flight")
        self._front.drain(self.deployment.gateway.drain_seconds)
        for keeper in self._keepers:
            keeper.end()
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
        clock = round(time() - self._journal.get("began"), 1)  # goes on over a restart of the controller
        numbers = figures([keeper.gang.stats for keeper in self._engines], self._front.take_figures())
        self._figures = {"serve/seconds": clock, "serve/restarts": self.status().restarts, **numbers}
        self._monitor.log(self._figures)


def figures(engines: list[dict[str, Any]], gateway: dict[str, Any]) -> dict[str, float]:
    """What is watched over time, in W&B's namespaces; counters of several engines are added up."""
    names = dict.fromkeys(key for engine in engines for key in engine)
    total = {key: float(sum(engine.get(key, 0) for engine in engines)) for key in names}
    total["kv_usage"] = total.get("kv_usage", 0.0) / max(1, len(engines))
    numbers = {f"engine/{key}": value for key, value in total.items() if key not in NO_FIGURES}
    numbers |= {key: float(value) for key, value in gateway.items() if value is not None}
    if seconds := total.get("reduce_seconds", 0.0):
        numbers["engine/reduce_hidden_share"] = 1 - total["exposed_seconds"] / seconds
    return numbers
