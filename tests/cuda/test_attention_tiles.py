"""sliding_window_attention over several tiles of queries and keys, in the types that matrix units take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlm import ops, reference
from tests.support.conformance import assert_gradients_match_reference, assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.sliding_window_attention import DEFAULTS, qkv

NAN, INF = float("nan"), float("inf")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize(
    ("head_dim", "queries", "keys", "options"),
    [
        (64, 500, 500, {"window_size": (400, 0)}),
        (128, 390, 520, {"window_size": (300, 0)}),
        (128, 300, 200, {"window_size": (40, 150), "causal": False}),
        (256, 200, 260, {"window_size": (190, 0)}),
        (72, 260, 260, {"softcap": 5.0}),
        (64, 130, 130, {"softmax_scale": -0.2, "causal": False}),
    ],
)
def test_matches_reference(head_dim, queries, keys, options, dtype):
    call = Call(qkv(Draw("tiles"), queries, keys, heads=(2, 1), head_dim=head_dim, dtype=dtype), options)
    functions = (ops.sliding_window_attention, reference.sliding_window_attention)
    assert_matches_reference(*functions, call, return_lse=True)
    assert_gradients_match_reference(*functions, call)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("row", "poison"), [(0, NAN), (130, INF), (299, -INF)])
def test_what_a_query_does_not_see_cannot_touch_it(row, poison, head_dim, dtype):
    q, k, v = qkv(Draw("apart"), 300, 400, heads=(2, 1), head_dim=head_dim, dtype=dtype)
    options = {"window_size": (170, 0), "return_lse": True}
    out, lse = ops.sliding_window_attention(q, k, v, **options)
    position = torch.arange(400)
    unseen = (position > row + 100) | (position < row + 100 - 170)
    bad = [t.clone() for t in (q, k, v)]
    bad[0][:, torch.arange(300) != row] = poison
    bad[1][:, unseen] = poison
    bad[2][:, unseen] = poison
    again, lse_again = ops.sliding_window_attention(*bad, **options)
    assert torch.equal(again[:, row], out[:, row])
    assert torch.equal(lse_again[..., row], lse[..., row])


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("at", "poison"), [(0, INF), (120, NAN), (255, -INF)])
def test_a_value_reaches_who_sees_it(at, poison, head_dim, dtype):
    q, k, v = qkv(Draw("reaches"), 256, heads=(2, 1), head_dim=head_dim, dtype=dtype)
    out = ops.sliding_window_attention(q, k, v, window_size=(60, 0))
    v[:, at, :, 5] = poison
    expected = out.clone()
    expected[:, at : at + 61, :, 5] = poison
    got = ops.sliding_window_attention(q, k, v, window_size=(60, 0))
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("at", [0, 140, 299])
def test_gradients_of_what_is_not_seen_stay_apart(at, head_dim, dtype):
    draw = Draw("gradients apart")
    q, k, v = qkv(draw, 300, heads=(2, 1), head_dim=head_dim, dtype=dtype)
    dout = draw.normal(*q.shape, dtype=dtype)
    left = 150
    options = {**DEFAULTS, "window_size": (left, 0)}
    out, lse = torch.ops.fastlm.sliding_window_attention(q, k, v, **options)

    def gradients(*changed: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.fastlm.sliding_window_attention_backward(
            changed[3], None, *changed[:3], out, lse, None, None, **options
        )

    position = torch.arange(300)
    seeing = (position >= at) & (position - at <= left)
    seen = (position <= at) & (at - position <= left)
    own = position == at
    clean = gradients(q, k, v, dout)
    for poisoned, touched in (
        ((1, 2), (seeing, own, own)),
        ((0, 3), (own, seen, seen)),
    ):
        bad = [t.clone() for t in (q, k, v, dout)]
        for i in poisoned:
            bad[i][:, at] = NAN
        for got, want, part in zip(gradients(*bad), clean, touched, strict=True):
            assert torch.equal(got[:, ~part], want[:, ~part])
            assert bool(got[:, part].isnan().all())


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_equals_separate(head_dim, dtype):
    lengths = [1, 200, 0, 127, 129, 3]
    draw = Draw("packed tiles")
    total = sum(lengths)
    q = draw.normal(total, 4, head_dim, dtype=dtype).requires_grad_()
    k, v = (draw.normal(total, 2, head_dim, dtype=dtype).requires_grad_() for _ in range(2))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    options = {"window_size": (90, 0), "return_lse": True}
    out, lse = ops.sliding_window_attention(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, **options)
    grads = torch.autograd.grad((out.square().sum(), lse.sum()), (q, k, v))
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        piece = [t[None, begin:end].detach().requires_grad_() for t in (q, k, v)]
        alone, lse_alone = ops.sliding_window_attention(*piece, **options)
        assert torch.equal(out[begin:end], alone[0])
        assert torch.equal(lse[:, begin:end], lse_alone[0])
        for got, want in zip(
            grads, torch.autograd.grad((alone.square().sum(), lse_alone.sum()), piece), strict=True
        ):
            assert torch.equal(got[begin:end], want[0])


@DTYPES
def test_later_queries_alone_give_the_same_rows(dtype):
    q, k, v = qkv(Draw("later"), 300, heads=(2, 1), head_dim=64, dtype=dtype)
    whole = ops.sliding_window_attention(q, k, v, window_size=(150, 0))
    for at in (1, 100, 257):
        assert torch.equal(ops.sliding_window_attention(q[:, at:], k, v, window_size=(150, 0)), whole[:, at:])
