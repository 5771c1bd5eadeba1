"""The log lines of a deployment's actors, from every node, through Ray's log API. `launch/ctl.py` prints them."""

import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from heapq import merge
from typing import Any

from ray.actor import ActorHandle
from ray.util.state import get_log, list_actors
from ray.util.state.exception import RayStateApiException
from requests.exceptions import RequestException

from stepladder.cluster.names import CONTROLLER, namespace
from stepladder.launch.ctl_options import CtlOptions
from stepladder.launch.typed_config import check_counts

FILES = ("out", "err")  # `print` and what is logged
LOOK_SECONDS = 2.0
_RAYS_OWN = re.compile(r":(job_id|actor_name|task_name):")
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}")


@dataclass(frozen=True, kw_only=True)
class LogOptions(CtlOptions):
    """What to print.

    Attributes:
        follow: go on as lines come, also those of processes that start later, until the deployment has ended.
        lines: of each file, counted from its end.
        actor: only actors whose name has this in it, such as engine-0 or gateway.
        dead: also those that have ended, of earlier lives too.
    """

    follow: bool = False
    lines: int = 100
    actor: str = ""
    dead: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "lines")


def logs(options: LogOptions, name: str, _: ActorHandle) -> int:
    """Print them, in order of time as far as it is known; returns the exit code.

    Raises:
        ValueError: no actor is called so. ConnectionError: Ray's API server does not answer.
    """
    try:
        if options.follow:
            _follow(options, name)
            return 0
        actors = _actors(options, name)
        if not actors:
            raise ValueError(_nobody(options, name))
        streams = [_dated(_lines(a, file, options)) for a in actors for file in FILES]
        for _time, line in merge(*streams, key=lambda dated: dated[0]):
            print(line)
    except (RayStateApiException, RequestException) as error:
        said = " ".join(str(error).split())[:200]
        raise ConnectionError(f"Ray's API server, which has the logs, does not answer: {said}") from None
    return 0


def _actors(options: LogOptions, name: str) -> list[Any]:
    found = list_actors(
        filters=[("ray_namespace", "=", namespace(name))], limit=10_000, timeout=max(1, int(options.patience))
    )
    return [a for a in found if options.actor in a.name and (options.dead or a.state == "ALIVE")]


def _nobody(options: LogOptions, name: str) -> str:
    """What there is instead."""
    everybody = replace(options, actor="")
    there = ", ".join(sorted({a.name for a in _actors(everybody, name)})) or "nobody"
    hint = "" if options.dead else "; dead=true has those that have ended, too"
    return f"no actor of {name} has {options.actor!r} in its name; there are {there}{hint}"


def _lines(actor: Any, file: str, options: LogOptions, follow: bool = False) -> Iterator[str]:
    """Whole lines behind the actor's name; a process that never wrote has no file."""
    rest = ""
    try:
        chunks = get_log(
            actor_id=actor.actor_id, suffix=file, tail=options.lines, follow=follow, errors="replace",
            filter_ansi_code=True,
        )  # fmt: skip
        for chunk in chunks:
            *whole, rest = (rest + chunk).split("\n")
            yield from (f"{actor.name} | {line}" for line in whole if line and not _RAYS_OWN.match(line))
    except (RayStateApiException, RequestException):  # no such file, or the stream broke off
        return
    if rest:
        yield f"{actor.name} | {rest}"


def _dated(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Lines without a time of their own, such as a traceback's, belong to the one before."""
    time = ""
    for line in lines:
        found = _TIME.search(line)
        time = found[0] if found else time
        yield time, line


def _follow(options: LogOptions, name: str) -> None:
    """A thread per file; new actors are looked for until the controller is gone."""
    seen: set[str] = set()
    cut_off = threading.Event()
    if not _actors(options, name):
        print(f"stepladder: so far, {_nobody(options, name)}", file=sys.stderr)
    while not cut_off.is_set():
        for actor in _actors(options, name):
            for file in FILES if actor.actor_id not in seen else ():
                lines = _lines(actor, file, options, True)
                threading.Thread(target=_print_all, args=(lines, cut_off), daemon=True).start()
            seen.add(actor.actor_id)
        alive = list_actors(filters=[("ray_namespace", "=", namespace(name)), ("name", "=", CONTROLLER)], limit=1000)
        if not any(controller.state != "DEAD" for controller in alive):
            cut_off.wait(LOOK_SECONDS)  # for what was written last
            return
        cut_off.wait(LOOK_SECONDS)
    raise BrokenPipeError


def _print_all(lines: Iterator[str], cut_off: threading.Event) -> None:
    try:
        for line in lines:
            print(line + "\n", end="", flush=True)  # in one piece, whatever other threads print
    except BrokenPipeError:
        cut_off.set()
