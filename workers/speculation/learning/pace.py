"""When what is learnt is judged: early while every step still changes much, and then less often."""

__all__ = ["FIRST", "Pace"]

FIRST = 2  # steps until the first candidate: the linear fit alone has most of the gain


class Pace:
    """The gap between two candidates doubles from `FIRST` to `most`, so that up to there judging happens a few times
    only, whatever `most` is.

    Args:
        most: steps of the optimizer between two candidates in the end.
    """

    def __init__(self, most: int) -> None:
        assert most > 0
        self._most, self._gap, self._last = most, min(FIRST, most), 0

    def due(self, steps: int) -> bool:
        """Whether there is to be a candidate after so many steps."""
        return steps - self._last >= self._gap

    def considered(self, steps: int) -> None:
        """There was one."""
        self._last, self._gap = steps, min(2 * self._gap, self._most)

    def begun(self, steps: int) -> None:
        """Training goes on from another head: what was learnt since the last candidate is gone, the gap stays."""
        self._last = steps
