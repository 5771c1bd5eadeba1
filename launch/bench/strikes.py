"""One deployment, struck again and again under streaming requests; what its clients and its controller saw."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from time import monotonic
from typing import Any

import requests

from launch.bench.failure import FAILURES, Failure, FailuresBench, Occurrence
from launch.bench.insist import Insisting
from launch.bench.pauses import resumptions
from launch.bench.victim import Victim, Watch, deployed, within

__all__ = ["Bench", "deployed"]


class Bench:
    """One deployment, struck again and again."""

    def __init__(self, config: FailuresBench, victim: Victim) -> None:
        self._config, self._victim = config, victim
        self._model: str = requests.get(f"{victim.url}/v1/models", timeout=30).json()["data"][0]["id"]
        self._texts: list[str] = []
        self._census: dict[str, int] = {}
        self.pause = 0.0

    def prepare(self) -> None:
        """The undisturbed texts.

        Raises:
            RuntimeError: they cannot be had, or are not the same twice though the engine is to be batch invariant.
        """
        runs = [self._under_way("undisturbed", nth, lambda: None) for nth in range(2)]
        first, second = [[client.text for client in clients] for clients in runs]
        if failure := next((client.failure for clients in runs for client in clients if client.failure), None):
            raise RuntimeError(f"an undisturbed request failed: {failure}")
        if self._config.batch_invariant and first != second:
            raise RuntimeError("two undisturbed runs gave different texts though engine.batch_invariant=true")
        self._texts, self._census = first, self._victim.census()
        self.pause = max(client.longest_pause for client in runs[1])

    def rounds(self) -> dict[str, list[Occurrence]]:
        """Every failure in turn, again and again; by failure, what happened."""
        seen: dict[str, list[Occurrence]] = {name: [] for name in self._config.chosen}
        deadline = monotonic() + 60 * self._config.minutes
        for nth in range(self._config.repeats):
            for name in self._config.chosen:
                if monotonic() < deadline:
                    seen[name].append(self.strike(name, nth))
        return seen

    def strike(self, name: str, nth: int) -> Occurrence:
        """One occurrence of a failure; returns when the deployment is whole again.

        Raises:
            RuntimeError: it does not become so.
        """
        failure, config, victim = FAILURES[name], self._config, self._victim
        process, generated = victim.process(failure), victim.engine()["generation_tokens"]
        struck: list[tuple[float, Watch]] = []

        def hit() -> None:
            hung = process if failure == FAILURES["SIGSTOP controller"] else None
            watch = Watch(victim, victim.state(), config.recover_seconds, hung)
            process.send_signal(failure.signal)
            struck.append((monotonic(), watch))

        clients = self._under_way(name, nth, hit)
        if not struck:
            raise RuntimeError(f"{name}: the requests before it did not begin ({clients[0].failure or 'too slow'})")
        ((moment, watch),) = struck
        watch.join()
        if watch.ready is None:
            raise RuntimeError(f"{name}: not ready again after {config.recover_seconds:.0f} s ({victim.state()})")
        whole = within(10.0, lambda: victim.census() == self._census and not self._busy())
        again = None
        if failure.kind not in ("rank", "attention"):
            again = victim.engine()["generation_tokens"] - generated - config.streams * config.tokens
        left = {} if whole else {**_excess(victim.census(), self._census), "requests in the engine": self._busy()}
        seen = judge(failure, clients, self._texts, moment, watch, again, left, self.pause)
        if failure.kind == "ffn":
            seen = replace(seen, block=victim.engine()["pool_resumed_block"])
        print(f"{name} {nth + 1}/{config.repeats}: {seen}", flush=True)
        return seen

    def stop(self) -> list[str]:
        """`ray job stop`; what is left a while after it."""
        self._victim.cluster.job("stop", self._victim.name)
        within(60.0, lambda: not self._victim.remains())
        return self._victim.remains()

    def _busy(self) -> int:
        counters = self._victim.engine()
        return counters["running"] + counters["waiting"]

    def _under_way(self, name: str, nth: int, hit: Callable[[], None]) -> list[Insisting]:
        """All clients to their end; `hit` when every one has got text, and the first of them as much as is this
        occurrence's turn."""
        config = self._config
        clients = [self._client(f"{name.replace(' ', '-')}-{nth}-{index}", index) for index in range(config.streams)]
        begun = config.tokens // 20 + nth * config.tokens // 2 // config.repeats
        with ThreadPoolExecutor(config.streams) as pool:
            futures: list[Future[Insisting]] = [pool.submit(client.run) for client in clients]
            if within(config.recover_seconds, lambda: all(c.arrivals for c in clients) and _begun(clients[0], begun)):
                hit()
            return [future.result() for future in futures]

    def _client(self, request_id: str, index: int) -> Insisting:
        prompt = f"class Stack{index}:\n    def __init__(self, {'x' * index}"
        body: dict[str, Any] = {"model": self._model, "prompt": prompt, "seed": index}
        body |= {"max_tokens": self._config.tokens, "ignore_eos": True}
        body["temperature"] = 0.0 if index % 2 else 0.8
        return Insisting(self._victim.url, request_id, body, self._config.recover_seconds)


def _begun(client: Insisting, chunks: int) -> bool:
    return len(client.arrivals) >= chunks


def judge(
    failure: Failure,
    clients: Sequence[Insisting],
    texts: Sequence[str],
    moment: float,
    watch: Watch,
    again: int | None,
    left: dict[str, int],
    usual_pause: float,
) -> Occurrence:
    hits_streams = failure.kind == "gateway"
    pairs = list(zip(clients, texts, strict=True))
    changed = sum(
        client.text != text or not all(text.startswith(broken) for _, broken in client.broken)
        for client, text in pairs
        if not client.failure
    )
    breaks = [time - moment for client in clients for time, _ in client.broken]
    streams = [client.arrivals for client in clients] if failure.kind != "controller" else []
    resumed = resumptions(streams, moment, usual_pause)
    return Occurrence(
        lost=sum(bool(client.failure) or bool(client.retries and not hits_streams) for client in clients),
        changed=changed,
        detected=watch.noticed - moment if watch.noticed else None,
        ready=watch.ready - moment if watch.ready else None,
        resumed=min(resumed, default=None),
        last_resumed=max(resumed, default=None),
        ended=max(breaks, default=None) if hits_streams else None,
        again=again,
        longest_pause=max(client.longest_pause for client in clients),
        left=left,
    )


def _excess(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {kind: now[kind] - count for kind, count in before.items() if now[kind] != count}
