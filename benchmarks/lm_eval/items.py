"""Items for lm-eval from text that every machine with Python has, and that the bundled model has not been trained on.

An item is a place in a held-out file of the standard library: what stands before a line with the line's first word, the
rest of the line, and the rests of three other lines of the file. It is cut at a space, where byte-level BPE cuts too;
lm-eval encodes both sides and would otherwise send tokens that the text does not have. Items differ between Pythons.
"""

from collections.abc import Iterator
from random import Random
from typing import Any

from datasets import Dataset

from stepladder.launch.recipes.corpus import Document, standard_library

PER_DOCUMENT = 4
CONTEXT_LINES = 16
EXCERPT = 2400  # characters
SHORTEST = 8  # characters of what is asked for


def lines(**_: Any) -> dict[str, Dataset]:
    """Rows of context, rest, choices and answer; lm-eval passes the task's metadata, which is not needed."""
    documents = [d for d in standard_library().held_out if d.name.endswith(".py")]
    return {"test": Dataset.from_list([item for document in documents for item in _items(document)])}


def excerpts(**_: Any) -> dict[str, Dataset]:
    """Rows of text: the beginning of every held-out document."""
    return {"test": Dataset.from_list([{"text": d.text[:EXCERPT]} for d in standard_library().held_out])}


def _items(document: Document) -> Iterator[dict[str, Any]]:
    random = Random(document.name)  # a string seeds alike in every process
    whole = document.text.splitlines()
    rests = {place: rest for place, line in enumerate(whole) if len(rest := _cut(line)[1]) >= SHORTEST}
    others = sorted(set(rests.values()))
    places = [place for place in rests if place >= CONTEXT_LINES]
    if len(others) < 4:
        return
    for place in sorted(random.sample(places, min(PER_DOCUMENT, len(places)))):
        choices = random.sample([other for other in others if other != rests[place]], 3)
        answer = random.randrange(4)
        choices.insert(answer, rests[place])
        context = "\n".join([*whole[place - CONTEXT_LINES : place], _cut(whole[place])[0]])
        yield {"context": context, "rest": rests[place], "choices": choices, "answer": answer}


def _cut(line: str) -> tuple[str, str]:
    """Up to the end of the first word, and from the space behind it on."""
    indent = len(line) - len(line.lstrip())
    word, space, rest = line[indent:].partition(" ")
    return line[:indent] + word, (space + rest).rstrip()
