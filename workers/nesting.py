"""How deeply JSON of strangers may be nested: what reads and writes it recurses, and Python ends that somewhere."""

import json
from typing import Any

MOST_LEVELS = 100  # far more than anybody writes, far less than what Python's recursion allows


def read_json(text: str | bytes, what: str) -> Any:
    """The JSON value in a text.

    Raises:
        TooDeep: lists and objects lie in one another more than MOST_LEVELS deep.
        ValueError: it is no JSON, or holds an integer of thousands of digits.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise TooDeep(what) from None
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [one for outer in level for one in _inside(outer) if isinstance(one, list | dict)]
        if not level:
            return value
    raise TooDeep(what)


class TooDeep(ValueError):
    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is nested too deeply; at most {MOST_LEVELS} levels are read")


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
