"""A drafter's head on disk: `drafter.safetensors`, and `drafter.json`, which says for which target it was made."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from stepladder.parallel.checkpoint import fingerprints
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.typed_json import (
    LARGEST,
    OBJECT,
    TEXT,
    Kind,
    check_regular,
    mapping,
    number,
    read_object,
    record,
    typed,
    whole,
)  # fmt: skip
from stepladder.workers.speculation.head.net import RecurrentHead

__all__ = ["MANIFEST", "WEIGHTS", "DataWindow", "Head", "Manifest", "read_head", "read_manifest", "write_head"]

MANIFEST, WEIGHTS, TOKENS = "drafter.json", "drafter.safetensors", "tokens"
KIND = "recurrent"
MANY = 1 << 53


@dataclass(frozen=True)
class DataWindow:
    """What a head was taught with. requests, tokens: how much of it. domains: tokens by domain."""

    requests: int = 0
    tokens: int = 0
    domains: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What is known of a head beside its weights. Files of before versions had numbers lack all that has a default.

    Attributes:
        hidden, inner: sizes of the network.
        version: its number among those of one drafter. parent: the one that it was taught from; 0, none.
        target: files of the checkpoint that it drafts for, by name their hash.
        figures: what was found when it was taught.
        window: what it was taught with. scores: how it was judged, by name.
        made: Unix time, in seconds.
        sha256: of the weights' file, in hexadecimal digits; whoever writes it sets it.
    """

    hidden: int
    inner: int
    version: int
    target: dict[str, str]
    figures: dict[str, Any]
    kind: str = KIND
    parent: int = 0
    window: DataWindow = field(default_factory=DataWindow)
    scores: dict[str, float] = field(default_factory=dict)
    made: float = 0.0
    sha256: str = field(default="", compare=False)


FIELDS: dict[str, Kind] = {
    **dict.fromkeys(("hidden", "inner"), whole(1, MANY)),
    **dict.fromkeys(("version", "parent"), whole(0, MANY)),
    **dict.fromkeys(("kind", "sha256"), TEXT),
    "target": mapping(TEXT),
    "figures": OBJECT,
    "window": record(requests=whole(0, MANY), tokens=whole(0, MANY), domains=mapping(whole(0, MANY))),
    "scores": mapping(number(-LARGEST)),
    "made": number(0),
}


@dataclass(frozen=True)
class Head:
    """net: the network. tokens: int64 [N], those that it drafts, ascending."""

    net: RecurrentHead
    tokens: Tensor
    manifest: Manifest


def write_head(head: Head, directory: str | Path) -> None:
    """Whole or not at all: without its manifest, which comes last, there is no head. On return it is on the disk.

    Raises:
        OSError: the disk does not take it.
    """
    home = Path(directory)
    home.mkdir(parents=True, exist_ok=True)
    (home / MANIFEST).unlink(missing_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in head.net.state_dict().items()}
    weights = save(tensors | {TOKENS: head.tokens.to(torch.int32)})
    manifest = replace(head.manifest, sha256=hashlib.sha256(weights).hexdigest())
    _put(home / WEIGHTS, weights)
    _put(home / MANIFEST, (json.dumps(asdict(manifest), indent=2) + "\n").encode())


def read_head(directory: str | Path, target: str | Path, spec: ModelSpec, name: str | None = None) -> Head:
    """The head in `directory`, of the checkpoint `target`.

    Args:
        name: what sentences call it; by default what it is as an option.

    Raises:
        ValueError: it is not there, broken, or was made for another model.
    """
    home, called = Path(directory), name or f"speculate.model is {directory}"
    try:
        manifest = read_manifest(home)
        net, tokens = _network(home, manifest)
    except FileNotFoundError as error:
        missing = Path(error.filename or MANIFEST).name
        raise ValueError(f"{called}; there is no {missing} in it") from None
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{called}; it cannot be read as a drafter's head: {said}") from None
    if manifest.kind != KIND or manifest.target != fingerprints(target):
        raise ValueError(f"{called}; it was made for another model than {target}")
    if net.hidden != spec.hidden_size:
        raise ValueError(f"{called}; it reads {net.hidden} numbers, not {spec.hidden_size}")
    if not len(tokens) or int(tokens.max()) >= spec.vocab_size or int(tokens.min()) < 0:
        raise ValueError(f"{called}; it drafts tokens that the model does not have")
    if not net.is_finite():
        raise ValueError(f"{called}; it holds numbers that are not finite")
    return Head(net.requires_grad_(False), tokens, manifest)


def read_manifest(home: Path) -> Manifest:
    """What stands beside the weights.

    Raises:
        FileNotFoundError: there is none. ValueError, TypeError: it is none.
    """
    values = typed(read_object(home / MANIFEST), FIELDS)
    return Manifest(**values | {"window": DataWindow(**values.get("window", {}))})


def _network(home: Path, manifest: Manifest) -> tuple[RecurrentHead, Tensor]:
    """With the shapes of the manifest, whatever those are: nothing is allocated for them."""
    check_regular(home / WEIGHTS)
    if manifest.sha256:
        with (home / WEIGHTS).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest.sha256:
                raise ValueError(f"{WEIGHTS} has another hash than {MANIFEST} says; the file is damaged")
    tensors = load_file(home / WEIGHTS)
    tokens = tensors.pop(TOKENS).long().flatten()
    with torch.device("meta"):
        net = RecurrentHead(manifest.hidden, manifest.inner)
    copied = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}  # the file may go
    net.load_state_dict(copied, assign=True)
    return net, tokens


def _put(path: Path, content: bytes) -> None:
    """A file on the disk, in place of what was there."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
