"""Offline generation: what it writes, and that a kill costs nothing but the time."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from stepladder import LLM, SamplingParams
from stepladder.cluster.config import ModelConfig
from stepladder.launch.generate import TERMINATED, GenerateConfig, generate
from stepladder.launch.prompts import OutputFile
from stepladder.workers.config import EngineConfig, KvConfig
from tests.cluster.models import write_random

ROOT = Path(__file__).parents[2]
LIMITS, KV = EngineConfig(max_sequences=4, max_step_tokens=64), KvConfig(tokens=2048)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("model"))


def config(model: Path, prompts: Path, **options: Any) -> GenerateConfig:
    given = {"sampling": {"max_tokens": 12, "temperature": 0.0}, "output": f"{prompts}.out", **options}
    return GenerateConfig(
        model=ModelConfig(path=str(model), name="tiny"),
        prompts=str(prompts),
        device="cpu",
        engine=LIMITS,
        kv=KV,
        **given,
    )


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows(path: str | Path) -> dict[int, dict[str, Any]]:
    found = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert len({row["index"] for row in found}) == len(found), "a row was written twice"
    return {row["index"]: row for row in found}


def test_a_line_may_ask_for_a_form(model: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "structured_outputs": {"choice": ["yes", "no"], "regex": None, "json": None}},
        {"prompt": "b", "structured_outputs": {"json": {"type": "strin"}}},
        {"prompt": "c"},
    ]
    wanted = config(model, write_lines(tmp_path / "p.jsonl", lines))
    assert generate(wanted) == 1
    got = rows(wanted.output)
    assert got[0]["text"] in ("yes", "no") and got[0]["finish_reason"] == "stop" and got[2]["text"]
    assert got[1]["error"] == "json cannot be used: Invalid type: strin"


def test_every_line_gets_its_own_text(model: Path, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "naïve 日本", "id": "first"},
        {"prompt": "one, two", "max_tokens": 5},
        {"messages": [{"role": "user", "content": "hello"}]},
        {"prompt": "again", "temperature": 1.0, "seed": 7, "logit_bias": {"65": 3.5}},
        {"prompt": "again", "temperature": 1.0},
        {"prompt": "again", "temperature": 1.0},
    ]
    wanted = config(model, write_lines(tmp_path / "p.jsonl", lines))
    assert generate(wanted) == 0
    got, llm = rows(wanted.output), LLM(str(model), device="cpu")
    assert set(got) == set(range(6)) and got[0]["id"] == "first" and got[2]["messages"] == lines[2]["messages"]
    params = {0: {}, 1: {"max_tokens": 5}, 3: {"temperature": 1.0, "seed": 7, "logit_bias": {65: 3.5}}}
    params |= {index: {"temperature": 1.0, "seed": index} for index in (4, 5)}
    for index, fields in params.items():
        [alone] = llm.generate(
            [lines[index]["prompt"]], SamplingParams(**{"max_tokens": 12, "temperature": 0.0, **fields})
        )
        assert (got[index]["text"], got[index]["finish_reason"]) == (alone.text, alone.finish_reason)
        assert got[index]["completion_tokens"] == len(alone.tokens)
    assert got[4]["text"] != got[5]["text"], "a line's seed is the run's plus its index"
    assert got[2]["prompt_tokens"] == len(llm.tokenizer.encode(llm.tokenizer.chat(lines[2]["messages"]), False))


def test_what_nobody_asks_for_is_as_the_models_makers_recommend(model: Path, tmp_path: Path) -> None:
    advised = Path(shutil.copytree(model, tmp_path / "model"))
    (advised / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 9, "max_new_tokens": 30}))
    lines = [{"prompt": "one"}, {"prompt": "two", "top_k": 3}, {"prompt": "x" * 1010}, {"prompt": "four", "seed": 1}]
    prompts = write_lines(tmp_path / "p.jsonl", lines)
    sampling = {"temperature": 0.9, "ignore_eos": True, "top_k": None, "max_tokens": None, "seed": 5}
    wanted = config(advised, prompts, sampling=sampling)
    assert generate(wanted) == 0
    llm, got = LLM(str(advised), device="cpu"), rows(wanted.output)
    for index, (top_k, seed, tokens) in enumerate([(9, 5, 30), (3, 6, 30), (9, 7, 14), (9, 1, 30)]):
        params = SamplingParams(temperature=0.9, top_k=top_k, max_tokens=tokens, seed=seed, ignore_eos=True)
        assert got[index]["text"] == llm.generate([lines[index]["prompt"]], params)[0].text
        assert got[index]["completion_tokens"] == tokens
    silent = config(model, prompts, sampling={"ignore_eos": True}, output=str(tmp_path / "silent"))
    assert generate(silent) == 0
    assert [row["completion_tokens"] for _, row in sorted(rows(silent.output).items())] == [256, 256, 14, 256]
    asked = config(model, prompts, sampling={"max_tokens": 256}, output=str(tmp_path / "asked"))
    assert generate(asked) == 1 and "together they exceed" in rows(asked.output)[2]["error"], "it was meant"


def test_plain_text_is_a_prompt_per_line_and_stop_strings_end_it(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("first\n\nthird\n")
    free = config(model, prompts)
    assert generate(free) == 0 and set(rows(free.output)) == {0, 2}
    text = rows(free.output)[0]["text"]
    stop = next(c for c in text[2:] if c.isprintable() and c != "\ufffd")
    sampling = {"max_tokens": 12, "temperature": 0.0, "stop": stop}
    cut = config(model, prompts, sampling=sampling, output=str(tmp_path / "cut"))
    assert generate(cut) == 0
    row = rows(cut.output)[0]
    assert row["text"] == text[: text.index(stop)] and row["finish_reason"] == "stop"


def test_null_is_absent_and_a_byte_order_mark_is_no_text(model: Path, tmp_path: Path) -> None:
    nulls = dict.fromkeys(("temperature", "stop", "seed", "max_tokens", "logit_bias", "structured_outputs", "logprobs"))
    lines = [{"prompt": "a"}, {"prompt": "b", "messages": None, **nulls}]
    wanted = config(model, write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}]))
    assert generate(wanted) == 0
    texts = [row["text"] for _, row in sorted(rows(wanted.output).items())]
    for name, written in (
        ("nulls.jsonl", "".join(json.dumps(line) + "\n" for line in lines)),
        ("mark.jsonl", '\ufeff{"prompt": "a"}\r\n{"prompt": "b"}\r\n'),
        ("mark.txt", "\ufeffa\r\nb\r\n"),
    ):
        (tmp_path / name).write_bytes(written.encode())
        other = config(model, tmp_path / name)
        assert generate(other) == 0
        got = rows(other.output)
        assert [got[n]["text"] for n in (0, 1)] == texts and [got[n]["prompt"] for n in (0, 1)] == ["a", "b"]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_other_encodings_are_one_sentence(model: Path, tmp_path: Path, name: str, encoding: str) -> None:
    prompts = tmp_path / name
    prompts.write_bytes('{"prompt": "é!"}'.encode(encoding))
    with pytest.raises(ValueError, match=f"{name} is not UTF-8 text: .* at byte"):
        generate(config(model, prompts))
    assert list(tmp_path.iterdir()) == [prompts]


@pytest.mark.parametrize(("name", "value"), [("seed", "abc"), ("seed", 1.5), ("temperature", "hot"), ("stop", 5)])
def test_a_wrong_option_is_one_sentence(model: Path, tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^sampling: {name} is {value!r}: expected"):
        generate(config(model, write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}]), sampling={name: value}))


def test_half_a_character_that_a_template_writes_is_a_row_that_says_so(model: Path, tmp_path: Path) -> None:
    """Of arguments that are JSON in a string the file's own characters tell nothing."""
    path = Path(shutil.copytree(model, tmp_path / "model"))
    config_file = path / "tokenizer_config.json"
    template = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"chat_template": template}))
    (path / "chat_template.jinja").unlink(missing_ok=True)
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]
    lines = [{"messages": [{"role": "assistant", "tool_calls": calls}]}, {"prompt": "fine"}]
    wanted = config(path, write_lines(tmp_path / "p.jsonl", lines))
    assert generate(wanted) == 1
    got = rows(wanted.output)
    assert "not valid Unicode at character" in got[0]["error"] and got[1]["text"]


def test_what_cannot_be_served_is_a_row_that_says_so(model: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "x" * 2000},
        {"prompt": ""},
        {"prompt": "fine"},
        {"messages": [{"role": "tool", "content": ""}]},
    ]
    wanted = config(model, write_lines(tmp_path / "p.jsonl", lines))
    assert generate(wanted) == 1
    got = rows(wanted.output)
    assert "together they exceed" in got[0]["error"] and "empty" in got[1]["error"] and "no tools" in got[3]["error"]
    assert got[2]["text"] and generate(wanted) == 1, "the second run finds all rows there"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": "a"', "line 2: not valid JSON"),
        ("[1]", "line 2: must be an object such as"),
        ('{"prompt": "a", "messages": []}', "line 2: give either prompt or messages"),
        ('{"prompt": 3}', "line 2: prompt must be a string"),
        ('{"prompt": "a", "temprature": 1}', "line 2: temprature is not an option"),
        ('{"prompt": "a", "temperature": 9}', "line 2: temperature is 9"),
        ('{"prompt": "a", "max_tokens": "9"}', "line 2: max_tokens is '9': expected `int`"),
        ('{"prompt": "a", "logprobs": 1}', "line 2: logprobs is not supported here"),
        ('{"prompt": "\\ud800"}', "line 2: holds half a character"),
        ('{"prompt": null}', "line 2: give either prompt or messages"),
        (
            '{"prompt": "a", "id": ' + "[" * 200_000 + "]" * 200_000 + "}",
            "line 2 is nested too deeply; at most 100 levels",
        ),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "line 2: not valid JSON: Exceeds the limit"),
        ('{"prompt": "a", "temperature": ' + "9" * 400 + "}", "line 2: temperature is"),
        ('{"prompt": "a", "seed": "a"}', "line 2: seed is 'a': expected `int`"),
        ('{"prompt": "a", "logit_bias": [1]}', "line 2: logit_bias is [1]"),
        ('{"prompt": "a", "stop": 5}', "line 2: stop is 5"),
        ('{"prompt": "a", "structured_outputs": {"regex": 5}}', "line 2: structured_outputs is {'regex': 5}: expected"),
    ],
)
def test_a_wrong_line_is_one_sentence_and_nothing_is_written(
    model: Path, tmp_path: Path, line: str, sentence: str
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError) as error:
        generate(config(model, prompts))
    assert sentence in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="'/nowhere' is not a directory"):
        generate(config(Path("/nowhere"), prompts))
    assert list(tmp_path.iterdir()) == [prompts]


def test_an_output_that_is_not_ours_is_refused(model: Path, tmp_path: Path) -> None:
    wanted = config(model, write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}]))
    assert generate(wanted) == 0
    before = Path(wanted.output).read_text()
    other = config(model, Path(wanted.prompts), sampling={"max_tokens": 13, "temperature": 0.0})
    with pytest.raises(ValueError, match="was made from other prompts, options or another model"):
        generate(other)
    with OutputFile(Path(wanted.output)), pytest.raises(ValueError, match="another process is writing"):
        generate(wanted)
    assert Path(wanted.output).read_text() == before


def test_a_killed_run_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    """SIGKILL, a half-written row, SIGTERM, and then to the end: the same rows as undisturbed."""
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": f"number {n}: " + "x" * (n % 7)} for n in range(60)])
    sampling = {"max_tokens": 40, "temperature": 0.7, "ignore_eos": True}
    undisturbed = config(model, prompts, sampling=sampling, output=str(tmp_path / "undisturbed"))
    assert generate(undisturbed) == 0
    killed = config(model, prompts, sampling=sampling)
    output = Path(killed.output)
    assert _interrupted(killed, signal.SIGKILL, at_least=3) == -signal.SIGKILL
    with output.open("a") as file:
        file.write('{"index": 59, "prompt": "numb')
    count = len(output.read_text().splitlines()) - 1
    assert _interrupted(killed, signal.SIGTERM, at_least=count + 3) == TERMINATED
    assert count + 3 <= len(rows(output)) < 60, "whole rows only"
    assert generate(killed) == 0
    assert rows(output) == rows(undisturbed.output)


def _interrupted(config: GenerateConfig, number: signal.Signals, at_least: int) -> int:
    """Run it as a person does, until its output has so many rows; its exit code after the signal."""
    words = [f"sampling.{key}={str(value).lower()}" for key, value in config.sampling.items()]
    words += [f"engine.max_sequences={LIMITS.max_sequences}", f"engine.max_step_tokens={LIMITS.max_step_tokens}"]
    words += [f"kv.tokens={KV.tokens}"]
    words += ["model=path", f"model.path={config.model.path}", "model.name=tiny", "device=cpu", "engine.threads=1"]
    words += [f"prompts={config.prompts}", f"output={config.output}"]
    command = [sys.executable, "-m", "launch.generate", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = monotonic() + 60
        while not Path(config.output).exists() or Path(config.output).read_bytes().count(b"\n") < at_least:
            assert process.poll() is None and monotonic() < deadline, process.communicate()[0][-2000:]
            sleep(0.002)
        process.send_signal(number)
        process.communicate(timeout=30)
    return process.returncode
