"""`stepladder.LLM`, text to text, against `transformers`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from stepladder import LLM, SamplingParams
from tests.llama import oracle_greedy, oracle_logits, read_llama, write_llama
from tests.tokenizers_of import write_byte_level

PROMPTS = [
    "x",
    "def main():\n    return",
    "The quick brown fox jumps over the lazy dog. STOP here",
    "日本語 😀",
    "naïve",
]
GREEDY = SamplingParams(max_tokens=48, temperature=0.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llm")
    write_byte_level(directory, vocab_size=320)
    return write_llama(directory, seed=4, vocab_size=320)


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return LLM(str(path), device="cpu", kv_tokens=512, max_sequences=3, max_step_tokens=16)


@pytest.fixture(scope="module")
def oracle(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    return read_llama(path), PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))


def test_greedy_text_equals_transformers(llm: LLM, oracle: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = oracle
    completions = llm.generate(PROMPTS, GREEDY)
    for prompt, got in zip(PROMPTS, completions, strict=True):
        want = oracle_greedy(model, tokenizer(prompt)["input_ids"], 48)
        assert got.tokens == want and got.prompt == prompt and got.finish_reason == "length"
        assert got.text == tokenizer.decode(want, skip_special_tokens=True)
        assert len(set(want)) > 8, "degenerate text proves little"


def test_stop_strings_end_the_text_before_them(llm: LLM) -> None:
    free = llm.generate(PROMPTS, GREEDY)
    for prompt, full in zip(PROMPTS, free, strict=True):
        at = len(full.text) // 2
        stop = full.text[at : at + 3]
        if "\ufffd" in full.text[: at + 4]:
            stop = full.text.replace("\ufffd", "")[:1]  # of broken characters not even the number is certain
        params = SamplingParams(max_tokens=48, temperature=0.0, stop=(stop, "never to be seen"))
        [cut] = llm.generate([prompt], params)
        assert cut.finish_reason == "stop" and cut.text == full.text.split(stop)[0]
        assert cut.tokens == full.tokens[: len(cut.tokens)] and len(cut.tokens) < len(full.tokens)
    assert not llm.engine.has_work and llm.engine.scheduler.blocks.num_free == llm.engine.config.num_blocks


def test_end_of_sequence_ends_the_text(path: Path, tmp_path: Path, llm: LLM) -> None:
    tokens = llm.generate(PROMPTS[:1], GREEDY)[0].tokens
    eos = tokens[20]
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (path / "config.json").read_text().replace('"eos_token_id": null', f'"eos_token_id": [{eos}, 5]')
    assert str(eos) in config
    (tmp_path / "config.json").write_text(config)
    ending = LLM(str(tmp_path), device="cpu", kv_tokens=512)
    [got] = ending.generate(PROMPTS[:1], GREEDY)
    assert got.finish_reason == "stop" and got.tokens == tokens[: tokens.index(eos) + 1]
    [got] = ending.generate(PROMPTS[:1], SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True))
    assert got.finish_reason == "length" and got.tokens == tokens


def test_seeds_reproduce_and_differ(path: Path, llm: LLM) -> None:
    params = SamplingParams(max_tokens=24, temperature=1.0, top_p=0.95, seed=12)
    once, again = llm.generate(PROMPTS, params), llm.generate(list(reversed(PROMPTS)), params)
    assert once == again[::-1]
    wide = LLM(str(path), device="cpu", kv_tokens=2048)
    assert wide.generate(PROMPTS, params) == once
    other = llm.generate(PROMPTS, SamplingParams(max_tokens=24, temperature=1.0, top_p=0.95, seed=13))
    assert all(a.tokens != b.tokens for a, b in zip(once, other, strict=True))


def test_without_parameters_the_models_own_defaults_hold(path: Path, tmp_path: Path, llm: LLM) -> None:
    model = Path(shutil.copytree(path, tmp_path / "model"))
    recommended = {"temperature": 0.6, "top_k": 9, "repetition_penalty": 1.3, "max_new_tokens": 40}
    (model / "generation_config.json").write_text(json.dumps(recommended))
    advised = LLM(str(model), device="cpu", kv_tokens=100)
    params = SamplingParams(temperature=0.6, top_k=9, repetition_penalty=1.3, max_tokens=40)
    assert advised.defaults == params
    assert advised.generate(PROMPTS) == list(dict(sorted(advised.stream(PROMPTS))).values())
    assert advised.generate(PROMPTS) == llm.generate(PROMPTS, params) != llm.generate(PROMPTS)
    [near] = advised.generate(["x" * 80])
    assert len(near.tokens) == 96 - len(llm.tokenizer.encode(near.prompt)) < 40, "as far as the context goes"
    assert advised.generate(PROMPTS[:1], SamplingParams())[0].tokens == llm.generate(PROMPTS[:1])[0].tokens


def test_streams_yield_each_completion_once(llm: LLM) -> None:
    done = list(llm.stream(PROMPTS, GREEDY))
    assert sorted(index for index, _ in done) == list(range(len(PROMPTS)))
    assert [completion for _, completion in sorted(done, key=lambda pair: pair[0])] == llm.generate(PROMPTS, GREEDY)
    assert llm.generate([], GREEDY) == []


def idle(llm: LLM) -> bool:
    llm.engine.scheduler.check_integrity()
    return not llm.engine.has_work and llm.engine.scheduler.blocks.num_free == llm.engine.config.num_blocks


def test_a_prompt_that_does_not_fit_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(ValueError, match="together they exceed"):
        llm.generate(["short", "x" * 300, "short"], GREEDY)
    assert idle(llm) and not llm._growing
    assert llm.generate(PROMPTS[:1], GREEDY)[0].tokens


def test_an_abandoned_stream_aborts_its_requests(llm: LLM) -> None:
    params = [GREEDY, SamplingParams(max_tokens=100, temperature=0.0)]
    wanted = llm.generate(PROMPTS, GREEDY)
    abandoned, other = llm.stream(PROMPTS, params[1]), llm.stream(PROMPTS, GREEDY)
    next(abandoned)
    first = next(other)
    abandoned.close()
    got = dict([first, *other])
    assert [got[index] for index in range(len(PROMPTS))] == wanted
    assert idle(llm) and not llm._growing


def test_streams_can_be_read_in_turn(llm: LLM) -> None:
    """Each gets its own completions, whoever makes the engine step."""
    both = zip(llm.stream(PROMPTS, GREEDY), llm.stream(PROMPTS[::-1], GREEDY), strict=True)
    left, right = map(dict, zip(*both, strict=True))
    wanted = llm.generate(PROMPTS, GREEDY)
    assert [left[i] for i in range(5)] == wanted == [right[4 - i] for i in range(5)] and idle(llm)


def test_logprobs(llm: LLM, oracle: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    params = SamplingParams(max_tokens=9, temperature=0.7, seed=2, top_k=20, logprobs=2, prompt_logprobs=1)
    for got in llm.generate(PROMPTS, params):
        prompt = llm.tokenizer.encode(got.prompt)
        logits = oracle_logits(oracle[0], prompt + got.tokens).log_softmax(-1)
        assert got.logprobs and got.prompt_logprobs and got.prompt_logprobs[0] is None
        found = [*got.prompt_logprobs[1:], *got.logprobs]
        for position, (one, token) in enumerate(zip(found, [*prompt[1:], *got.tokens], strict=True)):
            assert one and one.logprob == pytest.approx(float(logits[position, token]), abs=1e-4)
            assert one.top_tokens[0] == int(logits[position].argmax())
    [plain] = llm.generate(PROMPTS[:1], GREEDY)
    assert plain.logprobs is None and plain.prompt_logprobs is None


def test_stop_tokens_end_the_text_and_are_no_part_of_it(llm: LLM) -> None:
    [free] = llm.generate(PROMPTS[1:2], GREEDY)
    at = next(i for i, token in enumerate(free.tokens) if i > 5 and token not in free.tokens[:i])
    fields = {"max_tokens": 48, "temperature": 0.0, "stop_token_ids": (free.tokens[at],), "ignore_eos": True}
    [cut] = llm.generate(PROMPTS[1:2], SamplingParams(**fields))  # type: ignore[arg-type]
    assert cut.finish_reason == "stop" and cut.tokens == free.tokens[: at + 1]
    assert cut.text == llm.tokenizer.decode(free.tokens[:at])
    [kept] = llm.generate(PROMPTS[1:2], SamplingParams(**fields, include_stop_str_in_output=True))  # type: ignore[arg-type]
    assert kept.text == llm.tokenizer.decode(free.tokens[: at + 1])
    [later] = llm.generate(PROMPTS[1:2], SamplingParams(**fields, min_tokens=at + 1))  # type: ignore[arg-type]
    assert later.tokens[:at] == free.tokens[:at] and later.tokens[at] != free.tokens[at]


def test_what_does_not_fit_is_a_sentence(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"the prompt has 1 tokens and max_tokens is 256; together they exceed .* 256"):
        llm.generate(["x"], SamplingParams(max_tokens=256))
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.generate([""])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -0.1}, r"temperature is -0\.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"stop": ("",)}, "stop holds an empty string"),
    ],
)
def test_parameters_out_of_range_are_a_sentence(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(**fields)  # type: ignore[arg-type]


def test_limits_are_a_sentence(path: Path) -> None:
    sentence = r"the KV cache holds 96 tokens in blocks of 16, fewer .* raise kv\.tokens or lower engine\.max_model_len"
    with pytest.raises(ValueError, match=sentence):
        LLM(str(path), device="cpu", kv_tokens=100, max_model_len=100)
    assert LLM(str(path), device="cpu", kv_tokens=100).engine.config.max_model_len == 96
    with pytest.raises(ValueError, match="nowhere' is not a directory"):
        LLM(str(path / "nowhere"))


def test_a_model_in_bfloat16(path: Path, tmp_path: Path, oracle: tuple[LlamaForCausalLM, object]) -> None:
    """Same text for the first tokens; bf16 rounds to 8 bits, so it may part later."""
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text((path / "config.json").read_text().replace('"float32"', '"bfloat16"'))
    small = LLM(str(tmp_path), device="cpu", kv_tokens=512)
    assert next(small.engine.executor.model.parameters()).dtype == torch.bfloat16  # type: ignore[attr-defined]
    [got] = small.generate(PROMPTS[2:3], SamplingParams(max_tokens=8, temperature=0.0))
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager")
    assert got.tokens[0] == oracle_greedy(model, small.tokenizer.encode(PROMPTS[2]), 1)[0]


PARAMS = SamplingParams(max_tokens=6, temperature=0.0)


def test_one_string_is_one_prompt_and_so_are_its_tokens(llm: LLM) -> None:
    (text,) = llm.generate("def main():", PARAMS)
    assert text == llm.generate(["def main():"], PARAMS)[0]
    ids = llm.tokenizer.encode("def main():")
    assert llm.generate(ids, PARAMS) == llm.generate([tuple(ids)], PARAMS) == [text]
    mixed = llm.generate(["import os", ids], PARAMS)
    assert mixed[1] == text and mixed[0] == llm.generate("import os", PARAMS)[0]
    assert llm.generate([], PARAMS) == []


@pytest.mark.parametrize("wrong", [-1, 2**31, 2**40, 10**30])
def test_ids_that_the_model_has_not_are_a_sentence_and_leave_nothing_behind(llm: LLM, wrong: int) -> None:
    for prompts in ([wrong, 5], [5, wrong], [[5], [wrong]], ["import os", (5, wrong)]):
        with pytest.raises(ValueError, match="the prompt holds a token id outside of 0 to"):
            llm.generate(prompts, PARAMS)
        assert not llm.under_way and not llm.engine.has_work


@pytest.mark.parametrize("wrong", [5, None, [None], [1.5], [[1.5]], [[1, "a"]], [[True]], [1, [2]], [5, None]])
def test_prompts_of_wrong_types_are_a_sentence(llm: LLM, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"give texts or lists of token ids|must be a text or a list of token ids"):
        llm.generate(wrong, PARAMS)
    assert not llm.under_way


@pytest.mark.parametrize("wrong", [5, [5], "greedy", {"max_tokens": 3}])
def test_params_of_wrong_types_are_a_sentence(llm: LLM, wrong: Any) -> None:
    with pytest.raises(ValueError, match="give SamplingParams, or a list of them"):
        llm.generate("a", wrong)


@pytest.mark.parametrize("wrong", [5, None, "hi", [5], [None], [["hi"]], [{"role": "user", "content": "a"}, 5]])
def test_conversations_of_wrong_types_are_a_sentence(llm: LLM, wrong: Any) -> None:
    with pytest.raises(ValueError, match="give messages, or lists of messages"):
        llm.chat(wrong)


def test_each_prompt_may_have_params_of_its_own(llm: LLM) -> None:
    asked = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (2, 5)]
    assert [len(one.tokens) for one in llm.generate(["import os", "import os"], asked)] == [2, 5]
    with pytest.raises(ValueError, match="there are 2 params for 1 prompts; give one, or one for each"):
        llm.generate("import os", asked)


def test_chat_is_the_template_and_then_generate() -> None:
    llm = LLM("launch/demo_model", kv_tokens=2048, max_model_len=512)
    one, other = ([{"role": "user", "content": text}] for text in ("hello", "what is a list?"))
    prompts = [llm.tokenizer.encode(llm.tokenizer.chat(c), add_special_tokens=False) for c in (one, other)]
    wanted = [completion.tokens for completion in llm.generate(prompts, PARAMS)]
    assert [completion.tokens for completion in llm.chat([one, other], PARAMS)] == wanted
    assert [completion.tokens for completion in llm.chat(one, PARAMS)] == wanted[:1]
    assert llm.chat(one, PARAMS)[0].prompt == llm.tokenizer.chat(one)


def test_a_progress_bar_is_shown_if_asked_for(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], PARAMS)
    assert capsys.readouterr().err == ""
    llm.generate(["a", "b"], PARAMS, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_further_choices_differ_by_their_seed_and_are_not_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 choices with a thousand biases held a gateway's loop for as long as judging each of them took."""
    params = SamplingParams(logit_bias={3: 1.0}, stop_token_ids=(4,), seed=2**63 - 2)
    monkeypatch.setattr(SamplingParams, "__post_init__", lambda self: pytest.fail("it is judged"))
    found = [params.choice(nth) for nth in range(3)]
    assert [one.seed for one in found] == [2**63 - 2, 2**63 - 1, -(2**63)] and params.seed == 2**63 - 2
    assert all((one.logit_bias, one.stop_token_ids) == ({3: 1.0}, (4,)) for one in found)


def test_half_a_character_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="not valid Unicode at character 1"):
        llm.generate("a\ud800")
    assert not llm.under_way and llm.generate("a", GREEDY)[0].tokens


def test_a_token_that_only_the_configuration_names_is_beyond_this_model(path: Path, tmp_path: Path) -> None:
    """Which gives it the next id, as `transformers` does; it has no embedding."""
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    (copy / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    with pytest.raises(ValueError, match="outside of 0 to 319, the model's vocabulary"):
        LLM(str(copy), device="cpu", kv_tokens=512).generate("a [PAD]", GREEDY)
