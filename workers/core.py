"""The vocabulary: what a request is, what a step runs, what comes back. Pure host data; read this file first.

A step is one flat, ragged batch. A prefill chunk, a decode token and the verification of drafted tokens are the same
thing in it: "run these q tokens of sequence s". There is no other kind of step.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Literal, NamedTuple, Protocol

from stepladder.workers.params import SamplingParams, check
from stepladder.workers.structured_outputs import StructuredOutputs

__all__ = [
    "Constraint",
    "FinishReason",
    "Output",
    "Request",
    "Sample",
    "SamplingParams",
    "Score",
    "Sequence",
    "Start",
    "StepPlan",
    "StepResult",
    "StructuredOutputs",
    "TokenLogprob",
]

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a gateway asks of an engine.

    Attributes:
        prompt: token ids; not empty.
        output: tokens already generated elsewhere. A replay after a failure continues behind them.
        owner: who asks, under a seed of their own or none; nobody else's retry continues it.
        seeded: whoever asks has chosen the seed, and expects the same text each time.
        domain: what its answer is learnt under; "" is the model's own name. learn: False: nothing of it is kept for
            learning.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    output: tuple[int, ...] = ()
    owner: str = ""
    seeded: bool = True
    domain: str = ""
    learn: bool = True

    @property
    def name(self) -> str:
        """What whoever asks knows it as; what follows the last `#` of the id tells attempts apart."""
        return self.id.rsplit("#", 1)[0]

    def __post_init__(self) -> None:
        check(len(self.prompt) > 0, "the prompt is empty; it must hold at least one token")


class Constraint(Protocol):
    """Which tokens may follow in one sequence; host state of rank 0. `grammar/constraint.py` says more.

    Attributes:
        ended: the last token ended the text, whatever the parameters say.
        error: why it cannot go on; then what is drawn is void.
    """

    ended: bool
    error: str | None

    def advance(self, token: int) -> None:
        """The sequence goes on with this token."""

    def rollback(self, count: int) -> None:
        """Take back the last tokens."""

    def mask_rows(self, mask: Any, unending: int = 0, drafts: Seq[int] = ()) -> None:
        """Fill int32 rows [1 + drafts, vocab / 32 + 1] with a bit per token that may follow, in the first, and behind
        each draft, in the others. In `unending` rows none may end the text, unless nothing else can follow."""


class TokenLogprob(NamedTuple):
    """How likely a token was, by the log-softmax of the raw logits.

    rank: 1 is the likeliest. top_tokens, top_logprobs: the likeliest tokens, as many as were asked for, in order.
    """

    logprob: float
    rank: int
    top_tokens: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True)
class Start:
    """How a sequence came to its first token. Times are measurements, so equal starts may differ in them.

    Attributes:
        cached_tokens: how many of the prompt's tokens were found in the prefix cache.
        queue_seconds: from its arrival to its first place in a step, by the engine's clock.
        prefill_seconds: from there to the first token; preemptions included.
    """

    cached_tokens: int
    queue_seconds: float = field(compare=False)
    prefill_seconds: float = field(compare=False)


@dataclass(eq=False)
class Sequence:
    """A request inside an engine. Invariant: 0 <= num_computed < len(tokens), until it finishes.

    Attributes:
        tokens: prompt and output so far. A token that a step under way draws is there already, as -1-k: the k-th
            that this step draws. Nobody asks for it in any other step than the next one.
        num_computed: tokens whose keys and values are cached, or will be by the steps under way.
        num_cached: tokens that were found in the prefix cache when it last began.
        blocks, block_keys: KV blocks it holds, and the names of the full ones' content; the block manager sets them.
        prompt_logprobs: of the prompt's tokens from the second on, as far as they have been computed. They outlive a
            preemption, so that nothing is scored twice.
        added, scheduled: `time.monotonic()` when it came, and when it first got a place.
        constraint: has been told every token of the output that is known.
        draft: tokens that may follow, for the next step to verify; never among `tokens` before that has accepted them.
        drafts: somebody drafts for it, so that it waits for its last token.
        coupled: drafts are verified so that its text is plain decoding's; else only the text's distribution is.
    """

    request: Request
    constraint: Constraint | None = None
    tokens: list[int] = field(init=False)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_cached: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    added: float = field(default_factory=monotonic)
    scheduled: float | None = None
    draft: tuple[int, ...] = ()
    drafts: bool = False
    coupled: bool = True

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt, *self.request.output]

    @property
    def num_output(self) -> int:
        """Tokens generated, here or before a replay, and those being drawn."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def output(self) -> list[int]:
        """Tokens generated so far, here or before a replay."""
        return [token for token in self.tokens[len(self.request.prompt) :] if token >= 0]

    @property
    def is_drawing(self) -> bool:
        """Whether a step under way draws its last token."""
        return self.tokens[-1] < 0

    @property
    def num_pending(self) -> int:
        """Tokens that still have to be run: 1 when decoding, more in prefill."""
        return len(self.tokens) - self.num_computed

    def start(self) -> Start:
        """Of a sequence that gets its first token now."""
        assert self.scheduled is not None
        return Start(self.num_cached, self.scheduled - self.added, monotonic() - self.scheduled)

    @property
    def unscored(self) -> range:
        """Positions whose logits are still needed for prompt_logprobs. A replay's were returned before."""
        if self.request.params.prompt_logprobs is None or self.request.output:
            return range(0)
        return range(len(self.prompt_logprobs), len(self.request.prompt) - 1)


class Sample(NamedTuple):
    """A token to be drawn, and behind a draft one for each drafted token, too. Host data of rank 0, never broadcast.

    row: index into the plan's rows; the sample owns this one and as many behind it as there are drafted tokens: row + i
        draws what follows the first i of them.
    position: where the first drawn token will stand in its sequence.
    tokens: the sequence's tokens, of which the first `position` precede it and the first `num_prompt` are the prompt;
        not a copy. draft: the tokens to verify, which stand behind these, coupled or not.
    barred: tokens that may not be drawn, by the first `unending` rows; with a constraint, that knows which end a text.
    """

    row: int
    position: int
    params: SamplingParams
    tokens: list[int]
    num_prompt: int
    barred: tuple[int, ...] = ()
    constraint: Constraint | None = None
    unending: int = 0
    draft: tuple[int, ...] = ()
    coupled: bool = True

    @property
    def each(self) -> "list[Sample]":
        """One sample without a draft for every row, each with the drafted tokens before it among its tokens."""
        if not self.draft:
            return [self]
        known = [*self.tokens[: self.position], *self.draft] if self.params.penalises else self.tokens
        return [
            self._replace(
                row=self.row + i,
                position=self.position + i,
                tokens=known,
                barred=self.barred if i < self.unending else (),
                draft=(),
            )
            for i in range(1 + len(self.draft))
        ]


class Score(NamedTuple):
    """Prompt tokens whose log-probabilities are wanted. Host data of rank 0, never broadcast.

    row: index into the plan's rows of the first; targets[i] is judged by row + i. top: how many of the likeliest
        tokens are reported.
    """

    row: int
    targets: list[int]
    top: int


@dataclass(frozen=True)
class StepPlan:
    """One step of one tensor-parallel group. An empty plan is a heartbeat.

    Attributes:
        tokens: [T] token ids, sequence after sequence, drafted tokens behind a sequence's own. -1-k is the k-th token
            that the step before this one draws: the host need not know it, so that this step can be queued before that
            one is read.
        starts: [B] position of each sequence's first token in this step.
        lengths: [B] how many of the tokens are this sequence's; sums to T.
        block_tables: [B] the KV blocks of each sequence, including those this step writes.
        rows: [R] the tokens (as indices) whose logits are wanted.
        samples, scores: what rank 0 does with these logits; every row belongs to one of them.
    """

    tokens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    block_tables: list[list[int]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)

    @property
    def context(self) -> int:
        """Positions that the sequences have together when the step has run."""
        return sum(self.starts) + sum(self.lengths)


@dataclass(frozen=True)
class StepResult:
    """What a step drew and scored.

    Attributes:
        tokens: for each of the plan's samples those that its sequence goes on with: of its draft what was accepted, and
            one more.
        logprobs: theirs, by index of the sample, where they were asked for.
        scores: for each of the plan's scores, those of its targets.
        likely: for each sample and each of its rows the likeliest tokens, if a drafter asks for them.
        hidden: for each sample the final hidden states of its rows, a tensor [rows, hidden] on the model's device, if a
            drafter asks for them.
    """

    tokens: list[list[int]]
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    scores: list[list[TokenLogprob]] = field(default_factory=list)
    likely: list[list[list[int]]] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Output:
    """What a step did for one request: its new tokens and, at the end, why it ended.

    Attributes:
        logprobs: one per token, if they were asked for.
        prompt_logprobs: with the first token, if they were asked for: those of the prompt from its second token on.
        start: with the first token; with a replay that continues behind it, never.
        error: with "abort", why; None if the request is not to blame.
        drafted, accepted: tokens that were drafted for this step, and how many of them it goes on with.
    """

    id: str
    tokens: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    start: Start | None = None
    error: str | None = None
    drafted: int = 0
    accepted: int = 0
