"""Text that grows token by token equals text decoded at once, and shows nothing of a stop string."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from stepladder.workers.text.stream import TextStream, settled
from stepladder.workers.text.templates import compile_template
from stepladder.workers.text.tokenizer import Tokenizer
from tests.tokenizers_of import write_byte_fallback, write_byte_level

TEXT = st.text(max_size=40) | st.text("aSTOPstop é日😀\ufffd\n", max_size=40)
STOPS = st.lists(st.text("aSTOPs é日😀", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_byte_fallback(tmp_path_factory.mktemp("byte_fallback")))


def chunked(tokens: list[int], sizes: list[int]) -> list[list[int]]:
    """Tokens as steps bring them: one, or several when drafted ones are accepted."""
    chunks, at = [], 0
    for size in sizes:
        chunks.append(tokens[at : at + size])
        at += size
    return [*chunks, *([token] for token in tokens[at:])]


def push_all(stream: TextStream, tokens: list[int], sizes: list[int]) -> str:
    """Everything shown, in one string. What is shown grows, and `text` always begins with it."""
    shown = ""
    for chunk in chunked(tokens, sizes):
        shown += stream.push(chunk)
        assert stream.text.startswith(shown)
    shown += stream.push([], finished=True)
    assert stream.text == shown
    return shown


SIZES = st.lists(st.integers(0, 4), max_size=6)


@given(text=TEXT, sizes=SIZES)
def test_any_text_comes_out_whole(byte_level: Tokenizer, text: str, sizes: list[int]) -> None:
    tokens = byte_level.encode(text)
    assert push_all(TextStream(byte_level), tokens, sizes) == byte_level.decode(tokens) == text


@given(tokens=st.lists(st.integers(0, 319), max_size=30), sizes=SIZES)
def test_any_tokens_come_out_as_decoded_at_once(byte_level: Tokenizer, tokens: list[int], sizes: list[int]) -> None:
    """Also broken characters, and special tokens in between."""
    assert push_all(TextStream(byte_level), tokens, sizes) == byte_level.decode(tokens)


@given(text=TEXT, sizes=SIZES)
def test_byte_fallback_text_comes_out_whole(byte_fallback: Tokenizer, text: str, sizes: list[int]) -> None:
    tokens = byte_fallback.encode(text)
    assert push_all(TextStream(byte_fallback), tokens, sizes) == byte_fallback.decode(tokens)


@given(tokens=st.lists(st.integers(0, 319), max_size=40), at=st.integers(0, 40), special=st.booleans())
def test_a_text_goes_on_where_its_prompt_ended(
    byte_level: Tokenizer, tokens: list[int], at: int, special: bool
) -> None:
    """Also within a character."""
    stream = TextStream(byte_level, before=tokens[:at], special=special)
    whole = byte_level.fast.decode(tokens, skip_special_tokens=not special)
    assert settled(byte_level, tokens[:at], special) + push_all(stream, tokens[at:], []) == whole


@given(text=TEXT, before=TEXT)
def test_a_text_keeps_the_space_before_its_first_word(byte_fallback: Tokenizer, text: str, before: str) -> None:
    """With a tokenizer that decodes no space at the beginning of a text."""
    tokens, prompt = byte_fallback.encode(text), byte_fallback.encode(before)
    stream = TextStream(byte_fallback, before=prompt)
    whole = byte_fallback.decode([*prompt, *tokens])
    assert settled(byte_fallback, prompt) + push_all(stream, tokens, []) == whole


def test_a_text_behind_special_tokens_keeps_its_space(byte_fallback: Tokenizer) -> None:
    word, end = byte_fallback.encode("STOP"), byte_fallback.fast.token_to_id("</s>")
    after = {(): "STOP", (end,) * 20: "STOP", (*word, *[end] * 20): " STOP", (word[0],) * 1000: " STOP"}
    for before, text in after.items():
        assert push_all(TextStream(byte_fallback, before=before), word, []) == text
    shown = TextStream(byte_fallback, ("STOP",), before=word)
    assert shown.push([*word]) == " " and shown.stopped


def test_a_text_goes_on_behind_a_long_run_of_bytes(byte_fallback: Tokenizer) -> None:
    """Of which a window that began within a character would make nothing."""
    for before in ("한" * 4 + "ü", "ü" * 7 + "한", "한" * 20):
        prompt, tokens = byte_fallback.encode(before), byte_fallback.encode("한ü")[1:]  # without the space before it
        assert push_all(TextStream(byte_fallback, before=prompt), tokens, []) == "한ü"


def test_the_space_is_what_transformers_decodes(byte_fallback: Tokenizer, tmp_path: Path) -> None:
    oracle = PreTrainedTokenizerFast(tokenizer_object=byte_fallback.fast)
    prompt, tokens = oracle.encode("to a"), oracle.encode("STOP a")
    text = oracle.decode([*prompt, *tokens]).removeprefix(oracle.decode(prompt))
    assert push_all(TextStream(byte_fallback, before=prompt), tokens, []) == text == " STOP a"


@pytest.mark.parametrize("which", ["byte_level", "byte_fallback"])
def test_special_tokens_can_be_written_out(request: pytest.FixtureRequest, which: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    special = {"byte_level": "<|end|>", "byte_fallback": "</s>"}[which]
    tokens = [*tokenizer.encode("to a"), tokenizer.fast.token_to_id(special), *tokenizer.encode("STOP")]
    stream = TextStream(tokenizer, before=tokens[:1], special=True)
    assert settled(tokenizer, tokens[:1]) + push_all(stream, tokens[1:], []) == tokenizer.decode(
        tokens, skip_special=False
    )
    stopped = TextStream(tokenizer, (special[1:],), special=True)
    assert stopped.push(tokens) == "to a" + special[0] and stopped.stopped


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    path = write_byte_level(tmp_path)
    file = FastTokenizer.from_file(str(path / "tokenizer.json"))
    file.enable_truncation(10)
    file.enable_padding(length=100)
    file.save(str(path / "tokenizer.json"))
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    for text in ("a", "word " * 1000):
        tokens = Tokenizer(path).encode(text)
        assert tokens == oracle(text).input_ids and Tokenizer(path).decode(tokens) == text


@given(text=TEXT | st.sampled_from(["<|user|>\nhi", "<|end|><|user|>é日<|end|>", "  a  STOP"]))
def test_offsets_are_where_tokens_begin(byte_level: Tokenizer, text: str) -> None:
    """As found by decoding: a token within a character has that character's."""
    tokens = byte_level.encode(text)
    wanted = [len(settled(byte_level, tokens[:at], special=True)) for at in range(len(tokens))]
    assert byte_level.offsets(text) == wanted


def test_half_a_character_is_refused(byte_level: Tokenizer) -> None:
    """JSON spells it, and a template that writes JSON passes it on."""
    for tokenize in (byte_level.encode, byte_level.offsets):
        with pytest.raises(ValueError, match=r"not valid Unicode at character 3$"):
            tokenize("ab \ud800")


def test_offsets_in_words_with_spaces(tmp_path: Path) -> None:
    """The space before a word is the word's, also where the tokenizer says otherwise; what it adds has no width."""
    tokenizer = Tokenizer(write_byte_level(tmp_path))
    assert tokenizer.offsets("<|user|>\nhi") == [0, 8, 9, 10]
    fast = tokenizer.fast
    fast.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing("<|end|> $A <|end|>", None, [("<|end|>", fast.token_to_id("<|end|>"))]),
        ]
    )
    text = "The quick brown"
    tokens = tokenizer.encode(text)
    starts = [0, *(len(fast.decode(tokens[1:at])) for at in range(1, len(tokens)))]
    assert tokenizer.offsets(text) == starts
    assert tokenizer.offsets(text, add_special_tokens=False) == starts[1:-1]


@given(text=TEXT, stop=STOPS, sizes=SIZES, which=st.sampled_from(("byte_level", "byte_fallback")))
def test_stop_strings(
    request: pytest.FixtureRequest, text: str, stop: tuple[str, ...], sizes: list[int], which: str
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    tokens = tokenizer.encode(text)
    stream, shown = TextStream(tokenizer, stop), ""
    for chunk in chunked(tokens, sizes):
        shown += stream.push(chunk)
        assert not any(s in shown for s in stop)
        ends = [shown[-n:] for n in range(1, len(shown) + 1)]
        assert stream.stopped or not any(s.startswith(end) for s in stop for end in ends), "a beginning was shown"
    shown += stream.push([], finished=True)
    whole = tokenizer.decode(tokens)
    assert stream.stopped == any(s in whole for s in stop)
    assert stream.text == shown == text_before_stop(tokenizer, tokens, stop)
    if len(stop) == 1:
        assert shown == whole.split(stop[0])[0]


def text_before_stop(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...]) -> str:
    """Decode ever longer beginnings; the first that holds a stop string is cut at the earliest one in it."""
    for count in range(len(tokens) + 1):
        text = tokenizer.decode(tokens[:count])
        if count < len(tokens) and text.endswith("\ufffd"):
            continue
        if any(s in text for s in stop):
            return min((text.split(s)[0] for s in stop), key=len)
    return tokenizer.decode(tokens)


def test_stop_string_across_tokens(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("xSTOPy")
    assert len(tokens) > 2
    stream = TextStream(byte_level, ("STOP",))
    shown = [stream.push([token]) for token in tokens]
    assert "".join(shown) == "x" and stream.stopped and stream.push([], finished=True) == ""


def test_a_beginning_of_a_stop_string_is_shown_once_it_cannot_become_one(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, ("STOP",))
    assert stream.push(byte_level.encode("abST")) == "ab"
    assert stream.push(byte_level.encode("x")) == "STx"
    assert stream.push(byte_level.encode("S")) == ""
    assert stream.push([], finished=True) == "S" and not stream.stopped


def test_half_a_character_is_held_back(byte_level: Tokenizer) -> None:
    vocabulary = byte_level.fast.get_vocab()
    tokens = [vocabulary[piece] for piece in "ðŁĺĢ"]  # the four bytes of 😀 in GPT-2's alphabet
    stream = TextStream(byte_level)
    assert [stream.push([token]) for token in tokens] == ["", "", "", "😀"]
    broken = TextStream(byte_level)
    assert broken.push(tokens[:3]) == "" and broken.push([], finished=True) == "\ufffd"


@given(st.lists(st.integers(0, 319), min_size=30, max_size=120))
def test_long_runs_of_broken_bytes_come_out_as_decoded_at_once(byte_level: Tokenizer, tokens: list[int]) -> None:
    """Longer than the window, with bytes in the upper half only."""
    broken = [token for token in tokens if any(byte > 127 for byte in byte_level.bytes_of(token))]
    assert push_all(TextStream(byte_level), broken, []) == byte_level.decode(broken)


@pytest.mark.parametrize("which", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("raw", [b"\xff", b"\xe6", b"\x80", b"\xf0\x9f"])
def test_endless_broken_bytes_are_shown(request: pytest.FixtureRequest, which: str, raw: bytes) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    tokens = [token_of(tokenizer, bytes([byte])) for byte in raw] * 40
    stream, shown = TextStream(tokenizer), 0
    for count, token in enumerate(tokens, 1):
        shown += stream.push([token]).count("\ufffd")
        assert shown >= (count - 3) // len(raw), "more than three bytes are held back"
    assert shown + len(stream.push([], finished=True)) >= len(tokens) // len(raw)


def token_of(tokenizer: Tokenizer, raw: bytes) -> int:
    return next(t for t in range(tokenizer.fast.get_vocab_size()) if tokenizer.bytes_of(t) == raw)


@pytest.mark.parametrize("raw", [b"\xe6", b"a", b"\x80\xce"])
def test_a_token_costs_the_same_however_long_the_text_is(byte_level: Tokenizer, raw: bytes) -> None:
    """Counted in tokens that are decoded: special ones between halves of a character, and broken ones, among them."""
    decoded: list[int] = []

    class Counting(Tokenizer):
        def __init__(self) -> None:
            self.__dict__.update(byte_level.__dict__)

        def decode(self, tokens: list[int]) -> str:
            decoded.append(len(tokens))
            return super().decode(tokens)

    stream = TextStream(Counting())
    tokens = [token_of(byte_level, bytes([byte])) for byte in raw]
    special = byte_level.fast.token_to_id("<|end|>")
    for index in range(600):
        stream.push([tokens[index % len(tokens)], special, special])
    assert max(decoded) <= 25 and len(decoded) <= 3 * 600


def test_special_tokens_within_a_character_change_nothing(byte_level: Tokenizer) -> None:
    halves = [token_of(byte_level, bytes([byte])) for byte in "日".encode()]
    special = byte_level.fast.token_to_id("<|end|>")
    stream = TextStream(byte_level)
    assert stream.push([halves[0], *[special] * 50, *halves[1:]]) == "日"


def test_no_stop_string_is_looked_for_in_the_first_tokens(byte_level: Tokenizer) -> None:
    tokens = [token_of(byte_level, char.encode()) for char in "xyxyxy"]
    for min_tokens, kept in ((0, "x"), (1, "x"), (2, "xyx"), (3, "xyx"), (4, "xyxyx"), (6, "xyxyxy")):
        for bundle in (1, 6):
            stream = TextStream(byte_level, ("y",), min_tokens)
            shown = "".join(stream.push(tokens[i : i + bundle]) for i in range(0, 6, bundle))
            assert shown + stream.push([], finished=True) == stream.text == kept
            assert stream.stopped == (kept != "xyxyxy") and len(stream) == len(kept)
    across = TextStream(byte_level, ("xy",), min_tokens=1)
    assert across.push(tokens) == "xy" and across.stopped, "one that begins in them is not found either"


def test_stop_strings_can_stay_in_the_text(byte_level: Tokenizer) -> None:
    tokens = [token_of(byte_level, char.encode()) for char in "a STOPS here"]
    stream = TextStream(byte_level, ("STOP", "TO"), include_stop=True)
    assert stream.push(tokens) == "a STO" and stream.stopped


@pytest.mark.parametrize("which", ["byte_level", "byte_fallback"])
def test_bytes_of_tokens_join_to_the_text(request: pytest.FixtureRequest, which: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    text = "naïve STOP 日本😀 é."
    tokens = tokenizer.encode(text)
    assert b"".join(map(tokenizer.bytes_of, tokens)).decode().strip() == text
    special = {"byte_level": "<|end|>", "byte_fallback": "</s>"}[which]
    assert tokenizer.bytes_of(tokenizer.fast.token_to_id(special)) == special.encode()
    assert tokenizer.bytes_of(10**6) == b"" and not tokenizer.shows(10**6)


CHATML = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('no role ' + m['role']) }}{% endif %}\n"
    "    <|user|>{{ m['role'] + ': ' + m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)


def test_chat_equals_transformers(tmp_path: Path) -> None:
    path = write_byte_level(tmp_path, chat_template=CHATML, bos_token="<|user|>", eos_token={"content": "<|end|>"})
    messages = [{"role": "user", "content": "hi <b>'there'</b> & you"}, {"role": "assistant", "content": "日本"}]
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), bos_token="<|user|>", eos_token="<|end|>", chat_template=CHATML
    )
    want = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert Tokenizer(path).chat(messages) == want


RICH = (
    "{{ strftime_now('%Y') }}{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}"
    "{{ tools is none }}{{ documents is none }}"
)


def test_filters_and_functions_equal_transformers(tmp_path: Path) -> None:
    path = write_byte_level(tmp_path, chat_template=RICH)
    messages = [{"role": "user", "content": "<b>'é'</b> & \"you\""}]
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), chat_template=RICH)
    assert Tokenizer(path).chat(messages) == oracle.apply_chat_template(messages, tokenize=False)


def test_the_template_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        "stepladder.workers.text.tokenizer.compile_template", lambda s: compiled.append(s) or compile_template(s)
    )
    tokenizer = Tokenizer(write_byte_level(tmp_path, chat_template="{{ messages | length }}"))
    assert [tokenizer.chat([{}] * n) for n in (1, 2, 3)] == ["1", "2", "3"] and len(compiled) == 1


def test_chat_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    """Where transformers 5 saves it."""
    path = write_byte_level(tmp_path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), chat_template=CHATML)
    tokenizer.save_pretrained(path)
    assert (path / "chat_template.jinja").exists()
    assert "<|user|>user: hi<|end|>" in Tokenizer(path).chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("files", [False, True])
def test_of_several_chat_templates_tools_have_their_own(tmp_path: Path, files: bool) -> None:
    """In the configuration, and as transformers 5 saves them; the oracle chooses alike."""
    tools = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}]
    templates = {"tool_use": "{{ tools[0].function.name }}", "default": "none {{ messages[0].content }}", "rag": "no"}
    named = [{"name": name, "template": template} for name, template in templates.items()]
    path = write_byte_level(tmp_path, chat_template=named)
    if files:
        oracle = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), chat_template=templates)
        oracle.save_pretrained(path)
        assert (path / "additional_chat_templates" / "tool_use.jinja").exists()
    tokenizer, messages = Tokenizer(path), [{"role": "user", "content": "hi"}]
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), chat_template=templates)
    for told, expected in ((tools, "look"), (None, "none hi")):
        assert tokenizer.chat(messages, told) == expected
        assert oracle.apply_chat_template(messages, tools=told, tokenize=False) == expected
    assert tokenizer.takes_tools and tokenizer.template == templates["tool_use"]


def test_a_template_that_only_takes_tools_is_none_without_them(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_byte_level(tmp_path, chat_template=[{"name": "tool_use", "template": "yes"}]))
    tokenizer.prepare()
    assert tokenizer.chat([], [{}]) == "yes"
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.chat([])


@pytest.mark.parametrize(
    ("template", "messages", "sentence"),
    [
        (None, [], "this model has no chat template"),
        (CHATML, [{"role": "tool", "content": ""}], "refuses these messages: no role tool"),
        (CHATML, [{"role": "user", "content": None}], "the chat template refuses these messages"),
        (CHATML, [{"role": "user", "content": [{"type": "text"}]}], "the chat template refuses these messages"),
        (CHATML, [{"role": "user"}], "the chat template refuses these messages"),
        ("{% if %}", [], "the chat template refuses these messages"),
        ("{{ messages.__class__.__mro__ }}", [], "the chat template refuses these messages"),
        ("{{ messages[0]['content'].missing.deeper }}", [{"content": "a"}], "the chat template refuses these messages"),
    ],
)
def test_chat_errors_are_sentences(
    tmp_path: Path, template: str | None, messages: list[dict[str, object]], sentence: str
) -> None:
    path = write_byte_level(tmp_path, chat_template=template)
    with pytest.raises(ValueError, match=sentence):
        Tokenizer(path).chat(messages)


def test_info_is_the_configuration_with_tokens_as_text(tmp_path: Path) -> None:
    """Huge lengths and nested token objects are what published files hold."""
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    end = {"content": "<|end|>", "lstrip": False}
    config = {
        "chat_template": named,
        "eos_token": end,
        "added_tokens_decoder": {"256": end},
        "additional_special_tokens": [end, "<|user|>"],
        "model_max_length": 10**30,
        "vocab_file": "/home/somebody/vocab.json",
    }
    assert Tokenizer(write_byte_level(tmp_path, **config)).info() == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "yes",
        "eos_token": "<|end|>",
        "added_tokens_decoder": {"256": "<|end|>"},
        "additional_special_tokens": ["<|end|>", "<|user|>"],
        "model_max_length": 10**30,
    }


def test_unreadable_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)
    write_byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({})[:-1])
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        Tokenizer(tmp_path)
