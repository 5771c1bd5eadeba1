"""Whether all nodes of a deployment have the same files of the model."""

import threading
from collections.abc import Mapping


class CheckpointAgreement:
    """The first node that tells has the right ones. Of one deployment; keepers ask from their threads.

    Args:
        path: of the model, on every node.
    """

    def __init__(self, path: str) -> None:
        self._path, self._lock = path, threading.Lock()
        self._first: tuple[str, Mapping[str, str]] | None = None

    def compare(self, host: str, files: Mapping[str, str]) -> None:
        """`files`: a hash of each, by name.

        Raises:
            ValueError: they differ from those of another host, or some are missing; the sentence names file and hosts.
        """
        with self._lock:
            first, right = self._first = self._first or (host, files)
        differing = sorted(name for name in {*files, *right} if files.get(name) != right.get(name))
        if differing:
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise ValueError(
                f"model.path {self._path} holds different files on different nodes: {differing[0]}{more} on {host} is "
                f"not what {first} has; copy it again"
            )
