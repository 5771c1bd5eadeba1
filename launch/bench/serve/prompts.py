"""What the load consists of: prompts of exact token lengths, or those of a file."""

import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Where prompts come from.

    Attributes:
        dataset: a JSONL file with {"prompt": text or token ids} or {"messages": [...]}, and "output_tokens" if it
            likes; lines are taken in turn. None: random words.
        input_tokens, output_tokens: of one request. spread: lengths vary uniformly by up to this share of them.
        prefix_tokens: of the input, the first so many are the same in every request.
    """

    dataset: str | None = None
    input_tokens: int = 128
    output_tokens: int = 64
    spread: float = 0.0
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.input_tokens < 1 or self.output_tokens < 1:
            raise ValueError("prompts.input_tokens and prompts.output_tokens must be at least 1")
        if not 0 <= self.spread < 1:
            raise ValueError(f"prompts.spread is {self.spread}; it must be at least 0 and below 1")
        if not 0 <= self.prefix_tokens <= self.input_tokens * (1 - self.spread):
            raise ValueError("prompts.prefix_tokens must be at most the shortest input")


@dataclass(frozen=True)
class Prompt:
    """fields: of the request body, {"prompt": ...} or {"messages": ...}."""

    fields: dict[str, Any]
    output_tokens: int

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if "messages" in self.fields else "/v1/completions"


async def prompts(
    config: PromptConfig, count: int, seed: int, tokenize: Callable[[str], Awaitable[list[int]]]
) -> list[Prompt]:
    """`count` requests, the same for the same seed.

    Raises:
        ValueError: the dataset is unusable.
    """
    if config.dataset is not None:
        lines = from_file(Path(config.dataset), config.output_tokens)
        return [lines[index % len(lines)] for index in range(count)]
    draw = random.Random(seed)
    inputs = [_length(draw, config.input_tokens, config.spread) for _ in range(count)]
    outputs = [_length(draw, config.output_tokens, config.spread) for _ in range(count)]
    tokens = await _random_tokens(draw, sum(inputs) + config.prefix_tokens, tokenize)
    prefix, tokens = tokens[: config.prefix_tokens], tokens[config.prefix_tokens :]
    made = []
    for length, output in zip(inputs, outputs, strict=True):
        own = length - len(prefix)
        made.append(Prompt({"prompt": prefix + tokens[:own]}, output))
        tokens = tokens[own:]
    return made


def from_file(path: Path, output_tokens: int) -> list[Prompt]:
    if not path.is_file():
        raise ValueError(f"prompts.dataset: there is no file {path}")
    made = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            fields = {key: line[key] for key in ("prompt", "messages") if key in line}
            if len(fields) != 1:
                raise ValueError("give either prompt or messages")
            made.append(Prompt(fields, int(line.get("output_tokens", output_tokens))))
        except (ValueError, TypeError) as error:
            raise ValueError(f"prompts.dataset: {path} line {number}: {error}") from None
    if not made:
        raise ValueError(f"prompts.dataset: {path} is empty")
    return made


async def _random_tokens(
    draw: random.Random, count: int, tokenize: Callable[[str], Awaitable[list[int]]], at_once: int = 20_000
) -> list[int]:
    """Exactly `count` token ids of random words."""
    tokens: list[int] = []
    while len(tokens) < count:
        tokens += await tokenize(" ".join(_word(draw) for _ in range(min(at_once, count))))
    return tokens[:count]


def _word(draw: random.Random) -> str:
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(draw.randint(1, 3)))


def _length(draw: random.Random, mean: int, spread: float) -> int:
    return max(1, round(mean * draw.uniform(1 - spread, 1 + spread)))
