"""The special tokens that a model directory names by their use (`eos_token`, `pad_token`, ...)."""

from pathlib import Path
from typing import Any

from stepladder.parallel.typed_json import read_object

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def named_tokens(directory: str | Path) -> dict[str, str]:
    """The text of each token that is named, from `tokenizer_config.json` or, as old directories have it,
    `special_tokens_map.json`. Says nothing about files that are not there or hold something else."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        named = _object(Path(directory) / file)
        texts = {name: _text(named[name]) for name in NAMED if name in named}
        found |= {name: text for name, text in texts.items() if text is not None}
    return found


def end_of_turn(directory: str | Path) -> int | None:
    """The id of `eos_token`, which is what ends a turn of a chat, also where the model's other files name only the end
    of a document."""
    text = named_tokens(directory).get("eos_token")
    if text is None:
        return None
    decoder = _object(Path(directory) / "tokenizer_config.json").get("added_tokens_decoder")
    for token, entry in decoder.items() if isinstance(decoder, dict) else ():
        if _text(entry) == text and token.isdecimal():
            return int(token)
    return _look_up(_object(Path(directory) / "tokenizer.json"), text)


def _look_up(tokenizer: dict[str, Any], text: str) -> int | None:
    """The id of a token in a `tokenizer.json`."""
    for entry in tokenizer.get("added_tokens") or ():
        if _text(entry) == text:
            return entry.get("id")
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    return vocabulary.get(text) if isinstance(vocabulary, dict) else None


def _text(token: Any) -> str | None:
    """Tokens are written as text, or as objects with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (FileNotFoundError, ValueError):
        return {}  # whoever needs the file names the fault
