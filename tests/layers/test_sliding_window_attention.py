"""The attention layer: against masked softmax attention, window limits, packing, rings."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from fastlm.layers import RingPlan, RotaryTable, SlidingWindowAttention, apply_rotary, split_packed_qkv


def make(window: int = 4, kv_heads: int = 2, rope_theta: float | None = 10000.0) -> SlidingWindowAttention:
    torch.manual_seed(0)
    return SlidingWindowAttention(
        24, 4, kv_heads, head_dim=8, sliding_window=window, rope_theta=rope_theta, dtype=torch.float64
    )


def masked_attention(attn: SlidingWindowAttention, h: Tensor) -> Tensor:
    """The layer with PyTorch's attention and an explicit mask."""
    length = h.shape[1]
    q, k, v = (
        (h @ linear.weight.T).unflatten(-1, (-1, attn.head_dim))
        for linear in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    if attn.rotary is not None:
        cos, sin = RotaryTable(attn.head_dim, attn.rotary.theta).span(0, length, dtype=h.dtype)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    visible = (j <= i) & (j > i - attn.sliding_window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    return out.transpose(1, 2).flatten(-2) @ attn.o_proj.weight.T


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 3, 11, 50])
@pytest.mark.parametrize("theta", [10000.0, None])
def test_forward_and_gradients_equal_masked_attention(kv_heads, window, theta):
    attn = make(window, kv_heads, theta)
    h = torch.randn(2, 11, 24, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 11, 24, dtype=torch.float64)
    inputs = [h, *attn.parameters()]
    out, expected = attn(h), masked_attention(attn, h)
    assert_close(out, expected)
    got = torch.autograd.grad((out * weights).sum(), inputs)
    want = torch.autograd.grad((expected * weights).sum(), inputs, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        assert_close(g, torch.zeros_like(g) if w is None else w)


def test_a_token_beyond_the_window_changes_nothing():
    attn = make(window=4)
    h = torch.randn(1, 12, 24, dtype=torch.float64)
    out = attn(h)
    changed = h.clone()
    changed[:, 3] += 1.0
    other = attn(changed)
    assert torch.equal(out[:, :3], other[:, :3])
    assert torch.equal(out[:, 7:], other[:, 7:])  # 3 is the last position that 6 = 3 + W - 1 sees
    assert (out[:, 6] != other[:, 6]).any()


def test_packed_sequences_equal_separate_ones():
    attn = make()
    h = torch.randn(1, 14, 24, dtype=torch.float64)
    bounds = [0, 5, 5, 6, 14]
    packed = attn(h, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    alone = [attn(h[:, a:b]) for a, b in itertools.pairwise(bounds) if b > a]
    assert_close(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize("pieces", [[1] * 14, [5, 1, 8], [2, 12], [3, 4, 1, 6], [14]])
@pytest.mark.parametrize("extra_slots", [0, 3])
def test_pieces_over_a_ring_equal_one_pass(pieces, extra_slots):
    attn = make(window=4)
    h = torch.randn(2, 14, 24, dtype=torch.float64)
    whole = attn(h)
    ring = attn.new_ring(2, step_tokens=1 + extra_slots)
    ring.k.fill_(float("nan"))  # unfilled slots must not be read
    ring.v.fill_(float("nan"))
    got, p = [], 0
    for m in pieces:
        plan = RingPlan.build([p, p], [m, m], window=4, slots=ring.k.shape[1], device=h.device)
        cos, sin = attn.rotary.span(p, p + m, dtype=h.dtype)
        with torch.no_grad():
            got.append(attn(h[:, p : p + m], ring, plan, rotary=(cos, sin)))
        p += m
    assert_close(torch.cat(got, dim=1), whole)


def test_rows_of_a_ring_may_be_at_different_positions():
    attn = make(window=4)
    h = torch.randn(2, 16, 24, dtype=torch.float64)
    whole = attn(h)
    starts, lengths = [7, 2], [3, 5]
    ring = attn.new_ring(2)
    with torch.no_grad():
        for row, start in enumerate(starts):
            plan = RingPlan.build([0], [start], window=4, slots=4, device=h.device)
            own = type(ring)(ring.k[row : row + 1], ring.v[row : row + 1])
            attn(h[row : row + 1, :start], own, plan)
        plan = RingPlan.build(starts, lengths, window=4, slots=4, device=h.device)
        new = torch.cat([h[r, s : s + m] for r, (s, m) in enumerate(zip(starts, lengths, strict=True))])[None]
        places = torch.cat([torch.arange(s, s + m) for s, m in zip(starts, lengths, strict=True)])
        out = attn(new, ring, plan, rotary=attn.rotary.at(places[None], dtype=h.dtype))
    assert_close(out[0, :3], whole[0, 7:10])
    assert_close(out[0, 3:], whole[1, 2:7])


def test_steps_of_one_and_of_several_tokens_equal_one_pass():
    attn = make(window=5)
    h = torch.randn(2, 17, 24, dtype=torch.float64)
    whole = attn(h)
    tables = attn.rotary.span(0, 17, dtype=h.dtype)
    for m in (1, 3):
        ring = attn.new_ring(2, step_tokens=m)
        positions = torch.zeros(2, dtype=torch.int32)
        got = []
        for piece in h[:, : 17 // m * m].split(m, dim=1):
            got.append(attn.step(piece, ring, positions, rotary=tables))
            positions += m
        out = torch.cat(got, dim=1)
        assert_close(out, whole[:, : out.shape[1]])


def test_packed_weights_of_the_public_code_are_split_by_group():
    torch.manual_seed(0)
    heads, kv_heads, head_dim, width = 6, 2, 3, 5
    packed = torch.randn((heads + 2 * kv_heads) * head_dim, width)
    q, k, v = split_packed_qkv(packed, heads, kv_heads)
    h = torch.randn(4, width)
    groups = (h @ packed.T).view(4, kv_heads, heads // kv_heads + 2, head_dim)
    assert_close((h @ q.T).view(4, heads, head_dim), groups[:, :, :-2].flatten(1, 2))
    assert_close((h @ k.T).view(4, kv_heads, head_dim), groups[:, :, -2])
    assert_close((h @ v.T).view(4, kv_heads, head_dim), groups[:, :, -1])
    with pytest.raises(ValueError, match="multiple of 10 rows, got 29"):
        split_packed_qkv(packed[:-1], heads, kv_heads)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((24, 4, 3), "num_key_value_heads must divide num_attention_heads = 4, got 3"),
        ((25, 4), "num_attention_heads must divide hidden_size = 25, got 4"),
    ],
)
def test_heads_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindowAttention(*arguments)


def test_window_must_hold_the_token_itself():
    with pytest.raises(ValueError, match="sliding_window must be at least 1, got 0"):
        SlidingWindowAttention(24, 4, sliding_window=0)
