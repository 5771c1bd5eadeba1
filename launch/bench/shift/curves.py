"""How well everybody drafts while a stream goes by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stepladder.launch.bench.shift.answers import Answer
from stepladder.launch.bench.shift.options import AT_ONCE
from stepladder.launch.bench.shift.students import Online, Student, lessons_of
from stepladder.workers.speculation.head.exam import Exam
from stepladder.workers.speculation.head.files import Head
from stepladder.workers.speculation.head.vocabulary import TargetVocabulary


class Found(NamedTuple):
    """What a head's drafts are worth at their first token, the mean over places: overlap with the target's
    distribution, which is the acceptance of rejection sampling; how often both hold the same token likeliest, which is
    that of greedy decoding."""

    overlap: float
    same: float

    @classmethod
    def of(cls, exam: Exam, head: Head) -> "Found":
        judged = exam.judge(head.net, head.tokens, 1)
        return cls(float(judged.overlap[:, 0].mean()), float(judged.same[:, 0].mean()))

    def at(self, temperature: float) -> float:
        """Acceptance of what is decoded like that."""
        return self.overlap if temperature else self.same


class Look(NamedTuple):
    """A student on requests that nobody learns from, after `come` of the stream. steps of the optimizer, CPU seconds:
    that learning from the stream has taken."""

    come: int
    new: Found
    old: Found
    steps: int
    seconds: float


@dataclass
class Curve:
    """One student in one stream. live: by batch of requests, how it would have drafted for them, before it learnt from
    them; None before it had a head. looks: now and then, on others."""

    name: str
    live: list[Found | None] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)

    def mean(self, first: int, last: int, temperature: float) -> float:
        """Of requests `first` to `last` of the stream, those without a head counting 0."""
        found = self.live[first // AT_ONCE : -(-last // AT_ONCE)]
        return sum(each.at(temperature) if each else 0.0 for each in found) / max(1, len(found))


@dataclass(frozen=True)
class Others:
    """Requests that nobody learns from."""

    new: Exam
    old: Exam

    @classmethod
    def of(cls, new: Sequence[Answer], old: Sequence[Answer], target: TargetVocabulary) -> "Others":
        return cls(Exam.of(lessons_of(new), target), Exam.of(lessons_of(old), target))

    def judge(self, head: Head) -> tuple[Found, Found]:
        return Found.of(self.new, head), Found.of(self.old, head)


def drawn(
    students: Sequence[Student],
    stream: Sequence[Answer],
    looks: Sequence[int],
    others: Others,
    target: TargetVocabulary,
    told: Callable[[int], object],
) -> dict[str, Curve]:
    """Everybody sees the same stream."""
    curves = {student.name: Curve(student.name) for student in students}
    began = {student.name: _spent(student) for student in students}
    for first in range(0, len(stream), AT_ONCE):
        batch = stream[first : first + AT_ONCE]
        exam = Exam.of(lessons_of(batch), target)
        for student in students:
            curve = curves[student.name]
            curve.live.append(Found.of(exam, student.head) if student.begun else None)
            student.take(batch)
            if (come := first + len(batch)) in looks and student.begun:
                spent = [now - then for now, then in zip(_spent(student), began[student.name], strict=True)]
                curve.looks.append(Look(come, *others.judge(student.head), int(spent[0]), spent[1]))
        told(len(batch))
    return curves


def _spent(student: Student) -> tuple[float, float]:
    return (student.steps, student.seconds) if isinstance(student, Online) else (0, 0.0)
