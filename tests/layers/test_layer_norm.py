"""LayerNorm: values against its formula, statistics in float32, dtype of the result."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fastlm.layers import LayerNorm
from tests.support.tolerance import assert_close_to_reference


def test_formula_and_gradients():
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    norm = LayerNorm(12, 1e-3, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight + norm.bias
    assert_close(norm(x), expected)
    assert torch.autograd.gradcheck(norm, (x,))


def test_has_the_names_and_the_values_of_torch():
    ours, theirs = LayerNorm(24), nn.LayerNorm(24)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 24)
    assert torch.equal(ours(x), theirs(x))
    assert ours.eps == theirs.eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_float32(dtype):
    """Squares overflow float16, and the mean of numbers near 300 has no digits left in bfloat16."""
    x = (300 + torch.randn(2, 4096)).to(dtype)
    norm = LayerNorm(4096, dtype=dtype)
    exact = nn.functional.layer_norm(x.double(), (4096,))
    assert_close_to_reference("y", norm(x), exact)


def test_a_float32_stream_is_rounded_once_to_the_dtype_of_the_next_product():
    x = torch.randn(6, 40)
    assert LayerNorm(40)(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert LayerNorm(40)(x).dtype == torch.bfloat16
    norm = LayerNorm(40, dtype=torch.bfloat16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    y = norm(x)
    assert y.dtype == torch.bfloat16
    exact = nn.functional.layer_norm(x.double(), (40,), norm.weight.double(), norm.bias.double())
    assert_close_to_reference("y", y, exact)


def test_no_rows():
    norm = LayerNorm(8)
    x = torch.zeros(0, 8, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.shape == (0, 8)
    assert (norm.weight.grad == 0).all()


def test_can_be_made_on_meta_and_filled_later():
    norm = LayerNorm(8, device="meta").to_empty(device="cpu")
    norm.reset_parameters()
    assert (norm.weight == 1).all()
    assert (norm.bias == 0).all()
    assert repr(norm) == "LayerNorm(8, eps=1e-05)"
