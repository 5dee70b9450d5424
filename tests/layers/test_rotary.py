"""Rotary tables and rotation."""

from __future__ import annotations

import mpmath
import pytest
import torch
from torch.testing import assert_close

from fastlm.layers import RotaryTable, apply_rotary, rotary_angles


def test_rotation_is_multiplication_by_a_unit_complex_number():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    cos, sin = RotaryTable(8).span(3, 8, dtype=torch.float64)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = rotary_angles(torch.arange(3, 8), 8)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    assert_close(apply_rotary(x, cos, sin), torch.cat((turned.real, turned.imag), dim=-1))


def test_scores_depend_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    table = RotaryTable(16)

    def score(i: int, j: int) -> torch.Tensor:
        at_i, at_j = (table.span(p, p + 1, dtype=torch.float64) for p in (i, j))
        return (apply_rotary(q, *at_i) * apply_rotary(k, *at_j)).sum()

    assert_close(score(5, 2), score(1003, 1000))


def test_angles_stay_right_at_a_million_tokens():
    position, head_dim = 999_983, 64
    cos, sin = RotaryTable(head_dim).span(position, position + 1)
    float32_angle = torch.tensor(float(position)) * 10000 ** (-torch.arange(0, head_dim, 2) / head_dim)
    worst_float32 = 0.0
    with mpmath.workdps(40):
        for i in range(head_dim // 2):
            exact = position * mpmath.mpf(10000) ** (-mpmath.mpf(2 * i) / head_dim)
            assert abs(float(mpmath.cos(exact)) - cos[0, i].item()) < 2e-7
            assert abs(float(mpmath.sin(exact)) - sin[0, i].item()) < 2e-7
            worst_float32 = max(worst_float32, abs(float(mpmath.cos(exact)) - float32_angle[i].cos().item()))
    assert worst_float32 > 1e-3  # float32 angles would have failed this test


def test_spans_are_cached_and_agree_with_single_positions():
    table = RotaryTable(8)
    cos, _ = table.span(0, 20)
    again, _ = table.span(0, 100)
    assert again.data_ptr() == cos.data_ptr()  # the first span was rounded up
    far, _ = table.span(1000, 1010)
    assert_close(far, table.at(torch.arange(1000, 1010))[0])
    assert_close(table.span(0, 5)[0], cos[:5])


def test_tables_made_in_inference_mode_serve_training():
    table = RotaryTable(8)
    with torch.inference_mode():
        table.span(0, 4)
    x = torch.randn(1, 4, 1, 8, requires_grad=True)
    apply_rotary(x, *table.span(0, 4)).sum().backward()
    assert x.grad is not None


def test_fake_tensors_are_not_cached():
    from torch._subclasses.fake_tensor import FakeTensorMode

    table = RotaryTable(8)
    with FakeTensorMode():
        table.span(0, 4)
    assert type(table.span(0, 4)[0]) is torch.Tensor


def test_half_precision_is_rounded_once():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 2, 8).bfloat16()
    cos, sin = RotaryTable(8).span(0, 6)
    assert torch.equal(apply_rotary(x, cos, sin), apply_rotary(x.float(), cos, sin).bfloat16())


@pytest.mark.parametrize("head_dim", [0, 7, -2])
def test_odd_head_dim_is_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim must be a positive even number, got {head_dim}"):
        RotaryTable(head_dim)
