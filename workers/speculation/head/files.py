"""A drafter's head on disk: `drafter.safetensors`, and `drafter.json`, which says for which target it was made."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepladder.parallel.checkpoint import fingerprints
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.typed_json import check_regular
from stepladder.workers.speculation.head.net import RecurrentHead

__all__ = ["Head", "Manifest", "read_head", "write_head"]

MANIFEST, WEIGHTS, TOKENS = "drafter.json", "drafter.safetensors", "tokens"
KIND = "recurrent"


@dataclass(frozen=True)
class Manifest:
    """hidden, inner: sizes of the network. version: how often it was taught. target: files of the checkpoint that it
    drafts for, by name their hash. figures: what was found when it was taught."""

    hidden: int
    inner: int
    version: int
    target: dict[str, str]
    figures: dict[str, Any]
    kind: str = KIND


@dataclass(frozen=True)
class Head:
    """net: the network. tokens: int64 [N], those that it drafts, ascending."""

    net: RecurrentHead
    tokens: Tensor
    manifest: Manifest


def write_head(head: Head, directory: str | Path) -> None:
    """Whole or not at all: without its manifest, which comes last, there is no head."""
    home = Path(directory)
    home.mkdir(parents=True, exist_ok=True)
    (home / MANIFEST).unlink(missing_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in head.net.state_dict().items()}
    partial = home / f"{WEIGHTS}.partial"
    save_file(tensors | {TOKENS: head.tokens.to(torch.int32)}, partial)
    os.replace(partial, home / WEIGHTS)
    partial = home / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(asdict(head.manifest), indent=2) + "\n")
    os.replace(partial, home / MANIFEST)


def read_head(directory: str | Path, target: str | Path, spec: ModelSpec) -> Head:
    """The head in `directory`, of the checkpoint `target`.

    Raises:
        ValueError: it is not there, broken, or was made for another model.
    """
    home = Path(directory)
    try:
        check_regular(home / MANIFEST)
        check_regular(home / WEIGHTS)
        manifest = Manifest(**json.loads((home / MANIFEST).read_text()))
        tensors = load_file(home / WEIGHTS)
        tokens = tensors.pop(TOKENS).long().flatten()
        net = RecurrentHead(manifest.hidden, manifest.inner)
        net.load_state_dict(tensors)
    except FileNotFoundError as error:
        missing = Path(error.filename or MANIFEST).name
        raise ValueError(f"speculate.model is {directory}; there is no {missing} in it") from None
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"speculate.model is {directory}; it cannot be read as a drafter's head: {error}") from None
    if manifest.kind != KIND or manifest.target != fingerprints(target):
        raise ValueError(f"speculate.model is {directory}; it was made for another model than {target}")
    if net.hidden != spec.hidden_size:
        raise ValueError(f"speculate.model is {directory}; it reads {net.hidden} numbers, not {spec.hidden_size}")
    if not len(tokens) or int(tokens.max()) >= spec.vocab_size or int(tokens.min()) < 0:
        raise ValueError(f"speculate.model is {directory}; it drafts tokens that the model does not have")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError(f"speculate.model is {directory}; it holds numbers that are not finite")
    return Head(net.requires_grad_(False), tokens, manifest)
