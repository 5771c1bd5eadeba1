"""What can be told of a model directory before anything is started: whether its files are usable, and whether the
weights fit into memory."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from stepladder.parallel.checkpoint import check_weights
from stepladder.parallel.generation_defaults import GENERATION_CONFIG, GenerationDefaults
from stepladder.parallel.layers import POOLS
from stepladder.parallel.model import Transformer
from stepladder.parallel.shards import ALONE, Placement, Shard
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.typed_json import naming
from stepladder.workers.config import EngineConfig
from stepladder.workers.memory import available
from stepladder.workers.params import SamplingParams
from stepladder.workers.text.tokenizer import Tokenizer


class ModelFiles(NamedTuple):
    """What is read of a model directory, but for its weights."""

    spec: ModelSpec
    defaults: SamplingParams
    tokenizer: Tokenizer


def check_model(directory: str, engine: EngineConfig, device: str | None = None) -> ModelFiles:
    """Every file of the model, of weights the headers; and whether one rank on `device` has room for all of it.

    Raises:
        ValueError: one is unusable; the sentence names it, the field and the value.
    """
    spec = engine.of(ModelSpec.load(directory))
    if device:
        check_memory(spec, device)
    check_weights(spec, directory)
    return ModelFiles(spec, recommended_params(directory), Tokenizer(directory))


def recommended_params(directory: str) -> SamplingParams:
    """What the model's generation_config.json recommends, the rest as it is.

    Raises:
        ValueError: the file is unusable; the sentence names it.
    """
    recommended = GenerationDefaults.load(directory).sampling
    with naming(Path(directory) / GENERATION_CONFIG):
        return replace(SamplingParams(), **recommended)


def check_memory(
    spec: ModelSpec, device: str, shard: Shard = ALONE, pools: Collection[str] = POOLS, ranks_here: int = 1
) -> None:
    """ValueError unless so many ranks' weights fit into what is free of this machine's memory, or one rank's into what
    is free of its GPU's."""
    weights = weight_bytes(spec, shard, pools)
    on_gpu = torch.device(device).type == "cuda"
    need = weights if on_gpu else weights * ranks_here
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else available()
    if need > free:
        who = "one rank" if on_gpu or ranks_here == 1 else f"{ranks_here} ranks"
        raise ValueError(
            f"the weights of {who} need {need / 2**30:.1f} GiB in {str(spec.dtype).removeprefix('torch.')}, but "
            f"{free / 2**30:.1f} GiB of memory are free here; use more ranks or machines, or a smaller engine.dtype"
        )


def weight_bytes(spec: ModelSpec, shard: Shard | Placement = ALONE, pools: Collection[str] = POOLS) -> int:
    """Of one rank's weights, in the dtype of `spec`."""
    with torch.device("meta"):
        return sum(parameter.nbytes for parameter in Transformer(spec, shard, pools=pools).parameters())
