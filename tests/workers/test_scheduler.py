"""Scheduler and block manager against a fake executor whose tokens depend on everything a sequence should contain.

The executor keeps a fake KV cache: it writes the plan's tokens into the slots of the plan's block tables, reads each
sampled sequence's whole context back from there, and hashes it. A lost, doubled, stale or misplaced token, a block
shared by two sequences or freed too early: each gives another hash than the request would get alone.
"""

import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepladder.workers.blocks import BlockManager
from stepladder.workers.core import Request, Sample, SamplingParams, Sequence, StepPlan, StepResult
from stepladder.workers.sampler import _kept
from stepladder.workers.scheduler import Scheduler, SchedulerConfig

EOS, VOCAB, UNKNOWN = 0, 40, -1


def drew(tokens: list[int]) -> StepResult:
    return StepResult([[token] for token in tokens])


def next_token(context: list[int], seed: int, barred: set[int]) -> int:
    drawn = crc32(repr((context, seed)).encode()) % VOCAB
    while drawn in barred:
        drawn = (drawn + 1) % VOCAB
    return drawn


def ends_of(params: SamplingParams) -> set[int]:
    return {*params.stop_token_ids} | ({EOS} if not params.ignore_eos else set())


def alone(request: Request) -> list[int]:
    """What the request gets when nothing else is there."""
    tokens, params, ends = [*request.prompt, *request.output], request.params, ends_of(request.params)
    while (count := len(tokens) - len(request.prompt)) < params.max_tokens:
        tokens.append(next_token(tokens, params.seed, ends if count < params.min_tokens else set()))
        if tokens[-1] in ends:
            break
    return tokens[len(request.prompt) + len(request.output) :]


class CachingExecutor:
    """Knows only the plan, like a rank; it runs each one at once, however late its tokens are read."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config, self.drawn = config, list[int]()
        self.slots = [-1] * (config.num_blocks * config.block_size)

    def run(self, plan: StepPlan) -> StepResult:
        self._check(plan)
        known = [token if token >= 0 else self.drawn[-1 - token] for token in plan.tokens]
        contexts, row = {}, 0
        for start, length, table in zip(plan.starts, plan.lengths, plan.block_tables, strict=True):
            where = [block * self.config.block_size + i for block in table for i in range(self.config.block_size)]
            for position in range(start, start + length):
                self.slots[where[position]] = known[row]
                row += 1
                contexts[row - 1] = (position + 1, [self.slots[slot] for slot in where[: position + 1]])
        self.drawn, results = [], []
        for sample in plan.samples:
            assert len(sample.each) == 1 + len(sample.draft)
            for one in sample.each:
                position, context = contexts[plan.rows[one.row]]
                assert one.position == position
                assert all(a in (b, UNKNOWN) for a, b in zip(self._history(one, sample), context, strict=True))
                self.drawn.append(next_token(context, one.params.seed, set(one.barred)))
            results.append(_kept(sample.draft, self.drawn[-1 - len(sample.draft) :]))
        return StepResult(results)

    def _history(self, sample: Sample, whole: Sample) -> list[int]:
        """The tokens before it. What is still being drawn is the last of them at most, and never if it matters."""
        history = sample.tokens[: sample.position]
        if not sample.params.penalises:  # nobody reads what is drafted
            history = [*whole.tokens[: whole.position], *whole.draft][: sample.position]
        assert min(history[:-1], default=0) >= 0 and (self.config.lookahead or history[-1] >= 0)
        assert history[-1] >= 0 or not sample.params.penalises
        return [max(token, UNKNOWN) for token in history]

    def _check(self, plan: StepPlan) -> None:
        assert len(plan.starts) == len(plan.lengths) == len(plan.block_tables) <= self.config.max_sequences
        assert len(plan.tokens) == sum(plan.lengths) <= self.config.max_step_tokens
        assert all(length > 0 for length in plan.lengths)
        size, holders = self.config.block_size, Counter(b for table in plan.block_tables for b in table)
        for start, length, table in zip(plan.starts, plan.lengths, plan.block_tables, strict=True):
            assert len(table) * size >= start + length
            written = table[start // size : -(-(start + length) // size)]
            assert all(holders[block] == 1 for block in written), "a shared block is written to"


class WatchedBlocks(BlockManager):
    """Remembers what every known block should hold."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config.num_blocks, config.block_size, config.cache_salt, config.prefix_caching)
        self.contents: dict[bytes, list[int]] = {}

    def keep(self, sequence: Sequence, start: int, stop: int) -> None:
        super().keep(sequence, start, stop)
        for index in range(start // self.block_size, stop // self.block_size if self.caching else 0):
            tokens = sequence.tokens[index * self.block_size :][: self.block_size]
            assert min(tokens) >= 0, "a block is named after tokens that are not known"
            self.contents[self._key(sequence, index)] = tokens

    def check_contents(self, slots: list[int]) -> None:
        for block, key in self._key_of.items():
            assert slots[block * self.block_size :][: self.block_size] == self.contents[key]


@dataclass(frozen=True)
class Job:
    """A request, the step it arrives in, and the step in which it is aborted (while steps are under way that have been
    planned in the meantime, or before)."""

    request: Request
    arrival: int
    abort_at: int | None
    during: bool


@dataclass
class Served:
    """dropped: tokens drawn for sequences that had ended. overwritten: blocks that such a step wrote to, and the next
    plan gave to somebody else."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    preemptions: int = 0
    hits: int = 0
    steps: int = 0
    dropped: int = 0
    overwritten: int = 0
    drafted: int = 0
    accepted: int = 0


class Serving:
    """One run of some jobs, step by step as in an engine.

    Args:
        dice: drafts are thrown with it; None drafts nothing.
    """

    def __init__(self, config: SchedulerConfig, jobs: list[Job], dice: random.Random | None = None) -> None:
        self.dice, self.wanted = dice, {job.request.id: alone(job.request) for job in jobs}
        self.config, self.jobs, self.served = config, jobs, Served()
        self.scheduler, self.executor = Scheduler(config), CachingExecutor(config)
        self.blocks = self.scheduler.blocks = WatchedBlocks(config)
        self.under_way: deque[tuple[StepPlan, StepResult]] = deque()
        self.stale: set[int] = set()

    def run(self) -> Served:
        served, scheduler, jobs = self.served, self.scheduler, self.jobs
        work = sum(len(j.request.prompt) + j.request.params.max_tokens for j in jobs)
        while scheduler.has_work or self.under_way or served.steps <= max(j.arrival for j in jobs):
            for job in jobs:
                if job.arrival == served.steps:
                    scheduler.add(job.request)
            self.abort(during=False)
            self.plan()
            self.abort(during=True)
            if self.under_way:
                self.commit()
            scheduler.check_integrity()
            self.blocks.check_contents(self.executor.slots)
            resting = [s for s in (*scheduler.running, *scheduler.waiting) if not s.is_drawing]
            assert all(0 <= s.num_computed < len(s.tokens) for s in resting)
            served.steps += 1
            assert served.steps < 20 + work * len(jobs), "the scheduler goes round in circles"
        assert scheduler.blocks.num_free == self.config.num_blocks
        served.preemptions, served.hits = scheduler.num_preemptions, scheduler.blocks.hits
        return served

    def abort(self, during: bool) -> None:
        for job in self.jobs:
            now = job.abort_at == self.served.steps and job.during == during
            if now and self.scheduler.abort(job.request.id):
                self.served.aborted.add(job.request.id)
                assert not self.scheduler.abort(job.request.id) and self.scheduler.find(job.request.id) is None

    def draft(self) -> None:
        """For some of those that decode, what they will be given, up to a lie; perhaps far too much of it."""
        dice = self.dice
        for sequence in self.scheduler.running:
            if dice and dice.random() < 0.8:
                sequence.drafts, done = True, sequence.num_output - len(sequence.request.output)
                right = [*self.wanted[sequence.request.id][max(0, done) :], 1, 2, 3]
                count = dice.randrange(1, 12)
                sequence.draft = tuple(t if dice.random() < 0.8 else dice.randrange(VOCAB) for t in right[:count])

    def plan(self) -> None:
        had_work = self.scheduler.has_work
        while len(self.under_way) <= self.config.lookahead:
            before = self.scheduler.num_preemptions
            self.draft()
            plan = self.scheduler.schedule()
            drafted = sum(len(sample.draft) for sample in plan.samples)
            assert not drafted or self.scheduler.num_preemptions == before or self.dice
            self.served.drafted += drafted
            if self.scheduler.num_preemptions > before:
                assert 0 not in plan.starts, "something was admitted in a step that had to preempt"
            if not plan.tokens:
                break
            self.served.overwritten += len(self.stale & {block for table in plan.block_tables for block in table})
            self.stale = set()
            self.under_way.append((plan, self.executor.run(plan)))
        assert self.under_way or not had_work, "a step with work waiting runs nothing"

    def commit(self) -> None:
        plan, result = self.under_way.popleft()
        self.served.accepted += sum(len(tokens) - 1 for tokens in result.tokens)
        outputs = self.scheduler.commit(result)
        for output in outputs:
            assert output.id not in self.served.aborted and output.id not in self.served.reasons
            self.served.tokens.setdefault(output.id, []).extend(output.tokens)
            if output.finish_reason:
                self.served.reasons[output.id] = output.finish_reason
        self.served.dropped += len(plan.samples) - len(outputs)
        size = self.config.block_size
        if self.under_way:
            plan, _ = self.under_way[0]
            for part, table in zip(self.scheduler._under_way[0], plan.block_tables, strict=True):
                if self.scheduler.find(part.sequence.request.id) is not part.sequence:
                    self.stale.update(table[part.start // size :])


@st.composite
def configs(draw: st.DrawFn, lookahead: int, tight: bool = False) -> SchedulerConfig:
    sequences, block_size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    length = draw(st.integers(2, 24))
    smallest = -(-length // block_size)
    return SchedulerConfig(
        max_sequences=sequences,
        max_step_tokens=draw(st.integers(sequences, 16)),
        max_model_len=length,
        num_blocks=smallest if tight else draw(st.integers(smallest, 3 * smallest)),
        block_size=block_size,
        eos_ids=(EOS,),
        prefix_caching=draw(st.booleans()),
        lookahead=lookahead,
    )


@st.composite
def jobs(draw: st.DrawFn, config: SchedulerConfig) -> list[Job]:
    made = []
    for index in range(draw(st.sampled_from((1, 2, 4, 6, 8)))):
        size = draw(st.integers(1, config.max_model_len - 1))  # a list strategy would make nearly all prompts short
        prompt = random.Random(draw(st.integers(0, 4))).choices(range(VOCAB), k=size)  # of one seed: equal beginnings
        longest = config.max_model_len - len(prompt)
        limit = draw(st.just(longest) | st.integers(1, longest))
        output = draw(st.lists(st.integers(1, VOCAB - 1), max_size=min(3, limit - 1)))
        params = SamplingParams(
            max_tokens=limit,
            seed=draw(st.integers(0, 2)),
            ignore_eos=draw(st.booleans()),
            stop_token_ids=draw(st.sampled_from(((), (), (EOS,), (5, 6, 7, 8)))),
            min_tokens=draw(st.sampled_from((0, 0, min(3, limit)))),
            presence_penalty=draw(st.sampled_from((0.0, 0.0, 0.0, 1.0))),  # only who has one must know its history
        )
        request = Request(id=str(index), prompt=tuple(prompt), params=params, output=tuple(output))
        abort_at = draw(st.none() | st.none() | st.integers(0, 20))
        made.append(Job(request, draw(st.integers(0, 10)), abort_at, draw(st.booleans())))
    return made


def check_served(config: SchedulerConfig, made: list[Job], dice: random.Random | None = None) -> Served:
    served = Serving(config, made, dice).run()
    for job in made:
        request, want = job.request, alone(job.request)
        got = served.tokens.get(request.id, [])
        if request.id in served.aborted:
            assert got == want[: len(got)] and request.id not in served.reasons
            continue
        assert got == want
        assert served.reasons[request.id] == ("stop" if want[-1] in ends_of(request.params) else "length")
    return served


@pytest.mark.parametrize("lookahead", [0, 1])
def test_every_request_gets_the_tokens_it_would_get_alone(lookahead: int) -> None:
    seen = Counter[str]()

    @settings(max_examples=250)
    @given(st.data())
    def every_example(data: st.DataObject) -> None:
        config = data.draw(configs(lookahead))
        served = check_served(config, data.draw(jobs(config)))
        seen.update({name for name in ("preemptions", "hits", "dropped") if getattr(served, name)})
        assert config.prefix_caching or not served.hits

    every_example()
    assert seen["preemptions"] >= 5, "too few examples run out of blocks"
    assert seen["hits"] >= 20, "too few examples find a known prefix"
    assert seen["dropped"] >= 5 + 45 * lookahead, "too few sequences end while steps are under way"


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_cache_of_one_longest_sequence_serves_everybody(lookahead: int) -> None:
    seen = Counter[str]()

    @settings(max_examples=250)
    @given(st.data())
    def every_example(data: st.DataObject) -> None:
        config = data.draw(configs(lookahead, tight=True))
        served = check_served(config, data.draw(jobs(config)))
        seen.update({name for name in ("preemptions", "overwritten") if getattr(served, name)})

    every_example()
    assert seen["preemptions"] >= 5
    assert seen["overwritten"] >= 5 * lookahead, "too few steps write behind an end, into what somebody else gets"


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_drafts_change_no_token(lookahead: int, tight: bool) -> None:
    seen = Counter[str]()

    @settings(max_examples=250)
    @given(st.data())
    def every_example(data: st.DataObject) -> None:
        config = data.draw(configs(lookahead, tight))
        served = check_served(config, data.draw(jobs(config)), random.Random(data.draw(st.integers(0, 99))))
        seen.update({name for name in ("preemptions", "hits", "dropped") if getattr(served, name)})
        seen["drafted"] += served.drafted
        seen["accepted"] += served.accepted

    every_example()
    assert seen["preemptions"] >= 5 and seen["hits"] >= (0 if tight else 20)
    assert 0.2 * seen["drafted"] < seen["accepted"] < 0.9 * seen["drafted"]


def test_nobody_is_preempted_for_a_draft() -> None:
    """Eight blocks of four: three are the first one's, three the second one's, which needs a fourth first."""
    scheduler = Scheduler(config_of(num_blocks=8, max_model_len=32, max_step_tokens=40, prefix_caching=False))
    scheduler.add(request("a", 11, 12))
    scheduler.add(request("b", 12, 12))
    scheduler.commit(drew([1] * len(scheduler.schedule().samples)))
    for sequence in scheduler.running:
        sequence.draft, sequence.drafts = tuple(range(8)), True
    plan = scheduler.schedule()
    assert scheduler.num_preemptions == 0 and len(plan.samples) == 2
    assert [len(sample.draft) for sample in plan.samples] == [4, 3], "one block more for a, and what is left of b's"
    scheduler.commit(drew([1, 1]))
    scheduler.check_integrity()


def test_a_draft_is_cut_to_what_is_left() -> None:
    scheduler = Scheduler(config_of(max_model_len=32, max_step_tokens=6, eos_ids=(EOS,)))
    scheduler.add(request("a", 3, 9, min_tokens=4))
    scheduler.commit(drew([1] * len(scheduler.schedule().samples)))
    sequence = scheduler.find("a")
    assert sequence is not None
    sequence.draft, sequence.drafts = tuple(range(10, 20)), True
    [sample] = scheduler.schedule().samples
    assert sample.draft == (10, 11, 12, 13, 14), "a step has six tokens, one is its own"
    assert [len(one.barred) > 0 for one in sample.each] == [True] * 3 + [False] * 3, "one of four tokens is there"
    [output] = scheduler.commit(StepResult([[10, 11, 99]]))
    assert output.tokens == [10, 11, 99] and sequence.num_computed == len(sequence.tokens) - 1
    sequence.draft = tuple(range(10, 20))
    [sample] = scheduler.schedule().samples
    assert sample.draft == (10, 11, 12, 13), "five are left, and the last is drawn"


def test_an_end_inside_a_draft_ends_the_sequence_there() -> None:
    scheduler = Scheduler(config_of(max_model_len=32, max_step_tokens=8, eos_ids=(EOS,)))
    scheduler.add(request("a", 3, 9))
    scheduler.commit(drew([1]) if scheduler.schedule().samples else drew([]))
    sequence = scheduler.find("a")
    assert sequence is not None
    sequence.draft, sequence.drafts = (5, EOS, 7), True
    assert len(scheduler.schedule().samples) == 1
    [output] = scheduler.commit(StepResult([[5, EOS, 7, 8]]))
    assert (output.tokens, output.finish_reason) == ([5, EOS], "stop")
    assert not scheduler.has_work and scheduler.blocks.num_free == scheduler.config.num_blocks


def request(name: str, prompt: int, max_tokens: int, **params: Any) -> Request:
    made = SamplingParams(max_tokens=max_tokens, **params)
    return Request(id=name, prompt=tuple(range(1, prompt + 1)), params=made)


def config_of(**fields: object) -> SchedulerConfig:
    limits = {"max_sequences": 4, "max_step_tokens": 8, "max_model_len": 16, "num_blocks": 8, "block_size": 4}
    return SchedulerConfig(**{**limits, **fields})  # type: ignore[arg-type]


def prefilled(scheduler: Scheduler, *prompts: int, shared: int = 0) -> None:
    """Requests a, b, ... with so many tokens each, the first `shared` of all but the last the same; all decode."""
    for index, length in enumerate(prompts):
        common = shared if index < len(prompts) - 1 else 0
        prompt = (*range(50, 50 + common), *(1000 * (index + 1) + i for i in range(length - common)))
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        scheduler.add(Request(id="abcdef"[index], prompt=prompt, params=params))
        while scheduler.running[-1:] == [] or scheduler.running[-1].num_pending > 1 or scheduler.waiting:
            scheduler.commit(drew([5] * len(scheduler.schedule().samples)))


@pytest.mark.parametrize(
    ("prompts", "shared", "victim"),
    [
        ((8, 24, 8), 0, "b"),  # whoever has most
        ((24, 8, 8), 0, "c"),  # but not the oldest; of equal ones the youngest
        ((24, 12, 8), 0, "b"),
        ((20, 20, 20, 12), 16, "d"),  # what others hold as well would not become free
    ],
)
def test_whoever_has_most_for_itself_makes_room(prompts: tuple[int, ...], shared: int, victim: str) -> None:
    blocks = sum(-(-length // 4) for length in prompts) + 6 - (len(prompts) - 2) * shared // 4
    config = config_of(num_blocks=blocks, block_size=4, max_model_len=48, max_sequences=4, max_step_tokens=64)
    scheduler = Scheduler(config)
    prefilled(scheduler, *prompts, shared=shared)
    assert len(scheduler.running) == len(prompts) and not scheduler.num_preemptions
    while not scheduler.num_preemptions:
        scheduler.commit(drew([5] * len(scheduler.schedule().samples)))
        scheduler.check_integrity()
    assert scheduler.waiting[0].request.id == victim


@pytest.mark.parametrize(("prompt", "start"), [(7, 9), (4, 12)], ids=["it ran out itself", "an older one ran out"])
def test_of_two_the_younger_is_preempted_and_comes_back_in_a_later_step(prompt: int, start: int) -> None:
    scheduler = Scheduler(config_of(num_blocks=5, max_model_len=20, max_sequences=2, prefix_caching=False))
    scheduler.add(request("old", 7, 9, ignore_eos=True))
    scheduler.add(request("young", prompt, 9, ignore_eos=True))
    plan = scheduler.schedule()
    scheduler.add(request("later", 2, 2))
    while not scheduler.num_preemptions:
        scheduler.commit(drew([5] * len(plan.samples)))
        plan = scheduler.schedule()
    assert (plan.starts, plan.lengths, plan.block_tables) == ([start], [1], [scheduler.running[0].blocks])
    assert [s.request.id for s in scheduler.running] == ["old"]
    assert [(s.request.id, s.num_computed, s.blocks) for s in scheduler.waiting] == [
        ("young", 0, []),
        ("later", 0, []),
    ]
    scheduler.check_integrity()
    finished = []
    while scheduler.has_work:
        finished += [o.id for o in scheduler.commit(drew([5] * len(plan.samples))) if o.finish_reason]
        plan = scheduler.schedule()
    assert [name for name in finished if name != "later"] == ["old", "young"] and scheduler.num_preemptions == 1


def test_decode_comes_before_new_prompts_and_prompts_are_cut_to_what_is_left() -> None:
    scheduler = Scheduler(config_of())
    scheduler.add(request("a", 3, 9))
    plan = scheduler.schedule()
    scheduler.commit(drew([1]))
    assert (plan.lengths, len(plan.samples)) == ([3], 1)
    scheduler.add(request("b", 12, 4))
    plan = scheduler.schedule()
    assert (plan.starts, plan.lengths, plan.rows) == ([3, 0], [1, 7], [0])
    scheduler.commit(drew([1]))
    plan = scheduler.schedule()
    assert (plan.starts, plan.lengths, plan.rows) == ([4, 7], [1, 5], [0, 5])
    assert [s.row for s in plan.samples] == [0, 1]
    assert plan.samples[1].position == 12


def test_first_come_first_admitted() -> None:
    scheduler = Scheduler(config_of(max_sequences=1, max_step_tokens=8))
    for name in "abc":
        scheduler.add(request(name, 2, 1))
    order = []
    while scheduler.has_work:
        order += [o.id for o in scheduler.commit(drew([1] * len(scheduler.schedule().samples)))]
    assert order == ["a", "b", "c"]


def test_abort_between_schedule_and_commit_drops_only_that_sequence() -> None:
    scheduler = Scheduler(config_of())
    for name in "abc":
        scheduler.add(request(name, 2, 4))
    plan = scheduler.schedule()
    assert scheduler.abort("b")
    outputs = scheduler.commit(drew(list(range(1, 1 + len(plan.samples)))))
    assert [(o.id, o.tokens) for o in outputs] == [("a", [1]), ("c", [3])]
    scheduler.check_integrity()


def test_a_step_is_planned_before_the_last_one_is_read() -> None:
    scheduler = Scheduler(config_of(lookahead=1, eos_ids=(EOS,), max_step_tokens=16))
    for name, limit, params in (("a", 3, {}), ("short", 1, {}), ("b", 3, {}), ("exact", 3, {"presence_penalty": 1.0})):
        scheduler.add(request(name, 2, limit, **params))
    first = scheduler.schedule()
    ahead = scheduler.schedule()
    assert (len(first.samples), ahead.tokens, ahead.starts) == (4, [-1, -3], [2, 2]), "the first and third drawn"
    assert [s.output for s in scheduler.running] == [[]] * 4, "nothing is known yet"
    outputs = scheduler.commit(drew([11, 12, 13, 14]))
    assert [(o.id, o.tokens, o.finish_reason) for o in outputs] == [
        ("a", [11], None),
        ("short", [12], "length"),
        ("b", [13], None),
        ("exact", [14], None),
    ]
    assert [s.output for s in scheduler.running] == [[11], [13], [14]]
    third = scheduler.schedule()
    assert third.tokens == [-1, -2, 14], "who must know the last token skips the step that draws it"
    assert [o.finish_reason for o in scheduler.commit(drew([EOS, 16]))] == ["stop", None]
    assert [o.id for o in scheduler.commit(drew([17, 18, 19]))] == ["b", "exact"], "a had ended"
    scheduler.check_integrity()


def test_too_many_steps_under_way_are_refused() -> None:
    scheduler = Scheduler(config_of(lookahead=1))
    scheduler.add(request("a", 2, 9))
    assert scheduler.schedule().tokens and scheduler.schedule().tokens
    with pytest.raises(AssertionError, match="too many steps have not been committed"):
        scheduler.schedule()


def test_a_name_that_is_used_again_gets_nothing_of_the_steps_under_way() -> None:
    scheduler = Scheduler(config_of(lookahead=1))
    scheduler.add(request("a", 2, 9))
    scheduler.schedule()
    scheduler.schedule()
    assert scheduler.abort("a")
    scheduler.add(request("a", 3, 9))
    assert scheduler.commit(drew([11])) == []
    assert scheduler.schedule().tokens == [1, 2, 3]
    assert scheduler.commit(drew([12])) == [] and scheduler.find("a").output == []  # type: ignore[union-attr]
    assert [o.tokens for o in scheduler.commit(drew([13]))] == [[13]]
    scheduler.check_integrity()


def test_a_token_that_was_being_drawn_outlives_a_preemption() -> None:
    scheduler = Scheduler(config_of(lookahead=1, num_blocks=4, max_sequences=2, prefix_caching=False))
    scheduler.add(request("old", 7, 9))
    scheduler.add(request("young", 1, 9))
    plans, outputs = [scheduler.schedule()], []
    while not scheduler.num_preemptions:
        plans.append(scheduler.schedule())
        drawing = len(plans[-2].samples)
        outputs += scheduler.commit(drew([5] * drawing))
    young = scheduler.waiting[0]
    assert (young.blocks, young.num_computed) == ([], 0)
    assert [o.id for o in outputs][-2:] == ["old", "young"], "it was in the step before the one that preempted it"
    assert young.output == [5] * len(young.output) and not young.is_drawing


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_sequences": 0}, "engine.max_sequences is 0"),
        ({"block_size": -1}, "engine.block_size is -1"),
        ({"max_step_tokens": 3}, r"max_step_tokens \(3\) must be at least engine.max_sequences"),
        ({"lookahead": 2}, "engine.lookahead is 2; it must be 0 or 1"),
        ({"num_blocks": 3}, r"the KV cache holds 12 tokens in blocks of 4, fewer than engine.max_model_len \(16\)"),
    ],
)
def test_impossible_limits_are_refused(fields: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        config_of(**fields)


def test_requests_that_can_never_be_served_are_refused() -> None:
    scheduler = Scheduler(config_of())
    with pytest.raises(ValueError, match="the prompt has 10 tokens and max_tokens is 7; together they exceed"):
        scheduler.add(request("long", 10, 7))
    scheduler.add(request("fits", 10, 6))
    replay = SamplingParams(max_tokens=6)
    scheduler.add(Request(id="replay", prompt=(1,) * 10, params=replay, output=(1,) * 5))
    done = Request(id="done", prompt=(1,), params=SamplingParams(max_tokens=2), output=(3, 4))
    with pytest.raises(ValueError, match="2 of its 2 output tokens are there already"):
        scheduler.add(done)


def test_names_and_tokens_that_would_do_harm_are_refused() -> None:
    scheduler = Scheduler(config_of(vocab_size=40))
    scheduler.add(request("a", 3, 2))
    with pytest.raises(ValueError, match="a request with the id 'a' is here already"):
        scheduler.add(request("a", 3, 2))
    assert scheduler.abort("a")
    scheduler.add(request("a", 3, 1))
    scheduler.commit(drew([1] * len(scheduler.schedule().samples)))
    scheduler.add(request("a", 3, 1))
    for prompt, output, params, where in (
        ((40,), (), {}, "the prompt"),
        ((-1,), (), {}, "the prompt"),
        ((1,), (40,), {}, "the output so far"),
        ((1,), (), {"logit_bias": {40: 1.0}}, "logit_bias"),
        ((1,), (), {"stop_token_ids": (3, 40)}, "stop_token_ids"),
    ):
        wrong = Request(id="b", prompt=prompt, output=output, params=SamplingParams(max_tokens=3, **params))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{where} holds a token id outside of 0 to 39"):
            scheduler.add(wrong)
    assert [s.request.id for s in scheduler.waiting] == ["a"]


def test_min_tokens_bars_what_would_end_the_text() -> None:
    scheduler = Scheduler(config_of(eos_ids=(0, 9)))
    barred = []
    for name, ignore_eos in (("a", False), ("b", True)):
        params = SamplingParams(max_tokens=5, min_tokens=2, stop_token_ids=(4,), ignore_eos=ignore_eos)
        scheduler.add(Request(id=name, prompt=(1,), params=params))
    while scheduler.has_work:
        samples = scheduler.schedule().samples
        barred.append([set(s.barred) for s in samples])
        outputs = scheduler.commit(drew([1 if s.barred else 9 for s in samples]))
    assert barred == [[{0, 9, 4}, {4}]] * 2 + [[set(), set()]] + [[set()]] * 2
    assert [o.finish_reason for o in outputs] == ["length"], "b ignores end of sequence"
    everything = SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=tuple(range(VOCAB)))
    scheduler.add(Request(id="c", prompt=(1,), params=everything))
    reasons = [scheduler.commit(drew([7] * len(scheduler.schedule().samples)))[0].finish_reason for _ in range(3)]
    assert reasons == [None, None, "stop"], "with every token barred the sampler draws one of them all the same"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=40), st.integers(1, 12), st.integers(1, 6))
def test_blocks_are_never_lost(moves: list[tuple[int, int]], num_blocks: int, block_size: int) -> None:
    """Grow (or, with 0 tokens, release) any of four sequences in any order."""
    manager = BlockManager(num_blocks, block_size)
    holders = [Sequence(request(str(i), 1, 1)) for i in range(4)]
    for index, tokens in moves:
        holder, held, free = holders[index], list(holders[index].blocks), manager.num_free
        if tokens == 0:
            manager.release(holder)
            assert not holder.blocks and manager.num_free == free + len(held)
        else:
            needed = max(len(held), -(-tokens // block_size))
            assert manager.missing(holder, tokens) == needed - len(held)
            assert manager.grow(holder, tokens) == (needed - len(held) <= free)
            assert holder.blocks[: len(held)] == held and len(holder.blocks) in (len(held), needed)
        manager.check_integrity(holders)


def test_integrity_check_finds_a_lost_and_a_doubled_block() -> None:
    manager, holder = BlockManager(4, 2), Sequence(request("a", 1, 1))
    manager.grow(holder, 5)
    with pytest.raises(AssertionError, match="lost or counted wrongly"):
        manager.check_integrity([])
    with pytest.raises(AssertionError, match="lost or counted wrongly"):
        manager.check_integrity([holder, holder])


def test_a_known_beginning_is_not_computed_again() -> None:
    scheduler = Scheduler(config_of(num_blocks=8, max_model_len=20, max_step_tokens=20))
    scheduler.add(request("a", 13, 1))
    scheduler.commit(drew([5] * len(scheduler.schedule().samples)))
    scheduler.add(request("b", 13, 2))
    plan = scheduler.schedule()
    assert (plan.starts, plan.lengths) == ([12], [1]) and scheduler.blocks.hits == 12
    scheduler.commit(drew([5]))
    scheduler.add(request("c", 12, 2))  # its last token must be computed, so its last block is not taken over
    assert (scheduler.schedule().starts, scheduler.blocks.hits) == ([13, 8], 20)


def test_another_wiring_has_other_keys() -> None:
    holder = Sequence(request("a", 9, 1))
    keys = {BlockManager(8, 4, salt)._key(Sequence(holder.request), 1) for salt in ("standard:None", "ladder:None")}
    assert len(keys) == 2
