"""The configuration that a command makes of its words."""

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from stepladder.launch.where import CONF


def composed(command: str, *words: str) -> DictConfig:
    """command: serve, bench, train, generate, fetch."""
    with initialize_config_dir(CONF, version_base=None):
        return compose(command, list(words))
