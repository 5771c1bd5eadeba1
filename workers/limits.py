"""The limits of one engine, and which requests can never be served within them. Pure host code."""

from dataclasses import dataclass, replace

from stepladder.workers.core import Request, SamplingParams


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one engine.

    Attributes:
        max_sequences: how many sequences run at once.
        max_step_tokens: tokens of one step; a longer prompt is prefilled in chunks of what is left of it.
        max_model_len: prompt and output together.
        num_blocks, block_size: the KV cache.
        eos_ids: tokens that end a sequence.
        prefix_caching: whether known beginnings of prompts are reused.
        cache_salt: what keys and values depend on besides the tokens.
        vocab_size: token ids from 0 to this are the model's; None checks none.
        lookahead: how many steps may be under way when the next one is planned, 0 or 1.
    """

    max_sequences: int = 64
    max_step_tokens: int = 512
    max_model_len: int = 2048
    num_blocks: int = 1024
    block_size: int = 16
    eos_ids: tuple[int, ...] = ()
    prefix_caching: bool = True
    cache_salt: str = ""
    vocab_size: int | None = None
    lookahead: int = 0

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_step_tokens", "max_model_len", "num_blocks", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine.{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_step_tokens < self.max_sequences:
            raise ValueError(
                f"engine.max_step_tokens ({self.max_step_tokens}) must be at least engine.max_sequences "
                f"({self.max_sequences}), so that every running sequence can decode"
            )
        if self.lookahead not in (0, 1):
            raise ValueError(f"engine.lookahead is {self.lookahead}; it must be 0 or 1")
        if self.num_blocks * self.block_size < self.max_model_len:
            raise ValueError(
                f"the KV cache holds {self.num_blocks * self.block_size} tokens in blocks of {self.block_size}, fewer "
                f"than engine.max_model_len ({self.max_model_len}); raise kv.tokens or lower engine.max_model_len"
            )

    def fit(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        """The same with no more max_tokens than fit behind such a prompt (1, if none do): for who has not asked for
        that many.

        Raises:
            ValueError: min_tokens do not fit.
        """
        room = max(1, self.max_model_len - num_prompt_tokens)
        return params if params.max_tokens <= room else replace(params, max_tokens=room)

    def ends(self, params: SamplingParams) -> tuple[int, ...]:
        """The tokens that end a sequence."""
        return params.stop_token_ids if params.ignore_eos else self.last_ends(params)

    def last_ends(self, params: SamplingParams) -> tuple[int, ...]:
        """The tokens that end a sequence behind which, by its constraint, nothing else can follow."""
        return (*params.stop_token_ids, *self.eos_ids)

    def check(self, request: Request) -> None:
        """Judge a request before it is queued.

        Raises:
            ValueError: it cannot fit, names tokens that the model has not, or is a replay of one that was complete.
        """
        prompt, output, params = request.prompt, request.output, request.params
        if len(prompt) + params.max_tokens > self.max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}; together they exceed this "
                f"model's context of {self.max_model_len} tokens"
            )
        if len(output) >= params.max_tokens:
            raise ValueError(
                f"nothing is left to generate: {len(output)} of its {params.max_tokens} output tokens are there already"
            )
        if params.structured_outputs and not self.last_ends(params):
            raise ValueError(
                "this model has no end-of-sequence token, so that a text cannot end where structured_outputs does; "
                "give stop_token_ids"
            )
        named = {"the prompt": prompt, "the output so far": output}
        for where, tokens in (named | listed_tokens(params)).items():
            if self.vocab_size is not None and tokens and not (min(tokens) >= 0 and max(tokens) < self.vocab_size):
                sentence = f"{where} holds a token id outside of 0 to {self.vocab_size - 1}, the model's vocabulary"
                raise ValueError(sentence)


def listed_tokens(params: SamplingParams) -> dict[str, tuple[int, ...]]:
    """The token ids that sampling parameters name, by parameter."""
    return {"logit_bias": tuple(params.logit_bias), "stop_token_ids": params.stop_token_ids}
