"""What ranks tell of themselves: a dataclass per kind of rank, each field declared as counter, gauge or limit.

Whoever adds up, shows or exports figures reads these declarations; a new figure is a new field, and no list of names
elsewhere. `metric` is its name in /metrics, where that has it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, NamedTuple

from stepladder.parallel.clock import Split

COUNTER, GAUGE, LIMIT = "counter", "gauge", "limit"
Across = Literal["sum", "mean", "none"]


class Declared(NamedTuple):
    """How a field is meant.

    Attributes:
        kind: counters only grow in a rank's life, gauges tell the present, limits never change or add up to nothing.
        across: what several engines together have. each: it is also watched for every engine by itself.
        metric, text: its name in /metrics and what that says, if it is there.
    """

    kind: str
    across: Across = "sum"
    each: bool = False
    metric: str | None = None
    text: str = ""


def counter(metric: str | None = None, text: str = "", *, default: Any = 0, each: bool = False) -> Any:
    return field(default=default, metadata={"figure": Declared(COUNTER, "sum", each, metric, text)})


def gauge(
    metric: str | None = None, text: str = "", *, default: Any = 0, across: Across = "sum", each: bool = False
) -> Any:
    return field(default=default, metadata={"figure": Declared(GAUGE, across, each, metric, text)})


def limit(*, default: Any = 0) -> Any:
    return field(default=default, metadata={"figure": Declared(LIMIT, "none")})


# metadata of a list: for a person, and for whoever exports it in a form of its own
LISTED = {"figure": Declared(LIMIT, "none")}


def declared(kind: type) -> Iterator[tuple[Field, Declared]]:
    """The figures of a dataclass, in order."""
    return ((one, one.metadata["figure"]) for one in fields(kind) if "figure" in one.metadata)


@dataclass
class RankFigures:
    """Of every rank. clock: how its life was spent, since its loop began."""

    clock: Split = field(default_factory=Split)

    def parts(self) -> Iterator[Any]:
        """This, and what it holds that has figures."""
        yield self

    def declared(self) -> dict[str, Declared]:
        """By name."""
        return {one.name: how for part in self.parts() for one, how in declared(type(part))}

    def values(self) -> dict[str, Any]:
        """By name; plain numbers, or lists of them."""
        return {one.name: getattr(part, one.name) for part in self.parts() for one, _ in declared(type(part))}


def together(several: Mapping[str, RankFigures]) -> dict[str, float]:
    """What engines have together, by the name of the figure."""
    numbers: dict[str, float] = {}
    for name, how in {name: how for one in several.values() for name, how in one.declared().items()}.items():
        if how.across != "none":
            found = [float(values[name]) for one in several.values() if name in (values := one.values())]
            numbers[name] = sum(found) / (len(found) if how.across == "mean" else 1)
    return numbers
