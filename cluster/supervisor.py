"""What the controller does all day: keep the deployment as it should be, and take it down in the end."""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from time import monotonic, time
from typing import Any

from ray.exceptions import RayError

from stepladder.cluster import placement
from stepladder.cluster.checkpoint_agreement import CheckpointAgreement
from stepladder.cluster.config import Deployment
from stepladder.cluster.gateway_handle import GatewayHandle
from stepladder.cluster.journal import Journal
from stepladder.cluster.keeper import Keeper
from stepladder.cluster.learning import Learning
from stepladder.cluster.monitor import Monitors
from stepladder.cluster.ray_wait import Cancelled
from stepladder.cluster.spoken import Spoken
from stepladder.cluster.start_retry import StartRetry
from stepladder.workers.figures import RankFigures, together
from stepladder.workers.rank import ATTENTION, FFN, TRAINER, PoolNotice
from stepladder.workers.roles import ROLES
from stepladder.workers.silence import Silence

log = logging.getLogger(__name__)

STARTING = "placing the ranks and loading the model"


@dataclass(frozen=True)
class Status:
    """How a deployment is.

    Attributes:
        phase: starting, ready, mending, draining, failed or ended.
        detail: what a person should read.
        url: where the gateway listens, once it does.
        generations: which life each engine is in. restarts: how often something died and was put back.
        doing: what was done lately, in a sentence; empty before anything was.
    """

    phase: str
    detail: str
    url: str | None
    generations: dict[str, int]
    restarts: int
    doing: str = ""


class Supervisor:
    """One thread (`run`) looks after gateway, figures and driver; a keeper per engine looks after that engine.

    Args:
        gateway: the class of the gateway's actor.

    Raises:
        ValueError: `run_dir` cannot be written.
    """

    def __init__(self, deployment: Deployment, monitor: Monitors, gateway: type | None = None) -> None:
        self.deployment, self._monitor = deployment, monitor
        identity = blake2b(deployment.secret.encode(), digest_size=8).hexdigest()
        agreement = CheckpointAgreement(deployment.model.path)
        self._journal = journal = Journal(Path(deployment.run_dir) / "journal.json", identity)
        self._ending, self._wake = threading.Event(), threading.Event()
        self._logged = monotonic()
        self._driver = Silence(deployment.cluster.hang_seconds)  # a turn may take that long
        groups = deployment.groups()
        self._keepers = [Keeper(deployment, group, journal, agreement, self._changed) for group in groups]
        self._needed = [keeper for keeper in self._keepers if keeper.group.needed]
        self._engines = [keeper for keeper in self._keepers if ROLES[keeper.group.role].takes_requests]
        trainer = next((keeper for keeper in self._keepers if keeper.group.role == TRAINER), None)
        self._others = [keeper for keeper in self._keepers if keeper not in (*self._engines, trainer)]
        self._pools = [keeper for keeper in self._others if keeper.group.role == FFN]
        served = [*self._engines, *self._others]
        self._learning = Learning(deployment, journal, served, trainer) if trainer else None
        self._gateway = GatewayHandle(deployment, "gateway-0", journal.get("gateway_life", 0), journal.get("port", 0))
        self._gateway.program = gateway
        self._gateway_starts, self._gateway_restarts = StartRetry("the gateway", worked=journal.get("served", False)), 0
        self._starts = [*(keeper.starts for keeper in self._needed), self._gateway_starts]
        self._phase, self._detail = "starting", STARTING
        if journal.get("served"):
            self._phase, self._detail = "mending", "the controller was lost; looking for what lives"
        if journal.get("ending"):
            self._ending.set()
        self._figures: dict[str, float] = {}
        self._spoken, self._doing = Spoken(), ""
        self._homeless_since: float | None = None  # monotonic seconds

    def status(self) -> Status:
        url = self._gateway.url if self._gateway.port else None
        generations = {keeper.name: keeper.gang.generation for keeper in self._keepers}
        restarts = self._gateway_restarts + sum(keeper.restarts for keeper in self._keepers)
        return Status(self._phase, self._detail, url, generations, restarts, self._doing)

    def report(self) -> dict[str, Any]:
        """The status and more, as plain data.

        in_flight: HTTP requests being answered. draining: no more are admitted, by order. engines: by name,
        generation, whether it serves, restarts, the figures of rank 0 and how each rank's time was spent; pools: the
        same of groups without an engine, if there are any. figures: the monitor's newest row. drafter: which version is
        live and what its trainer does, where one is taught.
        """
        engines, pools = (
            {keeper.name: _told_by(keeper) for keeper in keepers} for keepers in (self._engines, self._others)
        )
        in_flight = self._gateway.stats.get("in_flight", 0)
        draining = self._journal.get("draining", False)
        more = {"in_flight": in_flight, "draining": draining, "engines": engines, "figures": self._figures}
        more |= {"pools": pools} if pools else {}
        more |= {"drafter": self._learning.report()} if self._learning else {}
        return {"name": self.deployment.name, "model": self.deployment.model.name, **asdict(self.status()), **more}

    def drain(self, draining: bool) -> None:
        """Admit no more requests, or again; those in flight go on, and everything stays up. In the journal, so that it
        outlives a restart of controller or gateway."""
        self._journal.set(draining=draining)
        self._wake.set()

    def drafter(self, order: str, version: int | None = None) -> dict[str, Any]:
        """An order about the versions of a drafter that is taught; see `obey`. It is in the journal on return.

        Raises:
            ValueError: it cannot be done.
        """
        if self._learning is None:
            raise ValueError("this deployment does not train a drafter; serve with train=online")
        done = self._learning.order(order, version)
        self._wake.set()
        return done

    def heartbeat(self) -> Status:
        """The driver's sign of life, answered with the state of things."""
        self._driver.broken()
        return self.status()

    def shut_down(self) -> None:
        """Drain and remove everything, soon; in the journal, so that it outlives a restart of the controller."""
        self._journal.set(ending=True)
        self._ending.set()
        self._wake.set()

    def run(self) -> None:
        """Until told to end; returns when nothing of the deployment is left but the controller itself."""
        self._adopt()
        for keeper in self._keepers:
            keeper.start()
        while self._go():
            self._turn()
            self._wake.wait(self.deployment.cluster.ping_seconds)
            self._wake.clear()
        self._finish()

    def _turn(self) -> None:
        """Look at everything once, and mend what is broken."""
        if self._phase == "failed":
            return
        if broke := next((keeper.broke for keeper in self._keepers if keeper.broke), None):
            raise broke
        admit = not self._journal.get("draining")
        self._tell(admit)
        if not self._gateway.alive():
            self._restart_gateway()
            self._tell(admit)
        if self._learning:
            self._learning.look()
            self._learning.show(self._monitor)
        self._judge(admit)
        self._log()

    def _tell(self, admit: bool) -> None:
        """Attention ranks hear of the pool, and the gateway of the engines, if that has changed."""
        self._introduce()
        self._gateway.show([endpoint for keeper in self._engines if (endpoint := keeper.endpoint)], admit)

    def _judge(self, admit: bool) -> None:
        """How the deployment is; one of which a part that has never worked cannot be started has failed."""
        serving = sum(keeper.endpoint is not None for keeper in self._needed)
        if over := next((starts.over for starts in self._starts if starts.over), None):
            self._fail(over)
        elif not admit:
            self._set("draining", "by order, no new requests are admitted (`launch.ctl resume` undoes it)")
        elif serving == len(self._needed) and self._gateway.stats.get("ready"):
            self._set("ready", f"serving {self.deployment.model.name} at {self._gateway.url}")
            if not self._journal.get("served"):
                self._journal.set(served=True)
        elif self._phase == "starting":
            self._set("starting", "; ".join([STARTING + self._loaded(), *self._troubles()]) + self._full())
        else:
            parts = "engines and FFN pool" if self._pools else "engines"
            rest = self._troubles() or ["starting the rest again"]
            serve = f"{serving} of {len(self._needed)} {parts} serve{self._loaded()}"
            self._set("mending", "; ".join([serve, *rest]) + self._full())

    def _troubles(self) -> list[str]:
        """Why something does not serve, if its last start has failed."""
        found = [f"{starts.name}: {trouble}" for starts in self._starts if (trouble := starts.trouble)]
        return [*found, "trying again"] if found else []

    def _loaded(self) -> str:
        """How far the slowest of those that load has read its weights; in tenths, which a person can follow."""
        shares = [share for keeper in self._needed if (share := keeper.gang.loaded) is not None]
        tenths = int(10 * min(shares, default=0.0))
        return f" ({tenths}0 % of the weights are read)" if tenths else ""

    def _full(self) -> str:
        """Who waits for room, for a person who wonders why it takes so long."""
        waiting = [f"{keeper.group.size} of {keeper.name}" for keeper in self._needed if keeper.gang.waits_for_room]
        seconds = f"{self.deployment.cluster.start_seconds:.0f} s"
        return f"; no room in the cluster yet for ranks: {', '.join(waiting)} (up to {seconds})" if waiting else ""

    def _changed(self) -> None:
        """In a keeper's thread: attention ranks hear of a pool at once, whatever the supervisor waits for."""
        self._introduce()
        self._wake.set()

    def _introduce(self) -> None:
        for pool in self._pools:
            for keeper in self._engines:
                if keeper.group.role == ATTENTION:
                    keeper.tell(PoolNotice(pool.pool))

    def _restart_gateway(self) -> None:
        """If it is due. One that cannot start, since its port is taken for instance, is not left running."""
        if self._gateway.actor is not None:
            self._gateway_restarts += 1
            if self._phase != "starting":
                self._set("mending", "the gateway was lost; starting it again")
            self._gateway.kill()
        if self._gateway_starts.pause or self._homeless():
            return
        self._journal.set(gateway_life=self._gateway.life + 1)
        try:
            self._gateway.start(self._go)
        except Cancelled:
            self._gateway.kill()
        except (ValueError, TimeoutError, RayError) as error:
            self._gateway_starts.failed(error)
            self._gateway.kill()
        else:
            self._gateway_starts.succeeded()
            self._journal.set(port=self._gateway.port)

    def _homeless(self) -> bool:
        """Whether no node can take the gateway. One that can may still come, so this waits as long as a start may take,
        and says so at once."""
        why, seconds = self._gateway.homeless(), self.deployment.cluster.start_seconds
        if why is None:
            self._homeless_since = None
            return False
        self._homeless_since = self._homeless_since or monotonic()
        self._gateway_starts.trouble = f"{why} (waiting up to {seconds:.0f} s for one)"
        if monotonic() - self._homeless_since > seconds:
            self._gateway_starts.failed(TimeoutError(f"{why}; set it to one of these, or to null for any node"))
            self._homeless_since = None
        return True

    def _adopt(self) -> None:
        """After a restart of the controller: keep what is whole and ours, remove what is not."""
        for keeper in self._keepers:
            keeper.adopt()
        if self._gateway.life and self._gateway.adopt() and self._journal.resumed and self._gateway.port:
            self._gateway_starts.succeeded()
        else:
            self._gateway.kill()
        whole = {keeper.gang.group for keeper in self._keepers if keeper.endpoint}
        placement.remove_all(f"{self.deployment.name}/", keep=whole)

    def _fail(self, why: str) -> None:
        """Nothing can be done: take everything down but ourselves, until the driver has read why."""
        self._set("failed", why)
        for keeper in self._keepers:
            keeper.end()
        self._gateway.kill()

    def _go(self) -> bool:
        """Whether to carry on: nobody has asked to end, and the driver (if it must be there) is."""
        if not self.deployment.detach and self._driver.seconds > self.deployment.cluster.driver_seconds:
            log.warning("the driver has been silent for %.0f s", self.deployment.cluster.driver_seconds)
            self._ending.set()
        return not self._ending.is_set()

    def _finish(self) -> None:
        """Keepers go on until nothing is in flight: who waits for an answer needs an engine."""
        self._set("draining", "finishing what is in flight")
        self._gateway.drain(self.deployment.gateway.drain_seconds, self._while_draining)
        for keeper in self._keepers:
            keeper.end()
        placement.remove_all(f"{self.deployment.name}/")
        self._monitor.close()
        self._set("ended", "everything is removed")

    def _while_draining(self) -> None:
        self._tell(admit=False)
        self._log()

    def _set(self, phase: str, detail: str) -> None:
        if (phase, detail) != (self._phase, self._detail):
            log.info("%s: %s", phase, detail)
        self._phase, self._detail = phase, detail

    def _log(self) -> None:
        if monotonic() - self._logged < self.deployment.monitor.every_seconds:
            return
        self._logged = monotonic()
        self._journal.retry()
        clock = round(time() - self._journal.get("began"), 1)  # goes on over a restart of the controller
        engines, others = ({k.name: k.gang.figures for k in ks} for ks in (self._engines, self._others))
        numbers = figures(engines, others, self._gateway.take_figures())
        learning = self._learning.figures() if self._learning else {}
        self._figures = {"serve/seconds": clock, "serve/restarts": self.status().restarts, **numbers, **learning}
        self._monitor.log(self._figures)
        if said := self._spoken.line(monotonic(), numbers):
            self._doing = said
            log.info("%s", said)


def figures(
    engines: Mapping[str, Sequence[RankFigures]], others: Mapping[str, Sequence[RankFigures]], gateway: dict[str, Any]
) -> dict[str, float]:
    """What is watched over time, in W&B's namespaces, from the figures of each group's ranks, rank 0 first.

    engine/ has what the engines have together; afd/NAME/ the figures of a group without an engine, and of each engine
    those that are watched one by one; ranks/NAME/RANK/ how the time of every rank was spent.
    """
    first = {name: ranks[0] for name, ranks in engines.items() if ranks}
    numbers = {f"engine/{key}": value for key, value in together(first).items()}
    for name, one in first.items():
        watched = {key for key, how in one.declared().items() if how.each}
        numbers |= {f"afd/{name}/{key}": float(value) for key, value in one.values().items() if key in watched}
    for name, ranks in others.items():
        numbers |= {f"afd/{name}/{key}": value for key, value in together({name: ranks[0]} if ranks else {}).items()}
    for name, ranks in {**engines, **others}.items():
        for index, rank in enumerate(ranks):
            numbers |= {f"ranks/{name}/{index}/{key}_seconds": value for key, value in rank.clock._asdict().items()}
    numbers |= {key: float(value) for key, value in gateway.items() if value is not None}
    if seconds := numbers.get("engine/reduce_seconds", 0.0):
        numbers["engine/reduce_hidden_share"] = 1 - numbers["engine/exposed_seconds"] / seconds
    return numbers


def _told_by(keeper: Keeper) -> dict[str, Any]:
    """One group in a report."""
    ranks = keeper.gang.figures
    times = [
        {"host": place.host, "pid": place.pid, **rank.clock._asdict()}
        for place, rank in zip(keeper.gang.places, ranks, strict=False)
    ]
    life = {"generation": keeper.gang.generation, "serves": keeper.endpoint is not None, "restarts": keeper.restarts}
    engine = getattr(ranks[0], "engine", None) if ranks else None
    told = {"speculation": engine.speculation} if engine and engine.speculation else {}
    return {**life, **(ranks[0].values() if ranks else {}), **told, "needed": keeper.group.needed, "ranks": times}
