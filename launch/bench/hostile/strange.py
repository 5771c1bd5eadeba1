"""Values and names that are not what a field should hold, and those that could be and ask for much."""

import math
from random import Random
from typing import Any

NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 7, 128, 129, 1024, 2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1,
    2**64, -(2**63), -(2**63) - 1, 10**30, 10**400, -(10**400), 0.0, -0.0, 0.5, 1.0, 1.5, -1e-300, 5e-324, 1e300, 1e308,
    -1e308, math.nan, math.inf, -math.inf, True, False,
)  # fmt: skip
TEXTS = (
    "", " ", "a", "1", "-1", "NaN", "null", "true", "\x00", "\u00e9", "\U0001f600", "\ud800", "a\udfffb", "\u202e",
    "\n", "{{", "{% raw %}", "{{ 1/0 }}", "<|endoftext|>", "<|im_start|>system", "<s>", "..", "../..", "%s%n",
    "a" * 257, "a" * 5000, "\u4e00" * 3000, "a " * 4000, "\u0301" * 2000, "\U0001f468\u200d\U0001f469" * 300,
)  # fmt: skip
NAMES = (*TEXTS[:24], "role", "content", "type", "text", "0", str(2**64), "1e5", "__class__", "x" * 300)
PLAUSIBLE: dict[str, tuple[Any, ...]] = {
    "n": (1, 2, 8, 64, 128),
    "max_tokens": (0, 1, 2, 16, 64, 1000, 1024),
    "max_completion_tokens": (1, 16, 1023),
    "min_tokens": (0, 1, 4, 16),
    "temperature": (0, 1e-9, 0.7, 1.0, 2.0, 100.0),
    "top_p": (1e-9, 0.5, 1.0),
    "top_k": (-1, 0, 1, 50, 10**6),
    "min_p": (0.0, 0.5, 1.0),
    "repetition_penalty": (1e-9, 1.0, 2.0, 1e6),
    "presence_penalty": (-2.0, 0.0, 2.0),
    "frequency_penalty": (-2.0, 0.0, 2.0),
    "logit_bias": ({}, {"1": 100}, {"65": -100, "66": -100}, {"0": 1e30}, {str(i): -100.0 for i in range(250)}),
    "seed": (0, -1, 2**63 - 1, -(2**63)),
    "stop": ("a", ["a", "b"], [" "], ["\n", "x", "y", "z"], "a" * 256),
    "stop_token_ids": ([], [0], [1, 2, 3], list(range(200))),
    "include_stop_str_in_output": (True,),
    "ignore_eos": (True,),
    "logprobs": (True, 0, 1, 5, 20),
    "top_logprobs": (0, 5, 20),
    "prompt_logprobs": (0, 1, 20),
    "echo": (True, True, False),
    "stream": (True, False),
    "stream_options": ({"include_usage": True}, {"continuous_usage_stats": True}, {}),
    "timeout": (1e-9, 0.001, 0.5, 60),
    "prompt": ([1], [[1], [2]], ["a", "b"], list(range(200)) * 5, "a" * 900, [[65] * 500] * 8, "\x00"),
    "add_special_tokens": (True, False),
}


def any_value(rng: Random, depth: int = 0) -> Any:
    """Anything that JSON, as Python writes it, can hold. A string such as "<list 9000>" stands for a nest so deep."""
    kind = rng.randrange(10 if depth < 3 else 6)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(TEXTS)
    if kind == 5:
        return None
    if kind == 6:
        return f"<{rng.choice(['list', 'object'])} {rng.choice([5, 50, 500, 5000, 30_000])}>"
    if kind == 7:
        one = any_value(rng, depth + 1)
        return [one] * rng.choice([1, 2, 5, 1 if isinstance(one, str | list | dict) else 5000])
    if kind == 8:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {any_name(rng): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def any_name(rng: Random) -> str:
    return rng.choice(NAMES)
