"""Text that every machine with Python has: the standard library's source and the prose of its manual.

The split is by a hash of each document's name, so a name is held out on every machine and in every Python version.
"""

import hashlib
import importlib
import lzma
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "_bundled", "__pycache__"}
TOPICS = "pydoc_data/topics.py"
HELD_OUT_PER_MILLE = 45


@dataclass(frozen=True)
class Document:
    """name: its path in the library, with forward slashes."""

    name: str
    text: str

    @property
    def hash(self) -> int:
        """Of the name, the same on every machine."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")

    @property
    def held_out(self) -> bool:
        """About 4.5 % of all names."""
        return self.hash % 1000 < HELD_OUT_PER_MILLE


@dataclass(frozen=True)
class Corpus:
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def sha256(self) -> str:
        """Of every name and text, in order."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                digest.update(f"{document.name}\0{document.text}\0".encode())
        return digest.hexdigest()


def standard_library() -> Corpus:
    """The running Python's standard library, without tests and vendored wheels; no text occurs twice."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = [*_source(root), *_topics()]
    return Corpus(*split(documents))


def split(documents: Iterable[Document]) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """(train, held out) in order of name. Empty documents go, and so does every later copy of the same text."""
    unique = {document.text: document for document in sorted(documents, key=lambda d: d.name, reverse=True)}
    kept = sorted((d for d in unique.values() if d.text.strip()), key=lambda d: d.name)
    return tuple(d for d in kept if not d.held_out), tuple(d for d in kept if d.held_out)


def primed_xz_bits_per_byte(train: Sequence[Document], held_out: Sequence[Document]) -> float:
    """What the strongest setting of xz needs for the held-out text when it has the training text as a prefix."""
    prefix, rest = (b"".join(d.text.encode() for d in part) for part in (train, held_out))
    with ThreadPoolExecutor(2) as pool:  # lzma works outside the interpreter's lock
        whole, primed = pool.map(_xz_size, (prefix + rest, prefix))
    return (whole - primed) * 8 / len(rest)


def _xz_size(data: bytes) -> int:
    dictionary = max(64 << 20, 1 << (len(data) - 1).bit_length())  # holds the whole prefix
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=[lzma2]))


def _source(root: Path) -> Iterable[Document]:
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        built = name.name.startswith("_sysconfigdata")  # written by the build: paths of one machine
        if built or name.as_posix() == TOPICS or SKIPPED_FOLDERS & set(name.parts):
            continue
        yield Document(name.as_posix(), path.read_text(encoding="utf-8"))


def _topics() -> Iterable[Document]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return [Document(f"pydoc_data/topics/{name}", text) for name, text in topics.items()]
