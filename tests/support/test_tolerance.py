"""The tolerance rule lets through what plain PyTorch does, and nothing much worse."""

from __future__ import annotations

import pytest
import torch

from tests.support.tolerance import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def exact() -> torch.Tensor:
    return torch.randn(7, 11, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rounded_result_passes(exact, dtype):
    assert_close_to_reference("out", exact.to(dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_element_fails_and_is_named(exact, dtype):
    actual = exact.to(dtype, copy=True)
    actual[3, 5] += 1e-9 if dtype == torch.float64 else 50 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=r"dB: worst at \(3, 5\): .* relative RMS error"):
        assert_close_to_reference("dB", actual, exact)


def test_a_small_bias_everywhere_fails(exact):
    actual = exact.to(torch.bfloat16)
    biased = (exact * (1 + 2**-5)).to(torch.bfloat16)
    # The plain result has one element as bad as any of the biased ones.
    plain = actual.clone()
    worst = exact.abs().argmax()
    plain.view(-1)[worst] = biased.view(-1)[worst]
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close_to_reference("out", biased, exact, plain)


def test_the_error_of_plain_pytorch_counts_twice(exact):
    error = torch.full_like(exact, 1e-3)
    plain = (exact + error).float()
    assert_close_to_reference("out", (exact + 1.9 * error).float(), exact, plain)
    with pytest.raises(AssertionError):
        assert_close_to_reference("out", (exact + 2.2 * error).float(), exact, plain)


def test_a_zero_must_be_a_zero():
    zeros = torch.zeros(4, dtype=torch.float64)
    assert_close_to_reference("out", zeros.float(), zeros)
    with pytest.raises(AssertionError):
        assert_close_to_reference("out", torch.full((4,), 1e-9), zeros)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_must_stand_where_the_reference_has_them(exact, bad):
    actual = exact.float()
    actual[2, 2] = bad
    with pytest.raises(AssertionError, match=r"\(2, 2\)"):
        assert_close_to_reference("out", actual, exact)
    exact[2, 2] = bad
    assert_close_to_reference("out", actual, exact)
    actual[2, 2] = 0
    with pytest.raises(AssertionError, match=r"\(2, 2\)"):
        assert_close_to_reference("out", actual, exact)


def test_shape_and_dtype_are_part_of_the_result(exact):
    with pytest.raises(AssertionError, match="shape must be"):
        assert_close_to_reference("out", exact.T.float(), exact)
    with pytest.raises(AssertionError, match="dtype must be"):
        assert_close_to_reference("out", exact, exact, exact.float())
