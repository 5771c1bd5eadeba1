"""From what a request asks for to a constraint: one thread compiles, so that neither steps nor requests wait for it."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from

from stepladder.workers.core import Constraint
from stepladder.workers.grammar.constraint import GrammarConstraint
from stepladder.workers.structured_outputs import StructuredOutputs
from stepladder.workers.text.tokenizer import Tokenizer

KEPT = 32  # compiled grammars
TRIED_TOKENS = 4
STACK_BYTES = 128 << 20  # the library recurses along chains of rules; only what is used takes memory
# what a grammar may cost: about a second to compile, a tenth of one for a mask, some ten megabytes
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 25_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# between two parts of a JSON text a blank, or a line's end and indentation: no room for blanks without end, which small
# models write where nothing forbids it
JSON_OPTIONS: Any = {"whitespace_pattern": r" |\r?\n[ \t]{0,40}", "lenient": False}


class Grammars:
    """Compiles for one model.

    Args:
        load: its tokenizer; called when the first grammar is asked for, in the thread that compiles.
        vocab_size: of the model.
    """

    def __init__(self, load: Callable[[], Tokenizer], vocab_size: int) -> None:
        self._load, self._vocab_size = load, vocab_size
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[StructuredOutputs, LLMatcher] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None

    def check(self, asked: StructuredOutputs) -> "Future[None]":
        """Whether it can be compiled and begun; a ValueError with one sentence if not."""
        return self._run(lambda: self._compile(asked) and None)

    def begin(
        self, asked: StructuredOutputs, ends: Sequence[int], last_ends: Sequence[int], output: Sequence[int] = ()
    ) -> "Future[Constraint]":
        """The constraint of a sequence whose text has begun with the tokens `output`; other arguments as its."""

        def make() -> GrammarConstraint:
            constraint = GrammarConstraint(self._compile(asked).deep_copy(), self._vocab_size, ends, last_ends)
            for token in output:
                constraint.advance(token)
            return constraint

        return self._run(make)

    def _run(self, work: Callable[[], Any]) -> "Future[Any]":
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "grammars")
            before = threading.stack_size(STACK_BYTES)
            try:
                return self._thread.submit(work)  # starts the thread
            finally:
                threading.stack_size(before)
        return self._thread.submit(work)

    def _compile(self, asked: StructuredOutputs) -> LLMatcher:
        """At the beginning of its text; to be copied, not used."""
        if asked in self._compiled:
            self._compiled.move_to_end(asked)
            return self._compiled[asked]
        if self._vocabulary is None:
            self._vocabulary = vocabulary_of(self._load(), self._vocab_size)
        matcher = _begun(self._vocabulary, asked)
        self._compiled[asked] = matcher
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return matcher


def source_of(asked: StructuredOutputs) -> str:
    """As llguidance takes it.

    Raises:
        ValueError: it cannot be read.
    """
    if asked.json is not None or asked.json_object:
        return LLMatcher.grammar_from_json_schema(asked.text or '{"type": "object"}', overrides=JSON_OPTIONS)
    if asked.regex is not None:
        return LLMatcher.grammar_from_regex(asked.regex)
    if asked.choice:
        words = " | ".join(json.dumps(word, ensure_ascii=False) for word in asked.choice)
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {words}")
    assert asked.grammar is not None
    return grammar_from("grammar", asked.grammar)


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    """Every token of the model as bytes, and behind them one that stands for the end."""
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)))


class _Vocabulary:
    """The attributes that llguidance asks for. Ids without a token have no bytes, and so are never allowed."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, vocab_size
        self.tokens = [*(tokenizer.bytes_of(token) for token in range(vocab_size)), b"<|the end|>"]
        self.special_token_ids = [*(t for t in range(vocab_size) if tokenizer.is_special(t)), vocab_size]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _begun(vocabulary: LLTokenizer, asked: StructuredOutputs) -> LLMatcher:
    """Raises ValueError: the library cannot use it, or it allows nothing, or it is too large for the first token."""
    name = asked.given[0]
    try:
        matcher = LLMatcher(vocabulary, source_of(asked), log_level=0, limits=LLParserLimits(**LIMITS))
        trial, mask = matcher.deep_copy(), b""
        for _ in range(TRIED_TOKENS):  # some grammars turn out to be too large only when they are used
            mask = trial.compute_bitmask()
            if trial.is_stopped() or not any(mask):
                break
            trial.consume_token(_lowest(mask))
        impossible = not any(mask) and not trial.is_error()
    except BaseException as error:  # a panic of the library is no Exception; nothing else ends this thread
        raise ValueError(f"{name} cannot be used: {str(error)[:300]}") from None
    if reason := matcher.get_error() or trial.get_error():
        reason = reason.partition("\n")[0].removesuffix("<non-verbose/>").strip()
        raise ValueError(f"{name} cannot be used: {reason[:300]}")
    if impossible:
        raise ValueError(f"{name} cannot be used: no text satisfies it")
    return matcher


def _lowest(mask: bytes) -> int:
    """The lowest token of a mask, which has one."""
    value = int.from_bytes(mask, "little")
    return (value & -value).bit_length() - 1
