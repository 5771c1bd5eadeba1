"""SmolLM2 as a user serves it, `ray job submit ... model=smollm2 layout.tp=2`, talked to with OpenAI's client."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stepladder import LLM, SamplingParams
from stepladder.launch.private_ray import PrivateRay
from tests.cluster.jobs import Job, submit
from tests.smollm2 import smollm2_in

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SYSTEM = {"role": "system", "content": "You are a helpful assistant. Answer in one short sentence."}
TURNS = ("What is the capital of France?", "And of Italy?", "Which of the two is larger?")


def ask(job: Job, messages: list[Any], stream: bool, **options: Any) -> tuple[str, str | None]:
    """The answer's text and why it ended."""
    create = job.client.chat.completions.create
    if not stream:
        choice = create(model="smollm2", messages=messages, **options).choices[0]
        return choice.message.content or "", choice.finish_reason
    chunks = [chunk.choices[0] for chunk in create(model="smollm2", messages=messages, stream=True, **options)]
    return "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason


def test_a_conversation(cluster: PrivateRay, tmp_path: Path) -> None:
    """Several turns behind a system prompt: each ends at the template's end token, says what `LLM` says to the very
    tokens of `transformers`' template, and is the same text streamed and whole, greedy and sampled."""
    cache = Path("~/.cache/stepladder/models").expanduser()
    directory = smollm2_in(cache)
    theirs, llm = AutoTokenizer.from_pretrained(directory), LLM(str(directory), "cpu", kv_tokens=4096)
    with submit(cluster, "smollm2", "smollm2", tmp_path / "run") as job:
        messages: list[dict[str, str]] = [SYSTEM]
        for turn in TURNS:
            messages.append({"role": "user", "content": turn})
            text, reason = ask(job, messages, stream=False, temperature=0, max_tokens=80)
            assert ask(job, messages, stream=True, temperature=0, max_tokens=80) == (text, reason)
            prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            [want] = llm.generate([prompt], SamplingParams(max_tokens=80, temperature=0.0))
            assert (text, reason) == (want.text, "stop"), "an answer ends at <|im_end|>"
            assert want.tokens[-1] == theirs.convert_tokens_to_ids("<|im_end|>") and "<|" not in text
            messages.append({"role": "assistant", "content": text})
        assert "Paris" in messages[2]["content"] and "Rome" in messages[4]["content"]
        sampled = [ask(job, messages[:2], stream, temperature=0.8, seed=7, max_tokens=60) for stream in (False, True)]
        assert sampled[0] == sampled[1] and sampled[0][0]
