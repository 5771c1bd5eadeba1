"""The files of `launch/generate.py`: prompts that come in, rows that go out and survive a kill."""

import fcntl
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any, Self

from stepladder.launch.json_files import json_of, lines_of
from stepladder.launch.typed_config import build
from stepladder.workers.core import SamplingParams
from stepladder.workers.params import MAX_COUNT
from stepladder.workers.text.tokenizer import Tokenizer

_OWN = ("prompt", "messages", "id")
_NOT_WRITTEN = ("logprobs", "prompt_logprobs")


@dataclass(frozen=True)
class Options:
    """What holds for every line.

    Attributes:
        model: directory of the checkpoint.
        sampling: parameters that were asked for, for lines that do not give them. defaults: of the others.
    """

    model: str
    sampling: Mapping[str, Any]
    defaults: Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One prompt.

    Attributes:
        index: of the line in its file, from 0.
        source: what its row repeats: prompt or messages, and the id if it has one.
        open_ended: nobody asked for its max_tokens: they are a default, and hold as far as the context goes.
        request: a digest of model, prompt and sampling, by which a row is known to be this line's.
    """

    index: int
    source: dict[str, Any]
    params: SamplingParams
    open_ended: bool
    request: str

    @property
    def prompt(self) -> str:
        return self.source["prompt"]

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        return self.source.get("messages")

    def tokens(self, tokenizer: Tokenizer) -> tuple[str, tuple[int, ...]]:
        """Its prompt as text and as tokens; chat templates write special tokens themselves. ValueError: a template or
        the tokenizer refuses it."""
        text = self.prompt if self.messages is None else tokenizer.chat(self.messages)
        return text, tuple(tokenizer.encode(text, add_special_tokens=self.messages is None))

    def row(self, **result: Any) -> dict[str, Any]:
        return {"index": self.index, **self.source, **result, "request": self.request}


def read_lines(path: Path, options: Options) -> list[Line]:
    """All lines that are not blank.

    Raises:
        ValueError: the file is not there or no UTF-8 text, or an option or a line is unusable; the sentence names it.
    """
    for name, value in options.sampling.items():
        _params({"max_tokens": MAX_COUNT, name: value}, "sampling")
    if not path.is_file():
        raise ValueError(f"prompts: there is no file {path}")
    lines = []
    for index, text in enumerate(lines_of(path)):
        if text.strip():
            where = f"{path} line {index + 1}"
            fields = _object(text, where) if path.suffix == ".jsonl" else {"prompt": text}
            lines.append(_line(index, fields, options, where))
    return lines


def _object(text: str, where: str) -> dict[str, Any]:
    value = json_of(text, where)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: holds half a character, which no tokenizer takes") from None
    if not isinstance(value, dict):
        raise ValueError(f'{where}: must be an object such as {{"prompt": "..."}}')
    return value


def _line(index: int, fields: dict[str, Any], options: Options, where: str) -> Line:
    """As over HTTP, null is as good as nothing."""
    fields = {key: value for key, value in fields.items() if value is not None}
    source = {key: value for key, value in fields.items() if key in _OWN}
    if ("prompt" in source) == ("messages" in source):
        raise ValueError(f"{where}: give either prompt or messages")
    kind, key = (str, "prompt") if "prompt" in source else (list, "messages")
    if not isinstance(source[key], kind):
        raise ValueError(f"{where}: {key} must be a {'string' if kind is str else 'list of messages'}")
    seed = {"seed": options.sampling.get("seed", 0) + index}
    asked = {**options.sampling, **seed, **{key: value for key, value in fields.items() if key not in _OWN}}
    params = _params({**options.defaults, **asked}, where)
    identity = json.dumps([options.model, source[key], asdict(params)], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return Line(index, source, params, "max_tokens" not in asked, digest)


def _params(wanted: dict[str, Any], where: str) -> SamplingParams:
    """JSON spells token ids as strings where they are keys, and one stop string may stand for a list of one."""
    for name in _NOT_WRITTEN:
        if wanted.get(name) is not None:
            raise ValueError(f"{where}: {name} is not supported here; the server has it")
    if isinstance(wanted.get("stop"), str):
        wanted["stop"] = [wanted["stop"]]
    if isinstance(form := wanted.get("structured_outputs"), Mapping):
        wanted["structured_outputs"] = {name: value for name, value in form.items() if value is not None}
    try:
        if isinstance(wanted.get("logit_bias"), Mapping):
            wanted["logit_bias"] = {int(token): bias for token, bias in wanted["logit_bias"].items()}
        return build(SamplingParams, wanted)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


class OutputFile:
    """JSON lines to which rows are appended whole; a half-written last one is cut off when it is opened.

    Raises:
        ValueError: another process is writing it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._file: BufferedRandom = path.open("r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"output: another process is writing {path}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def done(self, lines: Sequence[Line]) -> dict[int, bool]:
        """Index of every line that has its row -> whether it was refused. New rows go behind the last whole one.

        Raises:
            ValueError: a row is not of these lines, so that the file must be of something else.
        """
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        known, done = {line.index: line for line in lines}, {}
        for number, text in enumerate(whole.splitlines(), 1):
            row = _object(text.decode(errors="replace"), f"output: {self._path} line {number}")
            line = known.get(row.get("index", -1))
            if line is None or row.get("request") != line.request:
                raise ValueError(
                    f"output: {self._path} line {number} was made from other prompts, options or another model; "
                    f"choose another output"
                )
            done[line.index] = "error" in row
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        return done

    def write(self, row: Mapping[str, Any]) -> None:
        """One row, handed to the system before this returns."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
