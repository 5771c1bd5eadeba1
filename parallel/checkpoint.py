"""Safetensors to a rank's shard and back; each rank reads only the slices it holds."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parallel.model import Transformer
from parallel.shards import Piece, Sharded


class Checkpoint:
    """The safetensors files of a Hugging Face directory, opened lazily.

    Raises:
        ValueError: no weights, or a broken file; later a missing tensor or a wrong shape. The sentence names it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._opened: dict[str, safe_open] = {}
        self._files = {name: self._open(file) for name, file in self._index().items()}

    def read(self, piece: Piece) -> Tensor:
        """The slice of the checkpoint that `piece` describes."""
        file = self._files.get(piece.name)
        if file is None:
            raise ValueError(f"{self.directory} has no tensor {piece.name}")
        try:
            tensor = file.get_slice(piece.name)
        except SafetensorError as error:
            raise ValueError(f"{self.directory}: {piece.name} cannot be read: {error}") from None
        shape = tuple(tensor.get_shape())
        if shape != piece.shape:
            raise ValueError(f"{self.directory}: {piece.name} has shape {shape}, but config.json says {piece.shape}")
        return tensor[piece.start : piece.stop] if piece.dim == 0 else tensor[:, piece.start : piece.stop]

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name."""
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is not an index of weights: {error!r}; copy the checkpoint again") from None
        files = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{self.directory} has no .safetensors file")
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
    """Fill every parameter of `model` with its slices, cast to the parameter's dtype, on the parameter's device."""
    checkpoint = Checkpoint(directory)
    for parameter in sharded_parameters(model):
        for piece in parameter.pieces:
            parameter.view_of(piece).copy_(checkpoint.read(piece))


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
