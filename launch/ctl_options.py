"""What every command of `launch/ctl.py` takes."""

from dataclasses import dataclass
from typing import ClassVar

ANSWER_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class CtlOptions:
    """name: of the deployment; may be left out if there is one only. seconds: how long the command may take.

    bare: the option that a first word without an option's name is a value of, if there is one.
    """

    bare: ClassVar[str | None] = None
    name: str | None = None
    seconds: float = ANSWER_SECONDS

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}; it must be above 0")

    @property
    def patience(self) -> float:
        """Seconds for one answer."""
        return min(self.seconds, ANSWER_SECONDS)


@dataclass(frozen=True, kw_only=True)
class ShowOptions(CtlOptions):
    """format: table or json."""

    format: str = "table"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in ("table", "json"):
            raise ValueError(f"format is {self.format!r}; it must be table or json")
