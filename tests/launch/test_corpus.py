"""The text of the bundled model: what is in it, how it is split, and the xz figure it is held against."""

import random

import pytest

from stepladder.launch.recipes.corpus import Corpus, Document, primed_xz_bits_per_byte, split, standard_library


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return standard_library()


def test_the_split_is_disjoint_by_name_and_by_text(corpus: Corpus) -> None:
    train, held_out = ({d.name for d in part} for part in (corpus.train, corpus.held_out))
    assert not train & held_out
    assert not {d.text for d in corpus.train} & {d.text for d in corpus.held_out}
    assert 0.02 < len(held_out) / len(train | held_out) < 0.08


def test_the_split_does_not_depend_on_the_order_files_are_found_in(corpus: Corpus) -> None:
    shuffled = [*corpus.train, *corpus.held_out]
    random.Random(3).shuffle(shuffled)
    assert Corpus(*split(shuffled)) == corpus


def test_the_hash_is_of_names_and_texts(corpus: Corpus) -> None:
    first, *rest = corpus.train
    changed = Corpus((Document(first.name, first.text + " "), *rest), corpus.held_out)
    assert changed.sha256 != corpus.sha256 == Corpus(corpus.train, corpus.held_out).sha256


def test_tests_and_vendored_wheels_are_left_out_and_topics_are_prose(corpus: Corpus) -> None:
    names = [d.name for d in (*corpus.train, *corpus.held_out)]
    assert names and not [n for n in names if "/test/" in f"/{n}" or "/tests/" in f"/{n}" or "site-packages" in n]
    assert "pydoc_data/topics.py" not in names
    assert "pydoc_data/topics/lambda" in names


def test_a_copied_text_stays_once_and_an_empty_one_not_at_all() -> None:
    documents = [Document(f"{i}.py", text) for i, text in enumerate(["x = 1\n", "\n", "x = 1\n", "y = 2\n"])]
    kept = [d for part in split(documents) for d in part]
    assert sorted(d.name for d in kept) == ["0.py", "3.py"]


def test_primed_xz_pays_nothing_for_what_it_has_seen_and_four_bits_for_random_hex_digits() -> None:
    hexadecimal = "".join(random.Random(0).choices("0123456789abcdef", k=40_000))
    document = [Document("a", hexadecimal)]
    assert primed_xz_bits_per_byte(document, document) < 0.05
    assert 4.0 <= primed_xz_bits_per_byte([Document("b", "def f():\n" * 1000)], document) < 4.3
