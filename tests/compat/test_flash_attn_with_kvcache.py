"""`flash_attn_with_kvcache`: what is written into the cache, and what is seen of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fastlm import reference
from fastlm.compat.flash_attn import apply_rotary_emb, flash_attn_with_kvcache
from tests.support.tolerance import assert_close_to_reference

ROWS, ROOM, HEADS, KV_HEADS, WIDTH = 3, 12, 4, 2, 8


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def caches(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    return randn(rows, ROOM, KV_HEADS, WIDTH), randn(rows, ROOM, KV_HEADS, WIDTH)


def plain(q: Tensor, k: Tensor, v: Tensor, begins, ends, **options) -> tuple[Tensor, Tensor]:
    """Each row of `q` against its own part of the rows `k`, `v`."""
    parts = []
    for b in range(q.shape[0]):
        part = slice(int(begins[b]), int(ends[b]))
        parts.append(
            reference.sliding_window_attention(
                q[b : b + 1],
                k[b : b + 1, part],
                v[b : b + 1, part],
                window_size=options.get("window_size", (-1, -1)),
                causal=options.get("causal", False),
                softmax_scale=options.get("softmax_scale"),
                softcap=options.get("softcap", 0.0),
                return_lse=True,
            )
        )
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


OPTIONS = [
    {},
    {"causal": True},
    {"causal": True, "window_size": (3, 0), "softcap": 2.0},
    {"window_size": (2, 1), "softmax_scale": 0.2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("new", [0, 1, 3])
@pytest.mark.parametrize("queries", [1, 4])
def test_new_keys_are_written_and_seen(options, new, queries):
    q, seen = randn(ROWS, queries, HEADS, WIDTH), torch.tensor([0, 5, 9], dtype=torch.int32)
    k_cache, v_cache = caches()
    k, v = (randn(ROWS, new, KV_HEADS, WIDTH) for _ in range(2)) if new else (None, None)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for b, at in enumerate(seen.tolist()):
        if k is not None:
            expected_k[b, at : at + new], expected_v[b, at : at + new] = k[b], v[b]
        k_cache[b, at:], v_cache[b, at:] = torch.nan, torch.nan  # free room is not read
        expected_k[b, at + new :], expected_v[b, at + new :] = torch.nan, torch.nan
    places = k_cache.data_ptr(), v_cache.data_ptr()
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=seen, **options, return_softmax_lse=True
    )
    expected, expected_lse = plain(q, expected_k, expected_v, [0] * ROWS, seen + new, **options)
    assert_close(out, expected)
    assert_close(lse, expected_lse)
    assert_close(k_cache, expected_k, rtol=0, atol=0, equal_nan=True)
    assert_close(v_cache, expected_v, rtol=0, atol=0, equal_nan=True)
    assert (k_cache.data_ptr(), v_cache.data_ptr()) == places
    assert seen.tolist() == [0, 5, 9]


def test_the_length_may_be_one_number_or_all_there_is():
    q, (k_cache, v_cache) = randn(ROWS, 2, HEADS, WIDTH), caches()
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=7)
    assert_close(out, plain(q, k_cache, v_cache, [0] * ROWS, [7] * ROWS)[0])
    out = flash_attn_with_kvcache(q, k_cache, v_cache)
    assert_close(out, plain(q, k_cache, v_cache, [0] * ROWS, [ROOM] * ROWS)[0])


def test_a_cache_with_more_rows_or_with_gaps_between_them():
    q, (k_cache, v_cache) = randn(2, 1, HEADS, WIDTH), caches()
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=5)
    assert_close(out, plain(q, k_cache, v_cache, [0, 0], [5, 5])[0])
    k, v = randn(2, 1, KV_HEADS, WIDTH), randn(2, 1, KV_HEADS, WIDTH)
    view_k, view_v = k_cache[:2, 1:8], v_cache[:2, 1:8]
    out = flash_attn_with_kvcache(q, view_k, view_v, k, v, cache_seqlens=3)
    assert_close(k_cache[:2, 4], k[:, 0])
    assert_close(out, plain(q, view_k, view_v, [0, 0], [4, 4])[0])


@pytest.mark.parametrize("causal", [False, True])
def test_rows_begin_where_leftpad_says(causal):
    q, (k_cache, v_cache) = randn(ROWS, 3, HEADS, WIDTH), caches()
    k, v = randn(ROWS, 2, KV_HEADS, WIDTH), randn(ROWS, 2, KV_HEADS, WIDTH)
    begins, seen = torch.tensor([2, 0, 4], dtype=torch.int32), torch.tensor([4, 3, 10], dtype=torch.int32)
    k_cache[0, :2], k_cache[2, :4] = torch.nan, torch.nan
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=seen, cache_leftpad=begins, causal=causal
    )
    assert_close(out, plain(q, k_cache, v_cache, begins, seen + 2, causal=causal)[0])
    assert_close(k_cache[0, 4:6], k[0])


@pytest.mark.parametrize("index", [[4, 0, 2], [1, 1, 1]])
def test_rows_of_the_cache_are_chosen(index):
    q, (k_cache, v_cache) = randn(ROWS, 1, HEADS, WIDTH), caches(5)
    rows, seen = torch.tensor(index, dtype=torch.int32), torch.tensor([2, 6, 9])
    before = k_cache.clone()
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=seen, cache_batch_idx=rows, causal=True)
    assert_close(out, plain(q, k_cache[rows], v_cache[rows], [0] * ROWS, seen, causal=True)[0])
    k, v = randn(ROWS, 1, KV_HEADS, WIDTH), randn(ROWS, 1, KV_HEADS, WIDTH)
    flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=seen, cache_batch_idx=rows)
    before[rows.long(), seen] = k[:, 0]
    assert_close(k_cache, before)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (4, -1)}], ids=str)
def test_rotary_turns_new_keys_and_queries(interleaved, options):
    q, (k_cache, v_cache) = randn(ROWS, 3, HEADS, WIDTH), caches()
    k, v = randn(ROWS, 2, KV_HEADS, WIDTH), randn(ROWS, 2, KV_HEADS, WIDTH)
    seen, angle = torch.tensor([0, 4, 9], dtype=torch.int32), randn(ROOM, 3)
    cos, sin = angle.cos(), angle.sin()
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, seen, rotary_interleaved=interleaved, **options
    )
    turned_k = apply_rotary_emb(k, cos, sin, interleaved, seqlen_offsets=seen)
    if options:
        turned_q = apply_rotary_emb(q, cos, sin, interleaved, seqlen_offsets=seen)
    else:  # all queries stand at the first new position
        one = [
            apply_rotary_emb(q[:, i : i + 1], cos, sin, interleaved, seqlen_offsets=seen) for i in range(3)
        ]
        turned_q = torch.cat(one, dim=1)
    for b, at in enumerate(seen.tolist()):
        assert_close(k_cache[b, at : at + 2], turned_k[b])
    assert_close(out, plain(turned_q, k_cache, v_cache, [0] * ROWS, seen + 2, **options)[0])


@pytest.mark.parametrize("new", [0, 3])
def test_pages_are_read_and_written_where_the_table_says(new):
    size, table = 4, torch.tensor([[5, 0, 7], [2, 900, -1], [6, 3, 1]], dtype=torch.int32)
    seen = torch.tensor([6, 0 if new else 2, 9], dtype=torch.int32)
    q = randn(ROWS, 2, HEADS, WIDTH)
    pages_k, pages_v = (
        torch.full((8, size, KV_HEADS, WIDTH), torch.nan, dtype=torch.float64) for _ in range(2)
    )
    flat_k, flat_v = caches()
    k, v = (randn(ROWS, new, KV_HEADS, WIDTH) for _ in range(2)) if new else (None, None)
    for b in range(ROWS):
        for n in range(int(seen[b])):
            pages_k[table[b, n // size], n % size] = flat_k[b, n]
            pages_v[table[b, n // size], n % size] = flat_v[b, n]
        if k is not None:
            flat_k[b, seen[b] : seen[b] + new], flat_v[b, seen[b] : seen[b] + new] = k[b], v[b]
    out = flash_attn_with_kvcache(
        q, pages_k, pages_v, k, v, cache_seqlens=seen, block_table=table, causal=True
    )
    assert_close(out, plain(q, flat_k, flat_v, [0] * ROWS, seen + new, causal=True)[0])
    for b in range(ROWS):
        for n in range(int(seen[b]) + new):
            assert_close(pages_k[table[b, n // size], n % size], flat_k[b, n])
    filled = int(seen.sum()) + ROWS * new
    assert int((~pages_k.isnan()).all(-1).all(-1).sum()) == filled


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_decoding_equals_one_pass(dtype):
    q = randn(2, ROOM, HEADS, WIDTH).to(dtype)
    k, v = randn(2, ROOM, KV_HEADS, WIDTH).to(dtype), randn(2, ROOM, KV_HEADS, WIDTH).to(dtype)
    k_cache, v_cache = (torch.zeros(2, ROOM, KV_HEADS, WIDTH, dtype=dtype) for _ in range(2))
    steps = [
        flash_attn_with_kvcache(
            q[:, t : t + 1], k_cache, v_cache, k[:, t : t + 1], v[:, t : t + 1], cache_seqlens=t, causal=True
        )
        for t in range(ROOM)
    ]
    exact = reference.sliding_window_attention(q.double(), k.double(), v.double())
    plain_pass = reference.sliding_window_attention(q, k, v)
    assert_close_to_reference("out", torch.cat(steps, dim=1), exact, plain_pass)


def test_no_rows_and_no_gradient():
    empty = torch.randn(0, 1, 4, 8), torch.randn(0, 5, 2, 8), torch.randn(0, 5, 2, 8)
    out, lse = flash_attn_with_kvcache(*empty, cache_seqlens=3, return_softmax_lse=True)
    assert out.shape == (0, 1, 4, 8)
    assert lse.shape == (0, 4, 1)
    q = torch.randn(1, 1, 2, 8, requires_grad=True)
    assert not flash_attn_with_kvcache(q, torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8)).requires_grad


# ---- Errors


def call(**change):
    k_cache, v_cache = caches()
    args = {"q": randn(ROWS, 1, HEADS, WIDTH), "k_cache": k_cache, "v_cache": v_cache} | change
    return flash_attn_with_kvcache(**args)


K = torch.zeros(ROWS, 2, KV_HEADS, WIDTH, dtype=torch.float64)
NEW = {"k": K, "v": K, "cache_seqlens": 3}
COS = torch.ones(ROOM, 2)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"alibi_slopes": torch.ones(4)},
            NotImplementedError,
            r"alibi_slopes must be None, got a tensor of shape \(4,\)",
        ),
        ({"k": K, "cache_seqlens": 3}, ValueError, "v must be given when k is, got None"),
        ({"v": K, "cache_seqlens": 3}, ValueError, "k must be given when v is, got None"),
        (NEW | {"rotary_cos": COS}, ValueError, "rotary_sin must be given when rotary_cos is, got None"),
        (
            {"rotary_cos": COS, "rotary_sin": COS},
            ValueError,
            r"rotary_cos must be None without k, got shape \(12, 2\)",
        ),
        ({"k": K, "v": K}, ValueError, "cache_seqlens must be given when k is, got None"),
        (
            NEW | {"cache_seqlens": 11},
            ValueError,
            r"leave room for the new keys in 12 positions, got \[11, 11, 11\] and 2",
        ),
        (NEW | {"cache_seqlens": -1}, ValueError, r"cache_seqlens must be at least 0 .*, got \[-1, -1, -1\]"),
        ({"cache_seqlens": 13}, ValueError, "in 12 positions"),
        (
            {"cache_seqlens": torch.tensor([1, 2])},
            ValueError,
            r"cache_seqlens must have shape \(3,\) and dtype",
        ),
        ({"cache_seqlens": torch.ones(3)}, ValueError, r"dtype int32 or int64, got \(3,\), torch.float32"),
        (
            {"cache_batch_idx": torch.tensor([0, 3, 1])},
            IndexError,
            r"must name rows below 3, got \[0, 3, 1\]",
        ),
        ({"cache_leftpad": torch.tensor([0])}, ValueError, r"cache_leftpad must have shape \(3,\)"),
        (
            {
                "block_table": torch.zeros(3, 1, dtype=torch.int32),
                "cache_leftpad": torch.zeros(3, dtype=torch.int32),
            },
            ValueError,
            r"cache_leftpad must be None when block_table is given, got \[0, 0, 0\]",
        ),
        (
            NEW | {"block_table": torch.zeros(3, 1, dtype=torch.int32), "cache_seqlens": 11},
            ValueError,
            "block_table must have at least 2 columns for 13 tokens in pages of 12, got 1",
        ),
        (
            {"block_table": torch.full((3, 1), 3, dtype=torch.int32), "cache_seqlens": 1},
            IndexError,
            "block_table must name pages below 3, got 3",
        ),
        (
            NEW | {"k": K.float()},
            ValueError,
            "k must have the dtype of k_cache, torch.float64, got torch.float32",
        ),
        (NEW | {"v": K[:, :1]}, ValueError, r"v must have shape \(3, 2, 2, 8\), got \(3, 1, 2, 8\)"),
        ({"q": torch.randn(3, 1, 4, 8)}, ValueError, "q must have the dtype of k_cache"),
        ({"q": randn(3, 1, 3, 8)}, ValueError, "q must have a multiple of 2 heads of 8 dimensions"),
        ({"q": randn(4, 1, 4, 8)}, ValueError, "k_cache must have at least 4 rows, got 3"),
        ({"q": randn(3, 4, 8)}, ValueError, r"q must have 4 dimensions, got shape \(3, 4, 8\)"),
        ({"v_cache": randn(3, 4, 2, 8)}, ValueError, r"v_cache must have shape \(3, 12, 2, 8\)"),
        (
            NEW | {"rotary_cos": COS[:4], "rotary_sin": COS[:4]},
            IndexError,
            "positions must lie in the 4 rows of rotary_cos, got 3 to 4",
        ),
    ],
)
def test_wrong_input_raises_and_writes_nothing(change, error, text):
    k_cache, v_cache = caches()
    before = k_cache.clone(), v_cache.clone()
    with pytest.raises(error, match=text):
        call(**({"k_cache": k_cache, "v_cache": v_cache} | change))
    assert_close((k_cache, v_cache), before, rtol=0, atol=0)
