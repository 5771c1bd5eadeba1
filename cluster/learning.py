"""The controller's part in a drafter that keeps learning: leases for the trainer, versions for the engines."""

import logging
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, time
from typing import Any

from stepladder.cluster.config import Deployment
from stepladder.cluster.drafter_orders import obey
from stepladder.cluster.drafter_registry import Registry, Told
from stepladder.cluster.idleness import Reading
from stepladder.cluster.journal import Journal
from stepladder.cluster.keeper import Keeper
from stepladder.cluster.leases import Ledger
from stepladder.cluster.monitor import Monitors
from stepladder.workers.engine_rank import EngineFigures
from stepladder.workers.figures import RankFigures
from stepladder.workers.rank import TRAINER, DrafterNotice, TeachNotice
from stepladder.workers.speculation.learning.versions import Versions
from stepladder.workers.trainer_rank import TrainerFigures

log = logging.getLogger(__name__)

AGAIN_SECONDS = 10.0  # after which an engine that has not taken a version is told of it again


class Learning:
    """Looked at by the supervisor in each of its turns; orders come from other threads.

    Args:
        journal: has the registry's state. groups: keepers of all that serves. trainer: that of the trainer.
    """

    def __init__(self, deployment: Deployment, journal: Journal, groups: Sequence[Keeper], trainer: Keeper) -> None:
        self._deployment, self._trainer = deployment, trainer
        self._groups = list(groups)
        self.registry = Registry(journal.get("drafter"), lambda state: journal.set(drafter=state))
        self._versions = Versions(Path(deployment.drafters), deployment.train.keep)
        self._shown: dict[int, list[str]] = {}
        train = deployment.train
        self._ledger = Ledger(TRAINER, train.ranks, max_loss=train.max_tpot_loss, first=int(time() * 1000))
        self._told: dict[str, tuple[int | None, float]] = {}  # by an engine's life: the version, and when
        self._touched = self.registry.live is not None  # engines have been given a version

    def look(self) -> None:
        """Hear all, decide, tell all."""
        self._hear()
        for keeper in self._groups:
            if _engine(keeper):
                self._tell_version(keeper)
        self._tell_trainer()
        notice = self._ledger.look(monotonic(), {k.name: self._reading(k) for k in self._groups}, self._uses())
        self._trainer.tell(notice)

    def order(self, order: str, version: int | None) -> dict[str, Any]:
        """See `obey`; from any thread."""
        done = obey(self.registry, self._versions, order, version, time())
        if done["said"]:
            log.info("drafter: %s", done["said"])
        return done

    def show(self, monitor: Monitors) -> None:
        """Versions that are new to it, or are in use otherwise than before."""
        for number, aliases in self.registry.uses().items():
            if self._shown.get(number) != aliases:
                folder, scores = self._versions.folder(number), self.registry.scores(number)
                monitor.log_version(number, folder, scores, aliases)
        self._shown = self.registry.uses()

    def report(self) -> dict[str, Any]:
        """For a person, as plain data."""
        figures = self._taught()
        trained = figures.values() if figures else {}
        return {**self.registry.report(), "lease": self._ledger.figures(), "trainer": trained}

    def figures(self) -> dict[str, float]:
        """What is watched over time, in W&B's namespaces."""
        leases = {f"lease/{key.removeprefix('lease_')}": value for key, value in self._ledger.figures().items()}
        taught = self._taught()
        trained = (
            {f"drafter/{key.removeprefix('learning_')}": float(value) for key, value in taught.values().items()}
            if taught
            else {}
        )
        return {**trained, **self.registry.figures(), **leases}

    def _hear(self) -> None:
        """What engines and trainer have told with their last signs of life."""
        lines, now = [], time()
        taught = self._taught()
        if taught and (published := taught.published):
            lines.append(self.registry.published(published.number, published.scores, now))
        for keeper in self._groups:
            if not (told := _engine(keeper)) or not told.engine:
                continue
            if not keeper.endpoint:
                self.registry.gone(keeper.name)
                continue
            stats = told.engine
            seen = Told(
                keeper.gang.generation,
                stats.drafter_version,
                stats.drafter_guesses,
                stats.drafter_right,
                stats.drafts,
                stats.accepted_tokens,
            )
            lines.append(self.registry.observe(keeper.name, seen, now))
            if told.refused:
                lines.append(self.registry.refused(keeper.name, *told.refused, now))
        for line in filter(None, lines):
            log.info("drafter: %s", line)

    def _tell_version(self, keeper: Keeper) -> None:
        """Once, and again if it has not taken it for a while."""
        live = self.registry.live
        self._touched |= live is not None
        if not self._touched:
            return
        life = f"{keeper.name}/{keeper.gang.generation}"
        version, when = self._told.get(life, (-1, 0.0))
        again = version == live and keeper.name in self.registry.behind() and monotonic() - when > AGAIN_SECONDS
        if version != live or again:
            self._told[life] = live, monotonic()
            keeper.tell(DrafterNotice(live or 0, self._folder(live)), again)

    def _tell_trainer(self) -> None:
        engines = [told for keeper in self._groups if keeper.endpoint and (told := _engine(keeper))]
        doors = tuple(engine.door for engine in engines if engine.door)
        words = tuple(engine.word for engine in engines if engine.word)
        keep = tuple(sorted(self.registry.named))
        self._trainer.tell(TeachNotice(self.registry.live or 0, keep, doors, words))

    def _reading(self, keeper: Keeper) -> Reading:
        """A group's last sign of life, for the ledger."""
        ranks, told = keeper.gang.figures if keeper.endpoint else [], _engine(keeper)
        engine = told.engine if told else None
        here, places = {place.node for place in self._trainer.gang.places}, keeper.gang.places
        return Reading(
            clocks=tuple(rank.clock for rank in ranks),
            running=engine.running if engine else 0,
            waiting=engine.waiting if engine else 0,
            steps=engine.steps if engine else 0,
            serves=keeper.group.needed,
            beside=not places or any(place.node in here for place in places),  # one that starts may come anywhere
        )

    def _uses(self) -> list[Any]:
        """Of the trainer's ranks; by order, none of them wants anything."""
        figures = self._trainer.gang.figures if self._trainer.endpoint else []
        uses = [rank.use for rank in figures if isinstance(rank, TrainerFigures)]
        return [use._replace(returned=True, wants=False) for use in uses] if self.registry.paused else uses

    def _taught(self) -> TrainerFigures | None:
        figures: list[RankFigures] = self._trainer.gang.figures
        return figures[0] if figures and isinstance(figures[0], TrainerFigures) else None

    def _folder(self, version: int | None) -> str | None:
        return str(self._versions.folder(version)) if version else None


def _engine(keeper: Keeper) -> EngineFigures | None:
    """What rank 0 of an engine has told."""
    figures = keeper.gang.figures
    return figures[0] if figures and isinstance(figures[0], EngineFigures) else None
