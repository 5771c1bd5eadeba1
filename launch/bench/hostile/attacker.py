"""The attack: forged requests one after another on some lines, misbehaving connections on others; what came back."""

import asyncio
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from random import Random
from time import monotonic
from typing import Any

from stepladder.launch.bench.hostile.connections import ATTACKS, endless_choice
from stepladder.launch.bench.hostile.fuzz import Forged, Target, forge
from stepladder.launch.bench.hostile.line import Door, statuses

ALLOWED = 503  # the one status above 499 that a healthy server may answer
FAULTS_KEPT = 200
FORGED = "forged request"
JUST_BEFORE = 1.0  # seconds
NICENESS = 15  # strangers have computers of their own


@dataclass(frozen=True)
class Plan:
    """See `HostileBench`."""

    door: Door
    target: Target
    seed: int
    seconds: float
    requests: int | None
    clients: int
    intruders: int
    answer_seconds: float


@dataclass
class Outcome:
    """What came back.

    Attributes:
        answers: how often what was answered, by kind of forgery or name of an attack; "none" where nothing was.
        faults: answers that no request may get, and forged requests that got none twice: plain data, the first of them.
        log: what was under way from when to when (`monotonic`), so that a pause has its suspects.
        began, ended: when the first and the last of it was begun (`monotonic`); answers may have come later.
    """

    answers: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)
    log: list[tuple[float, float, str]] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0

    def suspects(self, begin: float, end: float) -> list[str]:
        """What began in that time, or shortly before it."""
        return [what for since, _, what in self.log if begin - JUST_BEFORE <= since <= end]

    def count(self, what: str, answered: list[int]) -> None:
        self.answers.setdefault(what, Counter()).update([str(status) for status in answered] or ["none"])

    def fault(self, **facts: Any) -> None:
        if len(self.faults) < FAULTS_KEPT:
            self.faults.append(facts)


def is_fault(status: int) -> bool:
    return status >= 500 and status != ALLOWED


def attack(plan: Plan) -> Outcome:
    """Raises OSError: the server takes no connection at all."""
    os.nice(NICENESS)
    return asyncio.run(_Attacker(plan).run())


@contextmanager
def under_attack(plan: Plan) -> Iterator[Any]:
    """In a process of its own, so that it takes no time of honest clients; yields a future of `Outcome`."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool.submit(attack, plan)


AGAIN = 4  # requests at once, when those that were not answered in the crowd are sent once more


class _Attacker:
    def __init__(self, plan: Plan) -> None:
        self._plan, self._outcome = plan, Outcome()
        self._numbers, self._until = itertools.count(), 0.0
        self._unanswered: list[int] = []

    async def run(self) -> Outcome:
        plan, outcome = self._plan, self._outcome
        outcome.began = monotonic()
        self._until = outcome.began + plan.seconds
        clients = [asyncio.create_task(self._client()) for _ in range(plan.clients)]
        intruders = [asyncio.create_task(self._intruder(nth)) for nth in range(plan.intruders)]
        await asyncio.gather(*clients)
        for intruder in intruders:
            intruder.cancel()
        for ended in await asyncio.gather(*intruders, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        outcome.ended = max(since for since, _, what in outcome.log if what.startswith(FORGED))
        few = asyncio.Semaphore(AGAIN)

        async def forged(number: int) -> bool:
            async with few:
                return await self._forged(number)

        again = await asyncio.gather(*map(forged, self._unanswered))  # was it the crowd, or is there no answer?
        for number, answered in zip(self._unanswered, again, strict=True):
            if not answered:
                outcome.fault(kind="no answer, twice", answer="none", number=number)
        return outcome

    async def _client(self) -> None:
        plan = self._plan
        while monotonic() < self._until:
            number = next(self._numbers)
            if plan.requests is not None and number >= plan.requests:
                return
            if not await self._forged(number):
                self._unanswered.append(number)

    async def _forged(self, number: int) -> bool:
        """Whether it was answered."""
        plan, began = self._plan, monotonic()
        forged = forge(plan.seed, number, plan.target)
        received = await send(plan.door, forged, plan.answer_seconds)
        self._outcome.log.append((began, monotonic(), f"{FORGED} {number} ({forged.what})"))
        self._judge(forged.what, received, number=number, request=f"{forged.method} {forged.path[:100]}")
        return bool(statuses(received))

    async def _intruder(self, nth: int) -> None:
        plan, rng = self._plan, Random(f"{self._plan.seed}/intruder {nth}")
        for name in endless_choice(rng):
            began = monotonic()
            try:
                received = await ATTACKS[name](plan.door, rng, plan.target)
            except (OSError, TimeoutError) as error:  # not even a connection
                self._outcome.count(name, [])
                self._outcome.fault(kind=name, answer=f"no connection: {error!r}")
                await asyncio.sleep(1.0)
            else:
                self._judge(name, received)
            self._outcome.log.append((began, monotonic(), name))

    def _judge(self, what: str, received: bytes, **facts: Any) -> None:
        answered = statuses(received)
        self._outcome.count(what, answered)
        for status in answered:
            if is_fault(status):
                self._outcome.fault(kind=what, answer=status, text=received[-500:].decode(errors="replace"), **facts)


async def send(door: Door, forged: Forged, seconds: float) -> bytes:
    """What a forged request is answered; empty if nothing."""
    try:
        async with door.open() as line:
            sending = asyncio.create_task(line.send(forged.raw()))
            await line.read(seconds)
            sending.cancel()
            return bytes(line.received)
    except (OSError, TimeoutError):
        return b""
