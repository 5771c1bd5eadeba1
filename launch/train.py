"""Train a model: `python -m launch.train recipe=demo`; what a recipe does is told in its own file."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from stepladder.launch.build import build, plain
from stepladder.launch.recipes import convert, twins
from stepladder.launch.recipes import demo_model as demo
from stepladder.launch.where import CONF

RECIPES: dict[str, tuple[type, Callable[[Any], None]]] = {
    "demo": (demo.DemoRecipe, demo.run),
    "twins": (twins.TwinsRecipe, twins.run),
    "convert": (convert.ConvertRecipe, convert.run),
}


@hydra.main(version_base=None, config_path=CONF, config_name="train")
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
        ValueError: an option that is missing, does not exist or cannot be.
    """
    options = plain(config)
    if options["name"] not in RECIPES:
        raise ValueError(f"name is {options['name']!r}; the recipes are {', '.join(RECIPES)}")
    kind, run = RECIPES[options["name"]]
    return build(kind, options | {"run_dir": str(Path(options["run_dir"]).absolute())}), run


if __name__ == "__main__":
    main()
