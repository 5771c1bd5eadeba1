"""Plans in micro-batches: nothing lost, nothing split that belongs together, about equal; and how many there are."""

from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepladder.parallel.afd.control import MAX_MICRO_BATCHES
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.afd.micro_batches import best_number, fixed_number, split
from stepladder.workers.core import StepPlan
from tests.llama import write_llama


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=20))
    ends = list(accumulate(lengths))
    rows = sorted(draw(st.sets(st.integers(0, ends[-1] - 1))) | {ends[-1] - 1})
    return StepPlan(
        list(range(ends[-1])), [7 * i for i in range(len(lengths))], lengths, [[i] for i in range(len(lengths))], rows
    )


@given(plans(), st.integers(1, 8))
def test_parts_make_up_the_plan(plan: StepPlan, parts: int) -> None:
    pieces = split(plan, parts)
    assert len(pieces) == min(parts, len(plan.lengths)) and all(piece.tokens for piece in pieces)
    for name in ("tokens", "starts", "lengths", "block_tables"):
        assert [one for piece in pieces for one in getattr(piece, name)] == getattr(plan, name)
    offsets = [0, *accumulate(len(piece.tokens) for piece in pieces)]
    assert [offset + row for offset, piece in zip(offsets, pieces, strict=False) for row in piece.rows] == plan.rows


@given(plans(), st.integers(2, 8))
def test_no_part_is_longer_than_its_share_and_one_sequence(plan: StepPlan, parts: int) -> None:
    pieces = split(plan, parts)
    share = len(plan.tokens) / len(pieces)
    assert max(len(piece.tokens) for piece in pieces) <= share + max(plan.lengths)


def test_sixteen_decoding_sequences_in_three() -> None:
    plan = StepPlan([0] * 16, [5] * 16, [1] * 16, [[i] for i in range(16)], list(range(16)))
    assert sorted(len(piece.tokens) for piece in split(plan, 3)) == [5, 5, 6]


@pytest.mark.parametrize(
    "ffn, transfer, number",
    [(10.0, 0.0, 2), (10.0, 5.0, 3), (10.0, 10.0, 4), (10.0, 2.0, 3), (10.0, -1.0, 2), (1.0, 100.0, MAX_MICRO_BATCHES)],
)
def test_measured_number(ffn: float, transfer: float, number: int) -> None:
    assert best_number(ffn, transfer) == number


def test_the_schedule_follows_the_checkpoint(tmp_path: Path) -> None:
    standard = ModelSpec.load(write_llama(tmp_path))
    ladder = replace(standard, residual="ladder")
    hybrid = replace(ladder, ladder_layers=(1,))
    assert fixed_number("auto", None, ladder) == fixed_number("ladder", None, ladder) == 1
    assert fixed_number("auto", None, standard) is None and fixed_number("auto", None, hybrid) is None
    assert fixed_number("pingpong", 3, ladder) == 3 and fixed_number("pingpong", None, ladder) is None
    for spec in (standard, hybrid):
        with pytest.raises(ValueError, match=r"layout\.schedule is ladder, but this checkpoint's wiring is"):
            fixed_number("ladder", None, spec)
