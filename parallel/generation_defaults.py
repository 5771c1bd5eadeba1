"""What the makers of a model recommend for sampling from it: `generation_config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stepladder.parallel.config_fields import TOKEN_IDS, as_tuple
from stepladder.parallel.typed_json import Kind, naming, number, optional, read_object, typed, whole

GENERATION_CONFIG = "generation_config.json"
MOST = (1 << 31) - 1
FIELDS: Mapping[str, Kind] = {  # as SamplingParams takes them
    "temperature": optional(number(0, 2)),
    "top_p": optional(number(0, 1, above=True)),
    "top_k": optional(whole(-1, MOST)),
    "min_p": optional(number(0, 1)),
    "repetition_penalty": optional(number(0.001, 1000)),
    "max_new_tokens": optional(whole(1, MOST)),
    "eos_token_id": TOKEN_IDS,
}


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
        path = Path(directory) / GENERATION_CONFIG
        try:
            config = read_object(path)
        except FileNotFoundError:
            return cls()
        with naming(path):
            return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "GenerationDefaults":
        """From the fields of a `generation_config.json`."""
        config = typed(config, FIELDS)
        top_k, eos = config.get("top_k"), config.get("eos_token_id")
        return cls(
            eos_ids=None if eos is None else as_tuple(eos),
            top_k=0 if top_k == -1 else top_k,
            max_tokens=config.get("max_new_tokens"),
            **{name: config.get(name) for name in ("temperature", "top_p", "min_p", "repetition_penalty")},
        )
