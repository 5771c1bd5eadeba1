"""`launch.ctl drafter`: its options, and what the controller answers, for a person."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar

from stepladder.launch.ctl_options import ShowOptions
from stepladder.launch.table import table

ORDERS = ("list", "pin", "rollback", "pause", "resume")
LINES = 5


@dataclass(frozen=True, kw_only=True)
class DrafterOptions(ShowOptions):
    """order: what to do. version: which one is to stay live, of `pin`."""

    bare: ClassVar[str | None] = "order"
    order: str = ""
    version: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ORDERS:
            said = f"{self.order!r} is no order" if self.order else "there is no order"
            raise ValueError(f"{said}; say drafter {', '.join(ORDERS)}")
        if (self.order == "pin") != (self.version is not None):
            raise ValueError("pin needs a version, and no other order takes one: drafter pin version=7")


def told(done: Mapping[str, Any]) -> str:
    """What an order has come to, or all versions, what is in use, and what happened last."""
    if done["said"]:
        return str(done["said"])
    if not done["versions"]:
        return f"no version yet; {in_short(done)}"
    rows = [_row(one, done) for one in done["versions"]]
    heading = ["version", "parent", "made", "requests", "tokens", "overlap", "acceptance", "MB", ""]
    lines = [f"{_time(when)}  {line}" for when, line in done["lines"][-LINES:]]
    return "\n".join([table([heading, *rows]), "", in_short(done), *lines])


def in_short(report: Mapping[str, Any]) -> str:
    """One line of a report's section on the drafter."""
    live = report["live"]
    parts = ["no version is live" if live is None else f"version {live} is live"]
    if report["previous"] is not None:
        parts.append(f"previous {report['previous']}")
    if (acceptance := _acceptance(report, live)) is not None:
        parts.append(f"acceptance {acceptance:.2f}")
    parts += [f"{report['pinned']} is pinned"] if report["pinned"] is not None else []
    parts += ["paused"] if report["paused"] else []
    parts += [f"not yet taken by {', '.join(report['behind'])}"] if report["behind"] else []
    return ", ".join(parts)


def _acceptance(report: Mapping[str, Any], live: int | None) -> float | None:
    if "versions" in report:
        found = (one["acceptance"] for one in report["versions"] if one["number"] == live)
        return next(found, None)
    known: dict[Any, float] = report["acceptance"]
    return known.get(live)


def _row(one: Mapping[str, Any], done: Mapping[str, Any]) -> list[object]:
    number, acceptance, overlap = one["number"], one["acceptance"], one["scores"].get("overlap")
    called = [name for name in ("live", "previous", "pinned") if done[name] == number]
    called += [f"rejected: {one['rejected']}"] if one["rejected"] else []
    return [
        number,
        one["parent"] or None,
        _time(one["made"]),
        one["window"]["requests"],
        one["window"]["tokens"],
        None if overlap is None else f"{overlap:.2f}",
        None if acceptance is None else f"{acceptance:.2f}",
        f"{one['bytes'] / 1e6:.1f}",
        ", ".join(called),
    ]


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds")
