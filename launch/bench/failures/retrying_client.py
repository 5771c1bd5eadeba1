"""A client that insists: it sends its request again, under the same X-Request-Id, until it has the whole text."""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from time import monotonic
from typing import Any

import requests

PAUSE_SECONDS = 0.1  # between two tries
PASSING = (429, 503)  # statuses that another try may not meet


@dataclass
class RetryingClient:
    """One streamed completion, on whatever number of tries it takes.

    Attributes:
        arrivals: when a chunk with text came, over all tries (`monotonic`).
        text: of the last try. broken: texts of tries that had begun and were cut off, and when.
        retries: tries after the first.
        failure: why the last try failed; empty if it did not.
    """

    url: str
    request_id: str
    body: Mapping[str, Any]
    seconds: float
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    broken: list[tuple[float, str]] = field(default_factory=list)
    retries: int = 0
    failure: str = ""

    @property
    def longest_pause(self) -> float:
        """Between two chunks, in seconds."""
        return max((later - earlier for earlier, later in pairwise(self.arrivals)), default=0.0)

    def run(self) -> "RetryingClient":
        deadline = monotonic() + self.seconds
        while not self._try() and monotonic() < deadline:
            self.retries += 1
            threading.Event().wait(PAUSE_SECONDS)
        return self

    def _try(self) -> bool:
        """Whether the text is whole.

        Raises:
            RuntimeError: the server refuses the request itself.
        """
        self.text = self.failure = ""
        try:
            with requests.post(
                f"{self.url}/v1/completions",
                json={**self.body, "stream": True},
                headers={"X-Request-Id": self.request_id},
                stream=True,
                timeout=self.seconds,
            ) as answer:
                if answer.status_code not in (200, *PASSING):
                    raise RuntimeError(f"HTTP {answer.status_code}: {answer.text[:300]}")
                if answer.status_code == 200:
                    self._read(answer)
                else:
                    self.failure = f"HTTP {answer.status_code}"
        except requests.RequestException as error:
            self.failure = f"{type(error).__name__}: {error}"[:300]
        if self.failure and self.text:
            self.broken.append((monotonic(), self.text))
        return not self.failure

    def _read(self, answer: requests.Response) -> None:
        for line in answer.iter_lines(chunk_size=None):  # type: ignore[call-overload]  # whatever has come, at once
            if line == b"data: [DONE]":
                return
            if line.startswith(b"data:"):
                self._take(json.loads(line[5:]))
        self.failure = "the stream ended early"

    def _take(self, chunk: dict[str, Any]) -> None:
        if error := chunk.get("error"):
            self.failure = error["message"]
        for choice in chunk.get("choices", ()):
            if choice["text"]:
                self.arrivals.append(monotonic())
                self.text += choice["text"]
