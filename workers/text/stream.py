"""Between text and tokens: the tokenizer of a model directory, and text that grows token by token."""

import codecs
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from stepladder.workers.core import Output, SamplingParams
from stepladder.workers.text.templates import compile_template
from stepladder.workers.text.token_bytes import TokenBytes


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
        self._chat_template = _chat_template(Path(directory), self._config)
        added = self.fast.get_added_tokens_decoder()
        self._special = {token for token, entry in added.items() if entry.special}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """In a batch of one: only then does the library let other threads run meanwhile."""
        (found,) = self.fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return found.ids

    def decode(self, tokens: list[int], skip_special: bool = True) -> str:
        return self.fast.decode(tokens, skip_special_tokens=skip_special)

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token: a text has at least a token for every so many of its own."""
        return max(map(len, self.fast.get_vocab()), default=1)

    def chat(self, messages: list[dict[str, Any]]) -> str:
        """The prompt text of a conversation, rendered in a sandbox with the model's own chat template.

        Raises:
            ValueError: the model has no chat template, or the template refuses these messages.
        """
        if not self._chat_template:
            raise ValueError("this model has no chat template; use /v1/completions")
        special = {key: _texts(self._config.get(key)) or "" for key in ("bos_token", "eos_token")}
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **special
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"the chat template refuses these messages: {error}") from None

    def info(self) -> dict[str, Any]:
        """`tokenizer_config.json` with the chat template in use, as vLLM's /tokenizer_info shows it: special tokens as
        their text, and no paths of files."""
        found = {key: _texts(value) for key, value in self._config.items() if key not in ("vocab_file", "merges_file")}
        found.setdefault("tokenizer_class", "PreTrainedTokenizerFast")  # what loads a bare tokenizer.json
        return found | ({"chat_template": self._chat_template} if self._chat_template else {})

    def shows(self, token: int) -> bool:
        """Whether it can add to a text: special tokens and ids beyond the vocabulary cannot."""
        return token not in self._special and self.fast.id_to_token(token) is not None

    def is_special(self, token: int) -> bool:
        """Whether texts are shown without it."""
        return token in self._special

    def bytes_of(self, token: int) -> bytes:
        """What one token stands for, special ones written out; it may be part of a character."""
        return self._bytes[token]

    @cached_property
    def _template(self) -> Any:
        return compile_template(self._chat_template or "")

    @cached_property
    def _bytes(self) -> TokenBytes:
        return TokenBytes(self.fast)


class TextStream:
    """The text of one growing sequence: what may be shown now, and whether a stop string has ended it.

    Text that could still turn out to be the beginning of a stop string, or of a character of several bytes, is held
    back until that is decided.

    Args:
        stop: strings that end the text.
        min_tokens: in the text of so many first tokens no stop string is looked for.
        include_stop: the stop string stays in the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), min_tokens: int = 0, include_stop: bool = False
    ) -> None:
        self.tokenizer, self._stop, self._include_stop = tokenizer, stop, include_stop
        self._unsearched = min_tokens  # tokens
        self._window = TokenWindow(tokenizer)
        self._shown: list[str] = []
        self._num_shown = 0
        self._tail = ""  # not shown yet; only here a stop string can be
        self._begin = 0  # where in the tail one can begin
        self.stopped = False

    @classmethod
    def of(cls, tokenizer: Tokenizer, params: SamplingParams) -> "TextStream":
        return cls(tokenizer, params.stop, params.min_tokens, params.include_stop_str_in_output)

    def visible(self, output: Output) -> int:
        """How many of an output's tokens belong to the text: a token that ended it does so only with include_stop."""
        return len(output.tokens) - (output.finish_reason == "stop" and not self._include_stop)

    def __len__(self) -> int:
        """Characters decoded so far."""
        return self._num_shown + len(self._tail)

    @property
    def text(self) -> str:
        """All text decoded so far, cut at the stop string if there was one."""
        return "".join(self._shown) + self._tail

    def push(self, tokens: list[int], finished: bool = False) -> str:
        """Append tokens; return the text that can be shown because of them. `finished` releases what was held back."""
        for token in tokens:
            if self.stopped:
                break
            self._append(self._window.push(token))
            self._unsearched -= 1
        if finished and not self.stopped:
            self._append(self._window.flush())
        return self._show(len(self._tail) if finished or self.stopped else len(self._tail) - self._held_back())

    def _append(self, fresh: str) -> None:
        begin = max(self._begin, len(self._tail) - max(map(len, self._stop), default=0))
        self._tail += fresh
        if self._unsearched > 0:
            self._begin = len(self._tail)
            return
        found = [(at, s) for s in self._stop if (at := self._tail.find(s, begin)) >= 0]
        if found:
            at, stop = min(found)
            self._tail, self.stopped = self._tail[: at + len(stop) * self._include_stop], True

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        tail = self._tail[self._begin :]
        lengths = (n for s in self._stop for n in range(min(len(s) - 1, len(tail)), 0, -1) if tail.endswith(s[:n]))
        return max(lengths, default=0)

    def _show(self, end: int) -> str:
        fresh, self._tail = self._tail[:end], self._tail[end:]
        self._begin = max(0, self._begin - end)
        self._num_shown += len(fresh)
        if fresh:
            self._shown.append(fresh)
        return fresh


class TokenWindow:
    """Decodes a growing sequence in pieces: a window over its newest tokens, wide enough for merges and spaces to come
    out as in the whole text, and never wider than WIDEST, so that any text costs time linear in its length."""

    WIDEST, KEPT = 24, 12

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._read = 0  # tokens that had been read when the window last moved
        self._given = 0  # characters of the window's text that have been returned

    def push(self, token: int) -> str:
        """The text that is certain because of one more token."""
        if not self._tokenizer.shows(token):
            return ""
        self._tokens.append(token)
        text, whole = self._certain()
        fresh, self._given = text[self._given :], max(self._given, len(text))
        if fresh and whole:
            self._move(self._read)
        elif len(self._tokens) > self.WIDEST:
            self._move(len(self._tokens) - self.KEPT)
        return fresh

    def flush(self) -> str:
        """The text that was held back."""
        return self._tokenizer.decode(self._tokens)[self._given :]

    def _certain(self) -> tuple[str, bool]:
        """The window's text without the beginning of a character at its end, and whether that is all of it."""
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith("\ufffd"):
            return text, True
        pieces = [self._tokenizer.bytes_of(token) for token in self._tokens[-3:]]  # an unfinished one has 3 bytes
        raw = b"".join(pieces)
        unfinished = len(raw) - codecs.utf_8_decode(raw, "replace", False)[1]
        if not unfinished:
            return text, True
        for held in range(1, 4):
            size = sum(map(len, pieces[-held:]))
            if size == unfinished:  # with a byte fallback, it would break the characters before it, too
                return self._tokenizer.decode(self._tokens[:-held]), False
            if size > unfinished:
                break
        return text[:-1], False  # it begins within a token, where only byte-level decoding writes it, as one \ufffd

    def _move(self, start: int) -> None:
        self._tokens = self._tokens[start:]
        self._read = len(self._tokens)
        self._given = len(self._certain()[0])


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


def _texts(value: Any) -> Any:
    """Tokens written as objects become their `content`, at any depth."""
    if isinstance(value, dict):
        return value["content"] if "content" in value else {key: _texts(inner) for key, inner in value.items()}
    return [_texts(inner) for inner in value] if isinstance(value, list) else value
