"""Log-probabilities as the API writes them: OpenAI's two shapes, and vLLM's for prompts."""

from collections.abc import Sequence
from math import isnan
from typing import Any, NamedTuple

import msgspec

from stepladder.workers.core import Output, TokenLogprob
from stepladder.workers.text.tokenizer import Tokenizer

Json = dict[str, Any]
encode_json = msgspec.json.Encoder().encode
LOWEST = -9999.0  # OpenAI's figure for the very unlikely; JSON has no infinity, and no NaN


class ScoredToken(NamedTuple):
    """A token of an answer. offset: where its text begins in the answer's. logprob: None for a prompt's first token."""

    token: int
    offset: int
    logprob: TokenLogprob | None


def chat_shape(tokenizer: Tokenizer, scored: Sequence[ScoredToken]) -> Json:
    """Chat completions'."""
    content = []
    for token, _, logprob in scored:
        assert logprob is not None
        top = [_entry(tokenizer, *pair) for pair in zip(logprob.top_tokens, logprob.top_logprobs, strict=True)]
        content.append({**_entry(tokenizer, token, logprob.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_shape(tokenizer: Tokenizer, scored: Sequence[ScoredToken], top: int) -> Json:
    """The legacy one: four lists. The likeliest tokens are `top` and the chosen one, if it is not among them."""
    return {
        "tokens": [token_text(tokenizer, s.token) for s in scored],
        "token_logprobs": [s.logprob and _number(s.logprob.logprob) for s in scored],
        "top_logprobs": [s.logprob and _by_text(tokenizer, s.token, s.logprob, top) for s in scored],
        "text_offset": [s.offset for s in scored],
    }


def prompt_shape(tokenizer: Tokenizer, prompt: Sequence[int], logprobs: Sequence[TokenLogprob], top: int) -> list[Any]:
    """vLLM's prompt_logprobs: for each token of the prompt, an object by token id; null for the first."""
    shaped: list[Json | None] = [None]
    for token, found in zip(prompt[1:], logprobs, strict=True):
        entries = {token: (found.logprob, found.rank)}
        for rank, pair in enumerate(zip(found.top_tokens[:top], found.top_logprobs, strict=False), 1):
            entries.setdefault(pair[0], (pair[1], rank))
        shaped.append(
            {
                str(t): {"logprob": _number(p), "rank": rank, "decoded_token": token_text(tokenizer, t)}
                for t, (p, rank) in entries.items()
            }
        )
    return shaped


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""As OpenAI writes it: a token that is no whole text is spelled bytes:\xe6\x97, so that no two look alike."""
    raw = tokenizer.bytes_of(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def is_broken(output: Output) -> bool:
    """Whether the model has not computed numbers, as far as the output tells."""
    return any(isnan(one.logprob) for one in (*(output.logprobs or ()), *(output.prompt_logprobs or ())))


def _number(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST  # also for NaN


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> Json:
    raw = list(tokenizer.bytes_of(token))
    return {"token": token_text(tokenizer, token), "logprob": _number(logprob), "bytes": raw}


def _by_text(tokenizer: Tokenizer, token: int, logprob: TokenLogprob, top: int) -> Json:
    pairs = list(zip(logprob.top_tokens[:top], logprob.top_logprobs, strict=False))
    named: Json = {}
    for one, value in [*pairs, (token, logprob.logprob)]:
        named.setdefault(token_text(tokenizer, one), _number(value))
    return named
