"""Safetensors to a rank's shard and back; each rank reads only the slices it holds."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepladder.parallel.model import Transformer
from stepladder.parallel.shards import Piece, Sharded

FLOATS = ("F64", "F32", "F16", "BF16")
UNUSED = ("rotary_emb.inv_freq",)  # computed from config.json; old checkpoints carry it along
PAGE, PAGES = 4096, 32


class Checkpoint:
    """The safetensors files of a Hugging Face directory, opened lazily.

    Attributes:
        files: of every tensor, by its name, the file that holds it.

    Raises:
        ValueError: no weights, or a broken file; later a missing tensor or a wrong shape. The error names it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._opened: dict[str, safe_open] = {}
        self.files = self._index()
        for file in set(self.files.values()):
            self._open(file)

    def read(self, piece: Piece) -> Tensor:
        """The slice of the checkpoint that `piece` describes."""
        file = self.files.get(piece.name)
        if file is None:
            raise ValueError(f"{self.directory} has no tensor {piece.name}")
        where = f"{self.directory / file}: {piece.name}"
        try:
            tensor = self._open(file).get_slice(piece.name)
            shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
            if shape != piece.shape:
                raise ValueError(f"{where} has shape {shape}, but config.json says {piece.shape}")
            if kind not in FLOATS:
                raise ValueError(
                    f"{where} has dtype {kind}; only unquantised weights ({', '.join(FLOATS)}) are supported"
                )
            return tensor[piece.start : piece.stop] if piece.dim == 0 else tensor[:, piece.start : piece.stop]
        except SafetensorError as error:
            raise ValueError(f"{where} cannot be read: {error}; copy the checkpoint again") from None

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name: by the index, or what is in model.safetensors, or in all files there are."""
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            try:
                return {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} is not an index of weights: {error!r}; copy the checkpoint again") from None
        files = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{self.directory} has no .safetensors file")
        if "model.safetensors" in files:  # others may be the same weights in another format
            files = ["model.safetensors"]
        return {name: file for file in files for name in self._open(file).keys()}  # noqa: SIM118

    def _open(self, file: str) -> safe_open:
        path = self.directory / file
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(path, framework="pt")
            return self._opened[file]
        except (SafetensorError, FileNotFoundError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}; copy the checkpoint again") from None


def load_weights(model: Transformer, directory: str | Path) -> None:
    """Fill every parameter of `model` with its slices, cast to the parameter's dtype, on the parameter's device.

    Raises:
        ValueError: a file is broken, or a tensor is missing, of the wrong shape or dtype, or of no use to this model.
    """
    checkpoint = Checkpoint(directory)
    with torch.device("meta"):
        everything = Transformer(model.spec)
    _refuse_unused(checkpoint, everything)
    for parameter in sharded_parameters(model):
        for piece in parameter.pieces:
            parameter.view_of(piece).copy_(checkpoint.read(piece))


def _refuse_unused(checkpoint: Checkpoint, model: Transformer) -> None:
    """A tensor that no parameter of the whole model holds would change it if it were left out."""
    used = {piece.name for parameter in sharded_parameters(model) for piece in parameter.pieces}
    unused = {name for name in checkpoint.files.keys() - used if not name.endswith(UNUSED)}
    head = model.spec.tensor("head")
    if model.spec.tie_embeddings and head in unused:
        for piece in model.embedding.weight.pieces:
            if not torch.equal(checkpoint.read(piece), checkpoint.read(piece._replace(name=head))):
                raise ValueError(
                    f"{checkpoint.directory}: {head} differs from {piece.name}, but config.json ties them; "
                    f"set tie_word_embeddings to false"
                )
        unused.remove(head)
    if unused:
        raise ValueError(
            f"{checkpoint.directory} has the tensor {min(unused)} ({len(unused)} such in all), which a "
            f"model of this config.json does not have; leaving it out would change the model"
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
        whole = {config.name: hashlib.sha256(config.read_bytes()).hexdigest()}
        return whole | {
            file: _sampled(config.parent / file) for file in sorted(set(Checkpoint(directory).files.values()))
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
    """Write an unsharded model as `model.safetensors` under its Hugging Face names."""
    assert model.shard.size == 1, "only a whole model can be written"
    tensors = {
        piece.name: parameter.view_of(piece).to(dtype).contiguous().cpu()
        for parameter in sharded_parameters(model)
        for piece in parameter.pieces
    }
    save_file(tensors, Path(directory) / "model.safetensors", metadata={"format": "pt"})


def sharded_parameters(model: Transformer) -> list[Sharded]:
    """The model's parameters, each once even where embedding and head are tied."""
    parameters = list(model.parameters())
    assert all(isinstance(p, Sharded) for p in parameters)
    return parameters  # type: ignore[return-value]
