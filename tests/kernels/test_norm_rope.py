"""Norms and rotary embedding against their formulas in fp64, and scaled frequencies against `transformers`."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stepladder.kernels.norm import layer_norm, rms_norm
from stepladder.kernels.rope import RopeScaling, rope_frequencies, rope_table, rotate


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
def test_rms_norm(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weight, eps = torch.randn(3, 5, 24).to(dtype), torch.randn(24).to(dtype), 1e-3
    wide, w = x.double(), weight.double()
    want = torch.stack([row / math.sqrt(float((row**2).sum()) / 24 + eps) * w for row in wide.view(-1, 24)])
    got = rms_norm(x, weight, eps)
    assert got.dtype == dtype and got.shape == x.shape
    torch.testing.assert_close(got.double(), want.view(3, 5, 24), rtol=tolerance, atol=tolerance)


def test_rms_norm_of_half_precision_does_not_overflow() -> None:
    """The statistics are fp32: 300^2 is beyond float16."""
    x = torch.full((1, 8), 300.0, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-6), torch.ones_like(x))


@pytest.mark.parametrize("weight_shape", [(24,), (5, 24)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
def test_layer_norm(dtype: torch.dtype, tolerance: float, weight_shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight, eps = (torch.randn(3, 5, 24) + 2).to(dtype), torch.randn(weight_shape).to(dtype), 1e-3
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    want = weight.double() * centred / ((centred**2).mean(-1, keepdim=True) + eps).sqrt()
    got = layer_norm(x, weight, eps)
    assert got.dtype == dtype and got.shape == x.shape
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_multiplication_by_a_complex_number(interleaved: bool) -> None:
    """(x_i, x_{i + d/2}), or (x_2i, x_{2i + 1}), is turned by position * theta^(-2i/d)."""
    torch.manual_seed(0)
    d, theta, positions = 12, 5000.0, torch.tensor([0, 1, 7, 250, 3])
    x = torch.randn(5, 3, d, dtype=torch.float64)
    frequencies = rope_frequencies(d, theta, torch.device("cpu")).double()
    cos, sin = rope_table(positions, frequencies, torch.float64, interleaved)
    assert cos.shape == sin.shape == (5, 1, d)
    z = torch.complex(x[..., ::2], x[..., 1::2]) if interleaved else torch.complex(x[..., : d // 2], x[..., d // 2 :])
    frequency = torch.tensor([theta ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)
    turned = z * torch.exp(1j * positions[:, None, None] * frequency)
    want = torch.view_as_real(turned).flatten(-2) if interleaved else torch.cat((turned.real, turned.imag), dim=-1)
    got = rotate(x, cos, sin, interleaved)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)  # frequencies are fp32: 250 * 2^-24
    torch.testing.assert_close(got[0], x[0], rtol=0, atol=0)


@pytest.mark.parametrize("scaling", [RopeScaling(kind="linear", factor=4.0), RopeScaling(kind="llama3", factor=8.0)])
def test_scaled_frequencies_equal_transformers(scaling: RopeScaling) -> None:
    """Llama 3.1's own numbers: all three regions occur."""
    rope = {"rope_type": scaling.kind, "rope_theta": 5e5, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=1024, num_attention_heads=8, rope_parameters=rope)
    want, attention_factor = ROPE_INIT_FUNCTIONS[scaling.kind](config)
    got = rope_frequencies(128, 5e5, torch.device("cpu"), scaling)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    plain = rope_frequencies(128, 5e5, torch.device("cpu"))
    assert attention_factor == 1.0 and len(set((plain / got).tolist())) > (2 if scaling.kind == "llama3" else 0)


def test_frequencies_equal_the_formula() -> None:
    got = rope_frequencies(64, 10000.0, torch.device("cpu"))
    want = torch.tensor([10000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_scores_depend_on_the_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)
    frequencies = rope_frequencies(16, 10000.0, torch.device("cpu")).double()

    def score(at: int, other: int) -> float:
        turned = [
            rotate(x, *rope_table(torch.tensor([p]), frequencies, torch.float64)) for x, p in ((q, at), (k, other))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-12)
    assert score(5, 2) != pytest.approx(score(6, 2), abs=1e-3)
