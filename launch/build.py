"""From Hydra's DictConfig to frozen dataclasses, once, at the edge."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast, get_type_hints

import msgspec

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str = "", strict: bool = True) -> T:
    """An instance of the dataclass `cls` from plain values; nested mappings become nested dataclasses.

    Args:
        where: the path of `values` in the configuration, for sentences about them.
        strict: refuse "1" for 1; False suits words of a command line.

    Raises:
        ValueError: an unknown or missing key, or a value of the wrong type; the sentence names the key.
    """
    kinds = get_type_hints(cls)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for key in values.keys() - known:
        raise ValueError(f"{where}{key} is not an option; {where or 'the top level '}takes {', '.join(sorted(known))}")
    made = {key: _value(kinds[key], value, where + key, strict) for key, value in values.items()}
    try:
        return cls(**made)
    except TypeError as error:
        raise ValueError(f"{where or 'the configuration'}: {str(error).split('.__init__() ')[-1]}") from None


def _value(kind: Any, value: Any, where: str, strict: bool) -> Any:
    if is_dataclass(kind) and isinstance(value, Mapping):
        return build(cast(type, kind), value, where + ".", strict)
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where} is {value!r}: {str(error)[0].lower()}{str(error)[1:]}") from None
