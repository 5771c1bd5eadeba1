"""Every wiring against the recurrence it stands for, in fp64, with the real modules.

The recurrences are written here from Zhang et al. 2501.06589: x_{i+1} = h_{i+1}(x_{i-1}) + x_i, and for hybrids the
carry of the authors' Hugging Face model, (attn_out, mlp_out) = (stream after attention, stream after FFN).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import WholeSequences
from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import Attention, FeedForward
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.wiring import wiring

LAYERS = 6
SPEC = ModelSpec(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_layers=LAYERS,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_position=64,
    dtype=torch.float64,
)
HYBRIDS: list[int | list[int]] = [3, 1, [0, 1], [0, 2, 4], [1, 3, 5], [2, 3], [0, 5], [], LAYERS]

Module = Callable[[Tensor], Tensor]


def build(residual: str, ladder_layers: int | list[int] | None = None) -> Transformer:
    """A model with the same random weights under any wiring."""
    config = SPEC.to_config() | {"residual": residual, "ladder_layers": ladder_layers}
    model = Transformer(ModelSpec.from_config(config)).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for _, parameter in sorted(model.named_parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return model


def modules_of(model: Transformer, context: WholeSequences) -> tuple[list[Module], list[Module]]:
    """h of every attention and of every FFN, by layer."""
    attention = sorted((m for m in model.modules_of_blocks if isinstance(m, Attention)), key=lambda m: m.layer)
    ffn = [m for m in model.modules_of_blocks if isinstance(m, FeedForward)]
    assert len(attention) == len(ffn) == LAYERS
    return [partial(m, context=context) for m in attention], [partial(m, context=context) for m in ffn]


def standard(x: Tensor, attention: list[Module], ffn: list[Module]) -> Tensor:
    for a, f in zip(attention, ffn, strict=True):
        x = a(x) + x
        x = f(x) + x
    return x


def ladder(x: Tensor, attention: list[Module], ffn: list[Module]) -> Tensor:
    before, now = x, x  # x_{-1} = x_0: first attention and first FFN both read the embedding
    for pair in zip(attention, ffn, strict=True):
        for h in pair:
            before, now = now, h(before) + now
    return now


def ladder_sums(x: Tensor, attention: list[Module], ffn: list[Module]) -> Tensor:
    """The same in closed form: attention of layer l sees A_k of k < l and M_k of k < l-1; FFN sees both of k < l."""
    a: list[Tensor] = []
    m: list[Tensor] = []
    for layer in range(LAYERS):
        a.append(attention[layer](x + sum(a[:layer], torch.zeros_like(x)) + sum(m[: max(layer - 1, 0)])))
        m.append(ffn[layer](x + sum(a[:layer], torch.zeros_like(x)) + sum(m[:layer])))
    return x + sum(a) + sum(m)


def hybrid(x: Tensor, attention: list[Module], ffn: list[Module], ladder_layers: list[int]) -> Tensor:
    attn_out = mlp_out = x
    for layer, (a, f) in enumerate(zip(attention, ffn, strict=True)):
        hidden, previous = mlp_out, attn_out
        if layer in ladder_layers:
            attn_out = hidden + a(previous)
            mlp_out = attn_out + f(hidden)
        else:
            attn_out = hidden + a(hidden)
            mlp_out = attn_out + f(attn_out)
    return mlp_out


def parallel(x: Tensor, attention: list[Module], ffn: list[Module], ladder_layers: list[int]) -> Tensor:
    """PaLM's layer y = x + A(x) + M(x); a ladder layer reads the stream without the layer before it."""
    before, now = x, x
    for layer, (a, f) in enumerate(zip(attention, ffn, strict=True)):
        seen = before if layer in ladder_layers else now
        before, now = now, now + (a(seen) + f(seen))
    return now


def check(model: Transformer, recurrence: Callable[..., Tensor], *args: list[int]) -> float:
    """Largest difference of the final hidden states, relative to the largest of them."""
    tokens = torch.randint(0, SPEC.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1)).view(-1)
    context = WholeSequences(2, 9)
    got = model(tokens, context)  # also sets the context's rotary tables
    want = model.norm(recurrence(model.embedding.embed(tokens), *modules_of(model, context), *args))
    return float((got - want).abs().max() / want.abs().max())


def layers_of(ladder_layers: int | list[int]) -> list[int]:
    return list(range(LAYERS))[LAYERS - ladder_layers :] if isinstance(ladder_layers, int) else ladder_layers


def test_pure_wirings_equal_their_recurrences() -> None:
    every = list(range(LAYERS))
    assert check(build("standard"), standard) == 0
    assert check(build("ladder"), ladder) == 0
    assert check(build("ladder"), ladder_sums) <= 1e-12
    assert check(build("ladder"), hybrid, every) == 0
    assert check(build("parallel"), parallel, []) == 0
    assert check(build("ladder-parallel"), parallel, every) == 0


@pytest.mark.parametrize("ladder_layers", HYBRIDS, ids=str)
def test_hybrids_equal_their_recurrences(ladder_layers: int | list[int]) -> None:
    named = layers_of(ladder_layers)
    assert check(build("ladder", ladder_layers), hybrid, named) == 0
    assert check(build("ladder-parallel", ladder_layers), parallel, named) == 0


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3", "cohere"])
def test_every_family_has_every_wiring(family: str, families: dict[str, Path]) -> None:
    """Its own attention and FFN, with their biases, windows and norms, in each of the recurrences."""
    path, every = families[family], [0, 1, 2]
    tokens = torch.randint(0, 101, (26,), generator=torch.Generator().manual_seed(1))
    cases: list[tuple[str, tuple[int, ...] | None, Callable[..., Tensor]]] = [
        ("standard", None, standard),
        ("ladder", None, ladder),
        ("ladder", (1, 2), partial(hybrid, ladder_layers=[1, 2])),
        ("parallel", None, partial(parallel, ladder_layers=[])),
        ("ladder-parallel", None, partial(parallel, ladder_layers=every)),
        ("ladder-parallel", (2,), partial(parallel, ladder_layers=[2])),
    ]
    outputs: list[Tensor] = []
    for residual, layers, recurrence in cases:
        spec = replace(ModelSpec.load(path), residual=residual, ladder_layers=layers, dtype=torch.float64)
        model, context = Transformer(spec).requires_grad_(False), WholeSequences(1, 26)
        load_weights(model, path)
        outputs.append(model(tokens, context))
        attention = [partial(m, context=context) for m in model.modules_of_blocks if isinstance(m, Attention)]
        ffn = [partial(m, context=context) for m in model.modules_of_blocks if isinstance(m, FeedForward)]
        assert torch.equal(outputs[-1], model.norm(recurrence(model.embedding.embed(tokens), attention, ffn)))
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])


def test_wirings_are_different_functions() -> None:
    """Otherwise the comparisons above would prove nothing."""
    tokens = torch.arange(9)
    models = [build(r) for r in ("standard", "ladder", "parallel", "ladder-parallel")]
    models += [build(r, h) for r in ("ladder", "ladder-parallel") for h in ([0, 2, 4], [1, 3, 5], 3)]
    outputs = [model(tokens, WholeSequences(1, 9)) for model in models]
    for i, one in enumerate(outputs):
        assert all((one - other).abs().max() > 1e-3 for other in outputs[:i])
    # layer 0 reads the embedding either way: [0] changes only what its FFN sees, nothing where both are one block
    assert torch.equal(build("ladder-parallel", [0])(tokens, WholeSequences(1, 9)), outputs[2])


def test_a_ladder_of_no_layers_is_standard_and_of_all_layers_is_ladder() -> None:
    tokens = torch.arange(9)
    for residual, plain in (("ladder", "standard"), ("ladder-parallel", "parallel")):
        none, every = build(residual, 0), build(residual, LAYERS)
        assert torch.equal(none(tokens, WholeSequences(1, 9)), build(plain)(tokens, WholeSequences(1, 9)))
        assert torch.equal(every(tokens, WholeSequences(1, 9)), build(residual)(tokens, WholeSequences(1, 9)))


def test_the_lag_never_rises_by_more_than_one() -> None:
    for residual in ("standard", "ladder", "parallel", "ladder-parallel"):
        for ladder_layers in (None, *HYBRIDS) if residual.startswith("ladder") else (None,):
            model = build(residual, ladder_layers)
            lags = [plan.lag for plan in wiring(model.spec)]
            assert all(b - a <= 1 for a, b in pairwise(lags))
            assert [block.lag for block in model.blocks] == lags


def test_wirings_of_the_same_weights_have_different_cache_keys() -> None:
    specs = [replace(SPEC, residual=r) for r in ("standard", "ladder", "parallel", "ladder-parallel")]
    specs += [replace(SPEC, residual="ladder", ladder_layers=layers) for layers in ((0,), (1,), (0, 1))]
    assert len({spec.wiring_key for spec in specs}) == len(specs)
