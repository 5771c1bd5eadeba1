"""What the real part asks of its rank processes, and what they answer: plain data that goes through pipes as JSON."""

from dataclasses import dataclass, field

from stepladder.launch.bench.rig.spans import Span

AFD, TP, REPLICAS = "afd", "tp", "replicas"


@dataclass(frozen=True)
class Load:
    """`batch` sequences, each behind `context` cached tokens, that are decoded for `steps` steps after one that warms
    up. late: seconds by which every message comes late at least, emulated."""

    batch: int
    context: int
    steps: int
    late: float


@dataclass(frozen=True)
class Case:
    """kind: AFD; TP, tensor parallelism over both ranks; REPLICAS, the whole model on each with half of the batch.
    lag: of all blocks. micro_batches: AFD only."""

    kind: str
    lag: int
    micro_batches: int = 1

    @property
    def name(self) -> str:
        if self.kind == REPLICAS:
            return "2 replicas"
        if self.kind == TP:
            return f"TP 2 {'ladder' if self.lag else 'standard'}"
        return "ladder AFD" if self.lag else f"AFD lag 0, m = {self.micro_batches}"


LADDER, LAG0 = Case(AFD, 1), Case(AFD, 0)
COLOCATED = [Case(TP, 0), Case(TP, 1), Case(REPLICAS, 0)]


@dataclass(frozen=True)
class Task:
    """what: `decode` a case, or measure what it is made of: its `modules` without communication, or one `transfer`.

    Attributes:
        rows: of the modules' input, or of the message.
        together: both ranks compute at once and share the memory's bandwidth.
        traced: also record messages, which costs time.
    """

    what: str
    load: Load
    case: Case
    rows: int = 0
    together: bool = False
    traced: bool = False


@dataclass(frozen=True)
class Moment:
    """A message was given to the link or could be read: the number of its step, its block's name or "x_0", the number
    of its micro-batch, and the time."""

    step: int
    block: str
    micro: int
    at: float


@dataclass(frozen=True)
class Decoded:
    """One rank's turn.

    Attributes:
        steps: [begin, end] of each, without the one that warms up; none from an F rank.
        compute: everything that it computed. tokens: [step][sequence], what it drew; none from an F rank.
        sent, came: messages, of a traced turn.
    """

    steps: list[tuple[float, float]]
    compute: list[Span]
    tokens: list[list[int]]
    sent: list[Moment] = field(default_factory=list)
    came: list[Moment] = field(default_factory=list)


@dataclass(frozen=True)
class Modules:
    """Seconds of compute of one layer's attention and FFN on this rank (0: none here), and of what is neither."""

    attention: float
    ffn: float
    rest: float


@dataclass(frozen=True)
class Transfer:
    """Seconds: a message one way, or an all-reduce; spacing: how much later a second one is that was sent with it."""

    one: float
    spacing: float


def micro_sizes(batch: int, count: int) -> list[int]:
    """Rows of each micro-batch; they differ by one at most."""
    return [batch // count + (index < batch % count) for index in range(count)]
