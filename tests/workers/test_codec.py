"""A plan survives the wire unchanged."""

from statistics import median
from time import perf_counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepladder.parallel.mesh import Group, Mesh
from stepladder.workers.codec import PlanCodec, decode, encode
from stepladder.workers.core import Sample, SamplingParams, Score, StepPlan
from tests.ranks import run_ranks

INT64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    sequences = draw(st.integers(0, 5))
    lengths = draw(st.lists(st.integers(0, 6), min_size=sequences, max_size=sequences))
    return StepPlan(
        tokens=draw(st.lists(INT64, min_size=sum(lengths), max_size=sum(lengths))),
        starts=draw(st.lists(st.integers(0, 2**40), min_size=sequences, max_size=sequences)),
        lengths=lengths,
        block_tables=draw(st.lists(st.lists(INT64, max_size=5), min_size=sequences, max_size=sequences)),
        rows=draw(st.lists(st.integers(0, 2**31), max_size=5)),
    )


@given(plans())
def test_decode_inverts_encode(plan: StepPlan) -> None:
    values = encode(plan)
    assert torch.tensor(values, dtype=torch.int64).tolist() == values, "every value must fit one int64"
    assert decode(values) == plan


def test_the_empty_plan() -> None:
    assert decode(encode(StepPlan())) == StepPlan()


def test_extremes() -> None:
    plan = StepPlan([2**63 - 1, -(2**63), -1], [0], [3], [[]], [2])
    assert decode(encode(plan)) == plan


def test_how_tokens_are_drawn_stays_on_rank_0() -> None:
    samples = [Sample(0, 3, SamplingParams(logit_bias={1: 2.0}), [7, 8, 9], 3, (5,))]
    plan = StepPlan([7, 8, 9], [0], [3], [[4]], [2, 0, 1], samples, [Score(1, [8, 9], 2)])
    assert decode(encode(plan)) == StepPlan([7, 8, 9], [0], [3], [[4]], [2, 0, 1])


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_broadcast_around_the_first_message(tp: int) -> None:
    first = Group.FIRST
    messages = [list(range(-n, n, 2))[:n] for n in (0, 1, first - 2, first - 1, first, first + 1, 2 * first + 7)]
    messages.append([-(2**63), 2**63 - 1, -1])
    messages.append([-1])

    def rank_main(mesh: Mesh) -> list[list[int]]:
        return [mesh.broadcast(m if mesh.shard.rank == 0 else None) for m in messages]

    assert run_ranks(tp, rank_main) == [messages] * tp


@st.composite
def successive(draw: st.DrawFn) -> list[StepPlan]:
    """Sequences that begin, grow, pause, lose their blocks and end, in whatever order."""
    alive: list[list[int]] = []
    made: list[StepPlan] = []
    for _ in range(draw(st.integers(1, 8))):
        alive = [table for table in alive if draw(st.integers(0, 4))]
        alive += [draw(st.lists(st.integers(0, 9), max_size=4)) for _ in range(draw(st.integers(0, 2)))]
        for table in alive:
            table += draw(st.lists(st.integers(0, 9), max_size=2))
        chosen = [list(table) for table in alive if draw(st.integers(0, 5))]
        count = len(chosen)
        made.append(StepPlan([7] * count, [0] * count, [1] * count, chosen, list(range(count))))
    return made


@given(successive())
def test_tables_are_rebuilt_from_what_is_new(plans: list[StepPlan]) -> None:
    sender, receiver = PlanCodec(), PlanCodec()
    assert [receiver.decode(sender.encode(plan)) for plan in plans] == plans


def test_a_long_context_is_sent_once() -> None:
    """Then two integers a sequence, besides its token, start, length and row; ends and beginnings cost nothing else."""
    tables = [list(range(1000 * i, 1000 * i + 128)) for i in range(64)]

    def plan(members: list[int]) -> StepPlan:
        count = len(members)
        return StepPlan([1] * count, [0] * count, [1] * count, [list(tables[i]) for i in members], list(range(count)))

    sender = PlanCodec()
    first, second = sender.encode(plan([*range(64)])), sender.encode(plan([*range(64)]))
    tables[3].append(5)
    third = sender.encode(plan([i for i in range(64) if i not in (0, 40)]))
    assert (len(first), len(second), len(third)) == (5 + 64 * (6 + 128), 5 + 64 * 6, 5 + 62 * 6 + 1)


def test_an_end_that_has_missed_a_plan_says_so() -> None:
    sender, receiver = PlanCodec(), PlanCodec()
    sender.encode(StepPlan([1], [0], [1], [[4]]))
    missed = sender.encode(StepPlan([1], [1], [1], [[4]]))
    with pytest.raises(AssertionError, match="plan 1 came, but 0 is the next one"):
        receiver.decode(missed)


@pytest.mark.parametrize("tokens", [2000, 8000])
def test_what_new_blocks_alone_cost_beside_whole_tables(tokens: int) -> None:
    """64 sequences over a real group of two, each way in turns: `-s` prints the medians of a whole trip. A time is no
    reason to fail; that both ways bring the same plan is checked."""
    tables = [list(range(1000 * i, 1000 * i + tokens // 16)) for i in range(64)]
    plan = StepPlan([1] * 64, [tokens] * 64, [1] * 64, tables, list(range(64)))

    def rank_main(mesh: Mesh) -> dict[str, list[float]]:
        new, seconds = PlanCodec(), {"whole": list[float](), "new": list[float]()}
        ways = {"whole": (encode, decode), "new": (new.encode, new.decode)}
        for way in [*ways] * 60:
            pack, unpack = ways[way]
            mesh.all_reduce(torch.zeros(1)).wait()
            began = perf_counter()
            if mesh.shard.rank:
                assert unpack(mesh.broadcast(None)) == plan
            else:
                mesh.broadcast(pack(plan))
            mesh.all_reduce(torch.zeros(1)).wait()
            seconds[way].append(perf_counter() - began)
        return seconds

    whole, parts = (median(times[10:]) * 1e3 for times in run_ranks(2, rank_main)[0].values())
    print(
        f"64 x {tokens} tokens: whole tables {whole:.2f} ms, new blocks {parts:.2f} ms, {whole / parts:.1f} times less"
    )
