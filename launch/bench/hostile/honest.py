"""Honest streams: the same few requests again and again, whose texts and pauses tell whether anybody felt something."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from time import monotonic
from typing import Any

from stepladder.launch.bench.failures.retrying_client import RetryingClient

POLL_SECONDS = 0.02


def _length(pause: tuple[float, float]) -> float:
    return pause[1] - pause[0]


@dataclass
class Phase:
    """What the streams saw of one phase; lists have an entry per stream.

    Attributes:
        when: the longest pause between two chunks began and ended (`monotonic`). waits: the longest until a first text,
            in seconds.
        ended: texts that came whole. changed: texts that are not those of the first phase. retries: tries after
            another, upon 429, 503, or a broken connection.
        lost: why requests failed.
    """

    name: str
    when: list[tuple[float, float]]
    waits: list[float]
    ended: int = 0
    changed: int = 0
    retries: int = 0
    lost: list[str] = field(default_factory=list)

    @property
    def pauses(self) -> list[float]:
        """The longest of each stream, in seconds."""
        return [_length(pause) for pause in self.when]

    @property
    def worst(self) -> tuple[float, float]:
        """When the longest of all pauses was."""
        return max(self.when, key=_length)


class HonestStreams:
    """Every other one greedy, the rest seeded.

    Args:
        tokens: of each answer. seconds: after which a request is lost.
    """

    def __init__(self, url: str, model: str, streams: int, tokens: int, seconds: float) -> None:
        self._url, self._model, self._tokens, self._seconds = url, model, tokens, seconds
        self._streams = streams
        self._texts: dict[int, str] = {}
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Streams are under way on entry and until exit, which waits for the last of them.

        Raises:
            RuntimeError: they do not begin.
        """
        phase, over = Phase(name, [(0.0, 0.0)] * self._streams, [0.0] * self._streams), threading.Event()
        first: dict[int, RetryingClient] = {}
        with ThreadPoolExecutor(self._streams) as pool:
            running = [pool.submit(self._stream, phase, nth, over, first) for nth in range(self._streams)]
            try:
                self._wait(first)
                yield phase
            finally:
                over.set()
            for stream in running:
                stream.result()

    def _wait(self, first: dict[int, RetryingClient]) -> None:
        """Until every stream's first client has text."""
        deadline = monotonic() + self._seconds
        while len(first) < self._streams or not all(client.arrivals for client in first.values()):
            if monotonic() > deadline:
                why = next((client.failure for client in first.values() if client.failure), "too slow")
                raise RuntimeError(f"the honest streams did not begin within {self._seconds:.0f} s ({why})")
            threading.Event().wait(POLL_SECONDS)

    def _stream(self, phase: Phase, nth: int, over: threading.Event, first: dict[int, RetryingClient]) -> None:
        """One request after another, at least one."""
        turn = 0
        while not (turn and over.is_set()):
            request_id = f"{phase.name}-{nth}-{turn}".replace(" ", "-")
            client = RetryingClient(self._url, request_id, self._body(nth), self._seconds)
            first.setdefault(nth, client)
            began = monotonic()
            try:
                client.run()
            except RuntimeError as error:  # a refusal
                client.failure = str(error)
            self._note(phase, nth, client, began)
            turn += 1

    def _note(self, phase: Phase, nth: int, client: RetryingClient, began: float) -> None:
        with self._lock:
            phase.retries += client.retries
            if client.arrivals:
                phase.waits[nth] = max(phase.waits[nth], client.arrivals[0] - began)
                phase.when[nth] = max([phase.when[nth], *pairwise(client.arrivals)], key=_length)
            if client.failure:
                phase.lost.append(client.failure)
            else:
                phase.ended += 1
                phase.changed += self._texts.setdefault(nth, client.text) != client.text

    def _body(self, nth: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": f"class Stack{nth}:\n    def __init__(self, {'x' * nth}",
        }
        body |= {"max_tokens": self._tokens, "ignore_eos": True, "seed": nth}
        return body | {"temperature": 0.0 if nth % 2 else 0.8}
