"""Items for lm-eval from text that every machine with Python has, and that the bundled model has not been trained on.

An item is a place in a held-out file of the standard library: what stands before a line, that line, and three other lines
of the same file. Items differ between Python versions.
"""

from collections.abc import Iterator
from random import Random
from typing import Any

from datasets import Dataset

from launch.corpus import Document, standard_library

PER_DOCUMENT = 4
CONTEXT_LINES = 16
EXCERPT = 2400  # characters
SHORTEST = 12  # characters of a line that is asked for


def lines(**_: Any) -> dict[str, Dataset]:
    """Rows of context, line, choices and answer; lm-eval passes the task's metadata, which is not needed."""
    documents = [d for d in standard_library().held_out if d.name.endswith(".py")]
    return {"test": Dataset.from_list([item for document in documents for item in _items(document)])}


def excerpts(**_: Any) -> dict[str, Dataset]:
    """Rows of text: the beginning of every held-out document."""
    return {"test": Dataset.from_list([{"text": d.text[:EXCERPT]} for d in standard_library().held_out])}


def _items(document: Document) -> Iterator[dict[str, Any]]:
    random = Random(document.name)  # a string seeds alike in every process
    whole = document.text.splitlines()
    long = sorted({line.strip() for line in whole if len(line.strip()) >= SHORTEST})
    places = [i for i, line in enumerate(whole) if i >= CONTEXT_LINES and len(line.strip()) >= SHORTEST]
    if len(long) < 2 * PER_DOCUMENT:
        return
    for place in sorted(random.sample(places, min(PER_DOCUMENT, len(places)))):
        line = whole[place].strip()
        choices = random.sample([other for other in long if other != line], 3)
        answer = random.randrange(4)
        choices.insert(answer, line)
        indent = whole[place][: len(whole[place]) - len(whole[place].lstrip())]
        context = "\n".join(whole[place - CONTEXT_LINES : place]) + "\n" + indent
        yield {"context": context, "line": line, "choices": choices, "answer": answer}
