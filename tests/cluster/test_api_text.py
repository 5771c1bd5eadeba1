"""Prompts become tokens and tokens text as `transformers` has it, over HTTP, in streams and with `LLM` alike."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stepladder import LLM, SamplingParams
from tests.cluster.models import WORDS, write_cycle, write_words
from tests.cluster.serving import Server, serve

pytestmark = pytest.mark.timeout(60)
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
GREEDY: dict[str, Any] = {"model": "org/tiny", "temperature": 0}
PROMPT, REST = "The capital of France is", " Paris, and The capital"


@pytest.fixture(scope="module")
def words_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cycle(tmp_path_factory.mktemp("words"), WORDS, write_words)


@pytest.fixture(scope="module")
def words(words_model: Path) -> Iterator[Server]:
    """A SentencePiece-like tokenizer; greedy text is WORDS again and again."""
    with serve(words_model) as server:
        yield server


def both(server: Server, path: str, body: dict[str, Any]) -> str:
    """The text of a whole answer, which must be that of the stream."""
    whole = server.post(path, body).json()["choices"][0]
    text = whole["text"] if path == COMPLETION else whole["message"]["content"]
    chunks = [chunk["choices"][0] for chunk in server.events(path, body)]
    assert text == "".join(c["text"] if path == COMPLETION else c["delta"].get("content", "") for c in chunks)
    return text


def test_the_space_before_the_first_word_is_kept(words: Server, words_model: Path) -> None:
    """The texts of prompt and answer join to what transformers decodes."""
    oracle = AutoTokenizer.from_pretrained(words_model)
    body = {**GREEDY, "max_tokens": 5}
    assert oracle.decode(oracle.encode(PROMPT + REST), skip_special_tokens=True) == PROMPT + REST
    for prompt in (PROMPT, oracle.encode(PROMPT)):
        assert both(words, COMPLETION, body | {"prompt": prompt}) == REST
        assert both(words, COMPLETION, body | {"prompt": prompt, "n": 1, "echo": True}) == PROMPT + REST
        assert both(words, COMPLETION, body | {"prompt": prompt, "stop": " Paris"}) == ""
    messages = [{"role": "user", "content": PROMPT}]
    assert both(words, CHAT, body | {"messages": messages}) == REST
    llm, greedy = LLM(str(words_model), device="cpu"), SamplingParams(max_tokens=5, temperature=0.0)
    assert [one.text for one in llm.generate([PROMPT, oracle.encode(PROMPT)], greedy)] == [REST] * 2
    assert llm.chat(messages, greedy)[0].text == REST


def test_echoed_offsets_are_those_of_the_text(words: Server, server: Server) -> None:
    """Special tokens of a written prompt have their width, those that the tokenizer adds have none."""
    body = {**GREEDY, "echo": True, "logprobs": 0, "max_tokens": 0}
    for prompt, offsets in (("<|user|>\nhi", [0, 8, 9, 10]), ("<|user|><|end|>é", [0, 8, 15, 15])):
        choice = server.post(COMPLETION, body | {"prompt": prompt}).json()["choices"][0]
        assert (choice["text"], choice["logprobs"]["text_offset"]) == (prompt, offsets)
    ids = server.service.tokenizer.encode("<|user|>\nhi")
    left_out = server.post(COMPLETION, body | {"prompt": ids}).json()["choices"][0]
    assert (left_out["text"], left_out["logprobs"]["text_offset"]) == ("\nhi", [0, 0, 1, 2])
    written = server.post(COMPLETION, body | {"prompt": ids, "skip_special_tokens": False}).json()["choices"][0]
    assert (written["text"], written["logprobs"]["text_offset"]) == ("<|user|>\nhi", [0, 8, 9, 10])
    choice = words.post(COMPLETION, body | {"prompt": "The capital of", "max_tokens": 2}).json()["choices"][0]
    assert choice["text"] == "The capital of France is"
    assert choice["logprobs"]["text_offset"] == [0, 0, 3, 11, 14, 21]


def test_an_echo_goes_on_within_a_character(cycle: Server) -> None:
    ids = cycle.service.tokenizer.encode("aé日🚀")
    for cut in range(1, len(ids)):
        body = {**GREEDY, "prompt": ids[:cut], "echo": True, "max_tokens": len(ids) - cut}
        assert both(cycle, COMPLETION, body) == "aé日🚀"


def test_tokens_around_a_text_can_be_left_out(words: Server) -> None:
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 1}
    counts = [
        words.post(COMPLETION, body | fields).json()["usage"]["prompt_tokens"]
        for fields in ({}, {"add_special_tokens": True}, {"add_special_tokens": False})
    ]
    assert counts == [6, 6, 5]
    scored = body | {"echo": True, "logprobs": 0, "add_special_tokens": False}
    assert words.post(COMPLETION, scored).json()["choices"][0]["logprobs"]["text_offset"] == [0, 3, 11, 14, 21, 24]


def test_special_tokens_are_written_out_where_asked(tmp_path: Path) -> None:
    model = write_cycle(tmp_path, "The capital</s> of France", write_words)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with serve(model) as server:
        body = {**GREEDY, "prompt": "The", "max_tokens": 4}
        assert both(server, COMPLETION, body) == " capital of France"
        assert both(server, COMPLETION, body | {"skip_special_tokens": False}) == " capital</s> of France"
        stopped = body | {"skip_special_tokens": False, "stop": ["s> of"]}
        assert both(server, COMPLETION, stopped) == " capital</"
    params = SamplingParams(max_tokens=4, temperature=0.0, skip_special_tokens=False)
    assert LLM(str(model), device="cpu").generate("The", params)[0].text == " capital</s> of France"


def test_the_end_that_only_the_tokenizer_names_ends_a_chat(tmp_path: Path) -> None:
    model = write_cycle(tmp_path, "The capital</s> of France", write_words)
    messages = [{"role": "user", "content": "of The"}]
    with serve(model) as server:
        answer = server.post(CHAT, {**GREEDY, "messages": messages, "max_tokens": 9}).json()["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == (" capital", "stop")
        on = {**GREEDY, "messages": messages, "max_tokens": 4, "ignore_eos": True}
        assert both(server, CHAT, on) == " capital of France"
    [one] = LLM(str(model), device="cpu").chat(messages, SamplingParams(max_tokens=9, temperature=0.0))
    assert (one.text, one.finish_reason) == (" capital", "stop")


def test_many_stop_strings(words: Server) -> None:
    """lm-eval sends five, others more."""
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 8, "stop": [*(f"no{n}" for n in range(63)), " and"]}
    assert both(words, COMPLETION, body) == " Paris,"
