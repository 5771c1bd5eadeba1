"""The terminal client, as a process, against a real server."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.models import write_cycle, write_random
from tests.cluster.serving import Server, eventually, serve

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(write_random(tmp_path_factory.mktemp("model")), api_key="k") as one:
        yield one


def chat(*words: str, said: str = "", key: str | None = "k") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.chat", *words], input=said, capture_output=True, text=True, env=environment(key)
    )


def environment(key: str | None) -> dict[str, str]:
    rest = {name: value for name, value in os.environ.items() if name != "STEPLADDER_API_KEY"}
    return rest | ({"STEPLADDER_API_KEY": key} if key else {})


def answers(server: Server, *turns: str, system: str | None = None, **params: Any) -> list[str]:
    """What the official client gets in such a conversation."""
    messages = [{"role": "system", "content": system}] if system else []
    found = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answer = server.client(api_key="k").chat.completions.create(model="org/tiny", messages=messages, **params)
        found.append(answer.choices[0].message.content)
        messages.append({"role": "assistant", "content": found[-1]})
    return found


def test_a_conversation_remembers_and_begins_anew(server: Server) -> None:
    words = [f"url={server.url}", "temperature=0", "max_tokens=6", "seed=1"]
    params: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "seed": 1}
    first, second = answers(server, "hello", "and you?", **params)
    assert second not in answers(server, "and you?", **params), "what was said before matters"
    done = chat(*words, said="hello\nand you?\n/reset\nand you?\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "\n".join([first, second, *answers(server, "and you?", **params), ""])


@pytest.mark.parametrize(
    ("words", "key", "code", "why"),
    [
        (["url=http://127.0.0.1:1"], "k", 1, "http://127.0.0.1:1 cannot be reached"),
        (["url=nonsense"], "k", 1, "is no URL; give url=http"),
        (["url={server}"], None, 1, "answers 401; set STEPLADDER_API_KEY to the API key"),
        (["url={server}", "model=other"], "k", 1, "the model 'other' does not exist"),
        (["url={server}", "temperature=hot"], "k", 2, "temperature"),
        (["url={server}", "colour=red"], "k", 2, "colour is not an option"),
        ([], "k", 2, "url is missing; give url=..."),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    server: Server, words: list[str], key: str | None, code: int, why: str
) -> None:
    done = chat(*(word.format(server=server.url) for word in words), said="hello\n", key=key)
    assert done.returncode == code and why in done.stderr and "Traceback" not in done.stderr


def test_an_answer_that_is_stopped_stays_in_the_conversation(tmp_path: Path) -> None:
    """Ctrl-C: the engine stops, the next turn knows what had been said."""
    path = write_cycle(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 16}))
    with serve(path, {"max_model_len": 60_000, "kv_tokens": 1 << 16}) as server:  # an answer of half a minute
        command = [sys.executable, "-m", "launch.chat", f"url={server.url}", "temperature=0"]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(None),
        ) as process:
            assert process.stdin and process.stdout
            process.stdin.write("go on for ever\n")
            process.stdin.flush()
            eventually(lambda: server.running == 1, seconds=20)
            while not process.stdout.read(1):
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            eventually(lambda: server.running == 0, seconds=30)
            out, err = process.communicate("/help\n", timeout=20)
        assert process.returncode == 0 and not err
        assert " [stopped]\n" in out and "/reset begins anew" in out


def test_a_reader_that_has_seen_enough_ends_it_without_a_word(server: Server) -> None:
    """As `stepladder chat | head -0` does."""
    command = [sys.executable, "-m", "launch.chat", f"url={server.url}", "temperature=0", "max_tokens=6"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment("k")
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.write(b"hello\n" * 3)
        process.stdin.close()
        assert (process.stderr.read(), process.wait(30)) == (b"", 141)


def test_the_command_is_in_the_console_script() -> None:
    done = subprocess.run([sys.executable, "-m", "launch.cli", "chat", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "url=" in done.stdout and "Ctrl-C stops an answer" in done.stdout
