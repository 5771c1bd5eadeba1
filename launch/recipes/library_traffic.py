"""Traffic for a model that does not chat: beginnings out of Python's own library, by kind of text."""

import random
from collections.abc import Callable

from stepladder.launch.recipes.corpus import standard_library
from stepladder.workers.text.tokenizer import Tokenizer

PROMPT = 48  # tokens of a beginning
TABLES = ("encodings/cp", "encodings/iso", "encodings/mac_", "encodings/koi", "html/entities")
NO_PROGRAM = ("encodings/", "html/entities", "pydoc_data/")

KINDS: dict[str, Callable[[str], bool]] = {
    "source": lambda name: name.endswith(".py") and not name.startswith(NO_PROGRAM),
    "prose": lambda name: not name.endswith(".py"),
    "tables": lambda name: name.startswith(TABLES),
}
"""Of documents by name: programs; the manual; tables of character sets and of markup."""


def texts(kind: str) -> list[str]:
    """All documents of this kind."""
    library = standard_library()
    return [document.text for document in (*library.train, *library.held_out) if KINDS[kind](document.name)]


def beginnings(tokenizer: Tokenizer, kind: str, count: int, seed: int) -> list[tuple[int, ...]]:
    """So many different ones, the same for the same seed and version of Python.

    Raises:
        ValueError: there are not so many.
    """
    found = set[tuple[int, ...]]()
    for text in map(tokenizer.encode, texts(kind)):
        found |= {tuple(text[at : at + PROMPT]) for at in range(0, len(text) - PROMPT, PROMPT)}
    if len(found) < count:
        raise ValueError(f"kinds: there are only {len(found)} different beginnings of {kind} here; {count} are wanted")
    order = sorted(found)
    random.Random(seed).shuffle(order)  # so that a smaller number takes the same first ones
    return order[:count]
