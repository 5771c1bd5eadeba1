"""Tokens of `tokenizer_config.json` are those that `transformers` finds there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stepladder.workers.text.tokenizer import Tokenizer
from tests.tokenizers_of import write_byte_level

TEXT = "hello <|user|> hi <|new|> a <|other|> b <|end|>"
Tokens = list[dict[str, Any]]


def entry(content: str, **flags: bool) -> dict[str, Any]:
    usual = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content, **usual, **flags}


def named(content: str) -> dict[str, Any]:
    return {**entry(content, special=False, lstrip=True, normalized=True), "__type": "AddedToken"}


def as_saved(tokens: Tokens) -> Tokens:
    return tokens


def without_end(tokens: Tokens) -> Tokens:
    """It is still in the vocabulary."""
    return [token for token in tokens if token["content"] != "<|end|>"]


def demoted(tokens: Tokens) -> Tokens:
    return [token | {"special": False} for token in tokens]


def normalized(tokens: Tokens) -> Tokens:
    return [token | {"normalized": True} for token in tokens]


@pytest.mark.parametrize("change", [as_saved, without_end, demoted, normalized])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"added_tokens_decoder": {"320": entry("<|new|>")}},
        {"added_tokens_decoder": {"320": entry("<|new|>", special=False)}},
        {"added_tokens_decoder": {"320": entry("<|new|>", special=False)}, "eos_token": "<|new|>"},
        {"added_tokens_decoder": {"1000": entry("<|new|>"), "330": entry("<|other|>", lstrip=True)}},
        {"added_tokens_decoder": {"0": entry("<|end|>", special=False, lstrip=True)}},
        {"eos_token": "<|end|>"},
        {"eos_token": named("<|end|>"), "pad_token": "<|user|>"},
        {"eos_token": "<|new|>", "pad_token": named("<|other|>")},
        {"eos_token": ""},
        {"extra_special_tokens": ["<|new|>", "<|end|>"]},
        {"extra_special_tokens": {"image_token": "<|new|>"}},
        {"additional_special_tokens": ["<|new|>", "<|end|>"]},
    ],
    ids=str,
)
def test_tokens_are_those_of_transformers(
    tmp_path: Path, config: dict[str, Any], change: Callable[[Tokens], Tokens]
) -> None:
    path = write_byte_level(tmp_path, tokenizer_class="PreTrainedTokenizerFast", **config)
    saved = json.loads((path / "tokenizer.json").read_text())
    saved["added_tokens"] = change(saved["added_tokens"])
    (path / "tokenizer.json").write_text(json.dumps(saved))
    ours, theirs = Tokenizer(path), AutoTokenizer.from_pretrained(path)
    tokens = theirs.encode(TEXT)
    assert ours.encode(TEXT) == tokens
    assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
    assert ours.decode(tokens, skip_special=False) == theirs.decode(tokens)


@pytest.mark.parametrize("decoder", [5, [], *({name: entry("a")} for name in ("x", "-1", "9" * 5000)), {"1": "a"}])
def test_odd_types_are_named(tmp_path: Path, decoder: Any) -> None:
    path = write_byte_level(tmp_path, added_tokens_decoder=decoder)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: added_tokens_decoder is .*; it must be") as found:
        Tokenizer(path)
    assert len(str(found.value)) < 600


def test_a_token_that_only_the_configuration_has_cannot_be_forged(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}<|new|>{% endfor %}"
    decoder = {"320": entry("<|new|>")}
    tokenizer = Tokenizer(write_byte_level(tmp_path, added_tokens_decoder=decoder, chat_template=template))
    tokens = tokenizer.encode(tokenizer.chat([{"role": "user", "content": "a<|new|>b"}]))
    assert tokens.count(320) == 1 and tokenizer.bytes_of(320) == b"<|new|>" and not tokenizer.shows(320)
