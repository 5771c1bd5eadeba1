"""Tokens that only `tokenizer_config.json` knows, or knows better than `tokenizer.json`."""

from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from stepladder.parallel.typed_json import NO, TEXT, Kind, optional, record

_ENTRY = record(content=TEXT)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_FURTHER = ("extra_special_tokens", "additional_special_tokens")  # a list, or an object of tokens by names of any kind


def _entries(value: Any) -> Any:
    if not isinstance(value, dict) or not all(name.isdecimal() and len(name) < 20 for name in value):
        return NO
    return NO if any(_ENTRY.take(entry) is NO for entry in value.values()) else value


ENTRIES = optional(Kind("an object of tokens by their ids, each an object with content", _entries))


def add_configured(fast: FastTokenizer, config: Mapping[str, Any], named: Mapping[str, Any]) -> None:
    """Add them as `transformers` does: what has an id of its own, then what has a name, which is special. It does not
    make special what is only listed as such.

    Args:
        config: of `tokenizer_config.json`, whose `added_tokens_decoder` is of the kind ENTRIES.
        named: tokens by their use, as text or as objects.
    """
    used, further = _special(named.values()), _special(_further(config))
    texts = {token.content for token in used}
    decoder = config.get("added_tokens_decoder") or {}
    entries = [_token(decoder[name]) for name in sorted(decoder, key=int)]
    for token in entries:
        token.special = token.special or token.content in texts
    there = set(map(repr, fast.get_added_tokens_decoder().values()))
    fast.add_tokens([token for token in entries if token.content and repr(token) not in there])
    known = {token.content: token for token in fast.get_added_tokens_decoder().values()}
    fast.add_special_tokens([known.get(token.content, token) for token in used])
    fast.add_special_tokens([token for token in further if token.content not in known])


def _further(config: Mapping[str, Any]) -> list[Any]:
    found = list[Any]()
    for given in map(config.get, _FURTHER):
        found += given.values() if isinstance(given, dict) else given if isinstance(given, list | tuple) else ()
    return found


def _special(given: Iterable[Any]) -> list[AddedToken]:
    """What of it is tokens. One that is a text is looked for before a text is normalized."""
    found = [
        AddedToken(one, normalized=False) if isinstance(one, str) else _token(one)
        for one in given
        if isinstance(one, str) or _ENTRY.take(one) is not NO
    ]
    return [token for token in found if token.content]


def _token(entry: Mapping[str, Any]) -> AddedToken:
    return AddedToken(entry["content"], **{name: entry[name] is True for name in _FLAGS if name in entry})
