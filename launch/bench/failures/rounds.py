"""One deployment, struck again and again under streaming requests; what its clients and its controller saw."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise, product
from time import monotonic
from typing import Any

import psutil
import requests
from ray.exceptions import RayError

from stepladder.cluster.error_text import error_text
from stepladder.launch.bench.failures.deployment_under_test import DeploymentUnderTest, Engines, Watch, within
from stepladder.launch.bench.failures.faults import FAULTS, FailuresBench, Fault, Occurrence
from stepladder.launch.bench.failures.retrying_client import RetryingClient

# how asking a deployment that did not come back can end
GONE = (TimeoutError, RuntimeError, ValueError, RayError, psutil.Error)


class Bench:
    """One deployment, struck again and again.

    Attributes:
        pause: the longest of undisturbed streams, in seconds. unlike: undisturbed texts that were not the same twice.
    """

    def __init__(self, config: FailuresBench, victim: DeploymentUnderTest) -> None:
        self._config, self._victim = config, victim
        self._model: str = requests.get(f"{victim.url}/v1/models", timeout=30).json()["data"][0]["id"]
        self._texts: list[str] = []
        self._census: dict[str, int] = {}
        self.pause, self.unlike = 0.0, 0

    def prepare(self) -> None:
        """The undisturbed texts.

        Raises:
            RuntimeError: they cannot be had.
        """
        runs = [self._under_way("undisturbed", nth, lambda: None) for nth in range(2)]
        first, second = [[client.text for client in clients] for clients in runs]
        if failure := next((client.failure for clients in runs for client in clients if client.failure), None):
            raise RuntimeError(f"an undisturbed request failed: {failure}")
        self.unlike = sum(one != other for one, other in zip(first, second, strict=True))
        self._texts, self._census = first, self._victim.census()
        self.pause = max(client.longest_pause for client in runs[1])

    def rounds(self) -> tuple[dict[str, list[Occurrence]], str | None]:
        """Every failure in turn, again and again, until the deployment does not come back from one.

        Returns: by failure, what happened; and where and why the rounds ended before their time, None if they did not.
        """
        config = self._config
        seen: dict[str, list[Occurrence]] = {name: [] for name in config.chosen}
        deadline = monotonic() + 60 * config.minutes
        for nth, name in product(range(config.repeats), config.chosen):
            if monotonic() >= deadline:
                break
            try:
                self.strike(name, nth, seen[name])
            except GONE as error:
                reason = f"{name}, time {nth + 1}: {error_text(error)}"
                print(reason, flush=True)
                return seen, reason
        return seen, None

    def strike(self, name: str, nth: int, seen: list[Occurrence]) -> None:
        """One occurrence of a failure; returns when the deployment is whole again.

        What the clients saw is in `seen` even if the deployment does not come back.

        Raises:
            TimeoutError, RuntimeError, ValueError, RayError, psutil.Error: it does not, or does not answer.
        """
        failure, config, victim = FAULTS[name], self._config, self._victim
        process, before = victim.process(failure), victim.engines()
        struck: list[tuple[float, Watch]] = []

        def hit() -> None:
            hung = process if failure == FAULTS["SIGSTOP controller"] else None
            watch = Watch(victim, victim.state(), config.recover_seconds, hung)
            process.send_signal(failure.signal)
            struck.append((monotonic(), watch))

        clients = self._under_way(name, nth, hit)
        if not struck:
            raise TimeoutError(f"the requests before it did not begin ({clients[0].failure or 'too slow'})")
        ((moment, watch),) = struck
        watch.join()
        one = judge(failure, clients, self._texts, moment, watch, self.pause)
        seen.append(one)
        if watch.ready is None:
            what = "not noticed" if watch.noticed is None else "not ready again"
            state = watch.last or "the controller does not answer"
            raise TimeoutError(f"{what} after {config.recover_seconds:.0f} s ({state})")
        whole = within(10.0, lambda: victim.census() == self._census and not self._busy())
        after = victim.engines()
        if failure.kind not in ("rank", "attention"):
            one.again = _sum(after, "generation_tokens") - _sum(before, "generation_tokens")
            one.again -= config.streams * config.tokens
        if not whole:
            one.left = {**_excess(victim.census(), self._census), "requests in the engine": self._busy()}
        if failure.kind == "ffn":
            one.blocks = resumed_blocks(before, after)
        print(f"{name} {nth + 1}/{config.repeats}: {one}", flush=True)

    def stop(self) -> list[str]:
        """`ray job stop`; what is left a while after it, or why that cannot be told."""
        try:
            self._victim.cluster.job("stop", self._victim.name)
            within(60.0, lambda: not self._victim.remains())
            return self._victim.remains()
        except GONE as error:
            return [f"unknown: {error_text(error)}"]

    def _busy(self) -> int:
        engines = self._victim.engines()
        return _sum(engines, "running") + _sum(engines, "waiting")

    def _under_way(self, name: str, nth: int, hit: Callable[[], None]) -> list[RetryingClient]:
        """All clients to their end; `hit` when every one has got text, and the first of them as much as is this
        occurrence's turn."""
        config = self._config
        clients = [self._client(f"{name.replace(' ', '-')}-{nth}-{index}", index) for index in range(config.streams)]
        chunks = config.tokens // 20 + nth * config.tokens // 2 // config.repeats

        def begun() -> bool:
            return all(client.arrivals for client in clients) and len(clients[0].arrivals) >= chunks

        with ThreadPoolExecutor(config.streams) as pool:
            futures: list[Future[RetryingClient]] = [pool.submit(client.run) for client in clients]
            if within(config.recover_seconds, begun):
                hit()
            return [future.result() for future in futures]

    def _client(self, request_id: str, index: int) -> RetryingClient:
        prompt = f"class Stack{index}:\n    def __init__(self, {'x' * index}"
        body: dict[str, Any] = {"model": self._model, "prompt": prompt, "seed": index}
        body |= {"max_tokens": self._config.tokens, "ignore_eos": True}
        body["temperature"] = 0.0 if index % 2 else 0.8
        return RetryingClient(self._victim.url, request_id, body, self._config.recover_seconds)


def judge(
    failure: Fault,
    clients: Sequence[RetryingClient],
    texts: Sequence[str],
    moment: float,
    watch: Watch,
    usual_pause: float,
) -> Occurrence:
    """What the clients and the controller saw of a strike at `moment`; `texts` are those of the undisturbed run."""
    hits_streams = failure.kind == "gateway"
    pairs = list(zip(clients, texts, strict=True))
    changed = sum(
        client.text != text or not all(text.startswith(broken) for _, broken in client.broken)
        for client, text in pairs
        if not client.failure
    )
    breaks = [time - moment for client in clients for time, _ in client.broken]
    streams = [client.arrivals for client in clients] if failure.kind != "controller" else []
    detected = watch.noticed - moment if watch.noticed is not None else None
    # a lost stream goes on only once the controller has noticed; one that was merely slow just then, before that
    resumed = [end for end in resumptions(streams, moment, usual_pause) if detected is None or end > detected]
    return Occurrence(
        lost=sum(bool(client.failure) or bool(client.retries and not hits_streams) for client in clients),
        changed=changed,
        detected=detected,
        ready=watch.ready - moment if watch.ready is not None else None,
        resumed=min(resumed, default=None),
        last_resumed=max(resumed, default=None),
        ended=max(breaks, default=None) if hits_streams else None,
        longest_pause=max(client.longest_pause for client in clients),
    )


def resumptions(streams: Iterable[Sequence[float]], moment: float, usual: float) -> list[float]:
    """Seconds from the failure at `moment` to the text that ended its pause, of every stream that paused, in order.

    A stream paused if it got no text for longer than `usual` from about the failure on: what was under way then may
    still come, up to `usual` later. Streams of an engine that lives on, which go on as ever, are not among them; but
    one that happens to be a little slower than any was undisturbed is.

    Args:
        streams: when text came (`monotonic`), of each.
        usual: the longest pause of streams that nothing disturbs.
    """
    ends = []
    for arrivals in streams:
        gaps = [gap for gap in pairwise(arrivals) if gap[0] <= moment + usual and gap[1] > moment]
        begin, end = max(gaps, key=lambda gap: gap[1] - gap[0], default=(moment, moment))
        if end - begin > usual:
            ends.append(end - moment)
    return sorted(ends)


def resumed_blocks(before: Engines, after: Engines) -> list[int]:
    """Where a step went on with another FFN pool between the two, of every engine in which one did.

    An engine that was between steps still tells the block of an earlier time.
    """
    both = [(before[name], after[name]) for name in before.keys() & after.keys()]
    return sorted(now["pool_resumed_block"] for then, now in both if now["pool_resumes"] > then["pool_resumes"])


def _sum(engines: Engines, counter: str) -> int:
    return sum(counters[counter] for counters in engines.values())


def _excess(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {kind: now[kind] - count for kind, count in before.items() if now[kind] != count}
