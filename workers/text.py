"""Between text and tokens: the tokenizer of a model directory, and text that grows token by token."""

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer


class Tokenizer:
    """`tokenizer.json` and the chat template of a Hugging Face directory. Knows text, nothing of engines.

    Raises:
        ValueError: the directory has no readable tokenizer.
    """

    def __init__(self, directory: str | Path) -> None:
        path = Path(directory) / "tokenizer.json"
        try:
            self.fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} cannot be read: {error}") from None
        self._config = _read_json(Path(directory) / "tokenizer_config.json")
        self._template = _chat_template(Path(directory), self._config)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: list[int]) -> str:
        return self.fast.decode(tokens, skip_special_tokens=True)

    def chat(self, messages: list[dict[str, Any]]) -> str:
        """The prompt text of a conversation, rendered in a sandbox with the model's own chat template.

        Raises:
            ValueError: the model has no chat template, or the template refuses these messages.
        """
        if not self._template:
            raise ValueError("this model has no chat template; use /v1/completions")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        special = {key: _content(self._config.get(key)) for key in ("bos_token", "eos_token")}
        try:
            return environment.from_string(self._template).render(
                messages=messages, add_generation_prompt=True, **special
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"the chat template refuses these messages: {error}") from None


class TextStream:
    """The text of one growing sequence: what may be shown now, and whether a stop string has ended it.

    Text that could still turn out to be the beginning of a stop string, or of a character of several bytes, is held
    back until that is decided.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._prefix = 0  # tokens[prefix:read] is the context that the next token is decoded with
        self._read = 0
        self._text = ""
        self._shown = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text decoded so far, cut at the stop string if there was one."""
        return self._text

    def push(self, tokens: list[int], finished: bool = False) -> str:
        """Append tokens; return the text that can be shown because of them. `finished` releases what was held back."""
        for token in tokens:
            if self.stopped:
                break
            self._tokens.append(token)
            self._append(self._decode_new(force=False))
        if finished and not self.stopped:
            self._append(self._decode_new(force=True))
        end = len(self._text) if finished or self.stopped else len(self._text) - self._held_back()
        fresh, self._shown = self._text[self._shown : end], max(end, self._shown)
        return fresh

    def _decode_new(self, force: bool) -> str:
        """Decode with a little context, so that merges and spaces come out as in the whole text."""
        before = self._tokenizer.decode(self._tokens[self._prefix : self._read])
        after = self._tokenizer.decode(self._tokens[self._prefix :])
        if len(after) <= len(before) or (after.endswith("\ufffd") and not force):
            return ""
        self._prefix, self._read = self._read, len(self._tokens)
        return after[len(before) :]

    def _append(self, fresh: str) -> None:
        begin = max(0, len(self._text) - max(map(len, self._stop), default=0))
        self._text += fresh
        found = [at for at in (self._text.find(s, begin) for s in self._stop) if at >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        lengths = (n for s in self._stop for n in range(len(s) - 1, 0, -1) if self._text.endswith(s[:n]))
        return max(lengths, default=0)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """From a file of its own (transformers 5), or from the configuration: one, or several with names."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text()
    found = config.get("chat_template")
    if isinstance(found, list):
        return next((entry["template"] for entry in found if entry["name"] == "default"), None)
    return found


def _content(token: str | dict[str, Any] | None) -> str:
    """Special tokens are written as a string or as an object with `content`."""
    return token["content"] if isinstance(token, dict) else token or ""


def _raise(message: str) -> None:
    raise TemplateError(message)
