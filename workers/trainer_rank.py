"""A rank that teaches the drafter while others serve: it reads what engines captured, trains under a lease, judges, and
publishes what is better than the live version."""

import logging
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from stepladder.parallel.mesh import SingleRank
from stepladder.workers.figures import RankFigures, counter, gauge
from stepladder.workers.rank import UNBOUNDED, Notice, Rank, RankConfig, TeachNotice
from stepladder.workers.speculation.head.files import Head, read_head
from stepladder.workers.speculation.head.vocabulary import TargetVocabulary
from stepladder.workers.speculation.learning.busy_word import BusyWords
from stepladder.workers.speculation.learning.door import LessonReader
from stepladder.workers.speculation.learning.following import Following
from stepladder.workers.speculation.learning.learner import Candidate, Learner
from stepladder.workers.speculation.learning.lease import LeaseNotice, Use
from stepladder.workers.speculation.learning.lease_trace import trace_path, write_trace
from stepladder.workers.speculation.learning.pace import Pace
from stepladder.workers.speculation.learning.permit import Permit, least_over
from stepladder.workers.speculation.learning.versions import Versions
from stepladder.workers.training.ranks import Ranks, joined

__all__ = ["Published", "TrainerFigures", "TrainerRank"]

log = logging.getLogger(__name__)

READ_TOKENS, READ_SECONDS = 8192, 0.5  # that are read at once, and how often
PAUSE_SECONDS = 0.1  # between two looks for something to do
SMOOTH = 0.9  # of the loss that is told


class Order(Enum):
    """What all ranks do next."""

    WAIT = auto()
    BEGIN = auto()
    TRAIN = auto()
    CONSIDER = auto()
    JUDGE = auto()


@dataclass(frozen=True)
class Published:
    """A version on the disk. scores: of the requests it was judged by, by name."""

    number: int
    scores: dict[str, float]


@dataclass
class TrainerFigures(RankFigures):
    """learning_tokens: read from engines. learning_steps: of the optimizer. learning_loss: smoothed. overlap, before:
    of the last candidate's distribution with the target's at the first place of a draft, and the live version's.
    candidates, refused_candidates: judged, and of these not better. use: of leases. published: the newest version.
    """

    learning_tokens: int = counter("drafter_learning_tokens", "Tokens that the trainer has read.")
    learning_steps: int = counter("drafter_learning_steps", "Steps of the optimizer.")
    learning_loss: float = gauge("drafter_loss", "Smoothed loss of training.", default=0.0, across="mean")
    overlap: float = gauge("drafter_overlap", "Of the last candidate, at the first token.", default=0.0, across="mean")
    before: float = gauge("drafter_overlap_live", "Of the live version then.", default=0.0, across="mean")
    candidates: int = counter("drafter_candidates", "Candidates that were judged.")
    refused_candidates: int = counter("drafter_candidates_refused", "Of these, those that were not better.")
    use: Use = field(default_factory=Use)
    published: Published | None = None


class TrainerRank(Rank):
    """Rank 0 reads, decides, judges and publishes; all train. Nothing but published versions outlives it."""

    def __init__(self, config: RankConfig) -> None:
        super().__init__(config)
        if config.device == "cpu":
            torch.set_num_threads(config.train.threads)
        self._versions = Versions(Path(config.drafters), config.train.keep)
        self._figures = TrainerFigures()
        self._notice = TeachNotice()
        self._leaving = ExitStack()
        self._words = self._leaving.enter_context(closing(BusyWords()))
        self._reader = self._leaving.enter_context(closing(LessonReader(config.secret)))
        self._following = Following()
        self._pace = Pace(config.train.candidate_every)
        self._judging, self._read_at = False, 0.0

    @property
    def address(self) -> str | None:
        return None if self.config.shard.rank else f"{self.config.host}:{self._store.port}"

    def tell(self, notice: Notice) -> None:
        if isinstance(notice, LeaseNotice):
            self._permit.hear(notice)
        elif isinstance(notice, TeachNotice):
            self._notice = notice

    def stop(self) -> None:
        super().stop()
        self._permit.leave()

    def stats(self) -> TrainerFigures:
        return replace(self._figures, clock=self._mesh.clock.split(), use=self._permit.use())

    def _join(self, store_host: str, store_port: int) -> None:
        """DeepSpeed wants torch's default group."""
        super()._join(store_host, store_port)
        self._mesh.close()
        self._mesh = SingleRank(self.config.device)
        shard, names = self.config.shard, torch.distributed.PrefixStore("training", self._names)
        meeting: dict[str, Any] = {"store": names, "rank": shard.rank, "world_size": shard.size}
        self._ranks: Ranks = self._leaving.enter_context(joined(self._mesh.device, timeout=self._timeout, **meeting))
        group = torch.distributed.new_group(backend="gloo") if shard.size > 1 else None
        self._permit = Permit(least_over(group), self._words.read) if group else Permit(word=self._words.read)

    def _load(self, path: str) -> int:
        """The target's vocabulary, and DeepSpeed."""
        config = self.config
        target = TargetVocabulary(self._spec, path, self._mesh.device)
        first = config.speculate.model
        head = read_head(first, path, self._spec) if first else None
        self._learner = Learner(target, path, self._ranks, config.train, head)
        self._mesh.note_loaded(1.0)
        return UNBOUNDED

    def _begin(self, kv_tokens: int) -> str | None:
        return self.address

    def _run(self) -> None:
        lead = self.config.shard.rank == 0
        work: dict[Order, Callable[[], object]] = {
            Order.BEGIN: self._begin_anew,
            Order.TRAIN: self._train,
            Order.CONSIDER: self._consider,
            Order.JUDGE: self._judge,
        }
        try:
            self._learn(work, lead)
        finally:
            self._write_trace()
        self._learner.close()
        self._leaving.close()

    def _learn(self, work: dict[Order, Callable[[], object]], lead: bool) -> None:
        """Until one of the ranks leaves."""
        while not self._permit.over:
            self._words.look_at(self._notice.words)
            order = self._ranks.share(self._next() if lead else None)
            if order != Order.WAIT and self._permit.go():
                with self._permit.micro_batch():
                    work[order]()
                continue
            with self._mesh.clock.idle:
                self._permit.wait(PAUSE_SECONDS)
            if order == Order.WAIT:
                self._permit.vote(False)

    def _write_trace(self) -> None:
        """Of leases and micro-batches, beside the versions; nobody is kept from leaving by a disk that does not take
        it."""
        rank = self.config.shard.rank
        try:
            write_trace(self._permit.trace.rows(), trace_path(Path(self.config.drafters), rank), rank)
        except OSError as error:
            log.warning("the trace of leases was not written to %s: %s", self.config.drafters, error.strerror or error)

    def _next(self) -> Order:
        """On rank 0: what there is to do, if it is allowed."""
        self._read()
        order = self._wanted()
        if order == Order.WAIT:
            self._permit.give_back()
        else:
            self._permit.want()
        return order

    def _wanted(self) -> Order:
        learner = self._learner
        if self._following.news(live := self._notice.live):
            return Order.BEGIN
        self._following.heed(live)
        if self._judging:
            return Order.JUDGE
        if self._pace.due(learner.steps) and learner.can_judge:
            return Order.CONSIDER
        return Order.TRAIN if learner.due else Order.WAIT

    def _read(self) -> None:
        """What engines have captured since the last time; it costs a copy, and needs no lease."""
        if monotonic() - self._read_at < READ_SECONDS:
            return
        self._read_at = monotonic()
        self._reader.look_at(self._notice.doors)
        if captured := self._reader.read(READ_TOKENS, 0.05):
            self._learner.add(captured)
            self._figures.learning_tokens += sum(len(one.lesson.tokens) for one in captured)

    def _begin_anew(self) -> None:
        """From a version that was made live by others."""
        head = self._of_live() if self.config.shard.rank == 0 else None
        self._judging = False
        if self._ranks.share(head is not None):
            self._learner.begin_with(head)
            self._pace.begun(self._learner.steps)

    def _of_live(self) -> Head | None:
        """The live version's head, or why not in the log."""
        config, following = self.config, self._following
        before = following.version
        following.heed(self._notice.live)
        try:
            if following.version:
                return self._versions.read(following.version, config.directory, self._spec)
            return read_head(config.speculate.model, config.directory, self._spec) if config.speculate.model else None
        except ValueError as error:
            log.error("training goes on from what it has, without the live version: %s", error)
            following.keep(before)
            return None

    def _train(self) -> None:
        loss, figures = self._learner.micro_batch(), self._figures
        figures.learning_loss = SMOOTH * figures.learning_loss + (1 - SMOOTH) * loss if figures.learning_loss else loss
        figures.learning_steps = self._learner.steps

    def _consider(self) -> None:
        self._learner.consider()
        self._pace.considered(self._learner.steps)
        self._judging = self.config.shard.rank == 0

    def _judge(self) -> None:
        """A piece of it; after the last one the candidate is published if it is better."""
        if self.config.shard.rank == 0 and not self._learner.judge():
            self._judging = False
            self._decide(self._learner.candidate())

    def _decide(self, candidate: Candidate) -> None:
        figures = self._figures
        figures.candidates += 1
        figures.overlap, figures.before = candidate.overlap[0], candidate.live_overlap[0]
        if not candidate.passes:
            figures.refused_candidates += 1
            log.info("a candidate is not better than version %d: %s", self._following.version, candidate.verdict)
            return
        scores = {"overlap": figures.overlap, "before": figures.before}
        manifest = replace(candidate.head.manifest, parent=self._following.version, scores=scores)
        try:
            number = self._versions.publish(replace(candidate.head, manifest=manifest))
        except (OSError, ValueError) as error:
            log.error("%s; the live version stays", error)
            return
        log.info("published version %d: overlap %.3f, before %.3f", number, figures.overlap, figures.before)
        self._learner.compare_with(candidate.head)
        self._following.published(number)
        figures.published = Published(number, scores)
        self._versions.prune({*self._notice.keep, number})
