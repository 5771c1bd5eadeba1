"""Which kernels a loaded model computes with: those in plain torch, or on a CPU rank native ones."""

import logging

import torch
from torch import nn

from stepladder.kernels.cpu import build
from stepladder.kernels.cpu.experts import Experts
from stepladder.kernels.cpu.native import DTYPES, NormWeight, Projection, Rotation
from stepladder.kernels.norm import layer_norm
from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import Attention, Norm, Product, VocabParallel
from stepladder.parallel.moe import MixtureOfExperts

log = logging.getLogger(__name__)

AUTO, NATIVE, TORCH = "auto", "native", "torch"
KERNELS = (AUTO, NATIVE, TORCH)


def choose(model: Transformer, kernels: str = AUTO) -> None:
    """Give a model, or half of one, its kernels. Only for inference.

    Args:
        kernels: `auto` takes the native ones where there are any.

    Raises:
        ValueError: native ones are asked for, and there are none.
    """
    some = next(parameter for parameter in model.parameters() if parameter.dim() == 2)
    if has_native(kernels, some.device.type, some.dtype):
        lay_out(model)
        log.info("this rank computes with native CPU kernels")


def has_native(kernels: str, device: str, dtype: torch.dtype) -> bool:
    """Whether ranks on such a device compute a model of this dtype with native kernels; compiles them on first use.

    Raises:
        ValueError: they are asked for, and there are none.
    """
    if kernels == TORCH or (kernels == AUTO and device != "cpu"):
        return False
    if device != "cpu":
        why = f"they are for CPU ranks, and this one runs on {device}"
    elif dtype not in DTYPES:
        why = f"they compute in float32, bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}"
    else:
        why = build.why_not() or ""
    if why and kernels == NATIVE:
        raise ValueError(f"engine.kernels=native and engine.batch_invariant=true need native kernels: {why}")
    if why:
        log.warning("CPU ranks compute with plain torch instead of native kernels: %s", why)
    return not why


def lay_out(model: Transformer) -> None:
    """Put native kernels in place of a model's products, norms, rotary embedding and attention, and its matrices into
    the layout that they read; the plain ones go."""
    for module in model.modules():
        for method, product in getattr(module, "PRODUCTS", {}).items():
            if module._parameters.get(product.weight) is not None:
                setattr(module, method, _taken(module, product))
        if isinstance(module, MixtureOfExperts):
            module.norm.forward = _norm(module.norm)  # type: ignore[method-assign]
            gate_up, down = (module._parameters.pop(name) for name in ("gate_up", "down"))
            module.mix = Experts.of(gate_up, down, module.held, module.first)  # type: ignore[method-assign, arg-type]
        if isinstance(module, Attention):
            heads = {"q_norm": module.num_heads, "k_norm": module.num_kv_heads}
            norms = {name: getattr(module, name) for name in heads}
            weights = {name: _norm(norm, (heads[name], module.head_dim)) for name, norm in norms.items() if norm}
            module.rotate_and_store = Rotation(module.num_heads, module.interleaved, **weights)
    if isinstance(head := getattr(model, "head", None), VocabParallel):
        head.project_out = Projection.of(head.weight)  # type: ignore[method-assign]
        if head is not model.embedding:
            del head._parameters["weight"]
        model.norm.forward = _norm(model.norm)  # type: ignore[method-assign]
    model.native = True


def _taken(module: nn.Module, product: Product) -> Projection:
    """A matrix with its bias, out of the module. What lies between the products of a module is fp32; what comes out has
    the stream's dtype."""
    weight, bias = module._parameters.pop(product.weight), module._parameters.pop(f"{product.weight}_bias", None)
    assert weight is not None
    norm = _norm(getattr(module, product.norm)) if product.norm else None
    wide = product.norm is not None or product.wide
    return Projection.of(weight, bias, norm, product.gated, torch.float32 if wide else weight.dtype)


def _norm(norm: Norm, shape: tuple[int, ...] | None = None) -> NormWeight:
    weight = norm.weight.detach().float()
    weight = weight.expand(shape) if shape else weight
    return NormWeight(weight.contiguous(), norm.eps, norm.kernel is layer_norm)
