"""Who may ask: API keys, known by their hashes only."""

import re
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

_LINE = re.compile(r"sha256:([0-9a-fA-F]{64})(\s.*)?")


@dataclass
class ApiKeys:
    """The keys of one server: one that was given, and those of a file, which is read again when it has changed.

    Each line of the file is `sha256:` and the SHA-256 of a key in hex (`printf %s "$KEY" | sha256sum`), with anything
    behind it that tells people whose it is; empty lines and those that begin with # are skipped.

    Raises:
        ValueError: the file cannot be read, or a line is none of these.
    """

    given: str | None = field(default=None, repr=False)
    file: str | None = None
    _changed: int = -1
    _hashes: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        assert self.given != "", "an empty key is no key, and None has to be meant"
        self._read()

    @property
    def needed(self) -> bool:
        return self.given is not None or self.file is not None

    def owner(self, key: str) -> str | None:
        """The hash of a key, if it is one of ours. Hashes are compared, so that the time says nothing of the key."""
        with suppress(ValueError):  # whoever edits the file is not done yet: until then the keys stay
            self._read()
        found = sha256(key.encode()).hexdigest()
        return found if found in self._hashes else None

    def _read(self) -> None:
        hashes = {sha256(self.given.encode()).hexdigest()} if self.given is not None else set()
        if self.file is not None:
            try:
                changed = Path(self.file).stat().st_mtime_ns
                if changed == self._changed:
                    return
                hashes |= _hashes_in(Path(self.file).read_text())
            except (OSError, ValueError) as error:
                raise ValueError(f"gateway.api_key_file {self.file}: {error}") from None
            self._changed = changed
        self._hashes = frozenset(hashes)


def _hashes_in(text: str) -> set[str]:
    hashes = set()
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if line and not line.startswith("#"):
            found = _LINE.fullmatch(line)
            if not found:
                raise ValueError(f"line {number} is not sha256: and 64 hex digits; it must not be the key itself")
            hashes.add(found[1].lower())
    if not hashes:
        raise ValueError("it holds no key")
    return hashes
