"""Who drafts in a stream: heads that learn from it in different ways, or not at all."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from time import process_time

import torch

from stepladder.launch.bench.shift.answers import Answer
from stepladder.launch.bench.shift.options import AT_ONCE
from stepladder.parallel.checkpoint import fingerprints
from stepladder.workers.speculation.head.exam import Exam
from stepladder.workers.speculation.head.files import Head, Manifest
from stepladder.workers.speculation.head.net import RecurrentHead
from stepladder.workers.speculation.head.teach import Teacher
from stepladder.workers.speculation.head.vocabulary import TargetVocabulary, most_frequent
from stepladder.workers.speculation.learning.learner import Learner
from stepladder.workers.speculation.learning.learner_config import LearnerConfig
from stepladder.workers.speculation.learning.lessons import Captured, Lessons
from stepladder.workers.training.ranks import Ranks

ROUND = 50  # steps of the optimizer between two looks at one that is taught until it gets no better
BETTER, PATIENCE = 0.002, 3  # of overlap, within so many looks
SHARE = 10  # of a stream, one part of so many is what `Distilled` learns from
JUDGED = 4  # places of a draft


class Student:
    """Somebody whose head does not change.

    Attributes:
        begun: whether there is a head yet. head: what it drafts with now.
    """

    def __init__(self, name: str, head: Head) -> None:
        self.name, self._head = name, head

    @property
    def begun(self) -> bool:
        return True

    @property
    def head(self) -> Head:
        return self._head

    def take(self, answers: Sequence[Answer]) -> None:
        """The next answers of the stream."""


class Online(Student):
    """Learns from every batch of answers what is due for it, as a trainer does that is granted all it asks for.

    Args:
        errors: learn where the head's own likeliest token was not what came, only.

    Attributes:
        seconds: of CPU time that learning has taken.
    """

    def __init__(
        self, name: str, target: TargetVocabulary, directory: Path, ranks: Ranks, config: LearnerConfig, errors: bool
    ) -> None:
        self.name, self._errors = name, errors
        self.learner = Learner(target, directory, ranks, replace(config, errors_only=errors or config.errors_only))
        self._manifest = Manifest(self.learner.net.hidden, self.learner.inner, 0, fingerprints(directory), {})
        self.seconds = 0.0

    @property
    def head(self) -> Head:
        """A copy, which learns no further."""
        return Head(self.learner.averaged(), self.learner.teacher.tokens.clone(), self._manifest)

    @property
    def begun(self) -> bool:
        return self.learner.begun

    @property
    def steps(self) -> int:
        return self.learner.steps

    def take(self, answers: Sequence[Answer]) -> None:
        pieces = [piece for answer in answers for piece in answer.pieces]
        if self._errors:
            pieces = [self._marked(piece) for piece in pieces]
        began = process_time()
        self.learner.add(pieces)
        while self.learner.due:
            self.learner.micro_batch()
        self.seconds += process_time() - began

    @torch.no_grad()
    def _marked(self, piece: Captured) -> Captured:
        """With the places where this head would have been wrong."""
        lesson, teacher = piece.lesson, self.learner.teacher
        state = self.learner.net(lesson.states[:-1].float(), teacher.target.embed(lesson.tokens[:-1]))
        likeliest = teacher.tokens[self.learner.net.logits(state, teacher.rows).argmax(-1)]
        wrong = torch.cat((torch.tensor([False]), likeliest != lesson.tokens[1:]))
        return piece._replace(lesson=lesson._replace(wrong=wrong))


class Distilled(Student):
    """Somebody who is taught once, with the first answers of the stream."""

    def __init__(
        self, name: str, head: Head, target: TargetVocabulary, config: LearnerConfig, stream: int, steps: int
    ) -> None:
        super().__init__(name, head)
        self._target, self._config, self._steps = target, config, steps
        self._wants, self._answers = max(AT_ONCE, stream // SHARE), list[Answer]()

    def take(self, answers: Sequence[Answer]) -> None:
        if len(self._answers) < self._wants:
            self._answers += answers
            if len(self._answers) >= self._wants:
                every = self._config.held_out
                rest = [answer for number, answer in enumerate(self._answers) if number % every]
                exam = Exam.of(lessons_of(self._answers[::every]), self._target)
                self._head, _ = until_no_better(self._head, self._target, rest, exam, self._config, self._steps)


def until_no_better(
    head: Head, target: TargetVocabulary, answers: Sequence[Answer], exam: Exam, config: LearnerConfig, most: int
) -> tuple[Head, int]:
    """A head taught with all of these at once, the best of those on the way by `exam`; and how many steps of the
    optimizer it took. It begins with a linear fit, or with `head` where that is better."""
    lessons = [lesson for answer in answers for lesson in answer.lessons]
    tokens = most_frequent([lesson.tokens.tolist() for lesson in lessons], len(head.tokens), target.spec.vocab_size)
    fitted = RecurrentHead(head.net.hidden, head.net.inner)
    all_of = Lessons.of(lessons, config.depth)
    Teacher(fitted, target, tokens, config.depth, config.objective).fit(all_of)
    net = max(fitted, deepcopy(head.net).requires_grad_(True), key=lambda one: _overlap(exam, one, tokens))
    teacher = Teacher(net, target, tokens, config.depth, config.objective)
    best, score, taken, waited = deepcopy(net), _overlap(exam, net, tokens), 0, 0
    batch, rate = config.batch * config.accumulate, config.rate_of(net.hidden)
    while taken < most and waited < PATIENCE:
        teacher.teach(all_of, ROUND, batch, rate=rate, seed=taken // ROUND)
        taken += ROUND
        found = _overlap(exam, net, tokens)
        waited = 0 if found > score + BETTER else waited + 1
        if found > score:
            best, score = deepcopy(net), found
    return replace(head, net=best.requires_grad_(False), tokens=tokens), taken


def lessons_of(answers: Sequence[Answer]) -> Lessons:
    return Lessons.of([lesson for answer in answers for lesson in answer.lessons], JUDGED)


def _overlap(exam: Exam, net: RecurrentHead, tokens: torch.Tensor) -> float:
    return float(exam.judge(net, tokens, 1).overlap.mean())
