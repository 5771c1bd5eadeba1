"""What went wrong, in one line for a person. Ray's own words are a traceback in colours, and name the cause last."""

import re

from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NODE = re.compile(r"\bip[=:]\s*([^\s,)]+)", re.IGNORECASE)
_OURS = (ValueError, TimeoutError, RayError)  # their words are sentences, and need no name of a class before them


def error_text(error: BaseException) -> str:
    """The cause, and the node's address where Ray tells it: the first line of what `error` says, without its traceback.

    An error of a remote method is what was raised there; a dead actor's is how it died.
    """
    text = _COLOUR.sub("", str(error))
    if isinstance(error, RayTaskError):
        said = error_text(error.cause)
    elif isinstance(error, RayActorError):
        said = _death(error, text)
    else:
        words = (text.strip().splitlines() or [""])[0]
        said = words if words and isinstance(error, _OURS) else f"{type(error).__name__}: {words}".removesuffix(": ")
    node = _NODE.search(text) if isinstance(error, RayError) else None
    return f"{said} (on node {node[1]})" if node and "(on node " not in said else said


def _death(error: RayActorError, text: str) -> str:
    """Ray begins with a phrase and a list of names, indented; then comes what it knows."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("\t")] or [type(error).__name__]
    if error.actor_init_failed:  # a traceback, too
        return lines[-1].removeprefix("ValueError: ")
    return lines[1] if isinstance(error, ActorDiedError) and len(lines) > 1 else lines[0]
