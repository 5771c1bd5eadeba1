"""How one sequence is continued: every knob of sampling, its range, and what it means."""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

from stepladder.workers.structured_outputs import StructuredOutputs

MAX_LOGPROBS = 20
MAX_LISTED_TOKENS = 1024  # of logit_bias and of stop_token_ids
MAX_COUNT = 2**31 - 1  # of anything that is counted, and of token ids
MAX_PENALTY = 1000.0  # of repetition_penalty, either way: logits stay finite in fp32


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one sequence is continued. Applied in this order: logit_bias, min_tokens, penalties, structured_outputs,
    temperature, min_p, top_k, top_p, then noise.

    Attributes:
        max_tokens: how many tokens may be generated.
        min_tokens: before so many, no token that would end the text is drawn and no stop string is looked for.
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probability reaches this (Holtzman et al. 1904.09751).
        top_k: only the so many likeliest tokens; 0 or -1 keeps all.
        min_p: only tokens at least this times as likely as the likeliest (Nguyen et al. 2407.01082).
        repetition_penalty: positive logits of tokens in prompt or output are divided by it, negative ones multiplied
            (Keskar et al. 1909.05858).
        presence_penalty, frequency_penalty: subtracted from the logit of a token that the output holds, once or as
            often as it does.
        logit_bias: token id -> what is added to its logit.
        seed: with a token's position it determines the random numbers, so a replay draws the same ones.
        stop: strings that end the text; they are not part of it unless include_stop_str_in_output.
        stop_token_ids: tokens that end the text, as an end-of-sequence token does.
        include_stop_str_in_output: what ended the text stays in it.
        ignore_eos: go on after an end-of-sequence token.
        skip_special_tokens: special tokens are no part of the text; False writes them out.
        logprobs: report each drawn token's log-probability, and those of the so many likeliest tokens. They are the
            model's own: log-softmax of the raw logits, before anything above.
        prompt_logprobs: the same for the prompt's tokens, the first excepted.
        speculate: let tokens be drafted, where the engine does so; without it the text takes plain decoding's time.
        structured_outputs: the form that the text must have. Only tokens are drawn that can lead to it; where nothing
            else may follow the text ends, even before min_tokens or with ignore_eos.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict, hash=False)
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    speculate: bool = True
    structured_outputs: StructuredOutputs | None = None

    def choice(self, nth: int) -> "SamplingParams":
        """Those of the nth choice: the same with a seed that is n higher, in 64 bits. Nothing is judged again."""
        made = copy(self)
        object.__setattr__(made, "seed", (self.seed + nth + 2**63) % 2**64 - 2**63)
        return made

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None or self.prompt_logprobs is not None

    def __post_init__(self) -> None:
        self._check_types()
        self._check_lengths()
        self._check_numbers()
        check(-(2**63) <= self.seed < 2**63, f"seed is {self.seed}; it must fit in 64 bits")
        check(all(self.stop), "stop holds an empty string; every stop string needs at least one character")
        for name in ("logit_bias", "stop_token_ids"):
            tokens = getattr(self, name)
            check(
                len(tokens) <= MAX_LISTED_TOKENS, f"{name} holds {len(tokens)} tokens; {MAX_LISTED_TOKENS} is the most"
            )
            check(all(_is(token, int) for token in tokens), f"{name} holds a token id that is no integer")
            check(all(token >= 0 for token in tokens), f"{name} holds a negative token id; ids begin at 0")
            check(all(token <= MAX_COUNT for token in tokens), f"{name} holds a token id above {MAX_COUNT}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            within = value is None or 0 <= value <= MAX_LOGPROBS
            check(within, f"{name} is {value}; it must be between 0 and {MAX_LOGPROBS}")

    def _check_types(self) -> None:
        """What the wire and the sampler hold: one string is one stop string, a list is as good as a tuple, and None, as
        vLLM has it, is as good as nothing."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _several(stop, "stop", "strings"))
        object.__setattr__(self, "stop_token_ids", _several(self.stop_token_ids, "stop_token_ids", "token ids"))
        object.__setattr__(self, "logit_bias", {} if self.logit_bias is None else self.logit_bias)
        object.__setattr__(self, "seed", 0 if self.seed is None else self.seed)
        bias, form = self.logit_bias, self.structured_outputs
        check(isinstance(bias, Mapping), f"logit_bias is {bias!r}; it must map token ids to numbers")
        judged = form is None or isinstance(form, StructuredOutputs)
        check(judged, f"structured_outputs is {form!r}; it must be a StructuredOutputs(...), or None")
        kinds = {int: "an integer", float: "a number", bool: "true or false"}
        for option in fields(self):
            name, value = option.name, getattr(self, option.name)
            kind = {"logprobs": int, "prompt_logprobs": int}.get(name, type(option.default))
            if kind in kinds and not (value is None and option.default is None):
                check(_is(value, kind), f"{name} is {value!r}; it must be {kinds[kind]}")
        check(all(isinstance(text, str) for text in self.stop), "stop holds something else than strings")
        check(all(_is(bias, float) for bias in self.logit_bias.values()), "logit_bias holds a value that is no number")

    def _check_lengths(self) -> None:
        within = 1 <= self.max_tokens <= MAX_COUNT
        check(within, f"max_tokens is {self.max_tokens}; it must be at least 1 and at most {MAX_COUNT}")
        check(self.min_tokens >= 0, f"min_tokens is {self.min_tokens}; it must be at least 0")
        sentence = f"min_tokens is {self.min_tokens}; it must be at most max_tokens, which is {self.max_tokens}"
        check(self.min_tokens <= self.max_tokens, sentence)

    def _check_numbers(self) -> None:
        check(0.0 <= self.temperature <= 2.0, f"temperature is {self.temperature}; it must be between 0 and 2")
        check(0.0 < self.top_p <= 1.0, f"top_p is {self.top_p}; it must be above 0 and at most 1")
        within = -1 <= self.top_k <= MAX_COUNT
        check(within, f"top_k is {self.top_k}; it must be from 1 to {MAX_COUNT}, or 0 or -1 for all tokens")
        check(0.0 <= self.min_p <= 1.0, f"min_p is {self.min_p}; it must be between 0 and 1")
        check(
            1 / MAX_PENALTY <= self.repetition_penalty <= MAX_PENALTY,
            f"repetition_penalty is {self.repetition_penalty}; it must be between {1 / MAX_PENALTY:g} and "
            f"{MAX_PENALTY:g}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            check(-2.0 <= value <= 2.0, f"{name} is {value}; it must be between -2 and 2")
        in_range = all(-100.0 <= bias <= 100.0 for bias in self.logit_bias.values())
        check(in_range, "logit_bias holds a value that is not between -100 and 100")

    @property
    def penalises(self) -> bool:
        """Whether the sequence's own tokens change its logits."""
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)

    @property
    def truncates(self) -> bool:
        """Whether the unlikely tokens are cut off."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def adjusts_logits(self) -> bool:
        """Whether a bias or penalty is asked for."""
        return bool(self.logit_bias) or self.penalises


def _several(value: Any, name: str, what: str) -> tuple[Any, ...]:
    check(value is None or isinstance(value, Iterable), f"{name} is {value!r}; it must be a list of {what}")
    return tuple(value or ())


def _is(value: object, kind: type) -> bool:
    """Whether a value is of a type; an integer is a number too, and true is neither."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def check(holds: bool, sentence: str) -> None:
    """ValueError with this sentence unless it holds."""
    if not holds:
        raise ValueError(sentence)
