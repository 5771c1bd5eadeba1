"""Starting something that may fail: whether to try again, and when."""

import logging
from time import monotonic

from stepladder.cluster.error_text import error_text

log = logging.getLogger(__name__)

MAX_FAILED = 3  # starts of something that has never worked
MAX_PAUSE = 30.0  # seconds
# what the same configuration raises every time, in words of ours (ValueError) or, where nobody checked it, in Python's
SAME_AGAIN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError, NotImplementedError)


class StartRetry:
    """Starts of one engine or gateway. What has worked before is tried for ever: others serve meanwhile.

    Args:
        name: of what is started. worked: whether it has before, under an earlier controller perhaps.

    Attributes:
        trouble: why the last start failed; None once one has succeeded.
        over: why there will not be another; None if there may.
    """

    def __init__(self, name: str, worked: bool) -> None:
        self.name, self.worked = name, worked
        self.trouble: str | None = None
        self.over: str | None = None
        self._failed, self._due = 0, 0.0

    @property
    def pause(self) -> float:
        """Seconds until the next one is due: after the nth failure in a row 2^n, at most MAX_PAUSE."""
        return max(0.0, self._due - monotonic())

    def succeeded(self) -> None:
        self.worked, self.trouble, self._failed = True, None, 0

    def failed(self, error: Exception) -> None:
        self._failed += 1
        self.trouble = error_text(error)
        self._due = monotonic() + min(2.0 ** min(self._failed, 10), MAX_PAUSE)
        log.error("start %d of %s failed: %s", self._failed, self.name, self.trouble)
        if self.worked:
            return
        if _hopeless(error):
            self.over = self.trouble
        elif self._failed >= MAX_FAILED:
            self.over = f"{self._failed} starts of {self.name} failed, the last one with: {self.trouble}"


def _hopeless(error: Exception) -> bool:
    """Whether it would fail again: what it was told cannot work, or our own deadline has passed.

    Errors of the system (ETIMEDOUT) and of Ray (GetTimeoutError) are kinds of TimeoutError too, but pass.
    """
    return isinstance(error, SAME_AGAIN) or (type(error) is TimeoutError and error.errno is None)
