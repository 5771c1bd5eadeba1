"""What an engine's time is worth: how long it takes per token, as it goes now."""

from math import inf

from stepladder.workers.core import StepPlan
from stepladder.workers.speculation.drafter import Verified
from stepladder.workers.speculation.price import Terms
from stepladder.workers.speculation.step_time import StepTime

__all__ = ["Pace"]

KEPT = 0.97  # of what is known, at each step
FURTHER = 8  # drafted tokens that what one more of them takes is read from: one alone is within the noise


class Pace:
    """Seconds and tokens of the steps that do nothing but decode, in times that are known of such steps."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    def observe(self, step_time: StepTime, plan: StepPlan, verified: list[Verified], drafting: float) -> None:
        """drafting: seconds that its drafts took."""
        if len(plan.tokens) != sum(1 + len(one.drafted) for one in verified):
            return
        took = step_time(len(plan.tokens), plan.context) + drafting
        self._seconds = KEPT * self._seconds + took
        self._tokens = KEPT * self._tokens + sum(len(one.tokens) for one in verified)

    def terms(self, step_time: StepTime, tokens: int, context: int) -> Terms:
        """tokens, context: of the next step without drafts."""
        token, longer = self._seconds / self._tokens if self._tokens else inf, 0.0
        if tokens + FURTHER <= step_time.largest:
            longer = (step_time(tokens + FURTHER, context) - step_time(tokens, context)) / FURTHER
        return Terms(token, max(0.0, longer))
