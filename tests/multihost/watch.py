"""A deployment's state as its controller tells it, watched from a process on the head's host.

python -m tests.multihost.watch NAME       prints what has changed as a line of JSON, until its stdin ends
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from queue import Empty, Queue
from time import monotonic

import ray
from ray.exceptions import RayError

from stepladder.cluster.names import CONTROLLER, namespace
from stepladder.launch.bench.rig.hosts import Host


@dataclass(frozen=True)
class Seen:
    """at: on the machine's monotonic clock, in seconds. nodes: that Ray counts as alive. The rest is the Status."""

    at: float
    phase: str
    detail: str
    generation: int
    nodes: int


class Watch:
    """As a context manager: a process that watches `name`."""

    def __init__(self, host: Host, env: dict[str, str], name: str) -> None:
        self._start = (host, env, [sys.executable, "-m", "tests.multihost.watch", name])
        self._seen: Queue[Seen] = Queue()
        self.now: Seen | None = None

    def __enter__(self) -> "Watch":
        host, env, command = self._start
        self._process = host.popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)

    def until(self, holds: Callable[[Seen], bool], seconds: float) -> Seen:
        """What was seen first of which `holds` is true; fails after `seconds`."""
        deadline = monotonic() + seconds
        while self.now is None or not holds(self.now):
            try:
                self.now = self._seen.get(timeout=max(0.0, deadline - monotonic()))
            except Empty:
                raise AssertionError(f"not within {seconds} s; last seen: {self.now}") from None
        return self.now

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):  # Ray prints what it has to say as well
                self._seen.put(Seen(**json.loads(line)))


def main(name: str) -> None:
    ray.init(namespace=namespace(name), log_to_driver=False, logging_level="ERROR")
    controller = ray.get_actor(CONTROLLER)
    before: Seen | None = None
    asked = threading.Thread(target=sys.stdin.read, daemon=True)  # ends when whoever watches has closed the pipe
    asked.start()
    while asked.is_alive():
        asked.join(0.1)
        try:
            status = ray.get(controller.status.remote(), timeout=5)
        except RayError:
            continue
        nodes = sum(node["Alive"] for node in ray.nodes())
        seen = Seen(monotonic(), status.phase, status.detail, status.generations["engine-0"], nodes)
        if before is None or replace(seen, at=before.at) != before:
            before = seen
            print(json.dumps(asdict(seen)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
