"""Which version of the drafter is live, and why: a state machine without processes, files or a clock of its own.

A version that the trainer has published becomes live; engines are told until they have it. From then on its acceptance
is held against what its predecessor's was just before, and one that is worse is taken back, for good.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import wraps
from typing import Any, NamedTuple, TypeVar

from stepladder.cluster.drafter_evidence import ENOUGH, LATELY, LEAST, RECENT, Counts, Evidence, Recent, is_worse

__all__ = ["Registry", "Told"]

KEPT_LINES = 20
KEPT_VERSIONS = 100

T = TypeVar("T")


@dataclass
class State:
    """What outlives the controller; plain data. Times are Unix times, in seconds.

    Attributes:
        live: what engines shall have; None leaves them what they began with. previous: what `live` would be taken back
            to. highest: the highest number that was ever heard of.
        pinned: the version that stays live by order. paused: by order, nothing is taught or made live.
        scores: of versions, by number, as they were published. rejected: why a version is never chosen again.
        baseline: the acceptance of `previous` when `live` took its place.
        lines: what happened, the newest last, each with its time.
    """

    live: int | None = None
    previous: int | None = None
    highest: int = 0
    pinned: int | None = None
    paused: bool = False
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)
    baseline: Evidence | None = None
    lines: list[tuple[float, str]] = field(default_factory=list)

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "State":
        """From JSON, whose objects have texts for keys and which knows no tuples."""
        state = cls(**saved)
        state.scores = {int(number): dict(scores) for number, scores in state.scores.items()}
        state.rejected = {int(number): why for number, why in state.rejected.items()}
        state.baseline = Evidence(*state.baseline) if state.baseline else None
        state.lines = [(time, line) for time, line in state.lines]
        return state


class Told(NamedTuple):
    """What an engine tells of its drafter.

    Attributes:
        life: which life of the engine; everything is counted anew in each.
        version: what it drafts with; 0, without weights.
        guesses, right: what this version foresaw of tokens that were reached, and how much of it came, since it was
            taken there.
        drafts, accepted: drafts verified and tokens accepted, of all versions.
    """

    life: int
    version: int
    guesses: int = 0
    right: int = 0
    drafts: int = 0
    accepted: int = 0

    def since(self, before: "Told | None") -> Counts:
        """What came after `before`."""
        known = before if before and before.life == self.life else Told(self.life, self.version)
        same = known.version == self.version and known.guesses <= self.guesses and known.right <= self.right
        own = (self.guesses - known.guesses, self.right - known.right) if same else (self.guesses, self.right)
        return Counts(*own, self.drafts - known.drafts, self.accepted - known.accepted) if before else Counts(*own)


def _alone(method: Callable[..., T]) -> Callable[..., T]:
    """One thread at a time: orders come in others than figures."""

    @wraps(method)
    def locked(self: "Registry", *args: Any, **named: Any) -> T:
        with self._lock:
            return method(self, *args, **named)

    return locked


class Registry:
    """Each event returns the one line that says what it changed, or None if it changed nothing.

    Args:
        saved: what `save` was given last, perhaps read from JSON; nothing for a new deployment.
        save: is given the whole state as plain data whenever it has changed, before anybody acts on it.
    """

    def __init__(
        self, saved: Mapping[str, Any] | None = None, save: Callable[[dict[str, Any]], object] = lambda state: None
    ) -> None:
        self._state, self._save, self._lock = State.of(saved or {}), save, threading.RLock()
        self._engines: dict[str, Told] = {}
        self._away: set[str] = set()
        self._recent: dict[int, Recent] = {}
        self._lately = Recent()  # of all versions
        self._refused: dict[tuple[str, int, int], str] = {}  # by engine, its life and version: why

    @property
    def live(self) -> int | None:
        """The version that engines shall have; None: what they began with."""
        return self._state.live

    @property
    def paused(self) -> bool:
        """Whether nothing is to be taught, by order."""
        return self._state.paused

    @property
    def named(self) -> set[int]:
        """Versions that must stay on the disk."""
        return {n for n in (self._state.live, self._state.previous, self._state.pinned) if n is not None}

    @_alone
    def uses(self) -> dict[int, list[str]]:
        """What versions are called that are in use: live or previous. The newest one is among them, and comes last."""
        state = self._state
        called = {state.previous: ["previous"], state.live: ["live"]}
        return {n: called.get(n, []) for n in sorted({n for n in (*called, state.highest) if n})}

    @_alone
    def scores(self, number: int) -> dict[str, float]:
        """How a version was judged before it was published, if that is known still."""
        return dict(self._state.scores.get(number, {}))

    @_alone
    def published(self, number: int, scores: Mapping[str, float], time: float) -> str | None:
        """The trainer has put a version on the disk, which has passed its gate. To say so again changes nothing.

        Args:
            scores: by name; of those, `overlap` and `before`, the live version's on the same requests, are told.
        """
        state = self._state
        if number <= state.highest:
            return None
        state.highest = number
        state.scores[number] = dict(scores)
        line = f"published {number}{_told(scores)}"
        if state.pinned not in (None, number):
            return self._tell(time, f"{line}; it waits, since {state.pinned} is pinned")
        if state.paused and number != state.live:
            return self._tell(time, f"{line}; it waits, since learning is paused")
        self._make_live(number)
        return self._tell(time, f"{line}; it is live")

    @_alone
    def observe(self, engine: str, told: Told, time: float) -> str | None:
        """An engine's figures."""
        counts = told.since(self._engines.get(engine))
        self._engines[engine] = told
        self._away.discard(engine)
        self._refused.pop((engine, told.life, told.version), None)
        self._recent.setdefault(told.version, Recent()).add(counts)
        if counts.guesses:
            self._lately.add(counts)
        return self._judge(time)

    @_alone
    def refused(self, engine: str, number: int, why: str, time: float) -> str | None:
        """An engine cannot read a version: nobody gets it. One that is pinned stays so, and this engine is not told
        again in this life."""
        life = self._engines[engine].life if engine in self._engines else 0
        if (engine, life, number) in self._refused:
            return None
        self._refused[engine, life, number] = why
        if number == self._state.pinned:
            return self._tell(time, f"{engine} cannot take {number}, which is pinned: {why}")
        if number in self._state.rejected:
            return None
        refusal = self._refusal(number)
        assert refusal
        return self._reject(number, refusal, time)

    @_alone
    def gone(self, engine: str) -> None:
        """An engine does not serve any more."""
        self._away.add(engine)  # what it had counted is known for when it comes back

    @_alone
    def behind(self) -> list[str]:
        """Engines that have not taken the live version, and are to be told of it again."""
        live = self._state.live
        if live is None:
            return []
        late = ((name, told.life) for name, told in self._engines.items() if told.version != live)
        return [name for name, life in late if name not in self._away and (name, life, live) not in self._refused]

    @_alone
    def pin(self, number: int, time: float) -> str:
        """By order, this version is live and stays so, even if it was rejected: from now on it is not."""
        state = self._state
        state.rejected.pop(number, None)
        self._refused = {one: why for one, why in self._refused.items() if one[2] != number}
        state.pinned = number
        self._make_live(number)
        return self._tell(time, f"pinned {number} by order; it stays live until learning is resumed")

    @_alone
    def rollback(self, time: float) -> str:
        """By order, back to the previous version.

        Raises:
            ValueError: there is none, or a version is pinned.
        """
        state = self._state
        if state.pinned is not None:
            raise ValueError(f"version {state.pinned} of the drafter is pinned; pin another one, or resume")
        if state.live is None or state.previous is None:
            raise ValueError("there is no earlier version of the drafter to go back to; pin one of those listed")
        return self._reject(state.live, "by order", time)

    @_alone
    def pause(self, time: float) -> str:
        """By order, nothing is taught and no version becomes live by itself. A worse one is still taken back."""
        self._state.paused = True
        return self._tell(time, "paused by order; nothing is taught or made live until learning is resumed")

    @_alone
    def resume(self, time: float) -> str:
        """Undo a pause and a pin; the newest version that was not rejected is live. What was pinned is rejected now if
        an engine could not take it."""
        state, said = self._state, ["resumed by order"]
        state.paused, state.pinned = False, None
        if state.live is not None and (why := self._refusal(state.live)):
            said.append(self._put_away(state.live, why))
        waiting = max((n for n in state.scores if n not in state.rejected), default=0)
        if waiting > (state.live or 0):
            self._make_live(waiting)
            said.append(f"{waiting} is live")
        return self._tell(time, "; ".join(said))

    @_alone
    def figures(self) -> dict[str, float]:
        """What is watched over time, by name; nothing before a version is live. drafter/ is of the live version; spec/
        has how the newest guesses of any went, a curve over swaps."""
        live = self._state.live
        if live is None:
            return {}
        scores = {f"drafter/{name}": value for name, value in self._state.scores.get(live, {}).items()}
        found = {"drafter/version": float(live), **scores}
        if (recent := self._recent.get(live)) and recent.total:
            found["drafter/acceptance"] = recent.evidence(RECENT).rate
            if (length := recent.accepted_length()) is not None:
                found["drafter/accepted_length"] = length
        if self._lately.total:
            found["spec/acceptance"] = self._lately.evidence(LATELY).rate
            if (length := self._lately.accepted_length(LATELY)) is not None:
                found["spec/accepted_length"] = length
        return found

    @_alone
    def report(self) -> dict[str, Any]:
        """For a person, as plain data. acceptance: of versions, lately. lines: what happened, the newest last, each
        with its Unix time. behind: engines that have not taken the live version."""
        state = asdict(self._state)
        shown = {key: state[key] for key in ("live", "previous", "pinned", "paused", "rejected", "lines")}
        acceptance = {n: recent.evidence(RECENT).rate for n, recent in self._recent.items() if recent.total}
        return {**shown, "acceptance": acceptance, "behind": self.behind()}

    def _judge(self, time: float) -> str | None:
        """Take the live version back if it is worse than the previous one was."""
        state = self._state
        if state.pinned is not None or state.live is None or state.previous is None or state.baseline is None:
            return None
        recent = self._recent.get(state.live)
        if recent is None:
            return None
        new, old = recent.evidence(), state.baseline
        if is_worse(new, old):
            why = f"acceptance {new.rate:.2f} < {old.rate:.2f} over {recent.total} tokens"
            return self._reject(state.live, why, time)
        if recent.total < ENOUGH:
            return None
        state.baseline = None
        return self._tell(time, f"kept {state.live}: acceptance {new.rate:.2f}, {state.previous} had {old.rate:.2f}")

    def _make_live(self, number: int) -> None:
        """What it replaces is what to go back to, if enough is known of it to judge by; else what that had replaced."""
        state, old = self._state, self._state.live
        if old == number:
            return
        known = self._recent[old].evidence(RECENT) if old in self._recent else None
        if old is None or old in state.rejected or self._refusal(old):
            if state.previous == number:
                state.previous = state.baseline = None
        elif known and known.guesses >= LEAST:
            state.previous, state.baseline = old, known
        elif state.previous in (None, number):
            state.previous, state.baseline = old, None
        state.live = number

    def _reject(self, number: int, why: str, time: float) -> str:
        """Never again by itself. In place of the live version the previous one is live."""
        return self._tell(time, self._put_away(number, why))

    def _put_away(self, number: int, why: str) -> str:
        """What is to be told of it."""
        state = self._state
        state.rejected[number] = why
        if number == state.previous:
            state.previous = state.baseline = None
        if number != state.live:
            return f"rejected {number}: {why}"
        state.live, state.previous, state.baseline = state.previous, None, None
        back = f"rolled back to {state.live}" if state.live is not None else "no version is live"
        return f"{back}: {why}; {number} is rejected"

    def _refusal(self, number: int) -> str | None:
        """Why an engine could not take a version, if one could not."""
        refused = ((name, why) for (name, _, version), why in self._refused.items() if version == number)
        return next((f"{name} cannot take {number}: {why}" for name, why in refused), None)

    def _tell(self, time: float, line: str) -> str:
        """Something has changed."""
        state = self._state
        state.lines = [*state.lines, (time, line)][-KEPT_LINES:]
        lowest = state.highest - KEPT_VERSIONS
        state.scores = {n: scores for n, scores in state.scores.items() if n > lowest or n in self.named}
        state.rejected = {n: why for n, why in state.rejected.items() if n > lowest}
        self._recent = {n: recent for n, recent in self._recent.items() if n in self.named}
        self._save(asdict(state))
        return line


def _told(scores: Mapping[str, float]) -> str:
    if "overlap" not in scores:
        return ""
    before = f"{scores['before']:.2f} -> " if "before" in scores else ""
    return f": overlap {before}{scores['overlap']:.2f}"
