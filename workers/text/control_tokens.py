"""Tokens that only a chat template may write: where a client's text spells one, it stays text.

A client that could write the token which ends a turn could write the turns of others. So each such spelling in what a
client sends is marked before the template is rendered, with a character between its letters that no text may hold, and
the tokenizer that reads the prompt finds the tokens first and drops the marks then. Templates may trim, split, replace
and upper-case what they are given: they see the client's text, and no mark parts what is not the spelling of a token.

Some tokenizers look for tokens in what they have normalized a text to, where full-width letters may be plain ones: a
text in which that finds one is marked as a whole.
"""

import re
from collections.abc import Collection, Iterable
from os.path import commonprefix
from typing import Any

from tokenizers import AddedToken, models, normalizers
from tokenizers import Tokenizer as FastTokenizer

MARK = "\ufdd0"  # a noncharacter: Unicode keeps it for such uses, inside one program
ESCAPED = ascii(MARK)[1:-1]


class MarkedText(str):
    """A prompt in which the spellings of control tokens are marked that are text."""


def marked_text(rendered: str) -> str:
    """What a template made of marked texts; it may have escaped the marks, as where a list is printed."""
    return MarkedText(rendered.replace(ESCAPED, MARK))


def plain(text: str) -> str:
    """A prompt as a person reads it."""
    return text.replace(MARK, "") if isinstance(text, MarkedText) else text


class ControlTokens:
    """A set of tokens, by their text. Those of a single character cannot be parted and are left out, as is white space,
    which belongs to every text.

    Args:
        tokens: all of them.
        normalizer: what the tokenizer does to a text before it looks for those that are `normalized`.
    """

    def __init__(self, tokens: Iterable[AddedToken], normalizer: normalizers.Normalizer | None) -> None:
        found = {token.content: token for token in tokens if len(token.content) > 1 and not token.content.isspace()}
        self._texts = found.keys()
        self._finder = _finder([token for token in found.values() if token.normalized], normalizer)
        # whatever its case: a template may change it
        self._spelling = re.compile(_alternatives(self._texts) if self._texts else "(?!)", re.IGNORECASE)

    def __contains__(self, text: str) -> bool:
        return text in self._texts

    def mark(self, texts: list[str]) -> list[str]:
        """The same texts with marks in whatever spells a token, be it across several: a template may join them, and
        trim them before."""
        marked = self._mark(texts)
        if len(texts) == 1:
            return marked
        cores = self._mark([text.strip() for text in marked])
        return [text.replace(text.strip(), core, 1) for text, core in zip(marked, cores, strict=True)]

    def _mark(self, texts: list[str]) -> list[str]:
        inside = {at for match in self._spelling.finditer("".join(texts)) for at in range(*match.span())}
        marked = _with_marks(texts, inside) if inside else texts
        if self._finder and self._finder.encode_batch_fast(["".join(marked)], add_special_tokens=False)[0].ids:
            return _with_marks(texts, range(sum(map(len, texts))))
        return marked

    def mark_all(self, value: Any) -> Any:
        """The same JSON value, whose texts and names are marked; the texts of a list of parts are marked together."""
        if isinstance(value, str):
            return self.mark([value])[0]
        if isinstance(value, dict):
            return {self.mark_all(name): self.mark_all(inner) for name, inner in value.items()}
        if not isinstance(value, list):
            return value
        parts = [self.mark_all(part) for part in value]
        texts = [part for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
        for part, text in zip(texts, self.mark([part["text"] for part in texts]), strict=True):
            part["text"] = text
        return parts


def reader_of_marks(fast: FastTokenizer, control: ControlTokens) -> FastTokenizer:
    """A tokenizer like `fast` with the same model in memory, for prompts with marks: a marked spelling of a control
    token becomes the tokens of its text."""
    reader = FastTokenizer(fast.model)
    drop = normalizers.Replace(MARK, "")
    reader.normalizer = normalizers.Sequence([drop, fast.normalizer]) if fast.normalizer else drop
    if fast.pre_tokenizer:
        reader.pre_tokenizer = fast.pre_tokenizer
    if fast.post_processor:
        reader.post_processor = fast.post_processor
    added = fast.get_added_tokens_decoder()
    reader.add_tokens([_raw(token) if token.content in control else token for _, token in sorted(added.items())])
    copied = reader.get_added_tokens_decoder()
    assert {number: token.content for number, token in copied.items()} == {n: t.content for n, t in added.items()}
    return reader


def _with_marks(texts: list[str], inside: Collection[int]) -> list[str]:
    """The same texts with a mark behind each letter that is `inside`, which counts through all of them."""
    marked, begin = list[str](), 0
    for text in texts:
        letters = (letter + MARK if at in inside else letter for at, letter in enumerate(text, begin))
        marked.append("".join(letters))
        begin += len(text)
    return marked


def _finder(tokens: list[AddedToken], normalizer: normalizers.Normalizer | None) -> FastTokenizer | None:
    """A tokenizer that makes nothing of a text but the tokens which appear where it is normalized; None if none do."""
    if not tokens or normalizer is None:
        return None
    finder = FastTokenizer(models.BPE())
    finder.normalizer = normalizer
    finder.add_tokens(tokens)
    return finder


def _raw(token: AddedToken) -> AddedToken:
    """The same, looked for before the marks are dropped."""
    places = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
    return AddedToken(token.content, normalized=False, special=token.special, **places)


def _alternatives(words: Iterable[str]) -> str:
    """A regular expression for the longest of some words, as a tree, so that many words cost no more than a few."""
    remaining = sorted(set(words))
    branches: dict[str, list[str]] = {}
    for word in filter(None, remaining):
        branches.setdefault(word[0], []).append(word)
    found = []
    for group in branches.values():
        prefix = commonprefix(group)  # noqa: RUF071 of words, not of paths
        found.append(re.escape(prefix) + _alternatives(word[len(prefix) :] for word in group))
    if not found:
        return ""
    return f"(?:{'|'.join(found)}){'?' if '' in remaining else ''}"
