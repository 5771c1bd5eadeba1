"""How a head is taught: a linear fit to begin with, then distillation of the target's distributions."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.workers.speculation.head.exam import Exam, unrolled
from stepladder.workers.speculation.head.net import RecurrentHead, seen
from stepladder.workers.speculation.head.vocabulary import TargetVocabulary
from stepladder.workers.speculation.learning import objectives
from stepladder.workers.speculation.learning.lessons import Lessons

__all__ = ["BETAS", "CLIP", "Judged", "Teacher"]

RIDGE = 1e-3  # of the mean square of what is fitted on
LATER = 0.8  # what each further token of a draft counts, of the one before it
CLIP = 1.0
BETAS = (0.9, 0.95)  # Adam's


class Judged(NamedTuple):
    """By place in a draft, the mean of `exam.Marks`: overlap of the two distributions, and how often both hold the same
    token likeliest."""

    overlap: list[float]
    same: list[float]


class Teacher:
    """Teaches one head. Each drafted token's distribution follows the target's over the drafted vocabulary; the
    target's is rebuilt from its hidden states, which loses nothing (its 64 likeliest tokens lose a quarter). The rows
    of its head are as they are: they learn nothing.

    Args:
        net: the head's network, which is changed. target: its embedding and head. tokens: those that are drafted.
        depth: tokens of a draft that are unrolled while learning. objective: one of `OBJECTIVES`.

    Raises:
        ValueError: there is no such objective.
    """

    def __init__(
        self,
        net: RecurrentHead,
        target: TargetVocabulary,
        tokens: Tensor,
        depth: int = 2,
        objective: str = objectives.DEFAULT,
    ) -> None:
        self.net, self.target, self.depth = net, target, depth
        self._objective = objectives.named(objective)
        self.draft(tokens)

    def draft(self, tokens: Tensor) -> None:
        """These from now on, int64 [N]: their rows are the target's, so nothing has to be learnt for it."""
        self.tokens, self.rows = tokens, self.target.rows(tokens)

    @torch.no_grad()
    def fit(self, lessons: Lessons) -> None:
        """The linear part in closed form: ridge regression of the next state on what the cell reads."""
        x = seen(lessons.states[lessons.starts], self.target.embed(lessons.tokens[lessons.starts]))
        y = lessons.states[lessons.starts + 1]
        moments = (x.T @ x).double()
        ridge = RIDGE * moments.diagonal().mean()
        found = torch.linalg.solve(moments + ridge * torch.eye(len(moments)).to(moments), (x.T @ y).double())
        self.net.linear.weight.copy_(found.T)

    def loss(self, lessons: Lessons, starts: Tensor) -> Tensor:
        """Of drafts from `starts`, places of the lessons: the mean, all tokens of a draft added up. One batch."""
        assert self.depth <= lessons.depth
        total, weight = torch.zeros((), device=self.rows.device), 1.0
        for place, state in enumerate(unrolled(self.net, self.target, lessons, starts, self.depth), 1):
            log_p = (lessons.states[starts + place] @ self.rows.T).float().log_softmax(-1)
            log_q = self.net.logits(state, self.rows).float().log_softmax(-1)
            total = total + weight * self._objective(log_p, log_q).mean()
            weight *= LATER
        return total

    def teach(
        self,
        lessons: Lessons,
        steps: int,
        batch: int = 256,
        told: Callable[[float], object] = lambda loss: None,
        rate: float = 3e-4,
        seed: int = 0,
    ) -> None:
        """So many steps of Adam, each on `batch` places of the lessons; `told` the loss of each. In this process alone:
        `learning.Learner` trains over ranks and for as long as requests come."""
        adam, dice = torch.optim.Adam(self.net.parameters(), lr=rate, betas=BETAS), torch.Generator().manual_seed(seed)
        for _ in range(steps):
            drawn = torch.randint(len(lessons.starts), (batch,), generator=dice)
            loss = self.loss(lessons, lessons.starts[drawn])
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
            adam.step()
            told(loss.item())

    def judge(self, lessons: Lessons, depth: int = 4) -> Judged:
        """On outputs that it was not taught with."""
        marks = Exam.of(lessons, self.target).judge(self.net, self.tokens, depth)
        return Judged(marks.overlap.mean(0).tolist(), marks.same.mean(0).tolist())
