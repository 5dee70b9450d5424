"""sliding_window_attention against its reference; gradients in
`test_sliding_window_attention_backward.py`."""

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
from tests.support.samples.sliding_window_attention import qkv

FORWARD = samples.of("sliding_window_attention")
NAN = float("nan")


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", FORWARD, ids=str)
def test_matches_reference(sample, device):
    assert_matches_reference(
        ops.sliding_window_attention,
        reference.sliding_window_attention,
        sample.build(device),
        return_lse=True,
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("head_dim", [64, 65, 96, 128, 130, 256, 264, 512])
def test_head_dims(head_dim, dtype):
    """Kernels differ by the head dim: at their bounds and beyond, over several tiles."""
    draw = Draw("head dims")
    call = Call(
        qkv(draw, 75, 150, heads=(4, 2), head_dim=head_dim, dtype=dtype),
        {"window_size": (80, 3), "causal": False, "softcap": 0.0 if head_dim % 64 else 4.0},
    )
    functions = (ops.sliding_window_attention, reference.sliding_window_attention)
    assert_matches_reference(*functions, call, return_lse=True)
    assert_gradients_match_reference(*functions, call)


def test_rows_that_see_nothing():
    q, k, v = (t.requires_grad_() for t in qkv(Draw("nothing"), 9, 5))
    out, lse = ops.sliding_window_attention(q, k, v, return_lse=True)
    assert not out[:, :4].any()
    assert bool((lse[..., :4] == -torch.inf).all())
    assert bool(lse[..., 4:].isfinite().all())
    (dq,) = torch.autograd.grad((out.sum(), lse[..., 4:].sum()), q)
    assert not dq[:, :4].any()
    assert bool(dq[:, 4:].any())


def test_a_window_beyond_every_integer_sum():
    q, k, v = qkv(Draw("huge"), 20)
    huge = 2**63 - 1
    for causal in (True, False):
        got = ops.sliding_window_attention(q, k, v, window_size=(huge, huge), causal=causal)
        assert torch.equal(got, ops.sliding_window_attention(q, k, v, causal=causal))


# ---- properties -----------------------------------------------------------------------------------------


@given(
    draw=strategies.draws(),
    length=strategies.sizes(1, 200),
    more=st.integers(0, 100),
    head_dim=strategies.sizes(1, 40),
    dtype=strategies.dtypes(),
)
def test_a_window_of_the_length_is_full_attention(draw, length, more, head_dim, dtype):
    q, k, v = qkv(draw, length, head_dim=head_dim, dtype=dtype)
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
    q, k, v = qkv(draw, length, heads=(2 * group, 2), head_dim=head_dim, dtype=dtype)
    got = ops.sliding_window_attention(q, k, v, window_size=(0, 0), causal=causal)
    assert torch.equal(got, v.repeat_interleave(group, dim=2))


@given(
    draw=strategies.draws(),
    queries=strategies.sizes(1, 160),
    more_keys=st.integers(-20, 60),
    left=st.integers(-1, 150),
    right=st.integers(-1, 20),
    causal=st.booleans(),
    head_dim=st.sampled_from([9, 100, 160]),
    dtype=strategies.dtypes(),
    at=st.floats(0, 0.999),
)
def test_what_a_query_does_not_see_cannot_touch_it(
    draw, queries, more_keys, left, right, causal, head_dim, dtype, at
):
    """NaN outside the window of one query leaves its bits; NaN inside reaches it."""
    keys = max(queries + more_keys, 1)
    q, k, v = qkv(draw, queries, keys, heads=(2, 1), head_dim=head_dim, dtype=dtype)
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


@given(draw=strategies.draws(), at=st.integers(1, 149), left=st.integers(-1, 100))
def test_a_changed_suffix_changes_nothing_before_it(draw, at, left):
    q, k, v = qkv(draw, 150)
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
    q, k, v = qkv(draw, length, dtype=dtype)
    at = int(cut * length)
    whole = ops.sliding_window_attention(q, k, v, window_size=(left, 0))
    assert torch.equal(ops.sliding_window_attention(q[:, at:], k, v, window_size=(left, 0)), whole[:, at:])


def test_a_row_does_not_depend_on_the_batch_around_it():
    q, k, v = qkv(Draw("batch"), 70)
    both = ops.sliding_window_attention(q, k, v, window_size=(20, 0))
    for row in range(2):
        alone = ops.sliding_window_attention(
            q[row : row + 1], k[row : row + 1], v[row : row + 1], window_size=(20, 0)
        )
        assert torch.equal(alone, both[row : row + 1])


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("sample", FORWARD, ids=str)
def test_opcheck(sample, with_grad):
    conformance.assert_opcheck(sample, with_grad=with_grad)


@pytest.mark.parametrize(
    "sample",
    samples.of("sliding_window_attention", "packed_more_keys")
    + samples.of("sliding_window_attention", "gaps"),
    ids=str,
)
def test_compile(sample):
    conformance.assert_compiles(sample, ops.sliding_window_attention, with_grad=True, return_lse=True)


def test_autocast_casts_like_a_matrix_product():
    q, k, v = qkv(Draw("autocast"), 12)
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


def test_positions_of_no_sequence():
    bounds = torch.zeros(1, dtype=torch.int32)
    call = Call(_PACKED, {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds})
    text = "sliding_window_attention: cu_seqlens_q must have at least 2 elements (0 and 5), got shape (1,)"
    conformance.assert_same_error(ops.sliding_window_attention, call, ValueError, text, on_meta=False)


@pytest.mark.host_values
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


# ---- twins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", FORWARD, ids=str)
def test_every_level(sample):
    conformance.assert_levels_match_reference(
        sample, ops.sliding_window_attention, reference.sliding_window_attention, with_grad=True
    )


@pytest.mark.parametrize("window", [200, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(dtype, window):
    """Several blocks of queries, several chunks of keys."""

    def make_call() -> Call:
        return Call(qkv(Draw("threads"), 900, dtype=dtype), {"window_size": (window, 0)})

    conformance.assert_same_for_any_thread_count(
        ops.sliding_window_attention, make_call, with_grad=True, return_lse=True
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
