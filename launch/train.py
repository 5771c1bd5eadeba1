"""Train a model: `python -m launch.train recipe=demo`; what a recipe does is told in its own file."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch import demo
from launch.build import build

RECIPES: dict[str, tuple[type, Callable[[Any], None]]] = {"demo": (demo.DemoRecipe, demo.run)}


@hydra.main(version_base=None, config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    try:
        recipe, run = recipe_of(config)
        run(recipe)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"stepladder: {error}")


def recipe_of(config: DictConfig) -> tuple[Any, Callable[[Any], None]]:
    """The recipe's dataclass, resolved and checked, and the function that runs it.

    Raises:
        ValueError: an option that does not exist or cannot be.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"the configuration cannot be resolved: {str(error).splitlines()[0]}") from None
    assert isinstance(values, dict)
    options = {str(key): value for key, value in values.items()}
    if options["name"] not in RECIPES:
        raise ValueError(f"name is {options['name']!r}; the recipes are {', '.join(RECIPES)}")
    kind, run = RECIPES[options["name"]]
    return build(kind, options | {"run_dir": str(Path(options["run_dir"]).absolute())}), run


if __name__ == "__main__":
    main()
