"""How byte-level tokenizers cut a text into words before they merge bytes: what a GGUF file only has a name for.

The patterns are those of the models' own `tokenizer.json`.
"""

from collections.abc import Mapping
from typing import NamedTuple

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split


class SplitRule(NamedTuple):
    """pattern: of a word; "" for GPT-2's.

    digits: each by itself. whole_words: a word that is a token is not merged from its bytes. bos: a text begins with
    the BOS token, unless the file says otherwise. nfc: Unicode is normalised first.
    """

    pattern: str = ""
    digits: bool = False
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False

    def pre_tokenizer(self) -> PreTokenizer:
        if self.pattern:
            return Sequence(
                [Split(Regex(self.pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
            )
        words = ByteLevel(add_prefix_space=False, use_regex=True)
        return Sequence([Digits(individual_digits=True), words]) if self.digits else words


_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"

_GPT2 = SplitRule()
_SINGLE_DIGITS = SplitRule(digits=True)
_LLAMA3 = SplitRule(
    rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}", whole_words=True, bos=True
)
_QWEN2 = SplitRule(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}", nfc=True)
_TEKKEN = SplitRule(rf"{_CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}", whole_words=True, bos=True)

SPLIT_RULES: Mapping[str, SplitRule] = {  # by tokenizer.ggml.pre
    **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo"), _GPT2),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _SINGLE_DIGITS
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
