"""Gradients of sliding_window_attention against autograd through its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastlm import ops, reference
from tests.support import conformance, samples, strategies
from tests.support.conformance import assert_gradients_match_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.sliding_window_attention import DEFAULTS, qkv

FORWARD = samples.of("sliding_window_attention")
NAN = float("nan")


# ---- properties -----------------------------------------------------------------------------------------


@given(
    draw=strategies.draws(),
    length=strategies.sizes(2, 220),
    left=st.integers(-1, 150),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([7, 100, 160]),
    dtype=strategies.dtypes(),
    at=st.floats(0, 0.999),
)
def test_gradients_of_what_is_not_seen_stay_apart(draw, length, left, group, head_dim, dtype, at):
    """NaN at one position leaves the bits of every gradient that position has no part in."""
    q, k, v = qkv(draw, length, heads=(2 * group, 2), head_dim=head_dim, dtype=dtype)
    dout = draw.normal(*q.shape, dtype=dtype)
    at = int(at * length)
    options = {**DEFAULTS, "window_size": (left, 0)}
    out, lse = torch.ops.fastlm.sliding_window_attention(q, k, v, **options)

    def gradients() -> tuple[Tensor, ...]:
        return torch.ops.fastlm.sliding_window_attention_backward(
            dout, None, q, k, v, out, lse, None, None, **options
        )

    position = torch.arange(length)
    not_at = position != at
    not_seeing_at = (position < at) | ((position - at > left) & (left >= 0))
    not_seen_by_at = (position > at) | ((at - position > left) & (left >= 0))
    clean = gradients()
    keep_k, keep_v = k[:, at].clone(), v[:, at].clone()
    k[:, at], v[:, at] = NAN, NAN
    for got, want, apart in zip(gradients(), clean, (not_seeing_at, not_at, not_at), strict=True):
        assert torch.equal(got[:, apart], want[:, apart])
    k[:, at], v[:, at] = keep_k, keep_v
    q[:, at], dout[:, at] = NAN, NAN
    for got, want, apart in zip(gradients(), clean, (not_at, not_seen_by_at, not_seen_by_at), strict=True):
        assert torch.equal(got[:, apart], want[:, apart])


# ---- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", FORWARD, ids=str)
def test_gradients(sample, device):
    assert_gradients_match_reference(
        ops.sliding_window_attention, reference.sliding_window_attention, sample.build(device)
    )


@pytest.mark.parametrize("sample", samples.of("sliding_window_attention", "window"), ids=str)
def test_gradients_through_lse(sample, device):
    def shown(function: Any) -> Any:
        """lse -inf would make the gradient of the reference NaN."""

        def call(*args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
            out, lse = function(*args, **kwargs, return_lse=True)
            return out, torch.where(lse.isfinite(), lse, 0.0)

        return call

    assert_gradients_match_reference(
        shown(ops.sliding_window_attention), shown(reference.sliding_window_attention), sample.build(device)
    )


@pytest.mark.parametrize("only", [0, 1])
def test_a_missing_upstream_gradient_counts_as_zero(only):
    q, k, v = (t.requires_grad_() for t in qkv(Draw("missing"), 12))
    results = []
    for fn in (ops.sliding_window_attention, reference.sliding_window_attention):
        output = fn(q, k, v, window_size=(5, 0), return_lse=True)[only]
        results.append(torch.autograd.grad(output.square().sum(), (q, k, v), allow_unused=True))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want)


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (3, 0)},
        {"window_size": (2, 1), "causal": False, "softcap": 1.5},
        {"softmax_scale": -0.4},
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(options, packed):
    draw = Draw("gradcheck")
    shape = (9,) if packed else (1, 5)
    q = draw.normal(*shape, 4, 3, dtype=torch.float64)
    k, v = (draw.normal(*shape, 2, 3, dtype=torch.float64) for _ in range(2))
    bounds = torch.tensor([0, 4, 9]) if packed else None

    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return ops.sliding_window_attention(
            q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, return_lse=True, **options
        )

    inputs = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(fn, inputs, check_undefined_grad=True)


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", samples.of("sliding_window_attention_backward"), ids=str)
def test_opcheck_of_backward(sample):
    conformance.assert_opcheck(sample, with_grad=False)


# ---- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "bad", "text"),
    [
        (0, torch.zeros(1, 5, 4, 9), "dout must have shape (1, 5, 4, 8), got (1, 5, 4, 9)"),
        (0, torch.zeros(1, 5, 4, 8, dtype=torch.half), "dout must have the dtype of q, float32, got float16"),
        (1, torch.zeros(1, 4, 6), "dlse must have shape (1, 4, 5), got (1, 4, 6)"),
        (
            1,
            torch.zeros(1, 4, 5, dtype=torch.double),
            "dlse must have the dtype of lse, float32, got float64",
        ),
        (5, torch.zeros(1, 5, 4), "out must have shape (1, 5, 4, 8), got (1, 5, 4)"),
        (6, torch.zeros(1, 5, 4), "lse must have shape (1, 4, 5), got (1, 5, 4)"),
        (6, torch.zeros(1, 4, 5, dtype=torch.half), "lse must have dtype float32, got float16"),
    ],
)
def test_errors_of_backward(place, bad, text):
    q, kv = torch.zeros(1, 5, 4, 8), torch.zeros(1, 7, 2, 8)
    args = [q, torch.zeros(1, 4, 5), q, kv, kv, q, torch.zeros(1, 4, 5), None, None]
    args[place] = bad
    function = torch.ops.fastlm.sliding_window_attention_backward
    text = f"sliding_window_attention_backward: {text}"
    conformance.assert_same_error(function, Call(tuple(args), DEFAULTS), ValueError, text)
