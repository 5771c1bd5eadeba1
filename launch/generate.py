"""Continue every prompt of a file, in one process without Ray: `python -m launch.generate prompts=questions.jsonl`.

A line of a .jsonl file is {"prompt": text} or {"messages": [...]}, with sampling fields and an "id" of its own if it
likes; a line of any other file is a prompt. A row is written as soon as its text has ended, so rows carry the line's
index (from 0) and come in any order. Started again after a kill, it goes on where it was.

Exit codes: 0 done; 1 done, but some prompts were refused (their rows say why), or a wrong option; 143 after SIGTERM.
"""

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from tqdm import tqdm

from stepladder import LLM
from stepladder.cluster.config import ModelConfig
from stepladder.launch.build import build, plain
from stepladder.launch.prompts import Line, Options, OutputFile, read_lines
from stepladder.launch.where import CONF
from stepladder.parallel.generation_defaults import GenerationDefaults
from stepladder.workers.config import EngineConfig, KvConfig
from stepladder.workers.core import Output, Request
from stepladder.workers.rank import resolve
from stepladder.workers.text.stream import TextStream

TERMINATED = 128 + signal.SIGTERM
DEFAULTS = {"max_tokens": 256}  # where they are not those of SamplingParams


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """prompts, output: files.

    sampling: fields of SamplingParams, for lines that do not give them. What is None or missing is as the model's
    generation_config.json recommends, or else as in DEFAULTS.
    """

    model: ModelConfig
    prompts: str
    output: str
    device: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    kv: KvConfig = field(default_factory=KvConfig)
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; it must be cpu, cuda or null")


@hydra.main(version_base=None, config_path=CONF, config_name="generate")
def main(config: DictConfig) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        sys.exit(generate(build(GenerateConfig, plain(config)), stop.is_set))
    except (ValueError, OSError) as error:
        sys.exit(f"stepladder: {error}")


def generate(config: GenerateConfig, stopping: Callable[[], bool] = lambda: False) -> int:
    """Write a row for every line that has none yet; returns the exit code.

    Raises:
        ValueError: an unusable option, line or model; nothing has been written then.
    """
    lines = read_lines(Path(config.prompts), options_of(config))
    with OutputFile(Path(config.output)) as output:
        done = output.done(lines)
        missing = [line for line in lines if line.index not in done]
        refused = sum(done.values())
        with tqdm(total=len(lines), initial=len(done), unit="prompt") as bar:
            for row in _rows(config, missing, stopping) if missing else ():
                output.write(row)
                refused += "error" in row
                bar.update()
    if stopping() and bar.n < len(lines):
        return TERMINATED
    print(f"{len(lines)} rows in {config.output}{f', {refused} of them refused' if refused else ''}")
    return 1 if refused else 0


def options_of(config: GenerateConfig) -> Options:
    """What holds for every line of this run."""
    recommended = GenerationDefaults.load(resolve(config.model.path)).sampling
    asked = {name: value for name, value in config.sampling.items() if value is not None}
    return Options(config.model.path, asked, DEFAULTS | recommended)


def _rows(config: GenerateConfig, lines: list[Line], stopping: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    options = asdict(config.engine)
    if options.pop("max_queued_tokens") != EngineConfig.max_queued_tokens:
        raise ValueError("engine.max_queued_tokens is for servers; offline, everything is queued")
    llm = LLM(resolve(config.model.path), config.device, kv=config.kv, **options)
    return Batch(llm).run(lines, stopping)


@dataclass
class Growing:
    line: Line
    prompt: tuple[int, ...]
    text: TextStream
    num_tokens: int = 0


class Batch:
    """Lines through one engine, continuously batched: a new one is taken in as an old one ends."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._growing: dict[str, Growing] = {}

    def run(self, lines: Iterable[Line], stopping: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """A row per line, as each ends; what has not when `stopping` turns true is dropped."""
        waiting = iter(lines)
        room = 2 * self._llm.engine.config.max_sequences  # one batch runs while the next one waits at the door
        while not stopping():
            while len(self._growing) < room and (line := next(waiting, None)):
                if refusal := self._admit(line):
                    yield line.row(error=refusal)
            if not self._growing:
                return
            for output in self._llm.engine.step():
                if row := self._take(output):
                    yield row

    def _admit(self, line: Line) -> str | None:
        """Queue it; why not, if it cannot be served."""
        try:
            prompt, params, request_id = self._encode(line), line.params, str(line.index)
            if line.open_ended:
                params = self._llm.engine.config.fit(params, len(prompt))
            self._llm.engine.add(Request(id=request_id, prompt=prompt, params=params))
        except ValueError as error:
            return str(error)
        self._growing[request_id] = Growing(line, prompt, TextStream.of(self._llm.tokenizer, params))
        return None

    def _encode(self, line: Line) -> tuple[int, ...]:
        """Chat templates write special tokens themselves."""
        tokenizer = self._llm.tokenizer
        if line.messages is not None:
            return tuple(tokenizer.encode(tokenizer.chat(line.messages), add_special_tokens=False))
        return tuple(tokenizer.encode(line.prompt))

    def _take(self, output: Output) -> dict[str, Any] | None:
        """The line's row if this was its end."""
        growing = self._growing[output.id]
        growing.num_tokens += len(output.tokens)
        growing.text.push(output.tokens[: growing.text.visible(output)], finished=output.finish_reason is not None)
        if not growing.text.stopped and not output.finish_reason:
            return None
        if not output.finish_reason:  # a stop string, which the engine does not know
            self._llm.engine.abort(output.id)
        del self._growing[output.id]
        reason = "stop" if growing.text.stopped else output.finish_reason
        counts = {"prompt_tokens": len(growing.prompt), "completion_tokens": growing.num_tokens}
        return growing.line.row(text=growing.text.text, finish_reason=reason, **counts)


if __name__ == "__main__":
    main()
