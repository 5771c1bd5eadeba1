"""How much memory of its host a process may still take. The limit of a container counts, unknown to the machine.

Files of the kernel: https://docs.kernel.org/admin-guide/cgroup-v2.html (Memory) and
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available(cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """Bytes, of the machine or of the tightest control group around this process.

    Args:
        cgroups: where control groups are mounted.
        own: the file that names this process's groups.
    """
    return min([psutil.virtual_memory().available, *_left(cgroups, own)])


def total(cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """Bytes that the machine has, or the tightest control group may take; arguments as `available`'s."""
    return min([psutil.virtual_memory().total, *_limits(cgroups, own)])


def _limits(cgroups: Path, own: Path) -> Iterator[int]:
    for group, limit, _ in _groups(cgroups, own):
        with suppress(OSError, ValueError):
            yield int((group / limit).read_text())


def _left(cgroups: Path, own: Path) -> Iterator[int]:
    """Of every group with a limit: what is left. The page cache counts as left, as in the machine's own figure."""
    for group, limit, used in _groups(cgroups, own):
        with suppress(OSError, ValueError, KeyError):  # no such file; or "max", which is no number
            room = int((group / limit).read_text()) - int((group / used).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            whole = "total_" if "total_active_file" in stat else ""  # v1: with the groups inside this one
            yield max(0, room + int(stat[f"{whole}active_file"]) + int(stat[f"{whole}inactive_file"]))


def _groups(cgroups: Path, own: Path) -> Iterator[tuple[Path, str, str]]:
    """(folder, file of its limit, file of its use) of this process's groups, the whole way up.

    In a container the path may be the host's, while what is mounted begins with the container's own group.
    """
    lines = own.read_text().splitlines() if own.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:
            root, files = cgroups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, files = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inner = root / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group.is_relative_to(root):
                yield group, *files
