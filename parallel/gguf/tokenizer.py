"""A GGUF file's tokenizer as a `tokenizer.json`: byte-level BPE, or SentencePiece's BPE with bytes to fall back on."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from stepladder.parallel.gguf.reader import GgufFile
from stepladder.parallel.gguf.split_rules import SPLIT_RULES, SplitRule
from stepladder.parallel.typed_json import FLAG, LONG_TEXT, number, several, shown, whole

log = logging.getLogger(__name__)

BYTE_LEVEL, SENTENCE_PIECE = "gpt2", "llama"  # llama.cpp's names
ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message that goes on after a tool's answer
SPELLED_ENDS = {  # what llama.cpp also takes for the end of a turn, where it is a control token
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<EOT>",
}
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}  # sic
PADDING = re.compile(r"\[PAD\d+\]")  # rows of the embedding that no text has; llama.cpp gives them names
SPACE = "▁"
_SCORE = number(-1e30, 1e30)


@dataclass(frozen=True)
class Vocabulary:
    """tokenizer.ggml.* of a file."""

    file: GgufFile

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        return self.file.get("tokenizer.ggml.tokens", several(LONG_TEXT))

    @cached_property
    def types(self) -> tuple[int, ...]:
        """What each token is, a `gguf.TokenType`."""
        found = self.file.get(
            "tokenizer.ggml.token_type", several(whole(0, 255)), (TokenType.NORMAL,) * len(self.tokens)
        )
        if len(found) != len(self.tokens):
            raise ValueError(f"tokenizer.ggml.token_type has {len(found)} entries for {len(self.tokens)} tokens")
        return found

    @cached_property
    def ids(self) -> dict[str, int]:
        """Of every token that a text can have; of two that are spelled alike, of the first."""
        found: dict[str, int] = {}
        for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind != TokenType.UNUSED or not PADDING.fullmatch(token):
                found.setdefault(token, index)
        return found

    @property
    def kind(self) -> str:
        kind = self.file.get("tokenizer.ggml.model", LONG_TEXT)
        if kind not in (BYTE_LEVEL, SENTENCE_PIECE):
            raise ValueError(f"tokenizer.ggml.model is {shown(kind)}; it must be {BYTE_LEVEL!r} or {SENTENCE_PIECE!r}")
        return kind

    @cached_property
    def rule(self) -> SplitRule:
        """Of a byte-level tokenizer."""
        name = self.file.get("tokenizer.ggml.pre", LONG_TEXT, None)
        if name is None:
            log.warning("%s has no tokenizer.ggml.pre; its words are taken to be GPT-2's", self.file.path)
        rule = SPLIT_RULES.get(name or "default")
        if rule is None:
            known = ", ".join(SPLIT_RULES)
            raise ValueError(f"tokenizer.ggml.pre is {shown(name)}; this version knows the words of {known}")
        return rule

    def token_id(self, name: str) -> int | None:
        """Of a token that the file names by its use."""
        return self.file.get(f"tokenizer.ggml.{name}_token_id", whole(0, len(self.tokens) - 1), None)

    @cached_property
    def named(self) -> dict[str, str]:
        """The spelling of bos_token, eos_token and so on."""
        ids = {name: self.token_id(theirs) for name, theirs in NAMED.items()}
        return {f"{name}_token": self.tokens[index] for name, index in ids.items() if index is not None}

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer."""
        given = [index for name in ENDS if (index := self.token_id(name)) is not None]
        spelled = [
            index
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind == TokenType.CONTROL and token in SPELLED_ENDS
        ]
        return tuple(dict.fromkeys([*given, *spelled]))

    def flag(self, name: str, default: bool) -> bool:
        return self.file.get(f"tokenizer.ggml.{name}", FLAG, default)


def tokenizer_of(vocabulary: Vocabulary) -> Tokenizer:
    """What `tokenizer.json` is saved from.

    Raises:
        ValueError, KeyError: the metadata is missing, contradicts itself, or is of another kind of tokenizer.
    """
    is_byte_level = vocabulary.kind == BYTE_LEVEL
    try:
        tokenizer = _byte_level(vocabulary) if is_byte_level else _sentence_piece(vocabulary)
        for special in (True, False):
            wanted = TokenType.CONTROL if special else TokenType.USER_DEFINED
            tokenizer.add_tokens(
                [
                    AddedToken(token, special=special, normalized=False)
                    for token, index in vocabulary.ids.items()
                    if vocabulary.types[index] == wanted and token
                ]
            )
    except (ValueError, KeyError):
        raise
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise ValueError(f"tokenizer.ggml.* is no tokenizer: {error}") from None
    _add_ends(tokenizer, vocabulary, vocabulary.rule.bos if is_byte_level else True)
    return tokenizer


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    """As of GPT-2: every character is one or several byte tokens."""
    merges = [_pair(merge) for merge in vocabulary.file.get("tokenizer.ggml.merges", several(LONG_TEXT))]
    rule = vocabulary.rule
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=rule.whole_words))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(vocabulary: Vocabulary) -> Tokenizer:
    """As of Llama 2: words begin with ▁, unknown characters are tokens <0xNN>."""
    unknown = vocabulary.named.get("unk_token")
    model = models.BPE(
        vocabulary.ids, _merges_by_score(vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    before = vocabulary.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if before else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if before else steps)
    return tokenizer


def _merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece joins whatever two tokens make the token of the best score; so do merges in the order of scores."""
    ids, scores = vocabulary.ids, vocabulary.file.get("tokenizer.ggml.scores", several(_SCORE))
    if len(scores) != len(vocabulary.tokens):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(vocabulary.tokens)} tokens")
    joined = (token for token, index in ids.items() if vocabulary.types[index] == TokenType.NORMAL)
    ordered = sorted(joined, key=lambda token: (-scores[ids[token]], ids[token]))
    return [pair for token in ordered for pair in _halves(token, ids)]


def _halves(token: str, ids: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
    found = [(left, right) for left, right in pairs if left in ids and right in ids]
    return sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _pair(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise ValueError(f"tokenizer.ggml.merges has {shown(merge)}; it must be two tokens with a space between them")
    return left, right


def _add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary, bos: bool) -> None:
    """The tokens that every text begins or ends with."""
    named = vocabulary.named
    first = [named["bos_token"]] if vocabulary.flag("add_bos_token", bos) and "bos_token" in named else []
    last = [named["eos_token"]] if vocabulary.flag("add_eos_token", False) and "eos_token" in named else []
    if first or last:
        ids = [(token, vocabulary.tokens.index(token)) for token in dict.fromkeys([*first, *last])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last], pair=[*first, "$A", *last, *first, "$B:1", *last], special_tokens=ids
        )
