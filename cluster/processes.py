"""End a process wherever it runs, also one that hangs: a stopped process ignores Ray."""

from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:  # the task that kills need not load torch first
    from stepladder.workers.actors import Place

END_SECONDS = 5.0  # a killed process takes to end, at most


def kill_process(place: "Place", wait_seconds: float = 0.0) -> None:
    """SIGKILL on the process's own node; returns when it has ended, or after `wait_seconds` at the latest.

    Our own node needs no task, for which Ray would first start a process: seconds in which whoever serves on a small
    machine has less of it.
    """
    if place.node == ray.get_runtime_context().get_node_id():
        _kill_here(place.pid, place.born, wait_seconds)
    else:
        there = NodeAffinitySchedulingStrategy(place.node, soft=False)
        task = _kill.options(scheduling_strategy=there).remote(place.pid, place.born)
        ray.wait([task], timeout=wait_seconds)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int, born: float) -> None:
    _kill_here(pid, born, END_SECONDS)


def _kill_here(pid: int, born: float, wait_seconds: float) -> None:
    with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
        process = psutil.Process(pid)
        if process.create_time() == born:
            process.kill()
            process.wait(timeout=wait_seconds)
