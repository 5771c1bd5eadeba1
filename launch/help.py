"""`--help` of a command: its own groups, and every option with its meaning, from the dataclasses' docstrings."""

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from stepladder.launch.where import CONF
from stepladder.workers.params import SamplingParams

WIDTH, LONGEST = 110, 80  # of lines, and of a value
EXTRA = {"serve": ("secrets",)}  # groups that no default names; they are added with a +
MAPPINGS = {"sampling": SamplingParams}  # options that are dictionaries, and the dataclass that explains them
FLAGS = """flags:
  --cfg job          print the configuration that these words come to, and do nothing
  --config-dir DIR   more choices for the groups: DIR/cluster/mine.yaml is cluster=mine
  --multirun         a sweep: option=1,2,3 runs once for each, in a folder of its own below run_dir"""


def help_of(name: str, kind: Callable[[DictConfig], type], words: Sequence[str]) -> str:
    """Of conf/NAME.yaml, as far as `words` choose.

    Args:
        kind: the dataclass of the command's options, of a configuration.
    """
    config = _composed(name, [word for word in words if "=" in word and not word.startswith("-")])
    values = cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))
    options = [_option(*one) for one in _options(kind(config), values)]
    groups = [f"  {group:<10} {', '.join(choices)}" for group, choices in _groups(name)]
    usage = f"usage: stepladder {name} [group=choice] [option=value] [flags]"
    return "\n".join([usage, "\ngroups (a choice sets options):", *groups, "\noptions, as these words set them:",
                      *options, f"\n{FLAGS}"])  # fmt: skip


def meanings(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass and of those it inherits from say of its fields, written `name: meaning`."""
    found: dict[str, str] = {}
    names = "|".join(re.escape(field.name) for field in fields(kind))
    label = re.compile(rf"(?:(?<=^)|(?<=\s))((?:{names})(?:, (?:{names}))*): ")
    for cls in reversed(kind.__mro__[:-1]):
        text = " ".join((inspect.cleandoc(cls.__doc__ or "")).replace("Attributes:", "").split())
        _, *parts = label.split(text)
        for named, said in zip(parts[::2], parts[1::2], strict=True):
            found |= dict.fromkeys(named.split(", "), said.strip().rstrip(".;"))
    return found


def _composed(name: str, overrides: list[str]) -> DictConfig:
    """What cannot be composed is shown as it is by default."""
    with initialize_config_dir(CONF, version_base=None):
        try:
            return compose(name, overrides)
        except HydraException:
            return compose(name)


def _options(kind: Any, config: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, str, str]]:
    """(option, its value, what it means) of a dataclass whose values are in `config`."""
    said, kinds = meanings(kind), get_type_hints(kind)
    for name, value in config.items():
        inner = MAPPINGS.get(name, kinds.get(name))
        if is_dataclass(inner) and isinstance(value, dict):
            yield from _options(inner, value, f"{where}{name}.")
        else:
            shown = "(must be given)" if value == "???" else value if isinstance(value, str) else json.dumps(value)
            yield where + name, shown, said.get(name, "")


def _option(name: str, value: str, said: str) -> str:
    head = f"  {name} = {value if len(value) <= LONGEST else value[:LONGEST] + '...'}"
    plain = said.replace("None", "null")
    return "\n".join([head, *textwrap.wrap(plain, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)])


def _groups(name: str) -> Iterator[tuple[str, list[str]]]:
    """The groups that conf/NAME.yaml composes, and their choices."""
    defaults = OmegaConf.load(Path(CONF, f"{name}.yaml")).defaults
    named = [next(iter(entry)) for entry in defaults if not isinstance(entry, str)]
    for group in [*(g for g in named if not g.startswith("override ")), *EXTRA.get(name, ())]:
        choices = sorted(path.stem for path in Path(CONF, group).glob("*.yaml"))
        yield (f"+{group}" if group in EXTRA.get(name, ()) else group), choices
