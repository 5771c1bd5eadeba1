"""Engines that run a case when it is their turn: in a process that is stopped while the others have theirs, or, like
llama.cpp, started for each turn."""

import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shutil import which
from typing import Any, Self

import msgspec

from stepladder.launch.bench.engine import peer_process
from stepladder.launch.bench.engine.work import Work
from stepladder.launch.where import IMPORTED_FROM

OURS = "stepladder.launch.bench.engine.own_process"
GGUF = {"float32": "F32.gguf", "bfloat16": "F16.gguf"}
END_SECONDS = 30.0  # vLLM ends its own workers


class Engine(ABC):
    """A context manager; inside it `run` may be called."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027
        """End what was started."""

    @abstractmethod
    def run(self, work: Work) -> dict[str, Any] | None:
        """At least {"seconds": ...}; None for work that this engine cannot be given."""


class ProcessEngine(Engine):
    """A process that speaks as `peer_process.py` says.

    Args:
        command: what it is started with. log: what it says besides.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command, self._log = command, log

    def __enter__(self) -> Self:
        log, pipe = self._log.open("wb"), subprocess.PIPE
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with log:  # a group of its own, but of this session: if we die, what is stopped gets SIGHUP
            self._process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, stderr=log, cwd=IMPORTED_FROM, env=environment, process_group=0
            )
        try:
            self._hear()
        except BaseException:
            self._kill()
            raise
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._signal(signal.SIGCONT)
        try:
            with suppress(subprocess.TimeoutExpired, BrokenPipeError):
                self._process.stdin.close()
                self._process.wait(END_SECONDS)
        finally:
            self._kill()

    def run(self, work: Work) -> dict[str, Any] | None:
        return self.ask({"prompts": work.prompts, "lengths": work.lengths})

    def ask(self, message: Any) -> Any:
        """Raises RuntimeError: the process has ended; it says where its last words are."""
        assert self._process.stdin
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # it has ended, as `_hear` will find
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()
        answer = self._hear()
        self._signal(signal.SIGSTOP)
        return answer

    def _hear(self) -> Any:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            return msgspec.json.decode(line)
        said = self._log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        raise RuntimeError(f"{' '.join(self._command)} ended; it said: {said[-1].strip()} (all of it: {self._log})")

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()


def ours(model: Path, dtype: str, threads: int, log: Path) -> ProcessEngine:
    return ProcessEngine([sys.executable, "-m", OURS, str(model), dtype, str(threads)], log)


def peer(engine: str, python: str, model: Path, dtype: str, threads: int, log: Path) -> ProcessEngine:
    """engine: of `peer_process.ENGINES`; python: of its environment. Raises ValueError: there is no such program."""
    if not which(python):
        raise ValueError(
            f"peers.{engine}: {python} is not a program; name the Python of the environment that has {engine}"
        )
    return ProcessEngine([python, "-I", peer_process.__file__, engine, str(model), dtype, str(threads)], log)


class LlamaCpp(Engine):
    """Its own bench, started for each turn; by its own clock, from when the model is loaded and warm. It feeds random
    tokens and draws none, and cannot be given ragged work or a shared prefix.

    Args:
        folder: of a build, with bin/llama-batched-bench, and F32.gguf or, for bfloat16, F16.gguf, beside bin/.

    Raises:
        ValueError: one of them is not there.
    """

    def __init__(self, folder: str, dtype: str, threads: int) -> None:
        self._bench, self._model = Path(folder, "bin/llama-batched-bench"), Path(folder, GGUF[dtype])
        self._threads = str(threads)
        for path in (self._bench, self._model):
            if not path.is_file():
                raise ValueError(f"peers.llama_cpp: there is no {path}; docs/operating.md says how to make it")

    def run(self, work: Work) -> dict[str, Any] | None:
        if work.equal is None:
            return None
        prompt, output, count = work.equal
        room = count * -(-(prompt + output) // 256) * 256  # it gives each sequence a multiple of 256
        sizes = {"npp": prompt, "ntg": max(1, output - 1), "npl": count, "c": room}
        words = [word for name, size in sizes.items() for word in (f"-{name}", str(size))]
        command = [str(self._bench), "-m", str(self._model), *words, "-t", self._threads, "-tb", self._threads]
        done = subprocess.run(
            [*command, "--output-format", "jsonl"], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        return {"seconds": seconds(done.stdout + done.stderr, output)}


def seconds(said: str, output: int) -> float:
    """From what llama-batched-bench prints as JSON lines. The first token of an output comes from the prompt's logits.

    Raises:
        RuntimeError: there is no such line.
    """
    for line in said.splitlines():
        if line.startswith("{"):
            times = msgspec.json.decode(line)
            return times["t_pp"] + (times["t_tg"] if output > 1 else 0.0)
    raise RuntimeError(f"llama-batched-bench gave no times: {said.strip()[-500:]}")
