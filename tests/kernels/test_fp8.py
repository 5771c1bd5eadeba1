"""FP8 rows against torch's cast with the scales written out, and against e4m3's own table of numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepladder.kernels.fp8 import dequantise, num_scales, quantise

FP32 = torch.finfo(torch.float32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def written_out(row: Tensor) -> tuple[list[int], list[float], list[float]]:
    """Codes as bytes, scales and values of one row, group by group with torch's own cast."""
    wide = row.double() if row.dtype == torch.float64 else row.float()
    codes: list[int] = []
    scales, values = [], []
    for start in range(0, len(row), 128):
        group = wide[start : start + 128]
        scale = max(group.abs().max() / 448, torch.tensor(FP32.tiny)).float().to(wide.dtype)
        code = torch.minimum(torch.maximum(group / scale, torch.tensor(-448.0)), torch.tensor(448.0))
        code = code.to(torch.float8_e4m3fn)
        codes += code.view(torch.uint8).tolist()
        scales.append(scale.item())
        values += (code.to(wide.dtype) * scale).tolist()
    return codes, scales, values


def e4m3() -> Tensor:
    """All finite numbers of the format, from its definition: 4 bits of exponent with bias 7, 3 of mantissa."""
    subnormal = [m / 8 * 2**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    positive = torch.tensor(subnormal + normal, dtype=torch.float64)
    return torch.cat([-positive.flip(0), positive])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 5, 127, 128, 129, 256, 300])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_codes_scales_and_values(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    """Columns of very different sizes, and one row of zeros."""
    draw = torch.Generator().manual_seed(hidden)
    x = torch.randn(tokens, hidden, generator=draw) * torch.exp(2 * torch.randn(hidden, generator=draw))
    x[tokens // 2 :][:1] = 0
    x = x.to(dtype)
    codes, scales = quantise(x)
    assert codes.shape == x.shape and codes.dtype == torch.float8_e4m3fn and codes.is_contiguous()
    assert scales.shape == (tokens, num_scales(hidden)) and scales.dtype == torch.float32
    values = dequantise(codes, scales, dtype)
    assert values.shape == x.shape and values.dtype == dtype
    for index, row in enumerate(x):
        want = written_out(row)
        assert codes[index].view(torch.uint8).tolist() == want[0]
        assert scales[index].tolist() == want[1]
        assert torch.equal(values[index], torch.tensor(want[2], dtype=torch.float64).to(dtype))


@given(rows=st.integers(1, 200).flatmap(lambda n: st.lists(st.lists(FLOATS, min_size=n, max_size=n), max_size=3)))
@settings(max_examples=60, deadline=None)
def test_any_finite_rows(rows: list[list[float]]) -> None:
    """Nothing becomes NaN or infinite; each code is nearest to its quotient; the error is at most half a step."""
    x = torch.tensor(rows).view(len(rows), len(rows[0]) if rows else 3)
    codes, scales = quantise(x)
    values = dequantise(codes, scales, torch.float32)
    assert codes.float().isfinite().all() and (scales > 0).all() and values.isfinite().all()
    wide = scales.double().repeat_interleave(128, 1)[:, : x.shape[1]]
    quotient, got = x.double() / wide, codes.double()
    best = (quotient[..., None] - e4m3()).abs().amin(-1)
    assert ((quotient - got).abs() <= best * (1 + 1e-6) + 1e-6 * quotient.abs()).all()
    step = torch.maximum(x.double().abs() * 2**-4, wide * 2**-10)
    assert ((values.double() - x.double()).abs() <= step * (1 + 1e-6) + FP32.tiny).all()


@pytest.mark.parametrize(
    "row",
    [
        [0.0] * 200,
        [FP32.max, -FP32.max, 1.0],
        [1e-45, -1e-45, 0.0],
        [FP32.tiny, FP32.tiny / 2],
        [FP32.max] + [0.0] * 127 + [1e-45],
        [447.99997, 448.0, -448.00003],
    ],
    ids=["zeros", "huge", "tiny", "smallest normal", "both in one row", "at the largest"],
)
def test_the_ends_of_the_range(row: list[float]) -> None:
    x = torch.tensor([row])
    values = dequantise(*quantise(x), torch.float32)
    assert values.isfinite().all()
    assert torch.equal(values[0], torch.tensor(written_out(x[0])[2]))
    large = x.abs() >= x.abs().max() * 0.99
    if x.abs().max() > 1e-30:
        torch.testing.assert_close(values[large], x[large], rtol=1e-6, atol=0)
    else:
        assert values.abs().max() <= 1e-37


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_number_of_a_type_comes_back(dtype: torch.dtype) -> None:
    largest = min(torch.finfo(dtype).max, 448 * FP32.max)
    x = torch.tensor([[largest, -largest, 0.0]], dtype=dtype)
    torch.testing.assert_close(dequantise(*quantise(x), dtype), x, rtol=1e-6, atol=0)


def test_beyond_the_range_of_scales_it_saturates() -> None:
    values = dequantise(*quantise(torch.tensor([[1e300, -1e300, 1.0]], dtype=torch.float64)), torch.float64)
    assert values.tolist() == [[448 * FP32.max, -448 * FP32.max, 0.0]]


def test_a_nan_stays_visible_in_its_group_only() -> None:
    x = torch.ones(1, 256)
    x[0, 3] = torch.nan
    values = dequantise(*quantise(x), torch.float32)[0]
    assert values[:128].isnan().all() and torch.equal(values[128:], torch.ones(128))


def test_what_was_quantised_before_comes_back_unchanged() -> None:
    """Up to one rounding of the scale."""
    x = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    once = dequantise(*quantise(x), torch.float32)
    torch.testing.assert_close(dequantise(*quantise(once), torch.float32), once, rtol=3e-7, atol=0)
