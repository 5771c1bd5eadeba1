"""Text that somebody brings: plain files, JSON lines, and directories of both."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from stepladder.launch.json_files import json_of, lines_of
from stepladder.launch.recipes.corpus import Corpus, Document, split

LINES = (".jsonl", ".ndjson")


def given_text(data: Sequence[str], held_out: Sequence[str] | None, field: str) -> Corpus:
    """The documents below the paths `data`; `held_out` is the text to measure on, or None to set apart about 4.5 % of
    `data` by a hash of each document's name. Empty documents go, and so does every later copy of the same text.

    Of a directory all files below it are read, but for those with a zero byte in their first 8 KiB.

    Args:
        field: of a JSON line, the one that holds the text.

    Raises:
        ValueError: a path that is not there, a file that is not text, a line without the field, or nothing to train
            or to measure on.
    """
    train, measured = split(_documents(data, field))
    if held_out is not None:
        train, measured = (*train, *measured), tuple(_documents(held_out, field))
        known = {document.text for document in train}
        measured = tuple(d for d in measured if d.text.strip() and d.text not in known)
    if not train:
        raise ValueError(f"data={list(data)} has no text to train on; name files or directories that do")
    if not measured:
        raise ValueError("there is no text to measure on that is not trained on; give held_out=[paths]")
    return Corpus(train, measured)


def _documents(paths: Sequence[str], field: str) -> Iterator[Document]:
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise ValueError(f"{path} does not exist; data and held_out must name files or directories")
        for file in sorted(filter(_is_text, path.rglob("*"))) if path.is_dir() else [path]:
            yield from _of_file(file, file.relative_to(path if path.is_dir() else path.parent).as_posix(), field)


def _is_text(path: Path) -> bool:
    """A file, and not a picture or an archive, which directories also have."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"\0" not in file.read(1 << 13)


def _of_file(path: Path, name: str, field: str) -> Iterator[Document]:
    """One document, or one for each line of JSON. name: the same wherever the data lies, since it decides what is set
    apart."""
    try:
        lines = lines_of(path)
    except ValueError as error:
        raise ValueError(f"{error}; leave it out of data") from None
    if path.suffix not in LINES:
        yield Document(name, "\n".join(lines))
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Document(f"{name}:{number}", _field(line, field, f"{path}, line {number}"))


def _field(line: str, field: str, where: str) -> str:
    value = json_of(line, where)
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise ValueError(f"{where} has no text in the field {field!r}; name the field with text_field=...")
    return str(value[field])
