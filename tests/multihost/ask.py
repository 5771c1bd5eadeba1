"""A greedy completion over HTTP, from a process on one host to the gateway on another.

python -m tests.multihost.ask URL PROMPT MAX_TOKENS       prints the text of each chunk as a line of JSON
"""

import json
import subprocess
import sys
from queue import Queue
from threading import Thread
from urllib.request import Request, urlopen

from stepladder.launch.bench.rig.hosts import Host


class Answer:
    """The answer to one request, as it comes."""

    def __init__(self, host: Host, url: str, prompt: str, max_tokens: int) -> None:
        command = [sys.executable, "-m", "tests.multihost.ask", url, prompt, str(max_tokens)]
        self._process = host.popen(command, stdout=subprocess.PIPE, text=True)
        self._chunks: Queue[str | None] = Queue()
        Thread(target=self._read, daemon=True).start()
        self._text = ""

    def begun(self, chunks: int = 10) -> None:
        """Wait until so many chunks have come."""
        for _ in range(chunks):
            self._text += self._chunks.get(timeout=30) or ""

    def text(self, timeout: float = 60) -> str:
        """The whole answer; `timeout` is for each chunk."""
        while (chunk := self._chunks.get(timeout=timeout)) is not None:
            self._text += chunk
        assert self._process.wait() == 0
        return self._text

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._chunks.put(json.loads(line))
        self._chunks.put(None)


def main(url: str, prompt: str, max_tokens: str) -> None:
    body = {"model": "demo", "prompt": prompt, "max_tokens": int(max_tokens), "temperature": 0.0, "stream": True}
    data = json.dumps({**body, "ignore_eos": True}).encode()
    request = Request(f"{url}/v1/completions", data, {"content-type": "application/json"})
    with urlopen(request, timeout=120) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                print(json.dumps(json.loads(line[6:])["choices"][0]["text"]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
