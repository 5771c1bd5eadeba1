"""From Hydra's DictConfig to frozen dataclasses, once, at the edge."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import msgspec
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

T = TypeVar("T")


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain dictionaries and lists.

    Raises:
        ValueError: a value is missing, or refers to something that is not there.
    """
    try:
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} is missing; give {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or 'the configuration'}: {str(error).splitlines()[0]}") from None


def build(cls: type[T], values: Mapping[str, Any], where: str = "", strict: bool = True) -> T:
    """An instance of the dataclass `cls` from plain values; nested mappings become nested dataclasses.

    Args:
        where: the path of `values` in the configuration, for sentences about them.
        strict: refuse "1" for 1; False suits words of a command line.

    Raises:
        ValueError: an unknown or missing key, or a value of the wrong type; the sentence names the key.
    """
    kinds = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in values.keys() - known.keys():
        place = where.removesuffix(".") or "the top level"
        raise ValueError(f"{where}{key} is not an option; {place} takes {', '.join(sorted(known)) or 'none'}")
    for key in known.keys() - values.keys():
        if known[key].default is MISSING and known[key].default_factory is MISSING:
            raise ValueError(f"{where}{key} is missing; give {where}{key}=...")
    return cls(**{key: _value(kinds[key], value, where + key, strict) for key, value in values.items()})


def check_counts(options: object, *names: str, where: str = "") -> None:
    """Raises ValueError if one of these options, which are at `where`, is below 1; one that is None is not."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{where}{name} is {value}; it must be at least 1")


def _value(kind: Any, value: Any, where: str, strict: bool) -> Any:
    if is_dataclass(kind) and isinstance(value, Mapping):
        return build(cast(type, kind), value, where + ".", strict)
    if get_origin(kind) is dict and is_dataclass(get_args(kind)[1]) and isinstance(value, Mapping):
        return {key: _value(get_args(kind)[1], inner, f"{where}.{key}", strict) for key, inner in value.items()}
    if get_origin(kind) in (list, tuple) and is_dataclass(get_args(kind)[0]) and isinstance(value, list):
        items = [_value(get_args(kind)[0], inner, f"{where}[{index}]", strict) for index, inner in enumerate(value)]
        return get_origin(kind)(items)
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where} is {value!r}: {str(error)[0].lower()}{str(error)[1:]}") from None
