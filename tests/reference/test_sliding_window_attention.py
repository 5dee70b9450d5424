"""The definition of sliding_window_attention against torch's attention under an explicit mask, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fastlm.reference import sliding_window_attention, sliding_window_attention_update
from tests.support import samples
from tests.support.layouts import Draw

F64 = torch.float64


@pytest.fixture
def draw() -> Draw:
    return Draw("reference-attention")


def qkv(draw, queries, keys, heads=(4, 2), head_dim=6, batch=2):
    q = draw.normal(batch, queries, heads[0], head_dim, dtype=F64)
    return q, *(draw.normal(batch, keys, heads[1], head_dim, dtype=F64) for _ in range(2))


def torch_attention(q, k, v, mask, scale=None):
    """torch's own attention; `mask (Lq, Lk)` is True where a key is seen."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("left", [-1, 0, 1, 4, 100])
@pytest.mark.parametrize(("right", "causal"), [(0, True), (-1, True), (-1, False), (2, False), (0, False)])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (4, 9), (1, 9)])
def test_equals_torch_under_the_mask(draw, left, right, causal, queries, keys):
    q, k, v = qkv(draw, queries, keys)
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for i in range(queries):
        for j in range(keys):
            distance = j - (i + keys - queries)
            mask[i, j] = (left < 0 or distance >= -left) and (right < 0 or distance <= right)
            mask[i, j] &= not causal or distance <= 0
    out = sliding_window_attention(q, k, v, window_size=(left, right), causal=causal)
    close(out, torch_attention(q, k, v, mask))


def test_a_large_window_is_causal_attention(draw):
    q, k, v = qkv(draw, 9, 9)
    causal = functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, scale=0.4, enable_gqa=True
    )
    out = sliding_window_attention(q, k, v, window_size=(8, 0), softmax_scale=0.4)
    close(out, causal.transpose(1, 2))


def test_a_window_of_one_copies_the_value(draw):
    q, k, v = qkv(draw, 9, 9, heads=(2, 2))
    close(sliding_window_attention(q, k, v, window_size=(0, 0)), v)


def test_the_window_counts_the_current_key(draw):
    """With W keys seen, key i - W is outside and key i - W + 1 inside."""
    q, k, v = qkv(draw, 9, 9)
    window = 3
    before = sliding_window_attention(q, k, v, window_size=(window - 1, 0))
    for moved, changes in ((8 - window, False), (8 - window + 1, True)):
        other = v.clone()
        other[:, moved] += 1
        after = sliding_window_attention(q, k, other, window_size=(window - 1, 0))
        assert torch.equal(after[:, 8], before[:, 8]) != changes


def test_softcap_and_lse(draw):
    q, k, v = qkv(draw, 5, 5, heads=(2, 2))
    scores = 3 * torch.tanh(torch.einsum("bihc,bjhc->bhij", q, k) * 0.7 / 3)
    scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    out, lse = sliding_window_attention(q, k, v, softmax_scale=0.7, softcap=3.0, return_lse=True)
    close(lse, scores.exp().sum(-1).log())
    close(out, torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), v))


def test_rows_that_see_nothing(draw):
    q, k, v = (t.requires_grad_() for t in qkv(draw, 9, 5))
    out, lse = sliding_window_attention(q, k, v, return_lse=True)
    assert not out[:, :4].any()
    assert (lse[..., :4] == -torch.inf).all()
    dq, dk, dv = torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), torch.ones_like(lse)])
    assert not dq[:, :4].any()
    assert dq[:, 5:].any()
    assert all(t.isfinite().all() for t in (dq, dk, dv))
    empty, lse = sliding_window_attention(q, k[:, :0], v[:, :0], return_lse=True)
    assert not empty.any()
    assert (lse == -torch.inf).all()


def test_keys_that_no_query_sees_are_not_read(draw):
    q, k, v = (t.requires_grad_() for t in qkv(draw, 3, 9))
    with torch.no_grad():
        k[:, :5], v[:, :5] = float("nan"), float("nan")
    out = sliding_window_attention(q, k, v, window_size=(1, 0))
    grads = torch.autograd.grad(out.sum(), [q, k, v])
    assert not any(t.isnan().any() for t in (out, *grads))


def test_packed_equals_separate(draw):
    bounds_q, bounds_k = [0, 2, 2, 6], [0, 5, 6, 13]
    q, k, v = (t[0] for t in qkv(draw, 6, 13, batch=1))
    out, lse = sliding_window_attention(
        q, k, v, window_size=(3, 0), return_lse=True,
        cu_seqlens_q=torch.tensor(bounds_q), cu_seqlens_k=torch.tensor(bounds_k),
    )  # fmt: skip
    assert lse.shape == (4, 6)
    for s in range(3):
        rows, keys = slice(*bounds_q[s : s + 2]), slice(*bounds_k[s : s + 2])
        alone, alone_lse = sliding_window_attention(
            q[None, rows], k[None, keys], v[None, keys], window_size=(3, 0), return_lse=True
        )
        close(out[rows], alone[0])
        close(lse[:, rows], alone_lse[0])


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("spare", [0, 2])
@pytest.mark.parametrize("rotary", [False, True])
def test_decoding_equals_the_whole_sequence(draw, new, spare, rotary):
    window, length = 4, 24
    q, k, v = qkv(draw, length, length)
    angles = draw.normal(length, 3, dtype=F64)
    tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()} if rotary else {}
    ring = window + new - 1 + spare
    k_cache = torch.full((2, ring, 2, 6), float("nan"), dtype=F64)
    v_cache = k_cache.clone()
    seen, pieces = torch.zeros(2, dtype=torch.int32), []
    for t in range(0, length, new):
        part = slice(t, t + new)
        pieces.append(
            sliding_window_attention_update(
                q[:, part], k[:, part], v[:, part], k_cache, v_cache, seen,
                window_size=(window - 1, 0), **tables,
            )
        )  # fmt: skip
        assert seen.tolist() == [t, t]
        seen += new
    if rotary:
        q, k = turned(q, angles), turned(k, angles)
    close(torch.cat(pieces, dim=1), sliding_window_attention(q, k, v, window_size=(window - 1, 0)))
    slots = [p % ring for p in range(length - ring, length)]
    close(k_cache[:, slots], k[:, -ring:])
    assert torch.equal(v_cache[:, slots], v[:, -ring:])


def turned(x, angles):
    """Rotary embedding as complex multiplication: a head's halves are real and imaginary parts."""
    half = x.shape[-1] // 2
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    y = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([y.real, y.imag], dim=-1)


def test_rows_of_a_batch_are_at_their_own_positions(draw):
    q, k, v = qkv(draw, 20, 20, batch=1)
    caches = torch.zeros(2, 3, 8, 2, 6, dtype=F64)
    starts = [0, 3, 17]
    for row, start in enumerate(starts):
        for t in range(start):
            caches[0, row, t % 8], caches[1, row, t % 8] = k[0, t], v[0, t]
    now = [torch.stack([x[0, s : s + 2] for s in starts]) for x in (q, k, v)]
    out = sliding_window_attention_update(
        *now, *caches, torch.tensor(starts, dtype=torch.int32), window_size=(6, 0)
    )
    whole = sliding_window_attention(q, k, v, window_size=(6, 0))
    for row, start in enumerate(starts):
        close(out[row], whole[0, start : start + 2])


def test_no_window_sees_what_the_ring_holds(draw):
    q, k, v = qkv(draw, 6, 6, batch=1)
    k_cache, v_cache = torch.zeros(2, 1, 4, 2, 6, dtype=F64)
    for t in range(6):
        part = slice(t, t + 1)
        out = sliding_window_attention_update(
            q[:, part], k[:, part], v[:, part], k_cache, v_cache,
            torch.tensor([t], dtype=torch.int32), window_size=(-1, 0),
        )  # fmt: skip
    close(out, sliding_window_attention(q, k, v, window_size=(3, 0))[:, 5:])


@pytest.mark.parametrize("name", ["window", "softcap", "rows_that_see_nothing", "packed_more_keys"])
def test_gradcheck(name):
    call = samples.of("sliding_window_attention", name)[0].build().to(F64).requires_grad()

    def function(*tensors):
        out, lse = sliding_window_attention(*tensors, **call.kwargs, return_lse=True)
        return out, torch.where(lse.isfinite(), lse, 0)

    assert torch.autograd.gradcheck(function, call.args, fast_mode=True)


def test_dtypes_and_errors(draw):
    q, k, v = (t.bfloat16() for t in qkv(draw, 5, 5))
    out, lse = sliding_window_attention(q, k, v, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="together"):
        sliding_window_attention(q[0], k[0], v[0], cu_seqlens_q=torch.tensor([0, 5]))
    caches = torch.zeros(2, 2, 7, 2, 6, dtype=torch.bfloat16)
    seen = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="at least 8 slots, got 7"):
        sliding_window_attention_update(q, k, v, *caches, seen, window_size=(3, 0))
    with pytest.raises(IndexError):
        sliding_window_attention_update(
            q,
            k,
            v,
            *caches,
            seen,
            window_size=(2, 0),
            rotary_cos=torch.ones(4, 3),
            rotary_sin=torch.ones(4, 3),
        )
