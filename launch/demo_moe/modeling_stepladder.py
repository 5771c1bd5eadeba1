"""For `transformers` with `trust_remote_code=True`: a Mixtral whose layers read the residual stream as `residual` and
`ladder_layers` of its config.json say. Stepladder writes this file beside weights, with the names of their family.

The contribution of a block of modules is added to the stream one block late where the lag is 1 (Ladder Residual, Zhang
et al. 2501.06589); attention and FFN are one block where the wiring is parallel.
"""

from typing import Any

import transformers
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

if int(transformers.__version__.split(".")[0]) < 5:  # there, models take the first of what a layer returns
    raise ImportError(f"this model needs transformers 5, not {transformers.__version__}")


class StepladderMixtralConfig(MixtralConfig):
    model_type = "stepladder_mixtral"


if _names := get_checkpoint_conversion_mapping(MixtralConfig.model_type):  # where files have a tensor for each expert
    register_checkpoint_conversion_mapping(StepladderMixtralConfig.model_type, _names, overwrite=True)


class StepladderMixtralForCausalLM(MixtralForCausalLM):
    config_class = StepladderMixtralConfig

    def __init__(self, config: StepladderMixtralConfig) -> None:
        super().__init__(config)
        residual, named = config.residual, getattr(config, "ladder_layers", None)
        total = config.num_hidden_layers
        ladder = range(total) if named is None else range(total - named, total) if isinstance(named, int) else named
        for number, layer in enumerate(self.model.layers):
            layer.__class__ = type(type(layer).__name__, (Rewired, type(layer)), {})
            layer.lag = int(residual.startswith("ladder") and number in ladder)
            layer.parallel, layer.last = residual.endswith("parallel"), number == total - 1


class Rewired(nn.Module):
    """A decoder layer. Between two layers `hidden_states` is a pair: the stream without its newest contribution, and
    that contribution."""

    lag: int
    parallel: bool
    last: bool
    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module

    def forward(self, hidden_states: Any, **others: Any) -> Any:
        stream, newest = hidden_states if isinstance(hidden_states, tuple) else (hidden_states, None)
        for modules in [("attention", "ffn")] if self.parallel else [("attention",), ("ffn",)]:
            late = stream
            if newest is not None:
                stream = stream + newest
            seen = late if self.lag else stream
            parts = [self._attention(seen, others) if name == "attention" else self._ffn(seen) for name in modules]
            newest = sum(parts[1:], parts[0])
        return stream + newest if self.last else (stream, newest)

    def _attention(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        return self.self_attn(hidden_states=self.input_layernorm(x), **others)[0]

    def _ffn(self, x: Tensor) -> Tensor:
        norm = getattr(self, "post_attention_layernorm", None) or self.input_layernorm  # Cohere has one for both
        return self.mlp(norm(x))
