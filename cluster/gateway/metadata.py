"""A request's `metadata`: the client's own labels, by OpenAI's rules. Two of them mean something here."""

import re
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

from stepladder.cluster.gateway.strict_json import at_most
from stepladder.workers.text.unicode_text import unicode

MAX_LABELS, MAX_NAME, MAX_VALUE = 16, 64, 512  # pairs; characters of each
DOMAIN, LEARN = "domain", "learn"
_DOMAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LEARN = {True: True, False: False, "true": True, "false": False}


@dataclass(frozen=True)
class Labels:
    """What metadata mean to this server, as `Request` has it. Further labels have no effect, by definition."""

    domain: str = ""
    learn: bool = True


def labels(value: Any) -> Labels:
    """What is neither true nor false is refused: nobody who asks that nothing is kept is misunderstood.

    Raises:
        ValueError, PydanticCustomError: it is no such metadata.
    """
    if not isinstance(at_most(value, MAX_LABELS, "metadata"), dict):
        raise ValueError("metadata must be an object of strings")
    for name, text in value.items():
        if len(name) > MAX_NAME:
            raise ValueError(f"metadata has a name of {len(name)} characters; it takes at most {MAX_NAME}")
        if not isinstance(text, str) and not (name == LEARN and isinstance(text, bool)):
            raise ValueError(f"metadata must be an object of strings, and {name!r} is none")
        if isinstance(text, str) and len(unicode(text)) > MAX_VALUE:
            raise ValueError(f"metadata has {len(text)} characters for {name!r}; it takes at most {MAX_VALUE}")
        unicode(name)
    domain, learn = value.get(DOMAIN), value.get(LEARN, True)
    if domain is not None and not _DOMAIN.fullmatch(domain):
        raise _wrong(DOMAIN, "must be a name of 1 to 64 letters, digits or any of _.-")
    if learn not in _LEARN:
        raise _wrong(LEARN, 'must be "true" or "false"')
    return Labels(domain or "", _LEARN[learn])


def _wrong(name: str, why: str) -> PydanticCustomError:
    param = f"metadata.{name}"
    return PydanticCustomError("value_error", "{error}", {"error": f"{param} {why}", "param": param})
