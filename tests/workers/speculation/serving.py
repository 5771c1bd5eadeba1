"""Sixteen requests of every kind, and an engine that serves them with a drafter or without."""

import random
from dataclasses import replace
from typing import Any

from stepladder.workers.core import Request, SamplingParams, TokenLogprob
from stepladder.workers.engine import Engine
from stepladder.workers.executor import Executor
from stepladder.workers.limits import SchedulerConfig
from stepladder.workers.speculation.config import SpeculateConfig
from stepladder.workers.speculation.drafter import Drafter
from stepladder.workers.speculation.learning.capture import Capture
from stepladder.workers.speculation.speculator import Speculator

LIMITS = SchedulerConfig(
    max_sequences=8, max_step_tokens=64, max_model_len=128, num_blocks=96, block_size=8, eos_ids=(7,)
)
Texts = dict[str, tuple[list[int], str, list[TokenLogprob], list[TokenLogprob]]]


def requests() -> list[Request]:
    dice = random.Random(3)
    beginning = [dice.randrange(101) for _ in range(24)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 20, "logprobs": 0},
        {"temperature": 0.7, "min_p": 0.05, "min_tokens": 12},
        {"temperature": 0.0, "repetition_penalty": 1.3, "min_tokens": 5},
        {"temperature": 1.0, "presence_penalty": 0.8, "frequency_penalty": 0.4, "logprobs": 1},
        {"temperature": 1.0, "logit_bias": {3: 4.0, 9: -50.0}, "stop_token_ids": (3, 11)},
    ]
    made = []
    for index, kind in enumerate(kinds * 2):
        prompt = [*beginning[: 24 * (index % 3 > 0)], *(dice.randrange(101) for _ in range(dice.randrange(1, 30)))]
        kind = {"max_tokens": dice.randrange(10, 40), "seed": index, "ignore_eos": index % 5 == 0, **kind}
        made.append(Request(id=str(index), prompt=tuple(prompt), params=SamplingParams(**kind)))
    return made


def serve(
    executor: Executor,
    made: list[Request],
    drafter: Drafter | None = None,
    k: int | None = None,
    capture: Capture | None = None,
    **limits: Any,
) -> tuple[Texts, Engine]:
    engine = Engine(replace(LIMITS, **limits), executor)
    engine.speculate(Speculator(drafter, SpeculateConfig(k=k, rule="coupled"), engine.stats) if drafter else None)
    engine.capture = capture
    texts: Texts = {request.id: (list(request.output), "", [], []) for request in made}
    for request in made:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            tokens, _, logprobs, prompt = texts[output.id]
            tokens.extend(output.tokens)
            logprobs.extend(output.logprobs or ())
            texts[output.id] = (tokens, output.finish_reason or "", logprobs, output.prompt_logprobs or prompt)
        engine.scheduler.check_integrity()
    assert engine.scheduler.blocks.num_free == engine.config.num_blocks
    return texts, engine
