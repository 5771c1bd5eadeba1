"""How well a head foresees its target, on outputs that it was not taught with."""

from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.workers.speculation.head.net import RecurrentHead
from stepladder.workers.speculation.head.vocabulary import TargetVocabulary
from stepladder.workers.speculation.learning.lessons import Lessons

__all__ = ["Exam", "Marks", "unrolled"]

SLICE = 2048  # places that are judged at once
VOCABULARY_SLICE = 8192  # rows of the target's head that are read at once


class Marks(NamedTuple):
    """Of M places, by place in a draft, fp32 [M, depth]: the overlap of the two distributions, which is the acceptance
    of rejection sampling (Leviathan et al. 2211.17192, theorem 3.5); and whether both hold the same token likeliest."""

    overlap: Tensor
    same: Tensor

    @property
    def length(self) -> Tensor:
        """Tokens of a draft that would be accepted, [M]: each counts if all before it were."""
        return self.overlap.cumprod(-1).sum(-1)


class Exam(NamedTuple):
    """Outputs, and what of the target's distributions does not depend on who is examined. They are over all of its
    tokens, so that what a head does not draft counts as missed. Once these are known, judging reads the rows of drafted
    tokens alone.

    Attributes:
        log_z: of the logits at each place [N]. likeliest: token at each place, int64 [N].
    """

    lessons: Lessons
    target: TargetVocabulary
    log_z: Tensor
    likeliest: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, lessons: Lessons, target: TargetVocabulary) -> "Exam":
        log_z = torch.full((len(lessons.tokens),), float("-inf"), device=lessons.states.device)
        most, likeliest = log_z.clone(), torch.zeros_like(lessons.tokens)
        for ids in torch.arange(target.spec.vocab_size, device=lessons.states.device).split(VOCABULARY_SLICE):
            rows = target.rows(ids)
            for places in torch.arange(len(log_z), device=log_z.device).split(SLICE):
                logits = lessons.states[places] @ rows.T
                log_z[places] = torch.logaddexp(log_z[places], logits.logsumexp(-1))
                largest = logits.max(-1)
                likeliest[places] = torch.where(largest.values > most[places], ids[largest.indices], likeliest[places])
                most[places] = torch.maximum(most[places], largest.values)
        return cls(lessons, target, log_z, likeliest)

    @torch.no_grad()
    def judge(self, net: RecurrentHead, tokens: Tensor, depth: int) -> Marks:
        """Of a head that drafts `tokens`, at all starts of the lessons."""
        assert depth <= self.lessons.depth, "it would read on into the next output"
        rows, marks = self.target.rows(tokens), list[Marks]()
        for starts in self.lessons.starts.split(SLICE):
            overlap, same = [], []
            for place, state in enumerate(unrolled(net, self.target, self.lessons, starts, depth), 1):
                p = (self.lessons.states[starts + place] @ rows.T - self.log_z[starts + place, None]).exp()
                q = net.logits(state, rows).softmax(-1)
                overlap.append(torch.minimum(p, q).sum(-1))
                same.append((tokens[q.argmax(-1)] == self.likeliest[starts + place]).float())
            marks.append(Marks(torch.stack(overlap, -1), torch.stack(same, -1)))
        return Marks(*(torch.cat(column) for column in zip(*marks, strict=True)))


def unrolled(
    net: RecurrentHead, target: TargetVocabulary, lessons: Lessons, starts: Tensor, depth: int
) -> list[Tensor]:
    """The states [M, hidden] that a head foresees behind each of the next tokens, which are the target's own."""
    state, states = lessons.states[starts], list[Tensor]()
    for place in range(depth):
        state = net(state, target.embed(lessons.tokens[starts + place]))
        states.append(state)
    return states
