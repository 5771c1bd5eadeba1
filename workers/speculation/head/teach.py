"""How a head is taught: a linear fit to begin with, then distillation of the target's distributions."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stepladder.workers.speculation.head.lessons import Lessons
from stepladder.workers.speculation.head.net import RecurrentHead, seen
from stepladder.workers.speculation.head.vocabulary import TargetVocabulary

__all__ = ["Judged", "Teacher"]

RIDGE = 1e-3  # of the mean square of what is fitted on
LATER = 0.8  # what each further token of a draft counts, of the one before it
CLIP = 1.0
SLICE = 2048  # places that are judged at once


class Judged(NamedTuple):
    """By place in a draft: the overlap of the two distributions, which is the acceptance of rejection sampling
    (Leviathan et al. 2211.17192, theorem 3.5); and how often both hold the same token likeliest. The target's own
    distribution is over all tokens, so that what the head does not draft counts as missed."""

    overlap: list[float]
    same: list[float]


class Teacher:
    """Teaches one head. Each drafted token's distribution follows the target's over the drafted vocabulary (forward
    KL); the target's is rebuilt from its hidden states, which loses nothing (its 64 likeliest tokens lose a quarter).

    Args:
        net: the head's network, which is changed. target: its embedding and head. tokens: those that are drafted.
        depth: tokens of a draft that are unrolled while learning. rate: Adam's.
    """

    def __init__(
        self,
        net: RecurrentHead,
        target: TargetVocabulary,
        tokens: Tensor,
        depth: int = 2,
        rate: float = 3e-4,
        seed: int = 0,
    ) -> None:
        self.net, self.target, self.depth = net, target, depth
        self.tokens, self.rows = tokens, target.rows(tokens)
        self._adam = torch.optim.Adam(net.parameters(), lr=rate, betas=(0.9, 0.95))
        self._dice = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def fit(self, lessons: Lessons) -> None:
        """The linear part in closed form: ridge regression of the next state on what the cell reads."""
        x = seen(lessons.states[lessons.starts], self.target.embed(lessons.tokens[lessons.starts]))
        y = lessons.states[lessons.starts + 1]
        moments = (x.T @ x).double()
        ridge = RIDGE * moments.diagonal().mean()
        found = torch.linalg.solve(moments + ridge * torch.eye(len(moments), dtype=torch.float64), (x.T @ y).double())
        self.net.linear.weight.copy_(found.T)

    def teach(
        self, lessons: Lessons, steps: int, batch: int = 256, told: Callable[[float], object] = lambda loss: None
    ) -> None:
        """So many steps of Adam, each on `batch` places of the lessons; `told` the loss of each."""
        for _ in range(steps):
            drawn = torch.randint(len(lessons.starts), (batch,), generator=self._dice)
            loss = self._loss(lessons, lessons.starts[drawn])
            self._adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
            self._adam.step()
            told(loss.item())

    @torch.no_grad()
    def judge(self, lessons: Lessons, depth: int = 4) -> Judged:
        """On outputs that it was not taught with."""
        assert depth <= lessons.depth, "it would read on into the next output"
        starts = lessons.starts
        overlap, same = torch.zeros(depth), torch.zeros(depth)
        everything = self.target.rows(torch.arange(self.target.spec.vocab_size))
        for some in starts.split(SLICE):
            for place, state in enumerate(self._unrolled(lessons, some, depth)):
                whole = lessons.states[some + place + 1] @ everything.T
                q = self.net.logits(state, self.rows).softmax(-1)
                overlap[place] += torch.minimum(whole.softmax(-1)[:, self.tokens], q).sum()
                same[place] += (self.tokens[q.argmax(-1)] == whole.argmax(-1)).sum()
        return Judged((overlap / len(starts)).tolist(), (same / len(starts)).tolist())

    def _loss(self, lessons: Lessons, starts: Tensor) -> Tensor:
        assert self.depth <= lessons.depth
        total, weight = torch.zeros(()), 1.0
        for place, state in enumerate(self._unrolled(lessons, starts, self.depth)):
            p = (lessons.states[starts + place + 1] @ self.rows.T).softmax(-1)
            q = self.net.logits(state, self.rows).log_softmax(-1)
            total = total + weight * F.kl_div(q, p, reduction="batchmean")
            weight *= LATER
        return total

    def _unrolled(self, lessons: Lessons, starts: Tensor, depth: int) -> Sequence[Tensor]:
        """The states that the head foresees behind each of the next tokens, which are the target's own."""
        state, states = lessons.states[starts], []
        for place in range(depth):
            state = self.net(state, self.target.embed(lessons.tokens[starts + place]))
            states.append(state)
        return states
