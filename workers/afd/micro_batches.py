"""A step's plan in micro-batches, and how many there should be."""

from itertools import accumulate
from math import ceil

from stepladder.parallel.afd.control import MAX_MICRO_BATCHES
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.core import StepPlan

SCHEDULES = ("auto", "pingpong", "ladder")


def split(plan: StepPlan, parts: int) -> list[StepPlan]:
    """Whole sequences, in the plan's order, about equally many tokens in each part; samples and scores stay behind.

    There are as many parts as `parts`, or as sequences if those are fewer. The parts' rows, one part's after the
    other's, are the plan's.
    """
    ends = list(accumulate(plan.lengths))
    assert plan.rows == sorted(plan.rows)
    pieces, first, token, row = [], 0, 0, 0
    for part in range(parts := min(parts, len(ends))):
        last = max(first + 1, _nearest(ends, ends[-1] * (part + 1) / parts))
        last = min(last, len(ends) - (parts - part - 1))
        end = ends[last - 1]
        rows = [r - token for r in plan.rows[row:] if r < end]
        piece = slice(first, last)
        pieces.append(
            StepPlan(plan.tokens[token:end], plan.starts[piece], plan.lengths[piece], plan.block_tables[piece], rows)
        )
        first, token, row = last, end, row + len(rows)
    return pieces


def _nearest(ends: list[int], target: float) -> int:
    """How many sequences come closest to `target` tokens."""
    return min(range(len(ends)), key=lambda i: abs(ends[i] - target)) + 1


def lags_everywhere(spec: ModelSpec) -> bool:
    """Whether both pools can work on every layer of one batch at once."""
    return all(spec.is_ladder(layer) for layer in range(spec.num_layers))


def fixed_number(schedule: str, wanted: int | None, spec: ModelSpec) -> int | None:
    """How many micro-batches an attention rank splits its steps into; None is to be measured.

    Raises:
        ValueError: the schedule does not fit the checkpoint.
    """
    if schedule == "ladder" and not lags_everywhere(spec):
        raise ValueError(
            f"layout.schedule is ladder, but this checkpoint's wiring is {spec.residual!r} "
            f"(ladder_layers={spec.ladder_layers}); use layout.schedule=pingpong, or convert it with recipe=convert"
        )
    if schedule == "ladder" or (schedule == "auto" and lags_everywhere(spec)):
        if wanted not in (None, 1):
            raise ValueError(
                f"layout.micro_batches is {wanted}, but layout.schedule={schedule} has one with this checkpoint "
                f"(wiring {spec.residual!r}); use layout.schedule=pingpong"
            )
        return 1
    return wanted


def best_number(ffn_seconds: float, transfer_seconds: float) -> int:
    """m = 2 (1 + tC/tF), rounded up: from there on F need not wait (MegaScale-Infer, 2504.02263 §4.1)."""
    number = ceil(2 * (1 + max(0.0, transfer_seconds) / ffn_seconds)) if ffn_seconds else MAX_MICRO_BATCHES
    return max(2, min(MAX_MICRO_BATCHES, number))
