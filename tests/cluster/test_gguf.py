"""A GGUF file served under Ray, over HTTP."""

from pathlib import Path

import pytest

from stepladder import LLM, SamplingParams
from stepladder.launch.private_ray import PrivateRay
from tests.cluster.jobs import submit
from tests.gguf_files import Q8_0, byte_level, write_checkpoint, write_gguf

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"


def test_what_a_gguf_file_says_over_http(cluster: PrivateRay, tmp_path: Path) -> None:
    """Driver, gateway and two ranks of one node share what the file was converted to, once."""
    tokenizer = byte_level(chat_template=TEMPLATE)
    path = write_gguf(tmp_path / "tiny.gguf", write_checkpoint(tmp_path, "qwen2"), Q8_0, tokenizer)
    cache, chat = tmp_path / "models", [{"role": "user", "content": "hello world"}]
    with submit(cluster, "gguf", path, tmp_path / "run", f"model.cache={cache}") as job:
        got = job.client.chat.completions.create(
            model="tiny",
            messages=chat,
            max_tokens=16,
            temperature=0,  # type: ignore[arg-type]
        )
    [folder] = [found for found in cache.iterdir() if found.is_dir()]
    [want] = LLM(str(folder), "cpu").chat(chat, SamplingParams(max_tokens=16, temperature=0.0))
    assert got.choices[0].message.content == want.text and len(want.tokens) > 3
    assert got.usage and got.usage.completion_tokens == len(want.tokens)
