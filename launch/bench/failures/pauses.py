"""Which streams a failure made pause, and when they went on."""

from collections.abc import Iterable, Sequence
from itertools import pairwise


def resumptions(streams: Iterable[Sequence[float]], moment: float, usual: float) -> list[float]:
    """Seconds from the failure at `moment` to the text that ended its pause, of every stream that paused, in order.

    A stream paused if it got no text for longer than `usual` from about the failure on: what was under way then may
    still come, up to `usual` later. Streams of an engine that lives on, which go on as ever, are not among them; but
    one that happens to be a little slower than any was undisturbed is.

    Args:
        streams: when text came (`monotonic`), of each.
        usual: the longest pause of streams that nothing disturbs.
    """
    ends = []
    for arrivals in streams:
        gaps = [gap for gap in pairwise(arrivals) if gap[0] <= moment + usual and gap[1] > moment]
        begin, end = max(gaps, key=lambda gap: gap[1] - gap[0], default=(moment, moment))
        if end - begin > usual:
            ends.append(end - moment)
    return sorted(ends)
