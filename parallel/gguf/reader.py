"""A GGUF file through the package `gguf`: its metadata in checked types, its tensors as numbers."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, dequantize
from gguf.gguf_reader import ReaderField, ReaderTensor
from numpy.typing import NDArray

from stepladder.parallel.typed_json import Kind, check, check_regular

MAGIC = b"GGUF"
LONGEST_ARRAY = 1 << 22  # a vocabulary of 256 Ki tokens has about as many merges
REQUIRED = object()
WHOLE = {"F16": "float16", "BF16": "bfloat16"}  # kinds that are a dtype; of the others every number is a float32


class GgufFile:
    """One file; numbers are read when they are asked for.

    Attributes:
        architecture: what llama.cpp calls the family; the prefix of the model's own fields.
        metadata: values by key.
        tensors: by name.

    Raises:
        ValueError: it is not GGUF, cut off or broken, or one part of several.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _open(path)
        try:
            self.metadata = {key: _value(field) for key, field in reader.fields.items()}
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} holds text that is not UTF-8: {error.reason}; copy it again") from None
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self.metadata.get("general.architecture"))
        parts = self.metadata.get("split.count")
        if isinstance(parts, int) and parts > 1:
            raise ValueError(f"{path} is one of {parts} parts; join them with `llama-gguf-split --merge`")

    def get(self, key: str, kind: Kind, default: Any = REQUIRED) -> Any:
        """The value of a key, as `kind` has it.

        Raises:
            KeyError: there is none, and no default.
            ValueError: it is something else; the sentence names the key.
        """
        if key not in self.metadata and default is not REQUIRED:
            return default
        return check(key, self.metadata[key], kind)

    def field(self, name: str, kind: Kind, default: Any = REQUIRED) -> Any:
        """The same of one of the model's own fields, whose keys begin with the architecture."""
        return self.get(f"{self.architecture}.{name}", kind, default)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, as torch has it."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def numbers(self, name: str) -> NDArray[np.float32]:
        """A tensor's numbers in fp32, in its `shape`.

        Raises:
            ValueError: it is quantised in a way that `gguf` cannot undo.
        """
        return self._dequantised(name, self.tensors[name].data).reshape(self.shape(name))

    def check_kinds(self) -> None:
        """Try one row of each kind of numbers.

        Raises:
            ValueError: one is quantised in a way that `gguf` cannot undo.
        """
        of_kind = {tensor.tensor_type: tensor for tensor in self.tensors.values()}
        for tensor in of_kind.values():
            self._dequantised(tensor.name, tensor.data[:1])

    def dtype_name(self) -> str:
        """The smallest dtype that most numbers lose nothing in."""
        counts: dict[GGMLQuantizationType, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.tensor_type] = counts.get(tensor.tensor_type, 0) + tensor.n_elements
        most = max(counts, key=lambda kind: counts[kind], default=GGMLQuantizationType.F32)
        return WHOLE.get(most.name, "float32")

    def _dequantised(self, name: str, data: NDArray[Any]) -> NDArray[np.float32]:
        kind = self.tensors[name].tensor_type
        try:
            with np.errstate(all="ignore"):  # numbers that are not finite are refused where weights are loaded
                return np.array(dequantize(data, kind), dtype=np.float32)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(
                f"{self.path}: {name} is quantised as {kind.name}, which cannot be undone: {error}"
            ) from None


class _Reader(GGUFReader):
    """Believes no length: its base class reads on behind the end of the file."""

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> NDArray[Any]:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > self.data.size:
            raise ValueError(f"it has {self.data.size} bytes, but byte {end} is asked for")
        return super()._get(int(offset), dtype, int(count), override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == GGUFValueType.ARRAY and (length := self._get(orig_offs + 4, np.uint64)[0]) > LONGEST_ARRAY:
            raise ValueError(f"an array has {length} entries; at most {LONGEST_ARRAY} are read")
        return super()._get_field_parts(orig_offs, raw_type)


def is_gguf(path: Path) -> bool:
    """By how the file begins.

    Raises:
        ValueError: it is not a regular file, or cannot be read.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _open(path: Path) -> GGUFReader:
    if not is_gguf(path):
        raise ValueError(f"{path} is not a GGUF file")
    try:
        with np.errstate(all="ignore"):
            reader = _Reader(path)
    except (ValueError, LookupError, ArithmeticError, TypeError, MemoryError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is cut off, broken or of another version of GGUF: {error}; copy it again") from None
    if reader.byte_order != "I":
        raise ValueError(f"{path} is of the other byte order; convert it on a machine like this one")
    return reader


def _value(field: ReaderField) -> Any:
    """As Python has it; an fp32 number as the decimal that it was made from."""
    value = field.contents()
    if field.types and field.types[-1] == GGUFValueType.FLOAT32:
        return [_decimal(one) for one in value] if isinstance(value, list) else _decimal(value)
    return value


def _decimal(value: float) -> float:
    return float(str(np.float32(value)))
