"""The safetensors files of a model directory: which there are, what their headers say, and slices of their tensors."""

from collections import Counter
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepladder.parallel.shards import Piece
from stepladder.parallel.typed_json import check_regular, read_object, shown

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BASE = "model."  # before the names of all tensors but the head; who saves a model without its head leaves it out
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightFiles:
    """The safetensors files of a Hugging Face directory, opened lazily.

    Attributes:
        files: of every tensor, by its name, the file that holds it.
        instead: by the name of a tensor, that of another which is taken where there is no such.

    Raises:
        ValueError: no weights, or a broken file; later a missing tensor or a wrong shape. The error names it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory, self.instead = Path(directory), dict[str, str]()
        self._opened: dict[str, safe_open] = {}
        self.files = self._find()
        for file in set(self.files.values()):
            self._open(file)

    def stored(self, name: str) -> str | None:
        """What the files call this tensor; None if they have none."""
        named = (name, self.instead.get(name, name))
        return next((n for name in named for n in (name, name.removeprefix(BASE)) if n in self.files), None)

    def check(self, piece: Piece) -> None:
        """ValueError unless the tensor of `piece` is there, with its shape and in a dtype that can be used."""
        self._slice(piece)

    def read(self, piece: Piece) -> Tensor:
        """The slice of the checkpoint that `piece` describes."""
        try:
            tensor, part = self._slice(piece), slice(piece.start, piece.stop)
            where = (part,) if piece.dim == 0 else (slice(None), part)
            return tensor[piece.place : piece.place + 1, *where][0] if piece.stack else tensor[where]
        except SafetensorError as error:
            raise ValueError(f"{self.where(piece)} cannot be read: {error}; copy the checkpoint again") from None

    def where(self, piece: Piece) -> str:
        """For a sentence: the tensor of `piece` and its file."""
        stored = self.stored(piece.name)
        return f"{self.directory / self.files[stored] if stored else self.directory}: {stored or piece.name}"

    def dtype_name(self) -> str:
        """What most numbers are in."""
        numbers: Counter[str] = Counter()
        for name, file in self.files.items():
            tensor = self._open(file).get_slice(name)
            numbers[tensor.get_dtype()] += prod(tensor.get_shape())
        return next((FLOATS[kind] for kind, _ in numbers.most_common() if kind in FLOATS), FLOATS["F32"])

    def _slice(self, piece: Piece) -> Any:
        stored = self.stored(piece.name)
        if stored is None:
            raise ValueError(f"{self.directory} has no tensor {piece.name}")
        try:
            tensor = self._open(self.files[stored]).get_slice(stored)
        except SafetensorError as error:
            raise ValueError(f"{self.where(piece)} cannot be read: {error}; copy the checkpoint again") from None
        shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
        if shape != piece.stored_shape:
            raise ValueError(f"{self.where(piece)} has shape {shape}, but config.json says {piece.stored_shape}")
        if kind not in FLOATS:
            raise ValueError(
                f"{self.where(piece)} has dtype {kind}; only unquantised weights ({', '.join(FLOATS)}) are supported"
            )
        return tensor

    def _find(self) -> dict[str, str]:
        """Tensor name -> file name: what is in model.safetensors, or by the index, or what is in all files there are.

        An index beside model.safetensors is left over from another copy, as other files are the same weights in
        another format.
        """
        if (self.directory / WHOLE).exists():
            return self._tensors_of([WHOLE])
        try:
            return self._indexed(self.directory / INDEX)
        except FileNotFoundError:
            files = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{self.directory} has no .safetensors file")
        return self._tensors_of(files)

    def _indexed(self, index: Path) -> dict[str, str]:
        found = read_object(index).get("weight_map")
        if not isinstance(found, dict) or not found:
            raise ValueError(
                f"{index} is not an index of weights: weight_map is {shown(found)}; copy the checkpoint again"
            )
        for file in found.values():
            path = PurePosixPath(file) if isinstance(file, str) else PurePosixPath("/")
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{index}: weight_map names the file {shown(file)}; it must lie in this directory")
        return found

    def _tensors_of(self, files: list[str]) -> dict[str, str]:
        return {name: file for file in files for name in self._open(file).keys()}  # noqa: SIM118

    def _open(self, file: str) -> safe_open:
        path = self.directory / file
        try:
            if file not in self._opened:
                check_regular(path)
                self._opened[file] = safe_open(path, framework="pt")
            return self._opened[file]
        except (SafetensorError, OSError, RuntimeError) as error:  # the last one where it cannot be mapped
            raise ValueError(f"{path} cannot be read: {error}; copy the checkpoint again") from None
