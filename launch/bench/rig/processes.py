"""A rank process of the real part: reads a setup and tasks as JSON lines and answers each with a line."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from stepladder.launch.bench.afd.real.task import Setup, Task
from stepladder.launch.bench.rig.priority import communication_first

Answering = Callable[[Task], object]
TIMEOUT = timedelta(seconds=180)  # for the other rank to load, or to answer


def serve(make: Callable[[Setup, dist.Store], Answering]) -> None:
    """make: loads this rank and joins the other one, in one gloo group."""
    setup = msgspec.json.decode(sys.stdin.readline(), type=Setup)
    os.sched_setaffinity(0, {setup.core})
    torch.set_num_threads(1)
    store = dist.TCPStore(setup.store_host, setup.port, None, setup.rank == 0, wait_for_workers=False)
    _say(store.port)
    with torch.inference_mode():
        answer = make(setup, store)
        for line in sys.stdin:
            _say(answer(msgspec.json.decode(line, type=Task)))


def gloo_goes_first() -> bool:
    """Where it may; elsewhere a line on stderr says what that means."""
    allowed = communication_first()
    if not allowed:
        print("gloo's threads may not go first here (CAP_SYS_NICE); overlap will be worse", file=sys.stderr)
    return allowed


def _say(value: object) -> None:
    print(msgspec.json.encode(value).decode(), flush=True)
