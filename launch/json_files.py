"""JSON files that are there whole or not at all, what an interrupted run finds in them, and files of lines that people
wrote."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepladder.parallel.typed_json import read_text
from stepladder.workers.nesting import TooDeep, read_json


def lines_of(path: Path) -> list[str]:
    """The lines of a UTF-8 file of any size, whatever its line ends, without a byte order mark.

    Raises:
        ValueError: it is something else; the sentence names it.
    """
    return read_text(path, most=math.inf).replace("\r\n", "\n").replace("\r", "\n").split("\n")


def json_of(line: str, where: str) -> Any:
    """The value that a line of JSON has; ValueError, with `where` in front, if it has none."""
    try:
        return read_json(line, where)
    except TooDeep:
        raise
    except ValueError as error:  # no JSON, or digits without end
        raise ValueError(f"{where}: not valid JSON: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, whatever kills this process."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def kept(path: Path, settings: Mapping[str, Any], refusal: str) -> Any:
    """What an earlier run wrote to `path`, None if there was none; its `settings` must be these.

    Raises:
        ValueError: they are not; `refusal` says what to do.
    """
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    if found["settings"] != json.loads(json.dumps(settings)):  # as JSON gives them back
        raise ValueError(f"{path} {refusal} or choose another run_dir")
    return found
