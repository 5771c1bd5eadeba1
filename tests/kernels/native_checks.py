"""The native kernels against their definitions in fp64. Also run as a program, with compiler flags: other builds of the
same source (`python -m tests.kernels.native_checks FOLDER -march=x86-64-v3 ...`)."""

import random
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stepladder.kernels.cpu import build, native
from stepladder.kernels.cpu.native import NormWeight, Projection, Rotation
from stepladder.parallel.context import KVCache, PagedSequences
from stepladder.parallel.spec import ModelSpec

CLOSE = 2e-6  # of the largest number, in fp32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(got: Tensor, want: Tensor, bound: float = CLOSE, least: float = 1e-30) -> None:
    """least: what the largest number is taken for at least; a lone sum may happen to be nearly nothing."""
    worst = float((got.double() - want).abs().max() / want.abs().max().clamp_min(least)) if want.numel() else 0.0
    assert got.shape == want.shape and worst <= bound, f"off by {worst:.1e} of the largest number"


def check_product(
    outputs: int, inputs: int, rows: int, gated: bool, bias: bool, norm: str | None, seed: int = 0
) -> None:
    """fp32 within CLOSE of fp64; other dtypes of weights exactly what fp32 gives on the widened weights."""
    g = draw(seed)
    weight, x = torch.randn(outputs, inputs, generator=g) * inputs**-0.5, torch.randn(rows, inputs, generator=g)
    added = torch.randn(outputs, generator=g) if bias else None
    scale = NormWeight(1 + 0.1 * torch.randn(inputs, generator=g), 1e-5, norm == "layer") if norm else None
    one = Projection.of(weight, added, scale, gated, torch.float32)
    close(one(x), wide(one).defined(x.double()), least=1.0)
    for dtype in DTYPES[1:]:
        narrow = Projection.of(weight.to(dtype), added, scale, gated, torch.float32)
        same = Projection.of(weight.to(dtype).float(), added, scale, gated, torch.float32)
        assert torch.equal(narrow(x), same(x)), f"{dtype} weights are not what they say"
        assert torch.equal(replace(narrow, dtype=dtype)(x), narrow(x).to(dtype)), f"rounding to {dtype}"
        assert torch.equal(narrow(x.to(dtype)), narrow(x.to(dtype).float())), f"rows in {dtype}"


def wide(one: Projection) -> Projection:
    norm = one.norm and replace(one.norm, weight=one.norm.weight.double())
    return replace(one, panels=one.panels.double(), norm=norm)


def check_rows_alone(outputs: int, inputs: int, gated: bool, dtype: torch.dtype, counts: Sequence[int]) -> None:
    """Each row's bits are its own."""
    g = draw(outputs)
    one = Projection.of(torch.randn(outputs, inputs, generator=g).to(dtype), None, None, gated)
    x = torch.randn(200, inputs, generator=g)
    whole = one(x)
    for count in counts:
        for start in (0, 3, 50, 200 - count):
            assert torch.equal(one(x[start : start + count]), whole[start : start + count]), (count, start)


def check_norm(size: int, rows: int, layer: bool) -> None:
    g = draw(size)
    x, norm = torch.randn(rows, size, generator=g) * 3 + 1, NormWeight(torch.randn(size, generator=g), 1e-6, layer)
    close(norm(x), replace(norm, weight=norm.weight.double()).defined(x.double()))
    assert torch.equal(norm(x)[-1:], norm(x[-1:]))
    for dtype in DTYPES[1:]:
        assert torch.equal(norm(x.to(dtype)), norm(x.to(dtype).float()).to(dtype))


def spec_of(heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> ModelSpec:
    return ModelSpec(
        vocab_size=1, hidden_size=1, intermediate_size=1, num_layers=2, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=dim, max_position=1, dtype=dtype,
    )  # fmt: skip


def check_rotation(heads: int, kv_heads: int, dim: int, size: int, interleaved: bool, norm: str | None) -> None:
    """Queries come out turned; keys and values lie where a plain cache would have them, and nothing else is written."""
    g, tokens, blocks = draw(dim), 21, -(-40 // size)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=g)
    weights = [
        NormWeight(torch.randn(n, dim, generator=g), 1e-5, norm == "layer") if norm else None for n in (heads, kv_heads)
    ]
    one = Rotation(heads, interleaved, *weights)
    positions, frequencies = torch.randint(0, 5000, (tokens,), generator=g), torch.rand(dim // 2, generator=g)
    cos, sin = native.rope_table(positions, frequencies, interleaved, 1.25)
    angle = positions[:, None] * frequencies
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    close(cos, 1.25 * angle.double().cos(), 1e-6)
    close(sin, 1.25 * angle.double().sin(), 1e-6)
    cache = KVCache(spec_of(heads, kv_heads, dim), kv_heads, blocks, size, native_layout=True)
    plain = torch.randn(2, 2, blocks, size, kv_heads, dim, generator=g)
    cache.put(plain[0], plain[1])
    slots = torch.randperm(blocks * size, generator=g)[:tokens]
    q = one(qkv, cos, sin, slots, cache.keys[1], cache.values[1])
    doubled = Rotation(heads, interleaved, *(w and replace(w, weight=w.weight.double()) for w in weights))
    want_q, want_k, want_v = doubled.defined(qkv.double(), cos.double(), sin.double(), kv_heads)
    close(q, want_q)
    want = plain.double()
    want[0, 1].flatten(0, 1)[slots], want[1, 1].flatten(0, 1)[slots] = want_k, want_v
    close(cache.keys, native.lay_out_keys(want[0]))
    close(cache.values, native.lay_out_values(want[1]))
    assert torch.equal(cache.keys[0], native.lay_out_keys(plain[0, 0])), "another layer was written"


class Case:
    """Sequences (start, length) of one step behind a filled cache, in blocks in no order."""

    def __init__(self, shapes: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, size: int,
                 dtype: torch.dtype, seed: int = 0) -> None:  # fmt: skip
        g, needed = draw(seed), [-(-(start + length) // size) for start, length in shapes]
        order = random.Random(seed).sample(range(sum(needed) + 3), sum(needed) + 3)
        self.shapes, self.size, self.heads = shapes, size, heads
        self.tables = [[order.pop() for _ in range(n)] for n in needed]
        self.cache = KVCache(spec_of(heads, kv_heads, dim, dtype), kv_heads, sum(needed) + 3, size, native_layout=True)
        self.plain = torch.randn(2, 2, sum(needed) + 3, size, kv_heads, dim, generator=g).to(dtype)
        self.cache.put(self.plain[0], self.plain[1])
        self.q = torch.randn(sum(n for _, n in shapes), heads, dim, generator=g)

    def attend(self, window: int | None, shapes: list[tuple[int, int]], which: list[int], rows: Tensor) -> Tensor:
        step = PagedSequences(
            self.cache, [s for s, _ in shapes], [n for _, n in shapes], [self.tables[i] for i in which]
        )
        return step.attend_pages(1, rows, window).view(rows.shape)

    def whole(self, window: int | None) -> Tensor:
        return self.attend(window, self.shapes, [*range(len(self.shapes))], self.q)

    def wanted(self, window: int | None) -> Tensor:
        """In fp64, token by token."""
        rows, token = [], 0
        for (start, length), table in zip(self.shapes, self.tables, strict=True):
            keys, values = (self.plain[i, 1][table].flatten(0, 1).double() for i in (0, 1))
            for position in range(start, start + length):
                seen = slice(max(0, position + 1 - (window or position + 1)), position + 1)
                k, v = (t[seen].repeat_interleave(self.heads // t.shape[1], 1) for t in (keys, values))
                scores = torch.einsum("hd,lhd->hl", self.q[token].double(), k) * k.shape[-1] ** -0.5
                rows.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), v))
                token += 1
        return torch.stack(rows)


def check_attention(shapes: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, size: int, dtype: torch.dtype,
                    window: int | None = None, seed: int = 0) -> None:  # fmt: skip
    case = Case(shapes, heads, kv_heads, dim, size, dtype, seed)
    close(case.whole(window), case.wanted(window))


def check_any_cut(start: int, length: int, heads: int, kv_heads: int, dim: int, size: int, window: int | None,
                  chunks: Sequence[int]) -> None:  # fmt: skip
    """A row has the same bits however its prompt was cut, and beside whomever."""
    case = Case([(start, length), (70, 1), (3, 9)], heads, kv_heads, dim, size, torch.float32)
    whole = case.whole(window)
    for chunk in chunks:
        for first in range(0, length, chunk):
            count = min(chunk, length - first)
            got = case.attend(window, [(start + first, count)], [0], case.q[first : first + count])
            assert torch.equal(got, whole[first : first + count]), f"chunks of {chunk}, at {first}"


def check_all(seed: int = 0) -> None:
    """A little of everything; for builds with other flags."""
    dice = random.Random(seed)
    for _ in range(12):
        sizes = dice.choice((100, 64, 33, 960, 130)) * 2, dice.choice((64, 70, 576, 1000))
        kind = dice.random() < 0.5, dice.random() < 0.5, dice.choice((None, "rms", "layer"))
        check_product(*sizes, dice.choice((1, 2, 5, 6, 7, 40)), *kind)
    check_rows_alone(100, 700, False, torch.float32, (1, 2, 7, 31))
    check_rows_alone(100, 70, True, torch.bfloat16, (1, 5, 6, 97))
    for layer in (False, True):
        check_norm(67, 5, layer)
        check_rotation(6, 2, 80, 16, layer, "layer" if layer else "rms")
        check_rotation(3, 3, 6, 5, layer, None)
    for dtype, dim, size, window in zip(DTYPES, (64, 80, 6), (16, 32, 1), (None, 40, 3), strict=True):
        check_attention([(0, 40), (100, 1), (700, 5), (17, 1)], 6, 2, dim, size, dtype, window)
    check_any_cut(90, 60, 6, 2, 32, 16, None, (1, 7, 16))
    check_any_cut(0, 60, 3, 3, 12, 7, 20, (1, 7, 16))


if __name__ == "__main__":
    library = build.build(sys.argv[1], build.FLAGS[:-1] + tuple(sys.argv[2:]))
    torch.ops.load_library(str(library))
    native.load = lambda: None  # type: ignore[attr-defined]
    check_all()
    print("all close")
