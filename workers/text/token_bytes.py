"""The bytes that single tokens stand for, which decoding alone cannot tell: a token may be part of a character."""

import json
import re
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Looks tokens up in the two ways that models spell bytes: GPT-2's alphabet and SentencePiece's byte fallback."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token: entry.content for token, entry in tokenizer.get_added_tokens_decoder().items()}
        decoder = tokenizer.decoder
        kinds = set(_decoders(json.loads(decoder.__getstate__()) if decoder else None))  # the vocabulary left out
        self._alphabet = _gpt2_alphabet() if "ByteLevel" in kinds else {}
        self._fallback, self._joins_words = "ByteFallback" in kinds, bool(kinds & {"Metaspace", "Replace"})

    def __getitem__(self, token: int) -> bytes:
        """Empty beyond the vocabulary."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._alphabet and all(character in self._alphabet for character in piece):
            return bytes(self._alphabet[character] for character in piece)
        if self._fallback and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        if self._joins_words:
            return piece.replace("▁", " ").encode()
        return self._tokenizer.decode([token], skip_special_tokens=False).encode()


def _decoders(decoder: dict[str, Any] | None) -> list[str]:
    """The names in a tokenizer.json's decoder, which may be a sequence."""
    if decoder is None:
        return []
    return [decoder["type"], *(name for part in decoder.get("decoders", ()) for name in _decoders(part))]


def _gpt2_alphabet() -> dict[str, int]:
    """GPT-2's bytes_to_unicode, reversed: printable bytes are themselves, the others follow from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
