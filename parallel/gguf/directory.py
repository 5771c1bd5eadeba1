"""From a GGUF file to a Hugging Face directory, which is all that the rest of this program knows."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from stepladder.parallel.checkpoint import check_weights, sharded_parameters
from stepladder.parallel.gguf.model import ELSEWHERE, ROTATED, UNUSED, spec_of, tensor_names
from stepladder.parallel.gguf.reader import GgufFile
from stepladder.parallel.gguf.tokenizer import Vocabulary, tokenizer_of
from stepladder.parallel.model import Transformer
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.typed_json import LONG_TEXT, naming, number, whole
from stepladder.parallel.weight_files import INDEX, WHOLE

log = logging.getLogger(__name__)

FILE_BYTES = 2 << 30  # of one safetensors file
SAMPLING = {  # generation_config.json's name -> GGUF's, and what it may be
    "temperature": ("temp", number(0, 2)),
    "top_k": ("top_k", whole(-1, (1 << 31) - 1)),
    "top_p": ("top_p", number(0, 1, above=True)),
    "min_p": ("min_p", number(0, 1)),
    "repetition_penalty": ("penalty_repeat", number(0.001, 1000)),
}


def write_directory(path: Path, directory: Path, dtype: str | None = None, progress: bool = False) -> None:
    """Write config.json, tokenizer, chat template, generation_config.json and dequantised weights into a directory.

    Args:
        dtype: of the weights: float32, bfloat16 or float16; None takes the smallest that loses nothing.
        progress: show a bar on stderr.

    Raises:
        ValueError: the file is broken, or holds something this engine does not do; or there is no room for the weights.
            The sentence names the file.
    """
    file = GgufFile(path)
    with naming(path):
        vocabulary = Vocabulary(file)
        tokenizer = tokenizer_of(vocabulary)
        spec = spec_of(file, dtype, vocabulary.eos_ids)
        if max(vocabulary.ids.values()) >= spec.vocab_size:
            raise ValueError(f"there are {len(vocabulary.tokens)} tokens, but embeddings of {spec.vocab_size}")
        weights = _Weights(file, spec)
        tokenizer.save(str(directory / "tokenizer.json"))
        _write(directory / "config.json", spec.to_config())
        _write(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **vocabulary.named})
        _write(directory / "generation_config.json", _generation_config(file, spec))
        if template := file.get("tokenizer.chat_template", LONG_TEXT, ""):
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    log.info("%s: its weights take %.2f GB as %s", path.name, weights.bytes / 1e9, _name(spec.dtype))
    weights.write(directory, progress)
    check_weights(spec, directory)


class _Weights:
    """The tensors of a file under a Hugging Face directory's names; all there, and of their shapes."""

    def __init__(self, file: GgufFile, spec: ModelSpec) -> None:
        self.file, self.spec = file, spec
        with torch.device("meta"):
            parameters = sharded_parameters(Transformer(spec))
        shapes = {piece.name: piece.shape for parameter in parameters for piece in parameter.pieces}
        self.names = {theirs: ours for theirs, ours in tensor_names(spec) if ours in shapes}
        for theirs, ours in self.names.items():
            if theirs not in file.tensors:
                raise ValueError(f"there is no tensor {theirs}")
            if file.shape(theirs) != shapes[ours]:
                raise ValueError(f"{theirs} has shape {file.shape(theirs)}; the metadata says {shapes[ours]}")
        for name in file.tensors.keys() - self.names.keys() - ELSEWHERE:
            if UNUSED not in name:
                raise ValueError(f"it has the tensor {name}, which a model of its metadata does not have")
        file.check_kinds()

    @property
    def bytes(self) -> int:
        """Of all of them, in the model's dtype."""
        return sum(self.file.tensors[name].n_elements for name in self.names) * self.spec.dtype.itemsize

    def write(self, directory: Path, progress: bool) -> None:
        """In files of about FILE_BYTES, so that no more than that is in memory."""
        part, index = dict[str, Tensor](), dict[str, str]()
        in_one = self.bytes <= FILE_BYTES
        title = f"{self.file.path.name} as {_name(self.spec.dtype)}"
        with tqdm(total=self.bytes, unit="B", unit_scale=True, desc=title, disable=None if progress else True) as bar:
            for name, tensor in self._tensors():
                part[name] = tensor
                if not in_one and sum(one.nbytes for one in part.values()) >= FILE_BYTES:
                    self._flush(directory, part, index)
                bar.update(tensor.nbytes)
            self._flush(directory, part, index)
        if in_one:
            (directory / next(iter(index.values()))).rename(directory / WHOLE)
        else:
            _write(directory / INDEX, {"metadata": {"total_size": self.bytes}, "weight_map": index})

    def _flush(self, directory: Path, part: dict[str, Tensor], index: dict[str, str]) -> None:
        """Write what has gathered in `part`; `index` knows in which file each tensor lies."""
        name = f"model-{len(set(index.values())) + 1:05}.safetensors"
        try:
            save_file(part, directory / name, metadata={"format": "pt"})
            (directory / name).chmod(0o644)  # a cache may be several people's; the library lets only its own user read
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{directory / name} cannot be written: {error}; is the disk full?") from None
        index |= dict.fromkeys(part, name)
        part.clear()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for theirs, ours in self.names.items():
            numbers = self.file.numbers(theirs)
            if self.file.architecture in ROTATED and (heads := self._heads(theirs)):
                numbers = halves_apart(numbers, heads)
            yield ours, torch.from_numpy(numbers).to(self.spec.dtype)

    def _heads(self, name: str) -> int:
        """Of the query or key that this tensor makes; 0 for others."""
        counts = {"attn_q": self.spec.num_heads, "attn_k": self.spec.num_kv_heads}
        return next((count for what, count in counts.items() if f".{what}." in name), 0)


def halves_apart(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """[heads * head_dim, ...] in which 2i and 2i + 1 turn together, to i and i + head_dim / 2, Hugging Face's order."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _generation_config(file: GgufFile, spec: ModelSpec) -> dict[str, Any]:
    given = {ours: file.get(f"general.sampling.{name}", kind, None) for ours, (name, kind) in SAMPLING.items()}
    return {name: value for name, value in given.items() if value is not None} | {"eos_token_id": list(spec.eos_ids)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
