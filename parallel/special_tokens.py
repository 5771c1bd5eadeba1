"""The special tokens that a model directory names by their use (`eos_token`, `pad_token`, ...)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepladder.parallel.typed_json import NO, OBJECT, Kind, check, naming, optional, read_object, shown, whole

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ID = whole(0, (1 << 32) - 1)  # what the tokenizer's library holds
_LIST = Kind("a list", lambda value: value if isinstance(value, list) else NO)


def named_tokens(directory: str | Path) -> dict[str, str]:
    """The text of each token that is named, from `tokenizer_config.json` or, as old directories have it,
    `special_tokens_map.json`. Says nothing about files that are not there or hold something else."""
    return texts_of(named_entries(directory))


def texts_of(entries: Mapping[str, Any]) -> dict[str, str]:
    """Of tokens as `named_entries` has them."""
    return {name: text for name, given in entries.items() if (text := _text(given)) is not None}


def named_entries(directory: str | Path) -> dict[str, Any]:
    """The same as they are written: texts, or objects with `content` and how the token is looked for."""
    found: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        named = _object(Path(directory) / file)
        found |= {name: named[name] for name in NAMED if _text(named.get(name)) is not None}
    return found


def end_of_turn(directory: str | Path) -> int | None:
    """The id of `eos_token`, which is what ends a turn of a chat, also where the model's other files name only the end
    of a document.

    Raises:
        ValueError: a file has something else where this id should be.
    """
    text = named_tokens(directory).get("eos_token")
    if text is None:
        return None
    config, tokenizer = Path(directory) / "tokenizer_config.json", Path(directory) / "tokenizer.json"
    with naming(config):
        decoder = check("added_tokens_decoder", _object(config).get("added_tokens_decoder"), optional(OBJECT))
        for token, entry in (decoder or {}).items():
            if _text(entry) == text:
                number = int(token) if token.isdecimal() and len(token) < 20 else token
                return check(f"the name of {shown(text)} in added_tokens_decoder", number, _ID)
    with naming(tokenizer):
        return _look_up(_object(tokenizer), text)


def _look_up(tokenizer: dict[str, Any], text: str) -> int | None:
    """The id of a token in a `tokenizer.json`."""
    added = check("added_tokens", tokenizer.get("added_tokens"), optional(_LIST))
    for nth, entry in enumerate(added or ()):
        if _text(entry) == text:
            return check(f"added_tokens[{nth}].id", entry.get("id") if isinstance(entry, dict) else entry, _ID)
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # of a Unigram model: [text, score], by their ids
        return next((at for at, pair in enumerate(vocabulary) if isinstance(pair, list) and pair[:1] == [text]), None)
    found = vocabulary.get(text) if isinstance(vocabulary, dict) else None
    return check(f"model.vocab[{shown(text)}]", found, optional(_ID))


def _text(token: Any) -> str | None:
    """Tokens are written as text, or as objects with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (FileNotFoundError, ValueError):
        return {}  # whoever needs the file names the fault
