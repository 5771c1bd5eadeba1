"""Training of a head from what is captured, for as long as something comes: one bounded piece of work per call.

The ranks that learn together each take places of their own; rank 0 alone has what was captured, and tells the others.
Nothing here survives the process but versions that were published: who resumes after a kill starts from the last one's
head, and the optimizer's moments and the replay begin anew. Nothing else is worth keeping: moments are there again in
ten steps or so, and the requests from before are gone in any case.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepladder.parallel.checkpoint import fingerprints
from stepladder.workers.speculation.head.files import DataWindow, Head, Manifest
from stepladder.workers.speculation.head.net import RecurrentHead
from stepladder.workers.speculation.head.teach import BETAS, CLIP, Teacher
from stepladder.workers.speculation.head.vocabulary import TargetVocabulary
from stepladder.workers.speculation.learning.gate import FEWEST, Verdict, paired_bootstrap
from stepladder.workers.speculation.learning.judging import Judging, Score, Window
from stepladder.workers.speculation.learning.learner_config import LearnerConfig
from stepladder.workers.speculation.learning.lessons import Captured, Lessons
from stepladder.workers.speculation.learning.replay import Replay
from stepladder.workers.training.ranks import Ranks
from stepladder.workers.training.sharded import Sharded

__all__ = ["Candidate", "Learner"]

NET = "net."  # what its weights' names begin with inside of what DeepSpeed has
PLACES_TO_FIT = 4  # times the hidden size: twice as many as there are unknowns for each output of the linear fit
MOST_TO_FIT = 4096  # places


class Candidate(NamedTuple):
    """head: what might be published. scores, live: expected accepted tokens per draft of each held-out request, of the
    candidate and of the live head (0 where there is none). overlap, live_overlap: mean by place in a draft. verdict: of
    the scores. passes: whether it is better than the live one by more than the margin."""

    head: Head
    scores: list[float]
    live: list[float]
    overlap: list[float]
    live_overlap: list[float]
    verdict: Verdict
    passes: bool


class Learner:
    """One head in training, on one of the ranks that train it. Construction takes seconds (DeepSpeed), each call after
    that a bounded time.

    Args:
        target: the model's embedding and head, on the ranks' device. directory: its checkpoint.
        live: to start from, and what candidates are compared with; without it the first micro-batch makes a linear fit.
            On rank 0; others may leave it out.

    Raises:
        ValueError: `live` reads states of another size.
    """

    def __init__(
        self,
        target: TargetVocabulary,
        directory: str | Path,
        ranks: Ranks,
        config: LearnerConfig,
        live: Head | None = None,
    ) -> None:
        self.target, self.ranks, self.config = target, ranks, config
        self._fingerprints = fingerprints(directory)
        hidden, size = target.spec.hidden_size, target.spec.vocab_size
        if live is not None and live.net.hidden != hidden:
            raise ValueError(f"the head to start from reads {live.net.hidden} numbers, not {hidden}")
        self.inner, self.begun = ranks.share((live.net.inner if live else config.inner, live is not None))
        self.drafted = min(config.drafted, size)
        self.replay = Replay(
            config.max_tokens, config.held_out, config.depth, config.seed, config.errors_only, config.newest
        )
        self.net = self._new()
        tokens = ranks.share(live.tokens.cpu() if live else torch.arange(self.drafted)).to(ranks.device)
        self.teacher = Teacher(self.net, target, tokens, config.depth, config.objective)
        adam = torch.optim.Adam(self.net.parameters(), lr=config.rate_of(hidden), betas=BETAS)
        self.engine = Sharded(
            _Objective(self.net, self.teacher), adam, ranks, config.batch, config.accumulate, CLIP, config.zero_stage
        )
        self.window = Window(target, self.replay, config.judged, config.judged_depth)
        self.live: Head | None = None
        self.micro_batches, self._owed = 0, 0.0
        self._average: dict[str, Tensor] = {}
        self._judging: Judging | None = None
        if self.begun:
            self.begin_with(live)

    # What comes in, on rank 0.

    def add(self, captured: list[Captured]) -> None:
        """On rank 0. What is owed for it grows no further than what the replay holds is worth."""
        assert self.ranks.rank == 0
        before = self.replay.seen
        self.replay.add(captured)
        per_token = self.config.steps * self.config.accumulate / self.config.every
        held = sum(self.replay.domains.values())
        self._owed = min(self._owed + (self.replay.seen - before) * per_token, held * per_token)

    @property
    def due(self) -> bool:
        """On rank 0: whether a micro-batch has something to learn. Nothing new, nothing due."""
        if not self.replay.places:
            return False
        return self._owed >= 1 if self.begun else self.replay.places >= self.places_to_fit

    @property
    def can_judge(self) -> bool:
        """On rank 0: whether there are held-out requests enough to judge by."""
        return len(self.replay.window(FEWEST, self.config.judged_depth)) == FEWEST

    @property
    def places_to_fit(self) -> int:
        """That there must be before a new head begins."""
        return PLACES_TO_FIT * self.target.spec.hidden_size

    @property
    def steps(self) -> int:
        """Of the optimizer, so far."""
        return self.micro_batches // self.config.accumulate

    # What all ranks do together.

    def micro_batch(self) -> float:
        """One micro-batch on every rank, and after the last one of a step the optimizer's; the loss, mean of the ranks.
        The first one of a new head makes the linear fit before.

        Raises:
            ValueError: there is nothing to learn from, on rank 0.
            RuntimeError: the loss is no longer a number.
        """
        if not self.begun:
            self._fit()
        self._owed = max(0.0, self._owed - 1)
        lessons, starts = self._places()
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss = self.engine(lessons.tokens, lessons.states, starts)
        self.engine.backward(loss)
        mean = self.ranks.mean(loss.item())
        if not math.isfinite(mean):
            raise RuntimeError(f"the loss of a drafter's head is {mean} after {self.steps} steps; lower its rate")
        self.engine.step()
        self.micro_batches += 1
        if self.micro_batches % self.config.accumulate == 0:
            self._take_into_average()
        return mean

    def begin_with(self, live: Head | None) -> None:
        """Training goes on from the live head of rank 0, the optimizer anew; candidates are compared with it."""
        self._begin_with(live.net if live else self.net)
        self.teacher.draft(self.ranks.share(live.tokens.cpu() if live else None).to(self.ranks.device))
        self.begun = True
        if live:
            self.compare_with(live)

    def consider(self) -> None:
        """What has been learnt so far becomes a candidate, whose drafted tokens are those that are most frequent now;
        training goes on with these. Whether it is any good rank 0 judges, by and by."""
        net = self.averaged()
        seen, size = self.teacher.tokens.cpu(), self.target.spec.vocab_size
        tokens = self.ranks.share(self.replay.frequent(self.drafted, size, seen) if self.ranks.rank == 0 else None)
        self.teacher.draft(tokens.to(self.ranks.device))
        if self.ranks.rank == 0:
            self._judging = self.window.judging(net, self.teacher.tokens)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the network's, on every rank: the average of its last steps, or its own without one."""
        return {name: weight.clone() for name, weight in self._average.items()} or self._latest()

    def averaged(self) -> RecurrentHead:
        """A network with these, which learns nothing."""
        net = self._new()
        net.load_state_dict(self.weights())
        return net.requires_grad_(False)

    def close(self) -> None:
        """Let go of DeepSpeed."""
        self.engine.destroy()

    # What rank 0 does alone.

    def compare_with(self, live: Head) -> None:
        """Candidates are, from now on; training goes on as it was. For what was just published."""
        self.live = live
        self.window.compare_with(live.net, live.tokens.to(self.ranks.device))

    def judge(self) -> bool:
        """One piece of a held-out request, in a bounded time; whether there is another. After `consider`."""
        assert self._judging is not None, "nothing is considered"
        return self._judging.step()

    def candidate(self) -> Candidate:
        """What was considered, or else is now (then all other ranks must do it too), with its scores; what has not been
        judged is judged at once."""
        if self._judging is None:
            self.consider()
        judging, self._judging = self._judging, None
        assert judging is not None
        while judging.step():
            pass
        scores, live = judging.scores, judging.live
        verdict = paired_bootstrap([s.length for s in scores], [s.length for s in live], self.config.seed)
        figures = {
            "requests": len(scores), "tokens": self.replay.seen, "steps": self.steps, "domains": self.replay.domains,
            "overlap": Score.mean(scores), "live_overlap": Score.mean(live), **verdict._asdict(),
        }  # fmt: skip
        kept = self.replay.domains
        data = DataWindow(self.replay.requests, sum(kept.values()), kept)
        manifest = Manifest(self.net.hidden, self.inner, 0, self._fingerprints, figures, window=data)
        head = Head(judging.net.cpu(), judging.tokens.cpu(), manifest)
        return Candidate(
            head, [s.length for s in scores], [s.length for s in live], figures["overlap"], figures["live_overlap"],
            verdict, verdict.passes(self.config.margin),
        )  # fmt: skip

    def _fit(self) -> None:
        """A new head: its tokens, and the linear part in closed form, made on rank 0 and told the others."""
        fitted, tokens = self._new(), None
        if self.ranks.rank == 0:
            tokens = self.replay.frequent(self.drafted, self.target.spec.vocab_size)
            Teacher(fitted, self.target, tokens.to(self.ranks.device)).fit(self._moved(self.replay.first(MOST_TO_FIT)))
        self._begin_with(fitted)
        self.teacher.draft(self.ranks.share(tokens).to(self.ranks.device))
        self.begun = True

    def _latest(self) -> dict[str, Tensor]:
        return {name.removeprefix(NET): weight for name, weight in self.engine.weights().items()}

    def _take_into_average(self) -> None:
        """On every rank. The noise of single steps cancels: it is the price of a constant rate, which follows traffic
        that changes."""
        if not self.config.average:
            return
        latest = self._latest()
        if not self._average:
            self._average = latest
            return
        for name, weight in self._average.items():
            weight.lerp_(latest[name], 1 - self.config.average)

    def _begin_with(self, net: RecurrentHead) -> None:
        self._average = {}
        self.engine.begin_with({NET + name: weight for name, weight in net.state_dict().items()})

    def _new(self) -> RecurrentHead:
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            return RecurrentHead(self.target.spec.hidden_size, self.inner).to(self.ranks.device)

    def _places(self) -> tuple[Lessons, Tensor]:
        """This rank's of the batch that rank 0 draws."""
        count, depth, size = self.config.batch, self.config.depth, self.ranks.size
        rows = count * (depth + 1)
        tokens = torch.empty(rows, dtype=torch.int64, device=self.ranks.device)
        states = torch.empty(rows, self.net.hidden, device=self.ranks.device)
        drawn = self._moved(self.replay.batch(count * size)[0]) if self.ranks.rank == 0 else None
        if size == 1:
            assert drawn is not None
            return drawn, drawn.starts
        dist.scatter(tokens, list(drawn.tokens.split(rows)) if drawn else None)
        dist.scatter(states, list(drawn.states.split(rows)) if drawn else None)
        starts = torch.arange(count, device=self.ranks.device) * (depth + 1)
        return Lessons(tokens, states, starts, depth), starts

    def _moved(self, lessons: Lessons) -> Lessons:
        tokens, states, starts = (part.to(self.ranks.device) for part in lessons[:3])
        return Lessons(tokens, states, starts, lessons.depth)


class _Objective(nn.Module):
    """What is trained, as the one module that DeepSpeed wants: from places to their loss."""

    def __init__(self, net: RecurrentHead, teacher: Teacher) -> None:
        super().__init__()
        self.net, self._teacher = net, teacher

    def forward(self, tokens: Tensor, states: Tensor, starts: Tensor) -> Tensor:
        return self._teacher.loss(Lessons(tokens, states, starts, self._teacher.depth), starts)
