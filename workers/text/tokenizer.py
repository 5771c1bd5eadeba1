"""The tokenizer of a model directory: text to tokens, conversations to text, and what single tokens stand for."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from stepladder.parallel.special_tokens import named_entries, texts_of
from stepladder.parallel.typed_json import (
    LONG_TEXT,
    TEXT,
    check_regular,
    either,
    naming,
    optional,
    read_object,
    read_text,
    record,
    several,
    typed,
)
from stepladder.workers.text.added_tokens import ENTRIES, add_configured
from stepladder.workers.text.chat import DEFAULTS, ChatOptions, ChatTemplate, Message
from stepladder.workers.text.control_tokens import (
    MARK,
    ControlTokens,
    MarkedText,
    marked_text,
    reader_of_marks,
)
from stepladder.workers.text.templates import compile_template, literals, reads
from stepladder.workers.text.token_bytes import TokenBytes
from stepladder.workers.text.unicode_text import unicode

DEFAULT, TOOL_USE = "default", "tool_use"  # names of templates; the second is for conversations with tools

_TOKEN = optional(either(TEXT, record(content=TEXT)))
_FIELDS = {  # of tokenizer_config.json, as far as they are read
    "chat_template": optional(either(LONG_TEXT, several(record(name=TEXT, template=LONG_TEXT)))),
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _TOKEN),
    "added_tokens_decoder": ENTRIES,
}


class Tokenizer:
    """`tokenizer.json` and the chat template of a Hugging Face directory. Knows text, nothing of engines.

    Attributes:
        fast: it cuts and pads nothing, whatever the file says: what fits is judged by who knows the context.

    Raises:
        ValueError: the directory has no readable tokenizer.
    """

    def __init__(self, directory: str | Path) -> None:
        self.fast = read_tokenizer(Path(directory) / "tokenizer.json")
        self._config = _tokenizer_config(Path(directory) / "tokenizer_config.json")
        add_configured(self.fast, self._config, entries := named_entries(directory))
        self._chat_templates = _chat_templates(Path(directory), self._config)
        self._templates: dict[str, ChatTemplate] = {}
        self._named = texts_of(entries)
        self._added = self.fast.get_added_tokens_decoder()
        self._special = {token for token, entry in self._added.items() if entry.special}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """In a batch of one: only then does the library let other threads run meanwhile.

        Raises:
            ValueError: a text holds half a character, as what a template made of JSON may; or a marked one spells a
                token that this tokenizer cannot write as text.
        """
        unicode(text)
        if not isinstance(text, MarkedText):
            (found,) = self.fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return found.ids
        (encoding,) = self._reader.encode_batch([text], add_special_tokens=add_special_tokens)
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._added and MARK in text[start:stop]:
                spelled = self._added[token].content
                if spelled in self._control_tokens:
                    raise ValueError(f"a message holds {spelled!r}, which this tokenizer cannot write as text")
        return encoding.ids

    def prepare(self) -> None:
        """Do what would keep the first request waiting: list the vocabulary, and find out what the template takes."""
        _ = self.longest, self._bytes, self._reader
        tools: dict[str, list[Any] | None] = {DEFAULT: None, TOOL_USE: [{}]}
        for name, role in product(self._chat_templates, ("system", "user", "assistant", "tool")):
            with suppress(ValueError):  # whoever sends such a message is told
                self.chat([{"role": role, "content": "x"}], tools[name])

    def decode(self, tokens: list[int], skip_special: bool = True) -> str:
        return self.fast.decode(tokens, skip_special_tokens=skip_special)

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token: a text has at least a token for every so many of its own."""
        return max(map(len, self.fast.get_vocab()), default=1)

    def offsets(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Where in `text` each token of `encode(text)` begins, in characters; several may share one.
        Raises what `encode` raises."""
        (encoding,) = self.fast.encode_batch([unicode(text)], add_special_tokens=add_special_tokens)
        end, found = 0, list[int]()
        for (start, stop), added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
            found.append(end if added else min(start, end))  # some tokenizers leave the space before a word out
            end = end if added else max(end, stop)
        return found

    def chat(self, messages: Sequence[Message], tools: list[Any] | None = None, options: ChatOptions = DEFAULTS) -> str:
        """The prompt of a conversation for `encode`, rendered in a sandbox with the model's own chat template.

        Args:
            messages: as OpenAI has them. Where the template takes no lists of parts, their texts are joined; where it
                takes no strings, they become parts. Arguments of tool calls may be objects or JSON.
            tools: what the template is to tell the model of.

        Returns:
            The text; a MarkedText if a message spells a special token, or another one that the template writes.

        Raises:
            ValueError: the model has no chat template, or the template refuses these messages.
        """
        name = TOOL_USE if tools and TOOL_USE in self._chat_templates else DEFAULT
        if name not in self._chat_templates:
            raise ValueError("this model has no chat template; use /v1/completions")
        try:
            template = self._compiled(name)
            given = template.fitted(messages), tools, options
            marked = given if options.special_tokens_in_content else self._marked(*given)
            text = template.render(*marked)
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"the chat template refuses these messages: {error}".replace(MARK, "")) from None
        return text if marked == given else marked_text(text)

    def _marked(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, options: ChatOptions
    ) -> tuple[list[dict[str, Any]], list[Any] | None, ChatOptions]:
        """What a client has written, with marks where it spells control tokens."""
        marked = [
            {
                name: value if name == "role" else self._control(message.get("role")).mark_all(value)
                for name, value in message.items()
            }
            for message in messages
        ]
        others = self._control("user")
        further = others.mark_all({**options.template_kwargs})
        return marked, others.mark_all(tools), replace(options, template_kwargs=further)

    def _control(self, role: Any) -> ControlTokens:
        """The tokens that no message of a role can write: the special ones, and those of the template. Answers of the
        model may hold the latter, such as <think>, and are sent back."""
        return self._special_tokens if role == "assistant" else self._control_tokens

    @property
    def template(self) -> str:
        """The source of the chat template that is told of tools; "" without one."""
        return self._chat_templates.get(TOOL_USE) or self._chat_templates.get(DEFAULT, "")

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the chat template shows tools to the model."""
        return reads(self.template, "tools")

    @cached_property
    def special_texts(self) -> frozenset[str]:
        """How special tokens are spelled."""
        return frozenset(self._added[token].content for token in self._special)

    def info(self) -> dict[str, Any]:
        """`tokenizer_config.json` with the chat template in use, as vLLM's /tokenizer_info shows it: special tokens as
        their text, and no paths of files."""
        found = {key: _texts(value) for key, value in self._config.items() if key not in ("vocab_file", "merges_file")}
        found.setdefault("tokenizer_class", "PreTrainedTokenizerFast")  # what loads a bare tokenizer.json
        used = self._chat_templates.get(DEFAULT)
        return found | ({"chat_template": used} if used else {})

    def shows(self, token: int) -> bool:
        """Whether it can add to a text: special tokens and ids beyond the vocabulary cannot."""
        return token not in self._special and self.knows(token)

    def knows(self, token: int) -> bool:
        """Whether the vocabulary holds it."""
        return self.fast.id_to_token(token) is not None

    def is_special(self, token: int) -> bool:
        """Whether texts are shown without it."""
        return token in self._special

    def bytes_of(self, token: int) -> bytes:
        """What one token stands for, special ones written out; it may be part of a character."""
        return self._bytes[token]

    def _compiled(self, name: str) -> ChatTemplate:
        if name not in self._templates:
            special = {"bos_token": "", "eos_token": ""}  # templates add them without asking whether there are any
            self._templates[name] = ChatTemplate(compile_template(self._chat_templates[name]), special | self._named)
        return self._templates[name]

    @cached_property
    def _special_tokens(self) -> ControlTokens:
        return self._control_of(entry for entry in self._added.values() if entry.special)

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        written = "\0".join(text for source in self._chat_templates.values() for text in literals(source))
        return self._control_of(e for e in self._added.values() if e.special or e.content in written)

    def _control_of(self, tokens: Iterable[AddedToken]) -> ControlTokens:
        return ControlTokens(tokens, self.fast.normalizer)

    @cached_property
    def _reader(self) -> FastTokenizer:
        return reader_of_marks(self.fast, self._control_tokens)

    @cached_property
    def _bytes(self) -> TokenBytes:
        return TokenBytes(self.fast)


def read_tokenizer(path: Path) -> FastTokenizer:
    """A `tokenizer.json` without the truncation and padding of whoever saved it, as `transformers` reads it.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        check_regular(path)
        fast = FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} cannot be read: {error}") from None
    fast.no_truncation()
    fast.no_padding()
    return fast


def _tokenizer_config(path: Path) -> dict[str, Any]:
    try:
        config = read_object(path)
    except FileNotFoundError:
        return {}
    with naming(path):
        return typed(config, _FIELDS)


def _chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Those that are used, by name: from files of their own (transformers 5), or from the configuration."""
    given = config.get("chat_template") or ()
    named = [(DEFAULT, given)] if isinstance(given, str) else [(entry["name"], entry["template"]) for entry in given]
    found = {name: template for name, template in named if name in (DEFAULT, TOOL_USE)}
    for name, file in ((TOOL_USE, f"additional_chat_templates/{TOOL_USE}.jinja"), (DEFAULT, "chat_template.jinja")):
        with suppress(FileNotFoundError):
            found[name] = read_text(directory / file)
    return found


def _texts(value: Any) -> Any:
    """Tokens written as objects become their `content`, at any depth."""
    if isinstance(value, dict):
        return value["content"] if "content" in value else {key: _texts(inner) for key, inner in value.items()}
    return [_texts(inner) for inner in value] if isinstance(value, list) else value
