"""The tokenizer: lossless on any text, kind to indentation, readable by transformers."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from stepladder.launch.recipes.bpe import END_OF_TEXT, encode_plain, end_of_text_id, save_tokenizer, train_tokenizer

DEMO = Path(__file__).parents[2] / "launch" / "demo_model"
SOURCE = Path(__file__).read_text().replace("<|", "<")  # a special token in a text is another test


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([SOURCE] * 3, vocab_size=500)


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


python_like = st.text(st.sampled_from(" \t\n\r_().:=abz09é中<|>'\"\\"), max_size=60)


@given(text=st.text(st.characters(codec="utf-8")) | python_like)
def test_decoding_gives_any_text_back(tokenizer: Tokenizer, demo: Tokenizer, text: str) -> None:
    for each in (tokenizer, demo):
        assert each.decode(encode_plain(each, text), skip_special_tokens=False) == text


def test_a_special_token_in_a_text_is_plain_text(tokenizer: Tokenizer) -> None:
    ids = encode_plain(tokenizer, f"a{END_OF_TEXT}b")
    assert end_of_text_id(tokenizer) not in ids
    assert tokenizer.encode(END_OF_TEXT).ids == [end_of_text_id(tokenizer)]


def test_a_line_end_with_its_indentation_is_one_token(demo: Tokenizer) -> None:
    for depth in range(0, 20, 4):
        assert len(encode_plain(demo, "\n" + " " * depth)) == 1
    assert len(encode_plain(demo, SOURCE)) < len(SOURCE.encode()) / 2.7


def test_transformers_reads_the_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path, max_length=1024)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(SOURCE)["input_ids"] == encode_plain(tokenizer, SOURCE)
    assert theirs.eos_token_id == end_of_text_id(tokenizer)
    chat = [{"role": "user", "content": "x"}]
    prompt = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>\nx<|endoftext|>\n<|assistant|>\n"
