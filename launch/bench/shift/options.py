"""Options of suite=shift."""

from dataclasses import dataclass, field, fields

from stepladder.cluster.config import ModelConfig
from stepladder.launch.bench.shift.shapes import SHAPES, SHARP
from stepladder.launch.bench.speculate.options import check_names, check_sampled, kv_tokens
from stepladder.launch.recipes import chat_traffic, library_traffic
from stepladder.launch.typed_config import check_counts
from stepladder.workers.speculation.config import COUPLED, SpeculateConfig
from stepladder.workers.speculation.kinds import WITH_HEAD
from stepladder.workers.speculation.learning.config import ONLINE, LearnConfig
from stepladder.workers.speculation.learning.learner_config import LearnerConfig

SUFFIX = "suffix"
DRAFTERS = (SUFFIX, *WITH_HEAD)
LIBRARY, CHAT = "library", "chat"
TRAFFIC = {LIBRARY: tuple(library_traffic.KINDS), CHAT: tuple(chat_traffic.KINDS)}
AT_ONCE = 8  # requests that come together: they are judged, then learnt from


@dataclass(frozen=True, kw_only=True)
class ShiftBench:
    """Options.

    Attributes:
        train: how a head learns. Here one process learns all that it is given: what is of ranks, leases and versions is
            refused.
        traffic: library, texts that go on as Python's own do, or chat, for models that answer.
        source: kind of it before the shift. before: requests of that, which all heads are taught with.
        kinds: what it shifts to, one after the other. Of library: source, prose, tables; of chat: prose, rewriting,
            code, tables.
        temperatures: of sampling; every request has a seed of its own.
        shapes: of the change: sharp; smooth, where the share of new requests grows from .1 to .8 and that of old ones
            falls from .8 to .1 (Liu et al. 2310.07177, section 5.3); alone, the new kind from the beginning.
        stream: requests that come then. tokens: of an answer, at most.
        looks: numbers of requests of the stream, multiples of 8, after which everybody is judged on others; so they
            are after the last one. judged: such others, of the old kind and of the new one.
        oracle: steps of the optimizer, at most, of a head that is taught with the whole sharp stream until it gets no
            better on the others.
        errors: whether there is also one that learns only where it was wrong. distilled: one that is taught with the
            first tenth of the stream until it gets no better, and then left alone.
        drafters: served end to end after a sharp stream: suffix, head, hybrid; the last two as they were at the shift
            and as they have learnt. fixed: also the last of them with drafts of so many tokens.
        batches: requests that are served together. requests: that each side serves, in turns; 0 leaves that out.
        seed: of the traffic. threads: of torch; None takes all cores.
    """

    name: str
    run_dir: str
    model: ModelConfig
    train: LearnConfig
    traffic: str = LIBRARY
    source: str = "source"
    kinds: list[str] = field(default_factory=lambda: ["tables"])
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    shapes: list[str] = field(default_factory=lambda: [SHARP])
    before: int = 200
    stream: int = 1000
    tokens: int = 80
    looks: list[int] = field(default_factory=lambda: [64, 144, 256, 496, 640])
    judged: int = 80
    oracle: int = 3000
    errors: bool = False
    distilled: bool = False
    drafters: list[str] = field(default_factory=lambda: [SUFFIX, "hybrid"])
    fixed: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=lambda: [1])
    requests: int = 64
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, "before", "stream", "tokens", "judged", "oracle", "threads")
        if self.traffic not in TRAFFIC:
            raise ValueError(f"traffic is {self.traffic!r}; it must be {LIBRARY} or {CHAT}")
        kinds = TRAFFIC[self.traffic]
        check_names(self, kinds=kinds, shapes=SHAPES, drafters=DRAFTERS)
        check_sampled(self.batches, self.temperatures)
        if self.source not in kinds or self.source in self.kinds:
            raise ValueError(f"source is {self.source}; it must be one of {', '.join(kinds)}, and none of kinds")
        if self.requests < 0:
            raise ValueError(f"requests is {self.requests}; it must be at least 0")
        if bad := [look for look in self.looks if look < AT_ONCE or look % AT_ONCE]:
            raise ValueError(f"looks has {bad[0]}; each must be a multiple of {AT_ONCE}: so many requests come at once")
        if self.requests and SHARP not in self.shapes:
            raise ValueError(f"requests are served after a {SHARP} stream; name it in shapes, or set requests=0")
        for k in self.fixed:
            SpeculateConfig(kind=SUFFIX, k=k)
        self._refuse_what_is_of_trainers()

    def _refuse_what_is_of_trainers(self) -> None:
        """It would be ignored: here one process learns, without leases and versions."""
        plain = LearnConfig(kind=ONLINE)
        for name in {each.name for each in fields(LearnConfig)} - {each.name for each in fields(LearnerConfig)}:
            if (value := getattr(self.train, name)) != getattr(plain, name):
                raise ValueError(f"train.{name} is {value}, but here one process learns, all that it is given; omit it")

    def third(self, kind: str) -> str:
        """What else comes in a smooth stream from `source` to `kind`."""
        return next(one for one in TRAFFIC[self.traffic] if one not in (self.source, kind))

    def speculate(self, drafter: str, head: str | None = None, k: int | None = None) -> SpeculateConfig:
        return SpeculateConfig(kind=drafter, k=k, rule=COUPLED, model=head)

    @property
    def kv_tokens(self) -> int:
        """For the largest batch."""
        return kv_tokens(self.batches, self.tokens)

    @property
    def all_looks(self) -> list[int]:
        """Within the stream, its end among them."""
        whole = self.stream - self.stream % AT_ONCE or self.stream
        return sorted({*(look for look in self.looks if look < whole), whole})
