"""Options of suite=speculate."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from stepladder.cluster.config import ModelConfig
from stepladder.launch.recipes.chat_traffic import KINDS
from stepladder.launch.typed_config import check_counts
from stepladder.workers.speculation.config import COUPLED, OFF, REJECTION, SpeculateConfig
from stepladder.workers.speculation.kinds import KINDS as DRAFTERS
from stepladder.workers.speculation.kinds import WITH_HEAD

MODEL = "model"  # the drafter that is a model itself
LONGEST = 256  # tokens of a prompt


@dataclass(frozen=True, kw_only=True)
class SpeculateBench:
    """Options.

    Attributes:
        kinds: of traffic: prose, rewriting, code, tables.
        drafters: who is measured, each with as many tokens as goodput chooses. The first also with `fixed` numbers.
        draft_model: of the drafter `model`, a directory with the same tokenizer. draft_head: of `head` and `hybrid`,
            one that `launch.train recipe=head` has made.
        fixed: lengths of drafts to compare that with; may be empty.
        batches: requests that are served together. stream: times so many make a turn, the next one comes when one has
            ended; 1 for turns that all begin together, and thin out to one.
        temperatures: of sampling; every request has a seed of its own.
        rule: coupled, so that texts are plain decoding's; or rejection, which accepts more of what is sampled.
        warm: requests of the same kind that a drafter has seen before.
        requests: that are measured, on every side; of the largest batch at least one turn.
        tokens: of an answer, at most.
        threshold: as speculate.threshold.
        spread: plain decoding is measured twice, against itself: `first`, for the first kind and temperature; `all` or
            `none`.
        seed: of the traffic. threads: of torch; None takes all cores.
    """

    name: str
    run_dir: str
    model: ModelConfig
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    drafters: list[str] = field(default_factory=lambda: ["suffix", "ngram", "recycling"])
    draft_model: str | None = None
    draft_head: str | None = None
    fixed: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=lambda: [1, 4, 16])
    stream: int = 1
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    rule: str = COUPLED
    warm: int = 200
    requests: int = 64
    tokens: int = 88
    threshold: float | None = None
    spread: str = "first"
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, "stream", "warm", "requests", "tokens", "threads")
        check_names(self, kinds=KINDS, drafters=DRAFTERS)
        check_sampled(self.batches, self.temperatures)
        if self.rule not in (COUPLED, REJECTION):
            raise ValueError(f"rule is {self.rule!r}; it must be {COUPLED} or {REJECTION}")
        if self.spread not in ("first", "all", "none"):
            raise ValueError(f"spread is {self.spread!r}; it must be first, all or none")
        for drafter, k in [*((name, None) for name in self.drafters), *((self.drafters[0], k) for k in self.fixed)]:
            self.speculate(drafter, k).check_taught()

    def speculate(self, drafter: str = OFF, k: int | None = None) -> SpeculateConfig:
        """Raises ValueError if the number of tokens or the threshold cannot be."""
        model = self.draft_model if drafter == MODEL else self.draft_head if drafter in WITH_HEAD else None
        return SpeculateConfig(kind=drafter, k=k, rule=self.rule, threshold=self.threshold, model=model)

    @property
    def kv_tokens(self) -> int:
        """For the largest batch."""
        return kv_tokens(self.batches, self.tokens)


def check_names(options: object, **known: Collection[str]) -> None:
    """Raises ValueError if one of these options does not name some of what is known, each once."""
    for name, names in known.items():
        values = getattr(options, name)
        if not values or len({*values}) < len(values) or not {*values} <= {*names}:
            raise ValueError(f"{name} is {values}; it must name one or more of {', '.join(names)}, each once")


def check_sampled(batches: Sequence[int], temperatures: Sequence[float]) -> None:
    """Raises ValueError if there are none, one is there twice, or cannot be."""
    for name, values in (("batches", batches), ("temperatures", temperatures)):
        if not values or len({*values}) < len(values):
            raise ValueError(f"{name} is {values}; it must hold one value or more, each once")
    if min(batches) < 1 or min(temperatures) < 0:
        raise ValueError("every batch must be at least 1 and every temperature at least 0")


def kv_tokens(batches: Sequence[int], tokens: int) -> int:
    """That a cache must hold for the largest batch, of answers of so many tokens."""
    return max(16384, 2 * max(batches) * (LONGEST + tokens))
