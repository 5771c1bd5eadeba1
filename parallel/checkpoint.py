"""Safetensors to a rank's shard and back; each rank reads only the slices it holds."""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stepladder.parallel.families import FAMILIES, OURS, REMOTE_CODE, identity
from stepladder.parallel.model import Transformer
from stepladder.parallel.shards import Piece, Sharded
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.typed_json import check_regular
from stepladder.parallel.weight_files import WeightFiles

UNUSED = (  # masks, and what is computed from config.json; old checkpoints carry them along
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "attn.bias",
    "attn.masked_bias",
)
PAGE, PAGES = 4096, 32


class OfACheckpoint(Protocol):
    """A module whose parameters are all `Sharded`: a model, or a part of one."""

    spec: ModelSpec

    def parameters(self) -> Iterator[nn.Parameter]: ...


def load_weights(
    model: OfACheckpoint, directory: str | Path, told: Callable[[float], object] = lambda share: None
) -> None:
    """Fill every parameter of `model` with its slices, cast to the parameter's dtype, on the parameter's device.

    Args:
        told: called after each slice with the share of the weights that has been read, up to 1.

    Raises:
        ValueError: a file is broken, or a tensor is missing, of the wrong shape or dtype, or of no use to this model.
    """
    files, done = check_weights(model.spec, directory), 0
    total = sum(
        parameter.view_of(piece).numel() for parameter in sharded_parameters(model) for piece in parameter.pieces
    )
    for parameter in sharded_parameters(model):
        for piece in parameter.pieces:
            view = parameter.view_of(piece)
            tensor = files.read(piece)
            view.copy_(tensor)
            if view.numel() and not all(math.isfinite(end) for end in torch.aminmax(view)):
                raise ValueError(f"{files.where(piece)} holds numbers that are not finite, read as {view.dtype}")
            _refuse_untied(files, model.spec, piece, tensor)
            done += view.numel()
            told(done / max(total, 1))


def check_weights(spec: ModelSpec, directory: str | Path) -> WeightFiles:
    """Whether the files' headers are those of this model; no weights are read.

    Raises:
        ValueError: a file is broken, or a tensor is missing, of the wrong shape or dtype, or of no use to this model.
    """
    files = WeightFiles(directory)
    with torch.device("meta"):
        everything = Transformer(spec)
    pieces = [piece for parameter in sharded_parameters(everything) for piece in parameter.pieces]
    if spec.tie_embeddings:
        files.instead[spec.tensor("embedding")] = spec.tensor("head")
    for piece in pieces:
        files.check(piece)
    _refuse_unused(files, spec, {files.stored(piece.name) for piece in pieces})
    return files


def _refuse_unused(files: WeightFiles, spec: ModelSpec, used: set[str | None]) -> None:
    """A tensor that no parameter of the whole model holds would change it if it were left out."""
    unused = {name for name in files.files.keys() - used if not name.endswith(UNUSED)}
    if spec.tie_embeddings:
        unused.discard(spec.tensor("head"))  # whoever holds the embedding compares it
    if unused:
        raise ValueError(
            f"{files.directory} has the tensor {min(unused)} ({len(unused)} such in all), which a "
            f"model of this config.json does not have; leaving it out would change the model"
        )


def _refuse_untied(files: WeightFiles, spec: ModelSpec, piece: Piece, tensor: Tensor) -> None:
    """A head of its own beside the embedding `piece`, whose slice is `tensor`, where config.json ties them."""
    head = piece._replace(name=spec.tensor("head"))
    if not spec.tie_embeddings or piece.name != spec.tensor("embedding") or head.name not in files.files:
        return
    if files.stored(piece.name) != head.name and not torch.equal(tensor, files.read(head)):
        raise ValueError(
            f"{files.directory}: {head.name} differs from {piece.name}, but config.json ties them; "
            f"set tie_word_embeddings to false"
        )


def fingerprints(directory: str | Path) -> dict[str, str]:
    """A hash of each file, by which machines tell in a fraction of a second whether they hold the same checkpoint.

    SHA-256 of the whole of `config.json`, and of each file of weights in use over its size, its safetensors header
    (names, dtypes, shapes and offsets of all tensors) and 32 pages of 4 KiB spread evenly over the file, the last one
    included. It finds another model, another revision and a truncated or half-written copy; a few flipped bits between
    the sampled pages it does not find.

    Returns:
        By the file's name.

    Raises:
        ValueError: a file is missing or broken; the error names it.
    """
    config = Path(directory) / "config.json"
    try:
        check_regular(config)
        whole = {config.name: hashlib.sha256(config.read_bytes()).hexdigest()}
        return whole | {
            file: _sampled(config.parent / file) for file in sorted(set(WeightFiles(directory).files.values()))
        }
    except OSError as error:
        raise ValueError(f"{error.filename or directory} cannot be read: {error.strerror}") from None


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    total = hashlib.sha256(f"{size}".encode())
    with path.open("rb") as file:
        total.update(file.read(int.from_bytes(file.read(8), "little")))
        for page in range(PAGES):
            file.seek(max(0, size - PAGE) * page // (PAGES - 1))
            total.update(file.read(PAGE))
    return total.hexdigest()


def save_weights(model: Transformer, directory: str | Path, dtype: torch.dtype) -> None:
    """Write an unsharded model as `model.safetensors` under its Hugging Face names, and beside it the code that has
    `transformers` compute it, where the wiring is not its family's own."""
    assert model.shard.size == 1, "only a whole model can be written"
    tensors = dict[str, Tensor]()
    for parameter in sharded_parameters(model):
        for piece in parameter.pieces:
            whole = tensors.setdefault(piece.name, torch.empty(piece.stored_shape, dtype=dtype))
            (whole[piece.place] if piece.stack else whole).copy_(parameter.view_of(piece))
    save_file(tensors, Path(directory) / "model.safetensors", metadata={"format": "pt"})
    if "auto_map" in identity(model.spec.family, model.spec.residual):
        (Path(directory) / f"{REMOTE_CODE}.py").write_text(_remote_code(model.spec.family))


def _remote_code(family: str) -> str:
    """modeling_stepladder.py, which is written for Llama, for another family."""
    source = Path(__file__).with_name(f"{REMOTE_CODE}.py").read_text()
    name = FAMILIES[family].architecture.removesuffix("ForCausalLM")
    return source.replace(f"{OURS}llama", OURS + family).replace("Llama", name)


def sharded_parameters(model: OfACheckpoint) -> list[Sharded]:
    """The model's parameters, each once even where embedding and head are tied."""
    parameters = list(model.parameters())
    assert all(isinstance(p, Sharded) for p in parameters)
    return parameters  # type: ignore[return-value]
