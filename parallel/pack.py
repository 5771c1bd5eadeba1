"""Get a loaded model ready for a CPU rank: its matrices in oneDNN's layout, and rows that round alike in any batch."""

from torch import nn

from stepladder.kernels.linear import can_pack, invariant_linear, pack
from stepladder.parallel.modules import VocabParallel


def pack_weights(model: nn.Module, invariant: bool = False) -> None:
    """Replace every matrix of a model, or of half a model, by its packed form, where this machine has one. Only for
    inference.

    Args:
        invariant: also make every linear layer round each row independently of the batch.

    Raises:
        ValueError: `invariant`, but this machine or dtype has no packed form.
    """
    some = next(parameter for parameter in model.parameters() if parameter.dim() == 2)
    if not can_pack(some):
        if invariant:
            raise ValueError(
                f"engine.batch_invariant needs CPU ranks in float32 or bfloat16 with oneDNN, not {some.dtype} on "
                f"{some.device.type}; turn it off"
            )
        return
    head, embedding = getattr(model, "head", None), getattr(model, "embedding", None)
    for module in model.modules():
        for name in getattr(module, "MATRICES", ()):
            weight = module._parameters.pop(name)
            assert weight is not None
            setattr(module, name, pack(weight))
        if module is head and isinstance(module, VocabParallel):
            module.packed = pack(module.weight)
            if module is not embedding:
                del module._parameters["weight"]
        if invariant and hasattr(module, "linear"):
            module.linear = invariant_linear  # type: ignore[assignment]
