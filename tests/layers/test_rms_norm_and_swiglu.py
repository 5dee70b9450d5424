"""The two small layers: values against their formulas, dtypes, parameter names."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from fastlm.layers import RMSNorm, SwiGLU


def test_rms_norm_formula_and_gradients():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(12, 1e-3, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight)
    assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_statistics_are_float32(dtype):
    x = torch.full(
        (1, 4096), 300.0, dtype=dtype
    )  # squares overflow float16, their sum loses bits in bfloat16
    norm = RMSNorm(4096, dtype=dtype)
    assert_close(norm(x), torch.ones_like(x))


def test_rms_norm_answers_in_the_dtype_of_the_next_product():
    x = torch.randn(2, 8)
    assert RMSNorm(8)(x).dtype == torch.float32
    assert RMSNorm(8, dtype=torch.bfloat16)(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert RMSNorm(8)(x).dtype == torch.bfloat16


def test_swiglu_formula_and_names():
    torch.manual_seed(0)
    mlp = SwiGLU(6, 10)
    assert {name: tuple(p.shape) for name, p in mlp.named_parameters()} == {
        "w1.weight": (10, 6),
        "w2.weight": (10, 6),
        "w3.weight": (6, 10),
    }
    x = torch.randn(2, 3, 6)
    gate, value = x @ mlp.w1.weight.T, x @ mlp.w2.weight.T
    assert_close(mlp(x), (functional.silu(gate) * value) @ mlp.w3.weight.T)


@pytest.mark.parametrize("layer", [RMSNorm(8, device="meta"), SwiGLU(8, 12, device="meta")])
def test_layers_can_be_made_on_meta_and_filled_later(layer):
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
