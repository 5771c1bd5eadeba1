"""Text that grows token by token."""

import codecs
from collections.abc import Sequence
from functools import partial
from itertools import islice

from stepladder.workers.core import Output, SamplingParams
from stepladder.workers.text.tokenizer import Tokenizer


class TextStream:
    """The text of one growing sequence: what may be shown now, and whether a stop string has ended it.

    Text that could still turn out to be the beginning of a stop string, or of a character of several bytes, is held
    back until that is decided.

    Args:
        stop: strings that end the text.
        min_tokens: in the text of so many first tokens no stop string is looked for.
        include_stop: the stop string stays in the text.
        before: the tokens that the sequence follows, not part of the text; without them, a first word would lose the
            space before it with many a tokenizer.
        special: special tokens are written out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
        before: Sequence[int] = (),
        special: bool = False,
    ) -> None:
        self.tokenizer, self._stop, self._include_stop = tokenizer, stop, include_stop
        self._unsearched = min_tokens  # tokens
        self._window = TokenWindow(tokenizer, before, special)
        self._shown: list[str] = []
        self._num_shown = 0
        self._tail = ""  # not shown yet; only here a stop string can be
        self._begin = 0  # where in the tail one can begin
        self.stopped = False

    @classmethod
    def of(cls, tokenizer: Tokenizer, params: SamplingParams, before: Sequence[int]) -> "TextStream":
        """The text that follows a prompt of the tokens `before`."""
        searched = params.stop, params.min_tokens, params.include_stop_str_in_output
        return cls(tokenizer, *searched, before, not params.skip_special_tokens)

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
    out as in the whole text, and never wider than WIDEST, so that any text costs time linear in its length.

    Args:
        before: the tokens that the sequence follows; the window begins with the newest of them.
        special: special tokens are written out.
    """

    WIDEST, KEPT = 24, 12
    LOOK_BACK = 256  # tokens of `before` among which there may be special ones

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._shows = tokenizer.knows if special else tokenizer.shows
        self.decode = partial(tokenizer.decode, skip_special=False) if special else tokenizer.decode
        self._tokens: list[int] = []
        self._read = 0  # tokens that had been read when the window last moved
        self._given = 0  # characters of the window's text that have been returned
        if before:
            self._begin_behind(before)

    def _begin_behind(self, before: Sequence[int]) -> None:
        newest = islice(filter(self._shows, reversed(before[-self.LOOK_BACK :])), self.KEPT)
        self._tokens = [*newest][::-1]
        while self._tokens and _is_inside_character(self._tokenizer.bytes_of(self._tokens[0])):
            del self._tokens[0]
        self._move(0)

    def push(self, token: int) -> str:
        """The text that is certain because of one more token."""
        if not self._shows(token):
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
        return self.decode(self._tokens)[self._given :]

    def _certain(self) -> tuple[str, bool]:
        """The window's text without the beginning of a character at its end, and whether that is all of it."""
        text = self.decode(self._tokens)
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
                return self.decode(self._tokens[:-held]), False
            if size > unfinished:
                break
        return text[:-1], False  # it begins within a token, where only byte-level decoding writes it, as one \ufffd

    def _move(self, start: int) -> None:
        self._tokens = self._tokens[start:]
        self._read = len(self._tokens)
        self._given = len(self._certain()[0])


def settled(tokenizer: Tokenizer, tokens: Sequence[int], special: bool = False) -> str:
    """The text of `tokens` without the beginning of a character at its end, which is the first that a stream behind
    them shows. special: special tokens are written out."""
    window = TokenWindow(tokenizer, tokens, special)
    return window.decode([*tokens]).removesuffix(window.flush())


def _is_inside_character(raw: bytes) -> bool:
    """Whether it goes on with a character of UTF-8 that has begun before."""
    return bool(raw) and 0x80 <= raw[0] < 0xC0
