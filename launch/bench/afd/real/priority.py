"""Sending beside gloo's own thread, where that one runs first on the only core."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


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
