"""The controller actor: named, detached, restartable. Its thread supervises; a supervisor's methods only leave notes.

Its durable state is the journal in the run directory; the rest it learns again from live processes.
"""

import logging
import os
import threading
from dataclasses import asdict
from pathlib import Path

import ray
from ray.actor import ActorHandle

from stepladder.cluster.config import Deployment
from stepladder.cluster.monitor import open_monitor
from stepladder.cluster.names import CONTROLLER, namespace
from stepladder.cluster.supervisor import Supervisor
from stepladder.workers.actors import configure_logging

log = logging.getLogger(__name__)

HEAD = "node:__internal_head__"  # a resource that Ray gives the head node, and no other


@ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=4)
class ControllerActor(Supervisor):
    """A `Supervisor` as an actor, told which program its gateways are. When the deployment has ended it removes
    itself."""

    def __init__(self, deployment: Deployment, gateway: type) -> None:
        configure_logging()
        self._me: ActorHandle = ray.get_runtime_context().current_actor
        folder, wanted = Path(deployment.run_dir), deployment.monitor
        shown = {key: value for key, value in asdict(deployment).items() if key not in ("secret", "gateway")}
        monitor = open_monitor(folder, wanted.wandb, wanted.project, folder.name, shown)
        super().__init__(deployment, monitor, gateway)
        threading.Thread(target=self._run, daemon=True, name="supervisor").start()

    def _run(self) -> None:
        try:
            self.run()
        except Exception:
            log.exception("the controller broke; Ray restarts it and it adopts what lives")
            os._exit(1)
        ray.kill(self._me, no_restart=True)


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
