"""What a rank says of itself once it is ready: its part of the model, and where it is computed."""

from collections.abc import Collection

from stepladder.parallel.experts import ExpertSpec
from stepladder.parallel.model import Transformer
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.model_check import weight_bytes

__all__ = ["of_cache", "of_model"]


def of_model(model: Transformer, pools: Collection[str], device: str, seconds: float) -> str:
    """seconds: that reading the weights took."""
    spec, place = model.spec, model.placement
    here = weight_bytes(spec, place, pools)
    group = max((place.attention, place.ffn, place.experts), key=lambda shard: shard.size)
    kernels = " with native kernels" if model.native else ""
    return (
        f"rank {group.rank} of {group.size}, {' and '.join(pools)} on {device}{kernels}: {_kind(spec)}; "
        f"{here / spec.dtype.itemsize / 1e6:.1f} million parameters as {str(spec.dtype).removeprefix('torch.')} here, "
        f"{here / 1e6:.1f} MB, read in {seconds:.1f} s"
    )


def of_cache(tokens: int, longest: int) -> str:
    """tokens: of the whole cache. longest: a request of full length."""
    return f"KV cache of {tokens} tokens, {tokens / longest:.1f} requests of full length ({longest})"


def _kind(spec: ModelSpec) -> str:
    ladder = sum(map(spec.is_ladder, range(spec.num_layers)))
    mixed = f" in {ladder} of {spec.num_layers} layers" if 0 < ladder < spec.num_layers else ""
    return f"{spec.family} of {spec.num_layers} layers, {spec.residual} wiring{mixed}{_experts(spec.experts)}"


def _experts(experts: ExpertSpec | None) -> str:
    return f", {experts.per_token} of {experts.count} experts for a token" if experts else ""
