"""The JSON files of a model directory, read so that whatever a stranger wrote there ends in values of the types and
ranges that are expected, or in one sentence with file, field and value."""

import json
import math
import os
import reprlib
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

MOST_BYTES = 64 << 20  # the index of a model of a trillion parameters has 13 MB
LARGEST = 1e300  # a number; an integer in a file may be larger than any float
SHORT = 1000  # characters
NO = object()  # what a value is that a kind does not take
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = 80


class Kind(NamedTuple):
    """What a field may be. wanted: in words, behind "it must be". take: the value in its right type, or NO."""

    wanted: str
    take: Callable[[Any], Any]


def whole(least: int, most: int) -> Kind:
    """An integer, or a float that is one."""

    def take(value: Any) -> Any:
        if not _is_number(value) or not least <= value <= most or value != int(value):
            return NO
        return int(value)

    return Kind(f"a positive integer up to {most}" if least == 1 else f"an integer from {least} to {most}", take)


def number(least: float, most: float = LARGEST, above: bool = False) -> Kind:
    """A number between these; `above` leaves out `least` itself."""

    def take(value: Any) -> Any:
        inside = _is_number(value) and least <= value <= most and not (above and value == least)
        return float(value) if inside else NO

    words = f"a number {'above' if above else 'of at least'} {least:g}"
    words = "a positive number" if above and least == 0 else words
    return Kind(words if most == LARGEST else f"{words}, at most {most:g}", take)


FLAG = Kind("true or false", lambda value: value if isinstance(value, bool) else NO)
TEXT = Kind("a short text", lambda value: value if isinstance(value, str) and len(value) <= SHORT else NO)
LONG_TEXT = Kind("a text", lambda value: value if isinstance(value, str) else NO)
OBJECT = Kind("an object", lambda value: value if isinstance(value, dict) else NO)


def optional(kind: Kind) -> Kind:
    """`kind` or null."""
    return Kind(f"{kind.wanted}, or null", lambda value: None if value is None else kind.take(value))


def several(kind: Kind) -> Kind:
    """A list of such values, which becomes a tuple."""

    def take(value: Any) -> Any:
        taken = tuple(map(kind.take, value)) if isinstance(value, list | tuple) else (NO,)
        return NO if NO in taken else taken

    return Kind(f"a list, each of it {kind.wanted}", take)


def either(one: Kind, other: Kind) -> Kind:
    """What the one takes, or else what the other does."""

    def take(value: Any) -> Any:
        return one.take(value) if one.take(value) is not NO else other.take(value)

    return Kind(f"{one.wanted}, or {other.wanted}", take)


def record(**kinds: Kind) -> Kind:
    """An object that has these fields at least, each as its kind has it."""

    def take(value: Any) -> Any:
        if not isinstance(value, dict) or kinds.keys() - value.keys():
            return NO
        taken = {name: kind.take(value[name]) for name, kind in kinds.items()}
        return NO if NO in taken.values() else value | taken

    return Kind(f"an object with {' and '.join(kinds)}", take)


def mapping(kind: Kind) -> Kind:
    """An object whose values are all such, whatever its fields are called."""

    def take(value: Any) -> Any:
        taken = {name: kind.take(one) for name, one in value.items()} if isinstance(value, dict) else {"": NO}
        return NO if NO in taken.values() else taken

    return Kind(f"an object, each value of it {kind.wanted}", take)


def typed(values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str = "") -> dict[str, Any]:
    """`values` with the fields that `kinds` names in their right types; a field that is not there stays away.

    Raises:
        ValueError: a field is something else; the sentence names it, behind `where`.
    """
    return dict(values) | {n: check(where + n, values[n], kind) for n, kind in kinds.items() if n in values}


def check(name: str, value: Any, kind: Kind) -> Any:
    """`value` as `kind` has it; ValueError if it is something else."""
    if (taken := kind.take(value)) is NO:
        raise ValueError(f"{name} is {shown(value)}; it must be {kind.wanted}")
    return taken


def shown(value: Any) -> str:
    """For a sentence: no longer than a person reads."""
    return _BRIEF.repr(value)


def read_text(path: Path, most: float = MOST_BYTES) -> str:
    """UTF-8 text of a regular file, which may begin with a byte order mark; no more than so many bytes.

    Raises:
        ValueError: it is something else; the sentence names it.
        FileNotFoundError: there is nothing.
    """
    check_regular(path)
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path} has {size} bytes; at most {most} are read")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def check_regular(path: Path) -> None:
    """ValueError for anything but a regular file, or a link to one: opening a pipe would wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # of a link in a circle, a name that cannot be
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is not a regular file")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: there is none in it; the sentence names the file.
        FileNotFoundError: there is no file.
    """
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as error:  # digits without end; or a sentence that names the file already
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is {shown(value)}; it must be a JSON object")
    return value


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever a value of this file leads to is a ValueError with the file's name in front."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} lacks the field {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path}: {error}") from None


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value if isinstance(value, float) else 0)
    )
