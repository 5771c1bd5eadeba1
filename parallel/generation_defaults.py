"""What the makers of a model recommend for sampling from it: `generation_config.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stepladder.parallel.families import as_tuple


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Defaults for what a request leaves open, under vLLM's names; None where the file is silent.

    As in vLLM, `do_sample` does not matter, and fields that only `transformers` itself knows (beams, say) are not read.

    Attributes:
        eos_ids: tokens that end a sequence; None leaves it to `config.json`.
        top_k: 0 keeps every token.
        max_tokens: from `max_new_tokens`.
    """

    eos_ids: tuple[int, ...] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, lambda x: x >= 0)
        _within("top_p", self.top_p, lambda x: 0 < x <= 1)
        _within("top_k", self.top_k, lambda x: x >= 0 and x == int(x))
        _within("min_p", self.min_p, lambda x: 0 <= x <= 1)
        _within("repetition_penalty", self.repetition_penalty, lambda x: x > 0)
        _within("max_new_tokens", self.max_tokens, lambda x: x >= 1 and x == int(x))
        if not all(isinstance(token, int) for token in self.eos_ids or ()):
            raise ValueError(f"eos_token_id is {self.eos_ids!r}; it must be one token id or a list of them")

    @property
    def sampling(self) -> dict[str, Any]:
        """The recommended sampling parameters by name, without those the file is silent about."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "eos_ids"}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def load(cls, directory: str | Path) -> "GenerationDefaults":
        """Read the file of a Hugging Face model directory; without one, nothing is recommended.

        Raises:
            ValueError: the file is not a JSON object, or a value is impossible; the sentence names file and field.
        """
        path = Path(directory) / "generation_config.json"
        if not path.exists():
            return cls()
        try:
            config = json.loads(path.read_text())
            if not isinstance(config, dict):
                raise ValueError("it is not a JSON object")
            return cls.from_config(config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "GenerationDefaults":
        """From the fields of a `generation_config.json`."""
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        top_k, eos = config.get("top_k"), config.get("eos_token_id")
        return cls(
            eos_ids=None if eos is None else as_tuple(eos),
            top_k=0 if top_k == -1 else top_k,
            max_tokens=config.get("max_new_tokens"),
            **{name: config.get(name) for name in names},
        )


def _within(name: str, value: Any, holds: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not holds(value)):
        raise ValueError(f"{name} is {value!r}, which no sampler can use; correct it or remove it")
