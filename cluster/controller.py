"""The controller actor: named, detached, restartable. Its thread supervises; its methods only leave notes.

Its durable state is the journal in the run directory; the rest it learns again from live processes.
"""

import logging
import os
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from stepladder.cluster.config import Deployment
from stepladder.cluster.monitor import Monitors, open_monitor
from stepladder.cluster.names import CONTROLLER, namespace
from stepladder.cluster.supervisor import Status, Supervisor
from stepladder.workers.actors import configure_logging

log = logging.getLogger(__name__)

HEAD = "node:__internal_head__"  # a resource that Ray gives the head node, and no other


@ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=4)
class ControllerActor:
    """The actor around a `Supervisor`, told which program its gateways are. When the deployment has ended it removes
    itself."""

    def __init__(self, deployment: Deployment, gateway: type) -> None:
        configure_logging()
        self._me: ActorHandle = ray.get_runtime_context().current_actor
        self._supervisor = Supervisor(deployment, _monitor(deployment), gateway)
        threading.Thread(target=self._run, daemon=True, name="supervisor").start()

    def heartbeat(self) -> Status:
        """The driver's sign of life, answered with the state of things."""
        self._supervisor.driver_alive()
        return self._supervisor.status()

    def status(self) -> Status:
        return self._supervisor.status()

    def report(self) -> dict[str, Any]:
        """See `Supervisor.report`."""
        return self._supervisor.report()

    def drain(self, draining: bool) -> None:
        """Refuse new requests from now on, or admit them again; those in flight go on, and everything stays up."""
        self._supervisor.drain(draining)

    def shut_down(self) -> None:
        """Drain, remove everything, end."""
        self._supervisor.shut_down()

    def _run(self) -> None:
        try:
            self._supervisor.run()
        except Exception:
            log.exception("the controller broke; Ray restarts it and it adopts what lives")
            os._exit(1)
        ray.kill(self._me, no_restart=True)


def _monitor(deployment: Deployment) -> Monitors:
    folder, wanted = Path(deployment.run_dir), deployment.monitor
    shown = {key: value for key, value in asdict(deployment).items() if key not in ("secret", "gateway")}
    return open_monitor(folder, wanted.wandb, wanted.project, folder.name, shown)


def start_controller(deployment: Deployment, gateway: type) -> ActorHandle:
    """Start the deployment's controller, on the head node: without it there is no Ray, and the driver is there too.

    On another node the controller could be lost alone, and Ray takes a minute to notice that.

    Args:
        gateway: the class of the gateway's actor.

    Raises:
        ValueError: a deployment of this name is running.
    """
    space = namespace(deployment.name)
    try:
        ray.get_actor(CONTROLLER, namespace=space)
    except ValueError:
        return ControllerActor.options(  # type: ignore[attr-defined]
            name=CONTROLLER, namespace=space, lifetime="detached", resources={HEAD: 0.001}
        ).remote(deployment, gateway)
    raise ValueError(
        f"a deployment named {deployment.name!r} already runs in this Ray cluster; stop it or choose another `name`"
    )
