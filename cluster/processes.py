"""End a process wherever it runs, also one that hangs: a stopped process ignores Ray."""

from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:  # the task that kills need not load torch first
    from stepladder.workers.actors import Place

END_SECONDS = 5.0  # a killed process takes to end, at most
GRACE_SECONDS = 0.5  # for a process that Ray has told to end


def kill_process(place: "Place", wait_seconds: float = 0.0, grace_seconds: float = 0.0) -> None:
    """SIGKILL on the process's own node; returns when it has ended, or `wait_seconds` after that at the latest.

    `grace_seconds` are for one that Ray has been told to end (`ray.kill`). If it heeds that, it ends in milliseconds,
    and Ray knows why; of one that SIGKILL ends before, Ray tells the driver in ten lines that memory may have run out.

    Our own node needs no task, for which Ray would first start a process: seconds in which whoever serves on a small
    machine has less of it.
    """
    if place.node == ray.get_runtime_context().get_node_id():
        _kill_here(place.pid, place.born, wait_seconds, grace_seconds)
    else:
        there = NodeAffinitySchedulingStrategy(place.node, soft=False)
        task = _kill.options(scheduling_strategy=there).remote(place.pid, place.born, grace_seconds)
        ray.wait([task], timeout=wait_seconds)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int, born: float, grace_seconds: float) -> None:
    _kill_here(pid, born, END_SECONDS, grace_seconds)


def _kill_here(pid: int, born: float, wait_seconds: float, grace_seconds: float) -> None:
    with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
        process = psutil.Process(pid)
        if process.create_time() != born:
            return
        with suppress(psutil.TimeoutExpired):
            process.wait(timeout=grace_seconds)
        if process.is_running():
            process.kill()
            process.wait(timeout=wait_seconds)
