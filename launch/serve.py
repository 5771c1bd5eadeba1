"""Serve a model under Ray: `ray job submit --working-dir . -- python -m launch.serve model=demo layout.tp=2`.

This process is the driver: it starts the controller, tells it every second that it is alive, and prints what a person
wants to know. The controller does the rest. On SIGTERM (`ray job stop`) the deployment drains and is removed, and so
it is when this process just dies.
"""

import os
import secrets
import signal
import threading
from contextlib import suppress
from pathlib import Path

import ray
from omegaconf import DictConfig
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

from stepladder.cluster.config import Deployment
from stepladder.cluster.controller import start_controller
from stepladder.cluster.error_text import error_text
from stepladder.cluster.gateway.actor import GatewayActor
from stepladder.cluster.names import namespace
from stepladder.cluster.supervisor import Status
from stepladder.launch.hydra_command import of_this_job, run_command
from stepladder.launch.ray_cluster import Head, attach
from stepladder.launch.typed_config import build, plain
from stepladder.parallel.native import has_native
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.model_check import check_model
from stepladder.workers.source.resolve import NoModel, resolve
from stepladder.workers.speculation.head.files import read_head
from stepladder.workers.speculation.kinds import WITH_HEAD

HEARTBEAT_SECONDS = 1.0
ENDING_SECONDS = 0.2  # between heartbeats once it was told to end


def main() -> None:
    run_command("serve", lambda _: Deployment, _serve)


def _serve(config: DictConfig) -> int:
    deployment = deployment_of(config)
    return serve(deployment, check_here(deployment))


def deployment_of(config: DictConfig) -> Deployment:
    """The configuration, resolved and checked, with a fresh secret.

    Raises:
        ValueError: an option that does not exist or cannot be.
    """
    values = plain(config)
    values["run_dir"] = of_this_job(values["run_dir"])
    deployment = build(Deployment, {**values, "secret": secrets.token_hex(32)})
    if not Path(deployment.run_dir).is_absolute():
        raise ValueError(
            f"run_dir is {deployment.run_dir!r}; it must be absolute, since a Ray job's own directory is temporary"
        )
    return deployment


def check_here(deployment: Deployment) -> ModelSpec | None:
    """Judge the model before anything is started, where this machine has it; the nodes judge theirs again. Returns what
    it is.

    Raises:
        ValueError: a file, a limit or a field is unusable.
    """
    with suppress(NoModel):
        source, dtype = deployment.model, deployment.engine.dtype
        directory = resolve(source.path, dtype, source.cache, fetching=True, progress=True)
        model = check_model(directory, deployment.engine)
        deployment.engine.model_len(model.spec, deployment.kv, deployment.kv.tokens)
        head = deployment.speculate.model
        if head and deployment.speculate.kind in WITH_HEAD and Path(head).is_dir():
            read_head(head, directory, model.spec)
        return model.spec
    return None


def serve(deployment: Deployment, spec: ModelSpec | None) -> int:
    """Run until the deployment has ended, or only until it is ready if it is detached. Returns the exit code.

    Args:
        spec: of the model, where this machine has it; kernels for it are compiled once a cluster has let us in.

    Raises:
        ConnectionError: no Ray cluster lets us in. ValueError: a deployment of this name runs there.
    """
    if not ray.is_initialized():
        attach(namespace(deployment.name), start=True)
    if spec:
        has_native(deployment.engine.wanted_kernels, deployment.cluster.device, spec.dtype)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which installs handlers of its own
        signal.signal(number, lambda *_: stop.set())
    controller = start_controller(deployment, GatewayActor)
    print(f"figures and journal in {deployment.run_dir}", flush=True)
    return _watch(controller, deployment, stop)


def _watch(controller: ActorHandle, deployment: Deployment, stop: threading.Event) -> int:
    """Heartbeats until the controller is gone; prints what changes."""
    seen: Status | None = None
    pause, told, headless = threading.Event(), False, ""
    while True:
        if told:
            pause.wait(ENDING_SECONDS)  # `stop` is set, and would not wait
        elif stop.wait(HEARTBEAT_SECONDS):
            controller.shut_down.remote()
            told = True
        try:
            status: Status = ray.get(controller.heartbeat.remote(), timeout=deployment.cluster.hang_seconds)
        except (GetTimeoutError, ActorUnavailableError):  # busy or restarting; Ray tells when it is gone for good
            headless, before = _headless(), headless
            if headless and not before:  # Ray ends this process after a minute of that
                print(f"stepladder: {headless}", flush=True)
            if headless and before and told:
                print("stepladder left; what ran there ends without its head", flush=True)
                os._exit(1)  # what Ray does at the exit of a process waits for a head that has died
            continue
        except RayActorError as error:
            if told or seen:  # somebody has ended it
                return 0
            print(f"stepladder failed: {error_text(error)}", flush=True)
            return 1
        if status != seen:
            _tell(status, seen)
            seen = status
        if status.phase == "failed":
            controller.shut_down.remote()
            return 1
        if status.phase == "ready" and deployment.detach:
            return 0


def _headless() -> str:
    """Why the cluster's head does not answer; empty if it does."""
    try:
        if head := Head.of_environment(start=True):
            head.ask()
    except ConnectionError as error:
        return str(error)
    return ""


def _tell(status: Status, before: Status | None) -> None:
    if before is None or (status.phase, status.detail) != (before.phase, before.detail):
        print(f"stepladder {status.phase}: {status.detail}", flush=True)
    if status.phase == "ready" and (before is None or before.url != status.url or before.phase == "starting"):
        print(f"STEPLADDER_READY {status.url}", flush=True)
    if status.doing and (before is None or before.doing != status.doing):
        print(f"stepladder: {status.doing}", flush=True)


if __name__ == "__main__":
    main()
