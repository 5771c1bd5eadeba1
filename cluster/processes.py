"""End a process wherever it runs, also one that hangs: a stopped process ignores Ray."""

from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:  # the task that kills need not load torch first
    from stepladder.workers.actors import Place


def kill_process(place: "Place") -> ray.ObjectRef:
    """SIGKILL, from a task on the process's own node, without waiting for it; the result is there when it has ended."""
    here = NodeAffinitySchedulingStrategy(place.node, soft=False)
    return _kill.options(scheduling_strategy=here).remote(place.pid, place.born)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int, born: float) -> None:
    with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
        process = psutil.Process(pid)
        if process.create_time() == born:
            process.kill()
            process.wait(timeout=5)
