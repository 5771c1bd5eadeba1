"""The trainer of a deployment under test: whether it may train, and what it has done so far."""

import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import ray

from stepladder.launch.bench.failures.deployment_under_test import DeploymentUnderTest
from stepladder.launch.bench.learning.figures import Done
from stepladder.workers.rank import TRAINER
from stepladder.workers.speculation.learning.lease_trace import Row, read_trace, trace_path

LOOK_SECONDS = 0.05
STILL_SECONDS = 30.0  # within which a lease must end that is taken back


class Trainer:
    """Of a deployment, through its controller. run_dir: the deployment's."""

    def __init__(self, deployment: DeploymentUnderTest, run_dir: Path) -> None:
        self._deployment, self._drafters = deployment, run_dir / "drafter"

    def allow(self, allowed: bool) -> None:
        """Training, from now on, or no more: then no lease is in force on return.

        Raises:
            TimeoutError: one still is.
        """
        ray.get(self._deployment.controller.drafter.remote("resume" if allowed else "pause"), timeout=10)
        deadline = monotonic() + STILL_SECONDS
        while not allowed and self._report()["drafter"]["lease"]["lease_open"]:
            if monotonic() > deadline:
                raise TimeoutError(f"training was not stopped within {STILL_SECONDS:g} s of the order")
            threading.Event().wait(LOOK_SECONDS)

    def done(self) -> Done:
        report = self._report()
        lease, trained = report["drafter"]["lease"], report["drafter"]["trainer"]
        ended = sum(lease[f"lease_{how}"] for how in ("revoked", "expired", "returned", "lost"))
        return Done(
            lease["lease_micro_batches"],
            trained.get("learning_steps", 0),
            lease["lease_core_seconds"],
            self._process_seconds(),
            ended,
            lease["lease_overrun_micro_batches"],
            lease["lease_overrun_seconds"],
        )

    def traces(self) -> list[list[Row]]:
        """By rank, once the deployment has ended; none if it has left none."""
        found = list[list[Row]]()
        while (path := trace_path(self._drafters, len(found))).exists():
            found.append(read_trace(path))
        return found

    def _report(self) -> dict[str, Any]:
        report = self._deployment.report(timeout=10)
        if "drafter" not in report:
            raise ValueError("nothing learns in this deployment; deploy needs speculate=hybrid train=online")
        return report

    def _process_seconds(self) -> float:
        """Of the ranks that there are now."""
        seconds = 0.0
        for place in self._deployment.places(TRAINER):
            with suppress(psutil.NoSuchProcess):
                times = psutil.Process(place.pid).cpu_times()
                seconds += times.user + times.system
        return seconds
