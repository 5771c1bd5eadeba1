"""Network namespaces whose names say who made them, so that those of a dead owner can be found and removed."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic

PREFIX = "stepladder"
FOLDER = Path("/run/netns")  # where iproute2 keeps them
_NAME = re.compile(rf"{PREFIX}-(?P<pid>\d+)-(?P<started>\d+)-[0-9a-f]+(-\w+)?")


def ip(*words: str, tool: str = "ip") -> str:
    """Run `ip ...`; returns what it printed.

    Raises:
        RuntimeError: it failed; the message is what it said.
    """
    done = subprocess.run([tool, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"`{tool} {' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout


def tc(*words: str) -> str:
    """As `ip`, for `tc ...`."""
    return ip(*words, tool="tc")


def new_name() -> str:
    """A name that nobody else has: the prefix, this process's id and start, and something random."""
    return f"{PREFIX}-{os.getpid()}-{_started(os.getpid())}-{secrets.token_hex(3)}"


def processes(namespace: str) -> list[int]:
    """The ids of those whose network is this namespace."""
    return [int(pid) for pid in ip("netns", "pids", namespace).split()]


def remove(namespace: str, seconds: float = 20.0) -> None:
    """Kill what runs in it, then delete it, and its devices with it. One that is gone already is no error.

    Raises:
        RuntimeError: it is still there after that, or a process in it would not die within `seconds`.
    """
    try:
        _kill(namespace, monotonic() + seconds)
        ip("netns", "del", namespace)
    except RuntimeError:
        if (FOLDER / namespace).exists():
            raise


def sweep() -> list[str]:
    """Remove the namespaces of owners that are no more; returns their names."""
    left = [path.name for path in FOLDER.glob(f"{PREFIX}-*") if _orphaned(path.name)]
    for namespace in left:
        remove(namespace)
    return left


def unavailable() -> str | None:
    """Why hosts cannot be built here, in one sentence; None if they can."""
    if sys.platform != "linux":
        return f"network namespaces are Linux's, and this is {sys.platform}"
    if missing := [tool for tool in ("ip", "tc") if not shutil.which(tool)]:
        return f"{' and '.join(missing)} of iproute2 cannot be found; install it"
    probe, bucket = new_name(), "tbf rate 1mbit burst 4kb latency 50ms"
    try:
        ip("netns", "add", probe)
        for link in ("bridge type bridge", "one type veth peer name other"):
            ip("-n", probe, "link", "add", *link.split())
        tc("-n", probe, "qdisc", "add", "dev", "one", "root", *bucket.split())
    except RuntimeError as error:
        needed = "root and a kernel with veth, bridge and tbf"
        return f"no network namespaces can be made here, which takes {needed}: {error}"
    finally:
        remove(probe)
    return None


def _kill(namespace: str, deadline: float) -> None:
    while alive := processes(namespace):
        if monotonic() > deadline:
            raise RuntimeError(f"processes {alive} in {namespace} do not die; end them and run again")
        for process in alive:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        threading.Event().wait(0.01)  # not wait_procs: it would take a child's exit code from its Popen


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did (proc(5): stat, field 22); None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def _orphaned(namespace: str) -> bool:
    name = _NAME.fullmatch(namespace)
    return name is not None and _started(int(name["pid"])) != int(name["started"])
