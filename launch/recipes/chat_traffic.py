"""The traffic: chat messages of four kinds, the same for the same seed and the same version of Python."""

import json
import random
from collections.abc import Callable, Iterator

from stepladder.launch.recipes.chat_material import THINGS, Library, record
from stepladder.workers.text.tokenizer import Tokenizer

ASKED = (
    "What does {name} of Python's module {module} do?",
    "When would one use {module}.{name} in Python?",
    "Explain {module}.{name} to somebody who is new to Python.",
    "What are the arguments {arguments} of {module}.{name} for?",
    "What should one look out for with {module}.{name}?",
)
REWRITTEN = ("Rewrite this in plain words: ", "Make this shorter: ", "Correct the style of this paragraph: ")
WRITTEN = (
    "Write a Python function {name}({arguments}). {does}",
    "Write a short Python function with a docstring: {name}({arguments}). {does}",
    "Write {name}({arguments}) in Python with type hints. {does}",
)


def messages(kind: str, count: int, seed: int, library: Library) -> list[str]:
    """So many different messages of a user.

    Raises:
        ValueError: there are not so many.
    """
    made = dict[str, None]()
    for tried, message in enumerate(KINDS[kind](library, random.Random(f"{kind} {seed}"))):
        if len(made) == count:
            return list(made)
        if tried > 100 * count:
            break
        made[message] = None
    raise ValueError(f"kinds: there are only {len(made)} different requests of {kind} here; {count} are wanted")


def prompts(tokenizer: Tokenizer, kind: str, count: int, seed: int, library: Library) -> Iterator[tuple[int, ...]]:
    """The same as a model's chats of one turn, in tokens."""
    for message in messages(kind, count, seed, library):
        text = tokenizer.chat([{"role": "user", "content": message}])
        yield tuple(tokenizer.encode(text, add_special_tokens=False))


def _prose(library: Library, draw: random.Random) -> Iterator[str]:
    while True:
        yield draw.choice(ASKED).format(**vars(draw.choice(library.functions)))


def _rewriting(library: Library, draw: random.Random) -> Iterator[str]:
    while True:
        yield draw.choice(REWRITTEN) + draw.choice(library.paragraphs)


def _code(library: Library, draw: random.Random) -> Iterator[str]:
    while True:
        yield draw.choice(WRITTEN).format(**vars(draw.choice(library.functions)))


def _tables(_: Library, draw: random.Random) -> Iterator[str]:
    """Half of them invent their contents, half of them convert what is given; Markdown and JSON."""
    while True:
        thing = draw.choice(sorted(THINGS))
        columns = ", ".join(draw.sample(THINGS[thing], len(THINGS[thing])))
        rows = [record(draw) for _ in range(draw.randint(2, 3))]
        text = "; ".join(", ".join(map(str, row.values())) for row in rows)
        yield draw.choice([
            f"Write a Markdown table of {draw.randint(4, 9)} {thing} with the columns {columns}.",
            f"Write a JSON array of {draw.randint(3, 7)} {thing} with the keys {columns}.",
            f"Make a Markdown table with the columns name, city, age of: {text}",
            f"Turn this JSON into a Markdown table: {json.dumps(rows)}",
            f"Turn this into JSON with the keys name, city, age: {text}",
        ])  # fmt: skip


KINDS: dict[str, Callable[[Library, random.Random], Iterator[str]]] = {
    "prose": _prose,
    "rewriting": _rewriting,
    "code": _code,
    "tables": _tables,
}
"""What `kinds` may name: questions about Python's library, rewriting of given paragraphs, small functions, tables."""
