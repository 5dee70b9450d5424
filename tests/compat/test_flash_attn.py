"""`fastlm.compat.flash_attn`: the other project's options against plain attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fastlm import layers, reference
from fastlm.compat.flash_attn import (
    apply_rotary_emb,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
)

OPTIONS = [
    {},
    {"causal": True},
    {"causal": True, "window_size": (2, 5)},
    {"window_size": (1, 2)},
    {"window_size": torch.tensor([3, 0])},
    {"window_size": (-7, 1)},
    {"softcap": 1.5, "causal": True},
    {"softcap": -1.0, "softmax_scale": 0.3},
    {"deterministic": True},
]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def plain(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The definition; `options` in flash-attn's words."""
    left, right = (max(int(bound), -1) for bound in options.get("window_size", (-1, -1)))
    out, lse = reference.sliding_window_attention(
        q,
        k,
        v,
        window_size=(left, right),
        causal=options.get("causal", False),
        softmax_scale=options.get("softmax_scale"),
        softcap=max(options.get("softcap", 0.0), 0.0),
        return_lse=True,
    )
    return out, lse


def assert_same_with_gradients(out: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    assert_close(out, expected)
    weights = torch.randn_like(out)
    got = torch.autograd.grad((out * weights).sum(), inputs)
    want = torch.autograd.grad((expected * weights).sum(), inputs)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w)


# ---- Equal lengths


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_separate_tensors(options):
    q, k, v = leaf(2, 5, 4, 8), leaf(2, 7, 2, 8), leaf(2, 7, 2, 8)
    out, lse, probs = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    expected, expected_lse = plain(q, k, v, **options)
    assert_same_with_gradients(out, expected, [q, k, v])
    assert_close(lse, expected_lse)
    assert probs is None
    assert_close(flash_attn_func(q, k, v, **options), out, rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_tensors(options):
    q, kv, qkv = leaf(2, 5, 4, 8), leaf(2, 7, 2, 2, 8), leaf(2, 6, 3, 4, 8)
    out, lse, _ = flash_attn_kvpacked_func(q, kv, **options, return_attn_probs=True)
    expected, expected_lse = plain(q, *kv.unbind(2), **options)
    assert_same_with_gradients(out, expected, [q, kv])
    assert_close(lse, expected_lse)
    out, lse, _ = flash_attn_qkvpacked_func(qkv, **options, return_attn_probs=True)
    expected, expected_lse = plain(*qkv.unbind(2), **options)
    assert_same_with_gradients(out, expected, [qkv])
    assert_close(lse, expected_lse)


def test_options_by_position_are_in_the_original_order():
    q, k, v = leaf(1, 4, 2, 8), leaf(1, 4, 2, 8), leaf(1, 4, 2, 8)
    out, lse, _ = flash_attn_func(q, k, v, 0.0, 0.2, True, (1, 0), 3.0, None, True, True)
    expected, expected_lse = plain(q, k, v, softmax_scale=0.2, causal=True, window_size=(1, 0), softcap=3.0)
    assert_close(out, expected)
    assert_close(lse, expected_lse)


def test_a_row_without_keys_is_zero():
    q, k, v = leaf(1, 5, 1, 4), leaf(1, 2, 1, 4), leaf(1, 2, 1, 4)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert_close(out[:, :3], torch.zeros(1, 3, 1, 4, dtype=torch.float64))
    assert bool(torch.isneginf(lse[..., :3]).all())


def test_gradients_flow_through_lse():
    q, k, v = leaf(1, 3, 2, 4), leaf(1, 3, 2, 4), leaf(1, 3, 2, 4)
    lse = flash_attn_func(q, k, v, return_attn_probs=True)[1]
    got, want = (torch.autograd.grad(t.square().sum(), [q, k]) for t in (lse, plain(q, k, v)[1]))
    assert_close(got, want)


# ---- Packed sequences

BOUNDS_Q, BOUNDS_K = (
    torch.tensor([0, 3, 3, 7], dtype=torch.int32),
    torch.tensor([0, 5, 6, 9], dtype=torch.int32),
)


def plain_varlen(q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor, **options) -> Tensor:
    outs = []
    for s in range(len(bounds_q) - 1):
        queries, keys = (slice(int(b[s]), int(b[s + 1])) for b in (bounds_q, bounds_k))
        outs.append(plain(q[None, queries], k[None, keys], v[None, keys], **options)[0][0])
    return torch.cat(outs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_sequences(options):
    q, k, v, kv, qkv = leaf(7, 4, 8), leaf(9, 2, 8), leaf(9, 2, 8), leaf(9, 2, 2, 8), leaf(7, 3, 4, 8)
    bounds = (BOUNDS_Q, BOUNDS_K)
    out = flash_attn_varlen_func(q, k, v, *bounds, 4, 5, **options)
    assert_same_with_gradients(out, plain_varlen(q, k, v, *bounds, **options), [q, k, v])
    out = flash_attn_varlen_kvpacked_func(q, kv, *bounds, 10, 10, **options)
    assert_same_with_gradients(out, plain_varlen(q, *kv.unbind(1), *bounds, **options), [q, kv])
    out = flash_attn_varlen_qkvpacked_func(qkv, BOUNDS_Q, 4, **options)
    assert_same_with_gradients(out, plain_varlen(*qkv.unbind(1), BOUNDS_Q, BOUNDS_Q, **options), [qkv])


def test_lse_of_packed_sequences_is_heads_first():
    q, k, v = leaf(7, 4, 8), leaf(9, 2, 8), leaf(9, 2, 8)
    _, lse, probs = flash_attn_varlen_func(q, k, v, BOUNDS_Q, BOUNDS_K, 4, 5, return_attn_probs=True)
    assert probs is None
    assert lse.shape == (4, 7)
    assert_close(lse[:, 3:], plain(q[None, 3:], k[None, 6:], v[None, 6:])[1][0])


def test_pages_equal_the_keys_in_them():
    q, k, v = leaf(7, 4, 8), leaf(9, 2, 8), leaf(9, 2, 8)
    # Sequences of 5, 1 and 3 keys in pages of 2; the rest of the pages and of the table must not be read.
    table = torch.tensor([[4, 0, 2], [3, 999, -5], [6, 1, 999]], dtype=torch.int32)
    pages_k, pages_v = (torch.full((8, 2, 2, 8), torch.nan, dtype=torch.float64) for _ in range(2))
    at = [(4, 0), (4, 1), (0, 0), (0, 1), (2, 0), (3, 0), (6, 0), (6, 1), (1, 0)]
    for n, (page, place) in enumerate(at):
        pages_k[page, place], pages_v[page, place] = k[n].detach(), v[n].detach()
    pages_k.requires_grad_()
    out = flash_attn_varlen_func(
        q, pages_k, pages_v, BOUNDS_Q, BOUNDS_K, 4, 5, causal=True, block_table=table
    )
    expected = plain_varlen(q, k, v, BOUNDS_Q, BOUNDS_K, causal=True)
    assert_close(out, expected)
    got = torch.autograd.grad(out.sum(), [pages_k])[0]
    (want,) = torch.autograd.grad(expected.sum(), [k])
    assert_close(torch.stack([got[page, place] for page, place in at]), want)


# ---- Rotary embedding


def turned(x: Tensor, angle: Tensor, *, interleaved: bool) -> Tensor:
    """`x (L, H, K)` with its first dimensions turned by `angle (L, R/2)`, as complex numbers."""
    half = angle.shape[-1]
    first, second = (
        (x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2])
        if interleaved
        else (x[..., :half], x[..., half : 2 * half])
    )
    z = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle).unsqueeze(-2)
    parts = (
        torch.stack((z.real, z.imag), dim=-1).flatten(-2)
        if interleaved
        else torch.cat((z.real, z.imag), dim=-1)
    )
    return torch.cat((parts, x[..., 2 * half :]), dim=-1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [4, 8])
def test_rotary_equals_multiplication_by_a_phase(interleaved, width):
    x, angle = leaf(2, 3, 2, 8), torch.rand(12, width // 2, dtype=torch.float64) * 6
    offsets = torch.tensor([4, 9], dtype=torch.int32)
    out = apply_rotary_emb(x, angle.cos(), angle.sin(), interleaved, seqlen_offsets=offsets)
    expected = torch.stack(
        [turned(x[b], angle[o : o + 3], interleaved=interleaved) for b, o in enumerate(offsets.tolist())]
    )
    assert_same_with_gradients(out, expected, [x])
    packed = apply_rotary_emb(
        x.flatten(0, 1),
        angle.cos(),
        angle.sin(),
        interleaved,
        seqlen_offsets=offsets,
        cu_seqlens=torch.tensor([0, 3, 6]),
        max_seqlen=3,
    )
    assert_close(packed.view_as(x), out, rtol=0, atol=0)


def test_rotary_equals_the_layer_and_writes_in_place():
    x, angle = torch.randn(2, 5, 3, 8), torch.rand(9, 4)
    cos, sin = angle.cos(), angle.sin()
    expected = layers.apply_rotary(x, cos[2:7], sin[2:7])
    assert_close(apply_rotary_emb(x, cos, sin, seqlen_offsets=2), expected)
    half = x.bfloat16()
    assert apply_rotary_emb(half, cos, sin, seqlen_offsets=2).dtype == torch.bfloat16
    assert apply_rotary_emb(x, cos, sin, inplace=True, seqlen_offsets=2) is x
    assert_close(x, expected)


# ---- Padding


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_padding_is_dropped_and_put_back(dtype):
    x = leaf(3, 4, 2, 5)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]]).to(dtype)
    packed, indices, bounds, longest, used = unpad_input(x, mask)
    assert_close(packed, x[mask.bool()])
    assert indices.tolist() == [0, 1, 8, 10, 11]
    assert bounds.tolist() == [0, 2, 2, 5]
    assert bounds.dtype == used.dtype == torch.int32
    assert longest == 3
    assert used.tolist() == [2, 0, 3]
    padded = pad_input(packed, indices, 3, 4)
    assert_same_with_gradients(padded, x * mask.bool()[..., None, None], [x])


def test_unused_tokens_keep_their_room():
    x = torch.randn(2, 3, 4)
    mask, unused = torch.tensor([[1, 0, 0], [1, 1, 0]]), torch.tensor([[0, 1, 0], [0, 1, 1]])
    packed, indices, bounds, longest, used = unpad_input(x, mask, unused)
    assert indices.tolist() == [0, 1, 3, 4, 5]
    assert (bounds.tolist(), longest, used.tolist()) == ([0, 2, 5], 3, [1, 2])
    assert_close(packed, x.flatten(0, 1)[indices])


def test_rows_are_picked_and_put_with_gradients():
    x, indices = leaf(6, 2, 3), torch.tensor([5, 0, 3])
    assert_same_with_gradients(index_first_axis(x, indices), x[indices], [x])
    values = leaf(3, 2, 3)
    out = index_put_first_axis(values, indices, 6)
    expected = torch.zeros(6, 2, 3, dtype=torch.float64).index_put((indices,), values)
    assert_same_with_gradients(out, expected, [values])


# ---- Errors

X, T = torch.randn(1, 4, 2, 8), torch.randn(4, 2, 8)
B = torch.tensor([0, 4], dtype=torch.int32)
TABLE = torch.zeros(1, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    "option", [{"dropout_p": 0.1}, {"alibi_slopes": torch.ones(2)}], ids=["dropout", "alibi"]
)
@pytest.mark.parametrize(
    ("function", "args"),
    [
        (flash_attn_func, (X, X, X)),
        (flash_attn_kvpacked_func, (X, torch.stack((X, X), 2))),
        (flash_attn_qkvpacked_func, (torch.stack((X, X, X), 2),)),
        (flash_attn_varlen_func, (T, T, T, B, B, 4, 4)),
        (flash_attn_varlen_kvpacked_func, (T, torch.stack((T, T), 1), B, B, 4, 4)),
        (flash_attn_varlen_qkvpacked_func, (torch.stack((T, T, T), 1), B, 4)),
    ],
)
def test_what_cannot_be_done_is_said(function, args, option):
    ((name, _),) = option.items()
    expected = "must be 0, got 0.1" if name == "dropout_p" else r"must be None, got a tensor of shape \(2,\)"
    with pytest.raises(NotImplementedError, match=rf"{function.__name__}: {name} {expected}"):
        function(*args, **option)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: flash_attn_func(X, X, X, window_size=(1, 2, 3)),
            ValueError,
            r"window_size must be \(left, right\), got 3",
        ),
        (lambda: flash_attn_func(X, X[:, :3], X), ValueError, "v must have shape"),
        (
            lambda: flash_attn_qkvpacked_func(torch.randn(1, 4, 2, 2, 8)),
            ValueError,
            r"qkv must have 5 dimensions and 3 tensors in dimension 2, got shape \(1, 4, 2, 2, 8\)",
        ),
        (
            lambda: flash_attn_kvpacked_func(X, X),
            ValueError,
            "kv must have 5 dimensions and 2 tensors in dimension 2",
        ),
        (
            lambda: flash_attn_varlen_func(T, T, T, B, B, 3, 4),
            ValueError,
            "max_seqlen_q must be at least .* 4, got 3",
        ),
        (
            lambda: flash_attn_varlen_func(T, T, T, B, B, 4, 4, block_table=TABLE),
            ValueError,
            r"k must have shape \(pages, page_size, Hkv, K\) when block_table is given, got \(4, 2, 8\)",
        ),
        (
            lambda: flash_attn_varlen_func(
                T, X, X, B, B, 4, 4, block_table=torch.zeros(2, 1, dtype=torch.int32)
            ),
            ValueError,
            r"block_table must have shape \(1, M\), got \(2, 1\)",
        ),
        (
            lambda: flash_attn_varlen_func(T, X[:, :3], X[:, :3], B, B, 4, 4, block_table=TABLE),
            ValueError,
            "block_table must have at least 2 columns for 4 tokens in pages of 3, got 1",
        ),
        (
            lambda: flash_attn_varlen_func(T, X, X, B, B, 4, 4, block_table=TABLE + 7),
            IndexError,
            "block_table must name pages below 1, got 7",
        ),
        (
            lambda: apply_rotary_emb(T, X[0, :, 0], X[0, :, 0]),
            ValueError,
            r"x must have shape \(B, L, H, K\)",
        ),
        (
            lambda: apply_rotary_emb(X, T, T),
            ValueError,
            r"rotary_cos must have shape \(P, R/2\) with R at most 8",
        ),
        (
            lambda: apply_rotary_emb(X, T[:, 0, :4], T[:, 0, :3]),
            ValueError,
            r"rotary_sin must have shape \(4, 4\)",
        ),
        (
            lambda: apply_rotary_emb(X, T[:, 0, :4], T[:, 0, :4], seqlen_offsets=1),
            IndexError,
            "positions must lie in the 4 rows of rotary_cos, got 1 to 4",
        ),
        (
            lambda: apply_rotary_emb(T, T[:, 0, :4], T[:, 0, :4], cu_seqlens=torch.tensor([0, 3])),
            ValueError,
            "cu_seqlens must end with 4, got 3",
        ),
        (
            lambda: unpad_input(X, torch.ones(1, 3)),
            ValueError,
            r"attention_mask must have shape \(1, 4\), got \(1, 3\)",
        ),
    ],
)
def test_wrong_input_raises(call, error, text):
    with pytest.raises(error, match=text):
        call()
