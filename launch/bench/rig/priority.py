"""Which of a rank's threads run first, where there are no more cores than ranks."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        Whether they do. Where it is not allowed, or the threads cannot be told, stderr says what that means.
    """
    found = _gloo_threads(seconds)
    try:
        for thread in found:
            os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        found = []
    if not found:
        print("gloo's threads may not go first here (CAP_SYS_NICE); overlap will be worse", file=sys.stderr)
    return bool(found)


@contextmanager
def ahead_of_gloo(needed: bool) -> Iterator[None]:
    """The calling thread runs before gloo's, which `communication_first` put into the real-time class.

    A send or a receive takes a lock that gloo's thread only ever tries to take. If that thread interrupted the holder
    on the holder's own core, it would try until the kernel stopped it, for a second.
    """
    if not needed:
        yield
        return
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _gloo_threads(seconds: float) -> list[int]:
    """The thread that reads and writes the sockets, and those that run collectives; none if they do not come up."""
    deadline = monotonic() + seconds
    while len(found := _named_by_gloo()) < 1 + RUN_LOOPS:  # a thread names itself a moment after it has started
        if monotonic() > deadline:
            return []
        Event().wait(0.001)
    return found


def _named_by_gloo() -> list[int]:
    found = []
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(FileNotFoundError):
            if (thread / "comm").read_text().startswith(GLOO_THREADS):
                found.append(int(thread.name))
    return found
