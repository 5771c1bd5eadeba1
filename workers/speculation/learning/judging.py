"""Candidate and live head on held-out requests, piece by piece, so that no piece takes long."""

from collections.abc import Sequence as Seq
from typing import NamedTuple

from torch import Tensor

from stepladder.workers.speculation.head.exam import Exam
from stepladder.workers.speculation.head.net import RecurrentHead
from stepladder.workers.speculation.head.vocabulary import TargetVocabulary
from stepladder.workers.speculation.learning.lessons import Lesson, Lessons
from stepladder.workers.speculation.learning.replay import HeldOut, Replay

__all__ = ["Judging", "Score", "Window"]

LONGEST = 32  # tokens of a piece that is judged at once: a tenth of a second on one thread for a model like SmolLM2

Key = tuple[int, int]  # request, and which of its pieces


class Score(NamedTuple):
    """places: that were judged. length: tokens of a draft that would be accepted, the mean of the places; each counts
    if all before it were accepted. overlap: with the target's distribution, by place in a draft, the mean."""

    places: int
    length: float
    overlap: list[float]

    @classmethod
    def all_of(cls, parts: Seq["Score"], depth: int) -> "Score":
        """Of a request, from those of its pieces."""
        places = sum(part.places for part in parts)
        if not places:
            return cls(0, 0.0, [0.0] * depth)
        length = sum(part.places * part.length for part in parts) / places
        return cls(places, length, [sum(p.places * p.overlap[i] for p in parts) / places for i in range(depth)])

    @staticmethod
    def mean(scores: Seq["Score"]) -> list[float]:
        """Overlap of several requests, each counting alike."""
        return [sum(column) / len(scores) for column in zip(*(score.overlap for score in scores), strict=True)]


class Window:
    """The newest held-out requests. What the target says about each, and how the live head does, is kept as long as it
    is in the window.

    Args:
        requests: how many. depth: of the drafts that are judged.
    """

    def __init__(self, target: TargetVocabulary, replay: Replay, requests: int, depth: int) -> None:
        self.target, self.replay, self.requests, self.depth = target, replay, requests, depth
        self.exams: dict[Key, Exam] = {}
        self.live_scores: dict[Key, Score] = {}
        self.live: tuple[RecurrentHead, Tensor] | None = None

    def compare_with(self, net: RecurrentHead, tokens: Tensor) -> None:
        self.live, self.live_scores = (net, tokens), {}

    def judging(self, net: RecurrentHead, tokens: Tensor) -> "Judging":
        """Of a head that drafts `tokens`, on what is in the window now."""
        held = self.replay.window(self.requests, self.depth)
        keys = {(each.request, i) for each in held for i in range(len(_pieces(each, self.depth)))}
        for kept in (self.exams, self.live_scores):
            for old in kept.keys() - keys:
                del kept[old]
        return Judging(self, held, net, tokens)

    def score(self, key: Key, lesson: Lesson, net: RecurrentHead, tokens: Tensor) -> tuple[Score, Score]:
        """Of a head, and of the live one."""
        if key not in self.exams:
            lessons, device = Lessons.of([lesson], self.depth), tokens.device
            tokens_of, states, starts = (part.to(device) for part in lessons[:3])
            moved = Lessons(tokens_of, states, starts, self.depth)
            self.exams[key] = Exam.of(moved, self.target)
        exam = self.exams[key]
        if self.live and key not in self.live_scores:
            self.live_scores[key] = _score(exam, *self.live, self.depth)
        nothing = Score(len(exam.lessons.starts), 0.0, [0.0] * self.depth)
        return _score(exam, net, tokens, self.depth), self.live_scores.get(key, nothing)


class Judging:
    """Of one candidate, under way.

    Attributes:
        net, tokens: the candidate. scores, live: of the requests judged so far, its own and those of the live head.
    """

    def __init__(self, window: Window, held: list[HeldOut], net: RecurrentHead, tokens: Tensor) -> None:
        self.net, self.tokens, self._window = net, tokens, window
        self._left = [
            ((each.request, i), lesson) for each in held for i, lesson in enumerate(_pieces(each, window.depth))
        ]
        self._left.reverse()
        self._parts: dict[int, list[tuple[Score, Score]]] = {}

    def step(self) -> bool:
        """One piece; whether there is another."""
        if self._left:
            key, lesson = self._left.pop()
            self._parts.setdefault(key[0], []).append(self._window.score(key, lesson, self.net, self.tokens))
        return bool(self._left)

    @property
    def scores(self) -> list[Score]:
        return self._of_requests(0)

    @property
    def live(self) -> list[Score]:
        return self._of_requests(1)

    def _of_requests(self, side: int) -> list[Score]:
        return [Score.all_of([part[side] for part in parts], self._window.depth) for parts in self._parts.values()]


def _score(exam: Exam, net: RecurrentHead, tokens: Tensor, depth: int) -> Score:
    marks = exam.judge(net, tokens, depth)
    return Score(len(marks.overlap), float(marks.length.mean()), marks.overlap.mean(0).tolist())


def _pieces(held: HeldOut, depth: int) -> list[Lesson]:
    """Long enough to be judged, and none long; what is cut off begins anew."""
    cut = [Lesson(*parts) for lesson in held.lessons for parts in zip(*(t.split(LONGEST) for t in lesson), strict=True)]
    return [lesson for lesson in cut if len(lesson.tokens) > depth]
