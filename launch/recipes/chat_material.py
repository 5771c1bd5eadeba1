"""What the traffic is made from: functions and paragraphs of Python's own library, and words for tables."""

import ast
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from stepladder.launch.recipes.corpus import Document, standard_library

MODULES = 320  # of the library, public ones first, chosen by the hashes of their names
WORDS = 15, 60  # of a paragraph, at least and at most
SENTENCE = re.compile(r"[A-Z][^`:\n]{12,70}\.")  # one that says what a function does, without signature or markup

THINGS = {  # what a table may be about, with its columns
    "planets": ("name", "diameter", "moons"),
    "cities": ("city", "country", "population"),
    "books": ("title", "author", "year"),
    "birds": ("bird", "habitat", "wingspan"),
    "rivers": ("river", "length", "continent"),
    "programming languages": ("language", "year", "creator"),
    "fruits": ("fruit", "colour", "price"),
    "employees": ("name", "department", "salary"),
    "countries": ("country", "capital", "language"),
    "chemical elements": ("element", "symbol", "number"),
    "instruments": ("instrument", "family", "strings"),
    "orders": ("order", "customer", "total"),
}
NAMES = ("Ada", "Ben", "Carla", "Dmitri", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Keiko", "Lena", "Marco")
TOWNS = ("Oslo", "Lima", "Porto", "Kyoto", "Cairo", "Turin", "Leeds", "Quito", "Accra", "Minsk", "Hanoi", "Perth")


@dataclass(frozen=True)
class Function:
    """module, name: where it is. arguments: as one would write them. does: the first sentence of its docstring."""

    module: str
    name: str
    arguments: str
    does: str


@dataclass(frozen=True)
class Library:
    """Of the running Python; in order of name."""

    functions: list[Function]
    paragraphs: list[str]

    @classmethod
    def read(cls) -> "Library":
        """Takes some three seconds."""
        corpus = standard_library()
        documents = sorted((*corpus.train, *corpus.held_out), key=lambda document: document.hash)
        modules = sorted((d for d in documents if d.name.endswith(".py")), key=lambda d: (_private(d), d.hash))
        functions = [function for document in modules[:MODULES] for function in _functions(document)]
        prose = [d.text for d in documents if not d.name.endswith(".py")]
        prose += [ast.get_docstring(ast.parse(document.text)) or "" for document in modules[:MODULES]]
        paragraphs = [paragraph for text in prose for paragraph in _paragraphs(text)]
        return cls(list(dict.fromkeys(functions)), list(dict.fromkeys(paragraphs)))


def record(draw: random.Random) -> dict[str, str | int]:
    """A row of made-up data."""
    return {"name": draw.choice(NAMES), "city": draw.choice(TOWNS), "age": draw.randint(18, 80)}


def _private(document: Document) -> bool:
    return any(part.startswith("_") for part in document.name.split("/"))


def _functions(document: Document) -> Iterator[Function]:
    """Public functions and methods with a docstring whose first sentence fits on a line."""
    module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for node in ast.walk(ast.parse(document.text)):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and len(node.args.args) <= 4:
            found = SENTENCE.match((ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " "))
            arguments = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
            if found and arguments:
                yield Function(module, node.name, ", ".join(arguments), found[0])


def _paragraphs(text: str) -> Iterator[str]:
    """Prose, that is lines without indent and markup, each paragraph on one line."""
    for paragraph in text.split("\n\n"):
        words = paragraph.split()
        plain = paragraph[:1].isupper() and not re.search(r"[*|=<>]|::|\n ", paragraph)
        if plain and WORDS[0] <= len(words) <= WORDS[1]:
            yield " ".join(words)
