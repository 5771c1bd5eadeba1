"""Packed linear layers equal plain ones, and rows round alike in any batch."""

import pytest
import torch
import torch.nn.functional as F

from stepladder.kernels.linear import can_pack, invariant_linear, linear, pack

SHAPES = [(64, 96), (768, 1024), (2048, 256), (96, 67)]
ROWS = [1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 33, 64, 100, 128, 255]


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if not can_pack(torch.empty(1, 1, dtype=request.param)):
        pytest.skip(f"oneDNN packs no {request.param} weights on this machine")
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_equals_plain(shape: tuple[int, int], with_bias: bool, dtype: torch.dtype) -> None:
    columns, rows = shape
    weight, x = torch.randn(rows, columns).to(dtype), torch.randn(33, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if with_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    for result in (linear(x, pack(weight), bias), linear(x, weight, bias)):
        assert (result.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_round_alike_in_any_batch(shape: tuple[int, int], threads: int, dtype: torch.dtype) -> None:
    columns, rows = shape
    weight, x = pack(torch.randn(rows, columns).to(dtype)), torch.randn(256, columns).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = invariant_linear(x, weight)
        for count in ROWS:
            for start in (0, 1, 101):
                part = invariant_linear(x[start : start + count], weight)
                assert torch.equal(part, whole[start : start + count]), (count, start)
    finally:
        torch.set_num_threads(before)


def test_other_dtypes_and_devices_are_not_packed() -> None:
    assert not can_pack(torch.empty(1, 1, dtype=torch.float64))
    assert not can_pack(torch.empty(1, 1, device="meta"))
