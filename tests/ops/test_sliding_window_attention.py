"""sliding_window_attention, its backward and its decoding step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import fastlm
from fastlm import ops, reference
from tests.support import conformance, samples, strategies
from tests.support.conformance import assert_gradients_match_reference, assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call

FORWARD = samples.of("sliding_window_attention")
BACKWARD = samples.of("sliding_window_attention_backward")
UPDATE = samples.of("sliding_window_attention_update")
NAN = float("nan")
# What the operators take beside tensors, by default.
_OPTIONS: dict[str, Any] = {
    "window_size": (-1, -1),
    "causal": True,
    "softmax_scale": None,
    "softcap": 0.0,
    "max_seqlen_q": None,
    "max_seqlen_k": None,
}


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", FORWARD, ids=str)
def test_matches_reference(sample, device):
    assert_matches_reference(
        ops.sliding_window_attention,
        reference.sliding_window_attention,
        sample.build(device),
        return_lse=True,
    )


@pytest.mark.parametrize("sample", UPDATE, ids=str)
def test_update_matches_reference(sample, device):
    assert_matches_reference(
        ops.sliding_window_attention_update,
        reference.sliding_window_attention_update,
        sample.build(device),
    )


def test_matches_torch_attention():
    """Not our own reference: torch's attention under the same mask."""
    draw = Draw("torch")
    q, k, v = (draw.normal(1, 200, 3, 32) for _ in range(3))
    position = torch.arange(200)
    visible = (position[:, None] >= position) & (position[:, None] - position < 50)
    expected = functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=visible
    )
    got = ops.sliding_window_attention(q, k, v, window_size=(49, 0))
    torch.testing.assert_close(got, expected.transpose(1, 2))


def test_rows_that_see_nothing():
    q, k, v = (t.requires_grad_() for t in _qkv("nothing", 9, 5))
    out, lse = ops.sliding_window_attention(q, k, v, return_lse=True)
    assert not out[:, :4].any()
    assert bool((lse[..., :4] == -torch.inf).all())
    assert bool(lse[..., 4:].isfinite().all())
    (dq,) = torch.autograd.grad((out.sum(), lse[..., 4:].sum()), q)
    assert not dq[:, :4].any()
    assert bool(dq[:, 4:].any())


def test_a_window_beyond_every_integer_sum():
    q, k, v = _qkv("huge", 20)
    huge = 2**63 - 1
    for causal in (True, False):
        got = ops.sliding_window_attention(q, k, v, window_size=(huge, huge), causal=causal)
        assert torch.equal(got, ops.sliding_window_attention(q, k, v, causal=causal))


# ---- properties -----------------------------------------------------------------------------------------


def _qkv(
    name: str,
    queries: int,
    keys: int | None = None,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    draw: Draw | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    draw = draw or Draw(name)
    keys = queries if keys is None else keys
    q = draw.normal(2, queries, heads[0], head_dim, dtype=dtype)
    return q, *(draw.normal(2, keys, heads[1], head_dim, dtype=dtype) for _ in range(2))


@given(
    draw=strategies.draws(),
    length=strategies.sizes(1, 200),
    more=st.integers(0, 100),
    head_dim=strategies.sizes(1, 40),
    dtype=strategies.dtypes(),
)
def test_a_window_of_the_length_is_full_attention(draw, length, more, head_dim, dtype):
    q, k, v = _qkv("", length, head_dim=head_dim, dtype=dtype, draw=draw)
    full = ops.sliding_window_attention(q, k, v, causal=True, return_lse=True)
    window = ops.sliding_window_attention(q, k, v, window_size=(length - 1 + more, 0), return_lse=True)
    for got, want in zip(window, full, strict=True):
        assert torch.equal(got, want)


@given(
    draw=strategies.draws(),
    length=strategies.sizes(1, 200),
    group=st.integers(1, 3),
    head_dim=strategies.sizes(1, 40),
    dtype=strategies.dtypes(),
    causal=st.booleans(),
)
def test_a_window_of_one_key_gives_its_value(draw, length, group, head_dim, dtype, causal):
    q, k, v = _qkv("", length, heads=(2 * group, 2), head_dim=head_dim, dtype=dtype, draw=draw)
    got = ops.sliding_window_attention(q, k, v, window_size=(0, 0), causal=causal)
    assert torch.equal(got, v.repeat_interleave(group, dim=2))


@given(
    draw=strategies.draws(),
    queries=strategies.sizes(1, 160),
    more_keys=st.integers(-20, 60),
    left=st.integers(-1, 150),
    right=st.integers(-1, 20),
    causal=st.booleans(),
    dtype=strategies.dtypes(),
    at=st.floats(0, 0.999),
)
def test_what_a_query_does_not_see_cannot_touch_it(draw, queries, more_keys, left, right, causal, dtype, at):
    """NaN outside the window of one query leaves its bits; NaN inside reaches it."""
    keys = max(queries + more_keys, 1)
    q, k, v = _qkv("", queries, keys, heads=(2, 1), head_dim=9, dtype=dtype, draw=draw)
    options = {"window_size": (left, right), "causal": causal, "return_lse": True}
    out, lse = ops.sliding_window_attention(q, k, v, **options)
    i = int(at * queries)
    position = i + keys - queries
    begin = 0 if left < 0 else max(position - left, 0)
    end = keys if right < 0 and not causal else position + (0 if causal else right) + 1
    seen = torch.zeros(keys, dtype=torch.bool)
    seen[begin : max(end, 0)] = True
    for poison in (NAN, float("inf")):
        bad = [t.clone() for t in (q, k, v)]
        bad[0][:, torch.arange(queries) != i] = poison
        bad[1][:, ~seen] = poison
        bad[2][:, ~seen] = poison
        again, lse_again = ops.sliding_window_attention(*bad, **options)
        assert torch.equal(again[:, i], out[:, i])
        assert torch.equal(lse_again[..., i], lse[..., i])
    if bool(seen.any()):
        v[:, seen.nonzero()[0, 0]] = NAN
        assert bool(ops.sliding_window_attention(q, k, v, **options)[0][:, i].isnan().all())


@given(
    draw=strategies.draws(),
    length=strategies.sizes(2, 220),
    left=st.integers(-1, 150),
    group=st.integers(1, 3),
    dtype=strategies.dtypes(),
    at=st.floats(0, 0.999),
)
def test_gradients_of_what_is_not_seen_stay_apart(draw, length, left, group, dtype, at):
    """NaN at one position leaves the bits of every gradient that position has no part in."""
    q, k, v = _qkv("", length, heads=(2 * group, 2), head_dim=7, dtype=dtype, draw=draw)
    dout = draw.normal(*q.shape, dtype=dtype)
    at = int(at * length)
    options = {**_OPTIONS, "window_size": (left, 0)}
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


@given(draw=strategies.draws(), at=st.integers(1, 149), left=st.integers(-1, 100))
def test_a_changed_suffix_changes_nothing_before_it(draw, at, left):
    q, k, v = _qkv("", 150, draw=draw)
    before = ops.sliding_window_attention(q, k, v, window_size=(left, 0))
    for t in (q, k, v):
        t[:, at:] = NAN
    assert torch.equal(ops.sliding_window_attention(q, k, v, window_size=(left, 0))[:, :at], before[:, :at])


@given(
    draw=strategies.draws(),
    lengths=strategies.lengths(longest=150),
    left=st.integers(-1, 40),
    index_dtype=strategies.index_dtypes(),
    dtype=strategies.dtypes(),
)
def test_packed_equals_separate(draw, lengths, left, index_dtype, dtype):
    total = sum(lengths)
    q = draw.normal(total, 4, 8, dtype=dtype).requires_grad_()
    k, v = (draw.normal(total, 2, 8, dtype=dtype).requires_grad_() for _ in range(2))
    bounds = strategies.cu_seqlens(lengths, index_dtype)
    options = {"window_size": (left, 0), "return_lse": True}
    out, lse = ops.sliding_window_attention(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, **options)
    grads = torch.autograd.grad((out.square().sum(), lse.sum()), (q, k, v))
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        piece = [t[None, begin:end].detach().requires_grad_() for t in (q, k, v)]
        alone, lse_alone = ops.sliding_window_attention(*piece, **options)
        assert torch.equal(out[begin:end], alone[0])
        assert torch.equal(lse[:, begin:end], lse_alone[0])
        alone_grads = torch.autograd.grad((alone.square().sum(), lse_alone.sum()), piece)
        for got, want in zip(grads, alone_grads, strict=True):
            assert torch.equal(got[begin:end], want[0])


@given(
    draw=strategies.draws(),
    length=strategies.sizes(1, 150),
    cut=st.floats(0, 1),
    left=st.integers(-1, 100),
    dtype=strategies.dtypes(),
)
def test_later_queries_alone_give_the_same_rows(draw, length, cut, left, dtype):
    """Bottom-right alignment: the last queries against all keys."""
    q, k, v = _qkv("", length, dtype=dtype, draw=draw)
    at = int(cut * length)
    whole = ops.sliding_window_attention(q, k, v, window_size=(left, 0))
    assert torch.equal(ops.sliding_window_attention(q[:, at:], k, v, window_size=(left, 0)), whole[:, at:])


@given(
    draw=strategies.draws(),
    window=strategies.sizes(1, 40),
    steps=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    spare=st.integers(0, 5),
    group=st.integers(1, 7),
)
def test_decoding_equals_the_whole_sequence(draw, window, steps, spare, group):
    """The ring wraps; what it does not hold yet is NaN."""
    length, ring = sum(steps), window + max(steps) - 1 + spare
    q, k, v = _qkv("", length, heads=(2 * group, 2), draw=draw)
    whole = ops.sliding_window_attention(q, k, v, window_size=(window - 1, 0))
    caches = [torch.full((2, ring, 2, 16), NAN) for _ in range(2)]
    seen = 0
    for new in steps:
        piece = [t[:, seen : seen + new] for t in (q, k, v)]
        counts = torch.full((2,), seen, dtype=torch.int32)
        out = ops.sliding_window_attention_update(*piece, *caches, counts, window_size=(window - 1, 0))
        torch.testing.assert_close(out, whole[:, seen : seen + new])
        seen += new


def test_decoding_over_many_splits_of_the_ring():
    """A window of several pieces of work, wrapped, in every dtype."""
    for dtype in strategies.FLOATING:
        draw = Draw(f"splits {dtype}")
        ring, seen = 1500, 4001
        q = draw.normal(1, 2, 6, 40, dtype=dtype)
        k, v = (draw.normal(1, 2, 2, 40, dtype=dtype) for _ in range(2))
        caches = [draw.normal(1, ring, 2, 40, dtype=dtype) for _ in range(2)]
        for cache in caches:  # positions that no query sees any more
            cache[:, torch.arange(seen + 2 - ring, seen - 1200) % ring] = NAN
        call = Call((q, k, v, *caches, torch.tensor([seen])), {"window_size": (1200, 0)})
        assert_matches_reference(
            ops.sliding_window_attention_update, reference.sliding_window_attention_update, call
        )


def test_a_row_does_not_depend_on_the_batch_around_it():
    draw = Draw("batch")
    q, k, v = _qkv("", 70, draw=draw)
    both = ops.sliding_window_attention(q, k, v, window_size=(20, 0))
    for row in range(2):
        alone = ops.sliding_window_attention(
            q[row : row + 1], k[row : row + 1], v[row : row + 1], window_size=(20, 0)
        )
        assert torch.equal(alone, both[row : row + 1])


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
    q, k, v = (t.requires_grad_() for t in _qkv("missing", 12))
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


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("sample", FORWARD, ids=str)
def test_opcheck(sample, with_grad):
    conformance.assert_opcheck(sample, with_grad=with_grad)


@pytest.mark.parametrize("sample", BACKWARD + UPDATE, ids=str)
def test_opcheck_of_backward_and_update(sample):
    conformance.assert_opcheck(sample, with_grad=False)


@pytest.mark.parametrize(
    "sample",
    samples.of("sliding_window_attention", "packed_more_keys")
    + samples.of("sliding_window_attention", "gaps"),
    ids=str,
)
def test_compile(sample):
    conformance.assert_compiles(sample, ops.sliding_window_attention, with_grad=True, return_lse=True)


def test_compile_update():
    (sample,) = samples.of("sliding_window_attention_update", "rotary_bfloat16_tables")
    conformance.assert_compiles(sample, ops.sliding_window_attention_update, with_grad=False)


def test_autocast_casts_like_a_matrix_product():
    q, k, v = _qkv("autocast", 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.sliding_window_attention(q, k, v, window_size=(5, 0))
    low = [t.bfloat16() for t in (q, k, v)]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, ops.sliding_window_attention(*low, window_size=(5, 0)))


# ---- errors ---------------------------------------------------------------------------------------------


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


_GOOD = (_x(1, 5, 4, 8), _x(1, 7, 2, 8), _x(1, 7, 2, 8))
_PACKED = (_x(5, 4, 8), _x(7, 2, 8), _x(7, 2, 8))
_BOUNDS = {"cu_seqlens_q": torch.tensor([0, 5]), "cu_seqlens_k": torch.tensor([0, 7])}

BAD_CALLS: list[tuple[str, tuple[Tensor, ...], dict[str, Any], str]] = [
    ("q_dim", (_x(5, 4, 8), *_GOOD[1:]), {}, "q must have shape (B, Lq, H, K), got (5, 4, 8)"),
    ("q_dim_packed", (_GOOD[0], *_PACKED[1:]), _BOUNDS, "q must have shape (T, H, K), got (1, 5, 4, 8)"),
    (
        "q_dtype",
        (_x(1, 5, 4, 8, dtype=torch.int32), *_GOOD[1:]),
        {},
        "q must have dtype float32, bfloat16, float16 or float64, got int32",
    ),
    ("k_dim", (_GOOD[0], _x(7, 2, 8), _GOOD[2]), {}, "k must have shape (B, Lk, Hkv, K), got (7, 2, 8)"),
    (
        "k_dtype",
        (_GOOD[0], _GOOD[1].double(), _GOOD[2]),
        {},
        "k must have the dtype of q, float32, got float64",
    ),
    ("k_batch", (_GOOD[0], _x(2, 7, 2, 8), _GOOD[2]), {}, "k must have the batch size of q, 1, got 2"),
    ("k_head_dim", (_GOOD[0], _x(1, 7, 2, 6), _GOOD[2]), {}, "k must have the head dim of q, 8, got 6"),
    (
        "k_heads",
        (_GOOD[0], _x(1, 7, 3, 8), _GOOD[2]),
        {},
        "k must have a number of heads that divides that of q, 4, got 3",
    ),
    (
        "no_k_heads",
        (_GOOD[0], _x(1, 7, 0, 8), _GOOD[2]),
        {},
        "k must have a number of heads that divides that of q, 4, got 0",
    ),
    (
        "head_dim",
        (_x(1, 5, 4, 513), _x(1, 7, 2, 513), _x(1, 7, 2, 513)),
        {},
        "q must have a head dim between 1 and 512, got 513",
    ),
    (
        "no_head_dim",
        (_x(1, 5, 4, 0), _x(1, 7, 2, 0), _x(1, 7, 2, 0)),
        {},
        "q must have a head dim between 1 and 512, got 0",
    ),
    ("v_shape", (*_GOOD[:2], _x(1, 6, 2, 8)), {}, "v must have shape (1, 7, 2, 8), got (1, 6, 2, 8)"),
    ("v_dtype", (*_GOOD[:2], _GOOD[2].half()), {}, "v must have the dtype of q, float32, got float16"),
    (
        "window",
        _GOOD,
        {"window_size": (4, -2)},
        "window_size must have bounds of at least -1 (no bound), got (4, -2)",
    ),
    (
        "window_length",
        _GOOD,
        {"window_size": (4, 0, 1)},
        "window_size must have 2 bounds (left, right), got 3",
    ),
    ("scale", _GOOD, {"softmax_scale": NAN}, "softmax_scale must be finite, got nan"),
    ("softcap", _GOOD, {"softcap": -0.5}, "softcap must be finite and not negative, got -0.5"),
    (
        "one_bound",
        _PACKED,
        {"cu_seqlens_q": _BOUNDS["cu_seqlens_q"]},
        "cu_seqlens_q and cu_seqlens_k must be given together",
    ),
    (
        "bounds_dtype",
        _PACKED,
        {**_BOUNDS, "cu_seqlens_k": _x(2)},
        "cu_seqlens_k must have dtype int32 or int64, got float32",
    ),
    (
        "bounds_length",
        _PACKED,
        {**_BOUNDS, "cu_seqlens_k": torch.tensor([0, 3, 7])},
        "cu_seqlens_k must have shape (2,), got (3,)",
    ),
    (
        "no_bounds",
        _PACKED,
        {"cu_seqlens_q": _BOUNDS["cu_seqlens_q"][:0], "cu_seqlens_k": _BOUNDS["cu_seqlens_k"][:0]},
        "cu_seqlens_q must have at least 1 element (0), got shape (0,)",
    ),
    (
        "longest_without_bounds",
        _GOOD,
        {"max_seqlen_q": 5},
        "max_seqlen_q and max_seqlen_k must be None without cu_seqlens_q and cu_seqlens_k",
    ),
]


@pytest.mark.parametrize(
    ("args", "kwargs", "text"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS]
)
def test_errors(args, kwargs, text):
    for function in (ops.sliding_window_attention, torch.ops.fastlm.sliding_window_attention):
        conformance.assert_same_error(
            function, Call(args, kwargs), ValueError, f"sliding_window_attention: {text}"
        )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cu_seqlens_q": [1, 5]}, "cu_seqlens_q must start with 0, got 1"),
        ({"cu_seqlens_q": [0, 3, 2, 5], "cu_seqlens_k": [0, 1, 2, 7]}, "cu_seqlens_q must never decrease"),
        ({"cu_seqlens_k": [0, 2**40]}, "cu_seqlens_k must end with 7, got 1099511627776"),
        ({"max_seqlen_q": 4}, "max_seqlen_q must be at least the longest sequence, 5, got 4"),
        ({"max_seqlen_k": -1}, "max_seqlen_k must be at least the longest sequence, 7, got -1"),
    ],
)
def test_errors_in_bounds(options, text):
    given = {name: torch.tensor(a) if isinstance(a, list) else a for name, a in options.items()}
    call = Call(_PACKED, {**_BOUNDS, **given})
    conformance.assert_same_error(ops.sliding_window_attention, call, ValueError, text, on_meta=False)


@pytest.mark.parametrize(
    ("place", "bad", "text"),
    [
        (0, _x(1, 5, 4, 9), "dout must have shape (1, 5, 4, 8), got (1, 5, 4, 9)"),
        (0, _x(1, 5, 4, 8, dtype=torch.half), "dout must have the dtype of q, float32, got float16"),
        (1, _x(1, 4, 6), "dlse must have shape (1, 4, 5), got (1, 4, 6)"),
        (1, _x(1, 4, 5, dtype=torch.double), "dlse must have the dtype of lse, float32, got float64"),
        (5, _x(1, 5, 4), "out must have shape (1, 5, 4, 8), got (1, 5, 4)"),
        (6, _x(1, 5, 4), "lse must have shape (1, 4, 5), got (1, 5, 4)"),
        (6, _x(1, 4, 5, dtype=torch.half), "lse must have dtype float32, got float16"),
    ],
)
def test_errors_of_backward(place, bad, text):
    args = [_GOOD[0], _x(1, 4, 5), *_GOOD, _GOOD[0], _x(1, 4, 5), None, None]
    args[place] = bad
    function = torch.ops.fastlm.sliding_window_attention_backward
    text = f"sliding_window_attention_backward: {text}"
    conformance.assert_same_error(function, Call(tuple(args), _OPTIONS), ValueError, text)


_STEP = (_x(2, 3, 4, 8), _x(2, 3, 2, 8), _x(2, 3, 2, 8), _x(2, 8, 2, 8), _x(2, 8, 2, 8), torch.tensor([0, 9]))
_TABLES = {"rotary_cos": _x(12, 4), "rotary_sin": _x(12, 4)}


def _step(**changed: Tensor) -> tuple[Tensor, ...]:
    names = ("q", "k", "v", "k_cache", "v_cache", "cache_seqlens")
    return tuple(changed.get(name, t) for name, t in zip(names, _STEP, strict=True))


UPDATE_BAD_CALLS: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
    (_step(q=_x(2, 4, 8)), {}, "q must have shape (B, m, H, K), got (2, 4, 8)"),
    (_step(k=_x(2, 2, 2, 8)), {}, "k must have shape (2, 3, 2, 8), got (2, 2, 2, 8)"),
    (_step(v=_x(2, 3, 1, 8)), {}, "v must have shape (2, 3, 2, 8), got (2, 3, 1, 8)"),
    (_step(v=_STEP[2].half()), {}, "v must have the dtype of q, float32, got float16"),
    (_step(k_cache=_x(2, 8, 4, 8)), {}, "k_cache must have shape (2, 8, 2, 8), got (2, 8, 4, 8)"),
    (_step(k_cache=_STEP[3].half()), {}, "k_cache must have the dtype of q, float32, got float16"),
    (_step(v_cache=_x(2, 9, 2, 8)), {}, "v_cache must have shape (2, 8, 2, 8), got (2, 9, 2, 8)"),
    (
        _step(v_cache=_x(2, 8, 8, 2).transpose(2, 3)),
        {},
        "v_cache must have stride 1 over its last dimension, got 2",
    ),
    (
        _STEP,
        {"window_size": (6, 0)},
        "k_cache must have at least 6 + 3 slots (left bound of the window + new tokens), got 8",
    ),
    (
        _STEP,
        {"window_size": (2**63 - 1, 0)},
        "k_cache must have at least 9223372036854775807 + 3 slots",
    ),
    (
        _step(q=_x(2, 9, 4, 8), k=_x(2, 9, 2, 8), v=_x(2, 9, 2, 8)),
        {"window_size": (-1, -1)},
        "k_cache must have at least 0 + 9 slots",
    ),
    (_step(cache_seqlens=_x(2)), {}, "cache_seqlens must have dtype int32 or int64, got float32"),
    (_step(cache_seqlens=torch.tensor([1])), {}, "cache_seqlens must have shape (2,), got (1,)"),
    (
        _STEP,
        {"rotary_cos": _TABLES["rotary_cos"]},
        "rotary_cos and rotary_sin must be given together",
    ),
    (_STEP, {**_TABLES, "rotary_cos": _x(12, 8)}, "rotary_cos must have shape (12, 4), got (12, 8)"),
    (_STEP, {**_TABLES, "rotary_sin": _x(11, 4)}, "rotary_sin must have shape (12, 4), got (11, 4)"),
    (
        _STEP,
        {**_TABLES, "rotary_sin": _TABLES["rotary_sin"].half()},
        "rotary_sin must have the dtype of rotary_cos, float32, got float16",
    ),
    (
        tuple(t[..., :7].contiguous() if t.dim() == 4 else t for t in _STEP),
        _TABLES,
        "q must have an even head dim when rotary_cos is given, got 7",
    ),
]


@pytest.mark.parametrize(("args", "kwargs", "text"), UPDATE_BAD_CALLS)
def test_errors_of_update(args, kwargs, text):
    call = Call(args, {"window_size": (5, 0), **kwargs})
    for function in (ops.sliding_window_attention_update, torch.ops.fastlm.sliding_window_attention_update):
        conformance.assert_same_error(function, call, ValueError, f"sliding_window_attention_update: {text}")


@pytest.mark.parametrize(
    ("seen", "kwargs", "error", "text"),
    [
        ([0, -1], {}, ValueError, "cache_seqlens must lie between 0 and 2^62, got -1 at index 1"),
        ([2**63 - 1, 0], {}, ValueError, "must lie between 0 and 2^62, got 9223372036854775807 at index 0"),
        (
            [9, 10],
            _TABLES,
            IndexError,
            "cache_seqlens must lead to positions below 12 (rows of rotary_cos), got position 12 at index 1",
        ),
    ],
)
def test_errors_in_positions(seen, kwargs, error, text):
    call = Call(_step(cache_seqlens=torch.tensor(seen)), {"window_size": (5, 0), **kwargs})
    conformance.assert_same_error(ops.sliding_window_attention_update, call, error, text, on_meta=False)
    assert not call.args[3].any(), "a refused call must not write"


# ---- twins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", FORWARD, ids=str)
def test_every_level(sample):
    conformance.assert_levels_match_reference(
        sample, ops.sliding_window_attention, reference.sliding_window_attention, with_grad=True
    )


@pytest.mark.parametrize("sample", UPDATE, ids=str)
def test_every_level_of_update(sample):
    conformance.assert_levels_match_reference(
        sample,
        ops.sliding_window_attention_update,
        reference.sliding_window_attention_update,
        with_grad=False,
    )


@pytest.mark.parametrize("window", [200, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(dtype, window):
    """Several blocks of queries, several chunks of keys."""

    def make_call() -> Call:
        return Call(_qkv("threads", 900, dtype=dtype), {"window_size": (window, 0)})

    conformance.assert_same_for_any_thread_count(
        ops.sliding_window_attention, make_call, with_grad=True, return_lse=True
    )


def test_update_gives_the_same_bits_for_any_number_of_threads():
    def make_call() -> Call:
        draw = Draw("update threads")
        q, k, v = (draw.normal(2, 2, heads, 64, dtype=torch.bfloat16) for heads in (6, 2, 2))
        caches = [draw.normal(2, 1100, 2, 64, dtype=torch.bfloat16) for _ in range(2)]
        return Call((q, k, v, *caches, torch.tensor([1500, 700])), {"window_size": (1000, 0)})

    conformance.assert_same_for_any_thread_count(
        ops.sliding_window_attention_update, make_call, with_grad=False
    )


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (300, 0)},
        {"window_size": (150, 130), "causal": False},
        {},
        {"window_size": (299, 0), "softcap": 3.0},
    ],
    ids=str,
)
def test_large_calls_match_the_reference(options):
    """Many blocks at once: interior, edges, several chunks of keys in the backward pass."""
    draw = Draw("large")
    q = draw.normal(1, 1400, 3, 24)
    k, v = (draw.normal(1, 1430, 1, 24) for _ in range(2))
    for level in fastlm._C.supported_cpu_capabilities():
        call = Call(tuple(t.clone() for t in (q, k, v)), options)
        with conformance.cpu_level(level):
            assert_matches_reference(
                ops.sliding_window_attention, reference.sliding_window_attention, call, return_lse=True
            )
            assert_gradients_match_reference(
                ops.sliding_window_attention, reference.sliding_window_attention, call
            )
