"""What a person may ask of the drafter's versions, and what is answered: plain data."""

from dataclasses import asdict
from typing import Any

from stepladder.cluster.drafter_registry import Registry
from stepladder.workers.speculation.learning.versions import Versions

__all__ = ["obey"]


def obey(registry: Registry, versions: Versions, order: str, version: int | None, time: float) -> dict[str, Any]:
    """Carry out `list`, `pin` (which needs a version), `rollback`, `pause` or `resume`.

    Returns:
        said: what has come of it, in words; without an order but `list`, nothing. The rest is `Registry.report`, and
        versions: those on the disk, as `VersionInfo`, each with its acceptance and why it is rejected, if it is.

    Raises:
        ValueError: it cannot be done.
    """
    there = versions.listed()
    if order == "list":
        said = None
    elif order == "pin":
        if version not in (numbers := [info.number for info in there]):
            known = ", ".join(map(str, numbers)) or "none"
            raise ValueError(f"there is no version {version} of the drafter in {versions.directory}; there are {known}")
        assert version is not None
        said = registry.pin(version, time)
    else:
        said = {"rollback": registry.rollback, "pause": registry.pause, "resume": registry.resume}[order](time)
    report = registry.report()
    acceptance, rejected = report.pop("acceptance"), report.pop("rejected")
    rows = [
        {
            **info._asdict(),
            "window": asdict(info.window),
            "acceptance": acceptance.get(info.number),
            "rejected": rejected.get(info.number),
        }
        for info in there
    ]
    return {"said": said, **report, "versions": rows}
