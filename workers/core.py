"""The vocabulary: what a request is, what a step runs, what comes back. Pure host data; read this file first.

A step is one flat, ragged batch. A prefill chunk, a decode token and (later) the verification of drafted tokens are the
same thing in it: "run these q tokens of sequence s". There is no other kind of step.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one sequence is continued.

    Attributes:
        max_tokens: how many tokens may be generated.
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probability reaches this (Holtzman et al. 1904.09751).
        seed: with a token's position it determines the random numbers, so a replay draws the same ones.
        stop: strings that end the text; they are not part of it.
        ignore_eos: go on after an end-of-sequence token.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 1, f"max_tokens is {self.max_tokens}; it must be at least 1")
        _check(0.0 <= self.temperature <= 2.0, f"temperature is {self.temperature}; it must be between 0 and 2")
        _check(0.0 < self.top_p <= 1.0, f"top_p is {self.top_p}; it must be above 0 and at most 1")
        _check(-(2**63) <= self.seed < 2**63, f"seed is {self.seed}; it must fit in 64 bits")
        _check(all(self.stop), "stop holds an empty string; every stop string needs at least one character")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a gateway asks of an engine.

    Attributes:
        prompt: token ids; not empty.
        output: tokens already generated elsewhere. A replay after a failure continues behind them.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    output: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(len(self.prompt) > 0, "the prompt is empty; it must hold at least one token")


@dataclass
class Sequence:
    """A request inside an engine. Invariant: 0 <= num_computed < len(tokens), until it finishes.

    Attributes:
        tokens: prompt and output so far.
        num_computed: tokens whose keys and values are cached; the scheduler advances it.
        blocks: KV blocks it holds; the block manager sets them.
    """

    request: Request
    tokens: list[int] = field(init=False)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt, *self.request.output]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_pending(self) -> int:
        """Tokens that still have to be run: 1 when decoding, more in prefill."""
        return len(self.tokens) - self.num_computed


class Sample(NamedTuple):
    """One wanted row of logits and how a token is drawn from it.

    row: index into the plan's tokens. position: where the drawn token will stand in its sequence.
    """

    row: int
    position: int
    seed: int
    temperature: float
    top_p: float


@dataclass(frozen=True)
class StepPlan:
    """One step of one tensor-parallel group. An empty plan is a heartbeat.

    Attributes:
        tokens: [T] token ids, sequence after sequence.
        starts: [B] position of each sequence's first token in this step.
        lengths: [B] how many of the tokens are this sequence's; sums to T.
        block_tables: [B] the KV blocks of each sequence, including those this step writes.
        samples: the rows whose logits are wanted.
    """

    tokens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    block_tables: list[list[int]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True)
class StepResult:
    """tokens: the token drawn for each of the plan's samples."""

    tokens: list[int]


@dataclass(frozen=True)
class Output:
    """What a step did for one request: its new tokens and, at the end, why it ended."""

    id: str
    tokens: list[int]
    finish_reason: FinishReason | None = None


def _check(holds: bool, sentence: str) -> None:
    if not holds:
        raise ValueError(sentence)
