"""Scheduler and block manager against a fake executor whose tokens depend on everything a sequence should contain.

The executor keeps a fake KV cache: it writes the plan's tokens into the slots of the plan's block tables, reads each
sampled sequence's whole context back from there, and hashes it. A lost, doubled, stale or misplaced token, a block
shared by two sequences or freed too early: each gives another hash than the request would get alone.
"""

import random
from collections import Counter
from dataclasses import dataclass, field
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.blocks import BlockManager
from workers.core import Request, SamplingParams, Sequence, StepPlan, StepResult
from workers.scheduler import Scheduler, SchedulerConfig

EOS, VOCAB = 0, 40


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
    """Knows only the plan, like a rank."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.slots = [-1] * (config.num_blocks * config.block_size)

    def run(self, plan: StepPlan) -> StepResult:
        self._check(plan)
        contexts, row = {}, 0
        for start, length, table in zip(plan.starts, plan.lengths, plan.block_tables, strict=True):
            where = [block * self.config.block_size + i for block in table for i in range(self.config.block_size)]
            for position in range(start, start + length):
                self.slots[where[position]] = plan.tokens[row]
                row += 1
            contexts[row - 1] = (start + length, [self.slots[slot] for slot in where[: start + length]])
        tokens = []
        for sample in plan.samples:
            position, context = contexts[plan.rows[sample.row]]
            assert sample.position == position and sample.tokens[:position] == context
            tokens.append(next_token(context, sample.params.seed, set(sample.barred)))
        return StepResult(tokens)

    def _check(self, plan: StepPlan) -> None:
        assert len(plan.starts) == len(plan.lengths) == len(plan.block_tables) <= self.config.max_sequences
        assert len(plan.tokens) == sum(plan.lengths) <= self.config.max_step_tokens
        assert all(length > 0 for length in plan.lengths)
        size, holders = self.config.block_size, Counter(b for table in plan.block_tables for b in table)
        for start, length, table in zip(plan.starts, plan.lengths, plan.block_tables, strict=True):
            assert len(table) * size >= start + length
            written = table[start // size : -(-(start + length) // size)]
            assert all(holders[block] == 1 for block in written), "a shared block is written to"


@dataclass(frozen=True)
class Job:
    """A request, the step it arrives in, and the step in which it is aborted (between its schedule and commit, or
    before both)."""

    request: Request
    arrival: int
    abort_at: int | None
    during: bool


@dataclass
class Served:
    tokens: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    preemptions: int = 0
    hits: int = 0
    steps: int = 0


def serve(config: SchedulerConfig, jobs: list[Job]) -> Served:
    scheduler, executor, served = Scheduler(config), CachingExecutor(config), Served()
    work = sum(len(j.request.prompt) + j.request.params.max_tokens for j in jobs)

    def abort(during: bool) -> None:
        for job in jobs:
            if job.abort_at == served.steps and job.during == during and scheduler.abort(job.request.id):
                served.aborted.add(job.request.id)
                assert not scheduler.abort(job.request.id)

    while scheduler.has_work or served.steps <= max(j.arrival for j in jobs):
        for job in jobs:
            if job.arrival == served.steps:
                scheduler.add(job.request)
        abort(during=False)
        before, had_work = scheduler.num_preemptions, scheduler.has_work
        plan = scheduler.schedule()
        assert bool(plan.tokens) == had_work, "a step with work waiting runs nothing"
        if scheduler.num_preemptions > before:
            assert 0 not in plan.starts, "something was admitted in a step that had to preempt"
        result = executor.run(plan)
        abort(during=True)
        for output in scheduler.commit(result):
            assert output.id not in served.aborted and output.id not in served.reasons
            served.tokens.setdefault(output.id, []).extend(output.tokens)
            if output.finish_reason:
                served.reasons[output.id] = output.finish_reason
        scheduler.check_integrity()
        assert all(0 <= s.num_computed < len(s.tokens) for s in (*scheduler.running, *scheduler.waiting))
        served.steps += 1
        assert served.steps < 20 + work * len(jobs), "the scheduler goes round in circles"
    assert scheduler.blocks.num_free == config.num_blocks
    served.preemptions, served.hits = scheduler.num_preemptions, scheduler.blocks.hits
    return served


@st.composite
def configs(draw: st.DrawFn, tight: bool = False) -> SchedulerConfig:
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
        )
        request = Request(id=str(index), prompt=tuple(prompt), params=params, output=tuple(output))
        abort_at = draw(st.none() | st.none() | st.integers(0, 20))
        made.append(Job(request, draw(st.integers(0, 10)), abort_at, draw(st.booleans())))
    return made


def check_served(config: SchedulerConfig, made: list[Job]) -> Served:
    served = serve(config, made)
    for job in made:
        request, want = job.request, alone(job.request)
        got = served.tokens.get(request.id, [])
        if request.id in served.aborted:
            assert got == want[: len(got)] and request.id not in served.reasons
            continue
        assert got == want
        assert served.reasons[request.id] == ("stop" if want[-1] in ends_of(request.params) else "length")
    return served


def test_every_request_gets_the_tokens_it_would_get_alone() -> None:
    preemptions, hits = [], []

    @settings(max_examples=250)
    @given(st.data())
    def every_example(data: st.DataObject) -> None:
        config = data.draw(configs())
        served = check_served(config, data.draw(jobs(config)))
        preemptions.append(served.preemptions)
        hits.append(served.hits)
        assert config.prefix_caching or not served.hits

    every_example()
    assert sum(map(bool, preemptions)) >= 5, "too few examples run out of blocks"
    assert sum(map(bool, hits)) >= 20, "too few examples find a known prefix"


def test_a_cache_of_one_longest_sequence_serves_everybody() -> None:
    preemptions = []

    @settings(max_examples=150)
    @given(st.data())
    def every_example(data: st.DataObject) -> None:
        config = data.draw(configs(tight=True))
        preemptions.append(check_served(config, data.draw(jobs(config))).preemptions)

    every_example()
    assert sum(map(bool, preemptions)) >= 5


def request(name: str, prompt: int, max_tokens: int, **params: bool) -> Request:
    made = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    return Request(id=name, prompt=tuple(range(1, prompt + 1)), params=made)


def config_of(**fields: object) -> SchedulerConfig:
    limits = {"max_sequences": 4, "max_step_tokens": 8, "max_model_len": 16, "num_blocks": 8, "block_size": 4}
    return SchedulerConfig(**{**limits, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(("prompt", "start"), [(7, 9), (4, 12)], ids=["it ran out itself", "an older one ran out"])
def test_the_youngest_is_preempted_and_comes_back_in_a_later_step(prompt: int, start: int) -> None:
    scheduler = Scheduler(config_of(num_blocks=5, max_model_len=20, max_sequences=2, prefix_caching=False))
    scheduler.add(request("old", 7, 9, ignore_eos=True))
    scheduler.add(request("young", prompt, 9, ignore_eos=True))
    plan = scheduler.schedule()
    scheduler.add(request("later", 2, 2))
    while not scheduler.num_preemptions:
        scheduler.commit(StepResult([5] * len(plan.samples)))
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
        finished += [o.id for o in scheduler.commit(StepResult([5] * len(plan.samples))) if o.finish_reason]
        plan = scheduler.schedule()
    assert [name for name in finished if name != "later"] == ["old", "young"] and scheduler.num_preemptions == 1


def test_decode_comes_before_new_prompts_and_prompts_are_cut_to_what_is_left() -> None:
    scheduler = Scheduler(config_of())
    scheduler.add(request("a", 3, 9))
    plan = scheduler.schedule()
    scheduler.commit(StepResult([1]))
    assert (plan.lengths, len(plan.samples)) == ([3], 1)
    scheduler.add(request("b", 12, 4))
    plan = scheduler.schedule()
    assert (plan.starts, plan.lengths, plan.rows) == ([3, 0], [1, 7], [0])
    scheduler.commit(StepResult([1]))
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
        order += [o.id for o in scheduler.commit(StepResult([1] * len(scheduler.schedule().samples)))]
    assert order == ["a", "b", "c"]


def test_abort_between_schedule_and_commit_drops_only_that_sequence() -> None:
    scheduler = Scheduler(config_of())
    for name in "abc":
        scheduler.add(request(name, 2, 4))
    plan = scheduler.schedule()
    assert scheduler.abort("b")
    outputs = scheduler.commit(StepResult(list(range(1, 1 + len(plan.samples)))))
    assert [(o.id, o.tokens) for o in outputs] == [("a", [1]), ("c", [3])]
    scheduler.check_integrity()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_sequences": 0}, "engine.max_sequences is 0"),
        ({"block_size": -1}, "engine.block_size is -1"),
        ({"max_step_tokens": 3}, r"max_step_tokens \(3\) must be at least engine.max_sequences"),
        ({"num_blocks": 3}, "the KV cache holds 12 tokens, fewer than one sequence"),
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
    scheduler.commit(StepResult([1] * len(scheduler.schedule().samples)))
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
        outputs = scheduler.commit(StepResult([1 if s.barred else 9 for s in samples]))
    assert barred == [[{0, 9, 4}, {4}]] * 2 + [[set(), set()]] + [[set()]] * 2
    assert [o.finish_reason for o in outputs] == ["length"], "b ignores end of sequence"
    everything = SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=tuple(range(VOCAB)))
    scheduler.add(Request(id="c", prompt=(1,), params=everything))
    reasons = [scheduler.commit(StepResult([7] * len(scheduler.schedule().samples)))[0].finish_reason for _ in range(3)]
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
    scheduler.commit(StepResult([5] * len(scheduler.schedule().samples)))
    scheduler.add(request("b", 13, 2))
    plan = scheduler.schedule()
    assert (plan.starts, plan.lengths) == ([12], [1]) and scheduler.blocks.hits == 12
    scheduler.commit(StepResult([5]))
    scheduler.add(request("c", 12, 2))  # its last token must be computed, so its last block is not taken over
    assert (scheduler.schedule().starts, scheduler.blocks.hits) == ([13, 8], 20)


def test_another_wiring_has_other_keys() -> None:
    holder = Sequence(request("a", 9, 1))
    keys = {BlockManager(8, 4, salt)._key(Sequence(holder.request), 1) for salt in ("standard:None", "ladder:None")}
    assert len(keys) == 2
