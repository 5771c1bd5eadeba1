"""Train a model: `python -m launch.train recipe=demo`; what a recipe does is told in its own file."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from stepladder.launch.hydra_command import of_this_job, run_command
from stepladder.launch.recipes import convert, head, twins
from stepladder.launch.recipes import demo_model as demo
from stepladder.launch.typed_config import build, plain

RECIPES: dict[str, tuple[type, Callable[[Any], None]]] = {
    "demo": (demo.DemoRecipe, demo.run),
    "demo_moe": (demo.DemoRecipe, demo.run),
    "twins": (twins.TwinsRecipe, twins.run),
    "convert": (convert.ConvertRecipe, convert.run),
    "head": (head.HeadRecipe, head.run),
}


def main() -> None:
    run_command("train", lambda config: RECIPES[config.name][0], _train)


def _train(config: DictConfig) -> int:
    logging.getLogger().setLevel(logging.WARNING)
    recipe, run = recipe_of(config)
    run(recipe)
    return 0


def recipe_of(config: DictConfig) -> tuple[Any, Callable[[Any], None]]:
    """The recipe's dataclass, resolved and checked, and the function that runs it.

    Raises:
        ValueError: an option that is missing, does not exist or cannot be.
    """
    options = plain(config)
    if options["name"] not in RECIPES:
        raise ValueError(f"name is {options['name']!r}; the recipes are {', '.join(RECIPES)}")
    kind, run = RECIPES[options["name"]]
    return build(kind, options | {"run_dir": of_this_job(str(Path(options["run_dir"]).absolute()))}), run


if __name__ == "__main__":
    main()
