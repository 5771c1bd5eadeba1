"""Random steps of an executor: anybody beside anybody, in chunks of any size, over cache blocks in any order. Each row
is held against what its text gives alone."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.workers.core import StepPlan
from stepladder.workers.executor import Executor

PLACES, BLOCK = 8, 8  # sequences that run at once; tokens of a cache block
BLOCKS = 60  # of texts of `make_texts`: too few for so many
VOCABULARY = 101
Rows = dict[str, Tensor]  # hidden states and logits


def make_texts(seed: int, stems: int = 4, each: int = 3, longest: int = 90) -> list[list[int]]:
    """Several with each beginning."""
    dice, made = random.Random(seed), []
    for _ in range(stems):
        stem = [dice.randrange(VOCABULARY) for _ in range(dice.randint(3, longest // 2))]
        for _ in range(each):
            rest = dice.randint(1, longest - len(stem))
            made.append(stem + [dice.randrange(VOCABULARY) for _ in range(rest)])
    return made


class Watched:
    """An executor, with what its last step computed.

    Args:
        left_behind: what stands in cache blocks that nobody has written to yet.
    """

    def __init__(self, executor: Executor, left_behind: float = float("nan")) -> None:
        self.executor, self.rows = executor, Rows()
        executor.cache.keys.fill_(left_behind)
        executor.cache.values.fill_(left_behind)
        plain = executor._logits

        def kept(hidden: Tensor) -> Tensor | None:
            logits = plain(hidden)
            assert logits is not None
            self.rows = {"hidden states": hidden, "logits": logits}
            return logits

        executor._logits = kept  # type: ignore[method-assign]

    def run(self, plan: StepPlan) -> Rows:
        self.executor.submit(plan)
        return self.rows

    def alone(self, texts: Sequence[list[int]]) -> list[Rows]:
        """Each text in one step that it has for itself."""
        blocks = [*range(self.executor.cache.num_blocks)]
        plans = [StepPlan(t, [0], [len(t)], [blocks[: -(-len(t) // BLOCK)]], [*range(len(t))]) for t in texts]
        found = [self.run(plan) for plan in plans]
        self.executor.submit(StepPlan())  # nobody should wait for this one
        return found


@dataclass(eq=False)
class Running:
    """A sequence that gets its text. known: tokens whose keys and values are cached. story: how it came here."""

    text: int
    known: int = 0
    blocks: list[int] = field(default_factory=list)
    story: str = "from its beginning"


class Part(NamedTuple):
    """A sequence's part of a step."""

    text: int
    start: int
    stop: int
    story: str


class Steps:
    """Plans as a scheduler might make them, and many that none would.

    Attributes:
        counts: of what happened.
    """

    def __init__(self, texts: Sequence[list[int]], blocks: int, seed: int) -> None:
        self._texts, self._dice = texts, random.Random(seed)
        self._free, self._holders = [*range(blocks)], Counter[int]()
        self._running = [self._another() for _ in range(PLACES)]
        self._ended: list[Running] = []  # their blocks are of use to others until somebody needs the room
        self.counts = Counter[str]()

    def next(self) -> tuple[StepPlan, list[Part]]:
        dice, plan, parts = self._dice, StepPlan(), list[Part]()
        if dice.random() < 0.1:
            self._preempt(dice.choice(self._running))
        for one in [one for one in self._running if not one.known]:
            self._take_over(one)
        idle, ended = [*self._running], list[Running]()
        for one in dice.sample(self._running, dice.randint(1, PLACES)):
            text = self._texts[one.text]
            stop = min(len(text), one.known + self._length())
            if not self._grow(one, stop, [other for other in idle if other is not one]):
                continue
            idle.remove(one)
            parts.append(Part(one.text, one.known, stop, one.story))
            plan.tokens.extend(text[one.known : stop])
            plan.starts.append(one.known)
            plan.lengths.append(stop - one.known)
            plan.block_tables.append([*one.blocks])
            one.known = stop
            if stop == len(text):
                self._running[self._running.index(one)] = self._another()
                ended.append(one)
        self._ended += ended  # not before: this step needs their blocks
        plan.rows.extend(range(len(plan.tokens)))
        return plan, parts

    def _another(self) -> Running:
        return Running(self._dice.randrange(len(self._texts)))

    def _length(self) -> int:
        """Of a chunk: mostly one token, as in decoding, or few, as in verification; else as in prefill."""
        return self._dice.choice((1, 1, 1, 2, 3, self._dice.randint(1, 9), self._dice.randint(10, 80)))

    def _take_over(self, one: Running) -> None:
        """Whole blocks of a beginning that another sequence has computed."""
        text = self._texts[one.text]
        other = self._dice.choice([*self._running, *self._ended])
        same = 0
        while same < min(len(text) - 1, other.known) and text[same] == self._texts[other.text][same]:
            same += 1
        if count := same // BLOCK:
            self._release(one)
            one.blocks, one.known = other.blocks[:count], count * BLOCK
            self._holders.update(one.blocks)
            one.story = f"behind {one.known} tokens of text {other.text}"
            self.counts["taken over"] += 1

    def _grow(self, one: Running, stop: int, victims: list[Running]) -> bool:
        """Blocks for so many tokens, at the cost of those that have ended, then of others."""
        missing = -(-stop // BLOCK) - len(one.blocks)
        while len(self._free) < missing and self._ended:
            self._release(self._ended.pop(0))
        while len(self._free) < missing and (others := [v for v in victims if v.blocks]):
            self._preempt(self._dice.choice(others))
        if len(self._free) < missing:
            return False
        for _ in range(missing):
            one.blocks.append(self._free.pop(self._dice.randrange(len(self._free))))
        self._holders.update(one.blocks[len(one.blocks) - missing :])
        return True

    def _preempt(self, one: Running) -> None:
        self.counts["preempted"] += bool(one.known)
        one.story = f"anew, after {one.known} tokens"
        self._release(one)

    def _release(self, one: Running) -> None:
        self._holders.subtract(one.blocks)
        self._free += [block for block in one.blocks if not self._holders[block]]
        one.blocks, one.known = [], 0


def differences(got: Tensor, want: Tensor) -> list[int]:
    """The rows whose bits are not the same."""
    same = (got.contiguous().view(torch.uint8) == want.contiguous().view(torch.uint8)).all(-1)
    return (~same).nonzero()[:, 0].tolist()


def check_steps(watched: Watched, texts: Sequence[list[int]], wanted: list[Rows], count: int, seed: int = 0) -> Counter:
    """Run so many steps; every row has the bits it has alone, `wanted`. What happened on the way.

    Raises:
        AssertionError: one has others; the sentence says which.
    """
    steps = Steps(texts, watched.executor.cache.num_blocks, seed)
    for number in range(count):
        plan, parts = steps.next()
        found, first = watched.run(plan), 0
        for part in parts:
            last, place = first + part.stop - part.start, slice(part.start, part.stop)
            for what, rows in found.items():
                got, want = rows[first:last], wanted[part.text][what][place]
                if other := differences(got, want):
                    apart = (got.double() - want.double()).abs().max()
                    raise AssertionError(
                        f"{what} differ by up to {apart:.3g}, at most {want.abs().max():.3g}, in step {number} of seed "
                        f"{seed}: text {part.text}, {part.story}, tokens {part.start} to {part.stop - 1}, of these "
                        f"{other}; beside (text, from, to) {[p[:3] for p in parts if p is not part]}"
                    )
            first = last
        steps.counts.update(tokens=len(plan.tokens), sequences=len(parts))
    watched.executor.submit(StepPlan())
    return steps.counts
