"""Which of a rank's threads run first, where there are no more cores than ranks."""

import os
from contextlib import suppress
from pathlib import Path
from threading import Event
from time import monotonic

from stepladder.parallel.mesh import RUN_LOOPS

GLOO_THREADS = ("gloo_", "pt_gloo_")  # how gloo and torch name theirs


def communication_first(seconds: float = 5.0) -> bool:
    """Let the gloo threads of this process, which has one group, run as soon as they have something to do.

    They do little, but where every core computes they wait for their turn, milliseconds each time, and a reduce that is
    to hide behind compute takes twice as long; a low nice value does not help (Linux 6.18). A machine with a core to
    spare needs none of this, nor do GPUs. All of the threads or none: gloo's loop spins while it waits for a thread of
    its own and, in the real-time class alone, would starve it. Takes CAP_SYS_NICE (or root).

    Returns:
        False where it is not allowed, or the threads cannot be told.
    """
    deadline = monotonic() + seconds
    while len(found := _gloo_threads()) < 1 + RUN_LOOPS:  # a thread gives itself its name a moment after it has started
        if monotonic() > deadline:
            return False
        Event().wait(0.001)
    try:
        for thread in found:
            os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        return False
    return True


def _gloo_threads() -> list[int]:
    """The thread that reads and writes the sockets, and those that run collectives."""
    found = []
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(FileNotFoundError):
            if (thread / "comm").read_text().startswith(GLOO_THREADS):
                found.append(int(thread.name))
    return found
