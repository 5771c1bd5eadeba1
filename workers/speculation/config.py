"""Options of speculative decoding."""

from dataclasses import dataclass

from stepladder.workers.limits import SchedulerConfig
from stepladder.workers.speculation.drafter import Drafter
from stepladder.workers.speculation.kinds import KINDS, WITH_HEAD, WITH_WEIGHTS, Seat, Target
from stepladder.workers.speculation.price import COSTLY, FREE

OFF = "off"
AUTO, COUPLED, REJECTION = "auto", "coupled", "rejection"
RULES = (AUTO, COUPLED, REJECTION)
LONGEST = 32  # tokens of a draft


@dataclass(frozen=True, kw_only=True)
class SpeculateConfig:
    """How tokens are drafted and verified.

    Attributes:
        kind: who drafts: `ngram` looks up what followed the last tokens earlier in the same text, `suffix` also in what
            this engine has written before, `recycling` chains what the model itself thought likely of late, `model` is
            a smaller one, `head` foresees the model's next hidden states, `hybrid` is suffix and head together; or
            `off`.
        k: tokens of every draft, as far as the drafter has so many; null chooses for every step what gives most tokens
            per second, none included.
        max_k: the most that null chooses.
        rule: `coupled` gives exactly plain decoding's text whoever drafts; `rejection` keeps only its distribution, and
            accepts more of what is sampled; `auto` is coupled where the text must be the same: greedy, with a seed, or
            going on after a replay.
        threshold: a draft ends where all of it would be right with less than this probability; null takes 0.05, since
            goodput cuts drafts anyway; where drafting a token takes time, it is also weighed against what the token
            is expected to save, or, with a given k, 0.25 is taken.
        memory: tokens of what this engine has written that `suffix` and `hybrid` remember, some 55 bytes each.
        model: of `model`, a directory with the same tokenizer; of `head` and `hybrid`, one that `launch.train
            recipe=head` has made for this model, or null where they are taught online.
    """

    kind: str = OFF
    k: int | None = None
    max_k: int = 8
    rule: str = AUTO
    threshold: float | None = None
    memory: int = 1 << 18
    model: str | None = None

    def __post_init__(self) -> None:
        if self.kind != OFF and self.kind not in KINDS:
            raise ValueError(f"speculate.kind is {self.kind!r}; it must be one of {', '.join((OFF, *KINDS))}")
        if self.rule not in RULES:
            raise ValueError(f"speculate.rule is {self.rule!r}; it must be one of {', '.join(RULES)}")
        for name, value in (("k", self.k), ("max_k", self.max_k)):
            if value is not None and not 1 <= value <= LONGEST:
                raise ValueError(f"speculate.{name} is {value}; it must be from 1 to {LONGEST}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"speculate.threshold is {self.threshold}; it must be from 0 to 1")
        self.check_taught(online=True)
        if self.memory < 0:
            raise ValueError(f"speculate.memory is {self.memory}; it must be 0 or more")

    def check_taught(self, online: bool = False) -> None:
        """Raises ValueError if its drafter has no weights and nobody teaches it online, or has no use for any."""
        needs = self.kind in WITH_WEIGHTS and not (online and self.kind in WITH_HEAD)
        if (needs and self.model is None) or (self.model is not None and self.kind not in WITH_WEIGHTS):
            raise ValueError(
                f"speculate.kind is {self.kind}, and speculate.model is {self.model}; the kinds "
                f"{', '.join(WITH_WEIGHTS)} need a directory, and no other takes one (head and hybrid need none with "
                "train=online)"
            )

    def drafter(self, limits: SchedulerConfig, target: Target, online: bool = False) -> Drafter | None:
        """Who drafts for an engine with these limits; ValueError if its directory is unusable.

        Args:
            online: it is taught while it drafts, and may have no weights yet.
        """
        self.check_taught(online)
        free, costly = FREE if self.threshold is None else self.threshold, self.threshold
        if costly is None and self.k:
            costly = COSTLY  # where k is given, nothing else is weighed either
        seat = Seat(free, costly, self.memory, self.model, limits, target)
        return KINDS[self.kind](seat) if self.is_on else None

    @property
    def is_on(self) -> bool:
        return self.kind != OFF

    @property
    def longest(self) -> int:
        """Tokens of the longest draft."""
        return self.k or self.max_k
