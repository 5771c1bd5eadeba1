"""Continue every prompt of a file, in one process without Ray: `python -m launch.generate prompts=questions.jsonl`.

A line of a .jsonl file is {"prompt": text} or {"messages": [...]}, with sampling fields and an "id" of its own if it
likes; a line of any other file is a prompt. A row is written as soon as its text has ended, so rows carry the line's
index (from 0) and come in any order. Started again after a kill, it goes on where it was.

Exit codes: 0 done; 1 done, but some prompts were refused (their rows say why), or a wrong option; 143 after SIGTERM.
"""

import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from stepladder import LLM, Completion
from stepladder.cluster.config import ModelConfig
from stepladder.launch.hydra_command import of_this_job, run_command
from stepladder.launch.prompts import Line, Options, OutputFile, read_lines
from stepladder.launch.typed_config import build, plain
from stepladder.parallel.generation_defaults import GenerationDefaults
from stepladder.workers.config import FOR_SERVERS, EngineConfig, KvConfig
from stepladder.workers.source.resolve import resolve
from stepladder.workers.speculation.config import SpeculateConfig

TERMINATED = 128 + signal.SIGTERM
DEFAULTS = {"max_tokens": 256}  # where they are not those of SamplingParams


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Options.

    prompts: *.jsonl has an object per line, anything else a prompt per line. output: what is there already is kept and
    not generated again. device: cpu or cuda; None takes CUDA where there is one.

    sampling: fields of SamplingParams, for lines that do not give them. What is None or missing is as the model's
    generation_config.json recommends, or else as in DEFAULTS.
    """

    model: ModelConfig
    prompts: str
    output: str
    device: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    kv: KvConfig = field(default_factory=KvConfig)
    speculate: SpeculateConfig = field(default_factory=SpeculateConfig)
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; it must be cpu, cuda or null")


def main() -> None:
    run_command("generate", lambda _: GenerateConfig, _generate)


def _generate(config: DictConfig) -> int:
    logging.getLogger().setLevel(logging.WARNING)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    values = plain(config)
    return generate(build(GenerateConfig, values | {"output": of_this_job(values["output"])}), stop.is_set)


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
            for row in _rows(_load(config), missing, stopping) if missing else ():
                output.write(row)
                refused += "error" in row
                bar.update()
    if stopping() and bar.n < len(lines):
        return TERMINATED
    print(f"{len(lines)} rows in {config.output}{f', {refused} of them refused' if refused else ''}")
    return 1 if refused else 0


def options_of(config: GenerateConfig) -> Options:
    """What holds for every line of this run."""
    recommended = GenerationDefaults.load(_directory(config)).sampling
    asked = {name: value for name, value in config.sampling.items() if value is not None}
    return Options(config.model.path, asked, DEFAULTS | recommended)


def _load(config: GenerateConfig) -> LLM:
    options = asdict(config.engine)
    for name in FOR_SERVERS:
        if options.pop(name) != getattr(EngineConfig, name):
            raise ValueError(f"engine.{name} is for servers; offline, everything is queued")
    return LLM(_directory(config), config.device, kv=config.kv, speculate=config.speculate, **options)


def _directory(config: GenerateConfig) -> str:
    model = config.model
    return resolve(model.path, config.engine.dtype, model.cache, fetching=True, progress=True)


Begun = tuple[Line, int]  # and how many tokens its prompt has


def _rows(llm: LLM, lines: Iterable[Line], stopping: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """A row per line, as each ends; a new one is taken in then. What has not when `stopping` turns true is dropped."""
    waiting, done = iter(lines), deque[tuple[Begun, Completion]]()
    room = 2 * llm.engine.config.max_sequences  # one batch runs while the next one waits
    while not stopping():
        while llm.under_way < room and (line := next(waiting, None)):
            try:
                _begin(llm, line, done)
            except ValueError as error:
                yield line.row(error=str(error))
        if not llm.under_way:
            return
        llm.step()
        while done:
            (line, prompt_tokens), ended = done.popleft()
            counts = {"prompt_tokens": prompt_tokens, "completion_tokens": len(ended.tokens)}
            yield line.row(text=ended.text, finish_reason=ended.finish_reason, **counts)


def _begin(llm: LLM, line: Line, done: deque[tuple[Begun, Completion]]) -> None:
    prompt, tokens = line.tokens(llm.tokenizer)
    params = llm.engine.config.fit(line.params, len(tokens)) if line.open_ended else line.params
    llm.begin((line, len(tokens)), prompt, tokens, params, done)


if __name__ == "__main__":
    main()
