"""Waiting for Ray results in slices, so that whoever waits can also be told to stop."""

from collections.abc import Callable
from typing import Any

import ray

from stepladder.workers.silence import Silence


class Cancelled(Exception):
    """Whoever waited was told to stop."""


def wait_for(refs: list[Any], seconds: float, go: Callable[[], bool] = lambda: True) -> list[Any]:
    """All results, in order; the first failure is raised as soon as it is there.

    Raises:
        TimeoutError: not all were there within `seconds`, in which we ran. Cancelled: `go` turned False.
    """
    tick = min(0.5, seconds)
    silence, missing = Silence(tick), list(refs)
    while missing:
        if not go():
            raise Cancelled
        if silence.seconds > seconds:
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        done, missing = ray.wait(missing, num_returns=1, timeout=tick)
        ray.get(done)
    return ray.get(refs)
