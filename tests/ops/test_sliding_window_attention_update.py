"""sliding_window_attention_update, the decoding step over a ring of keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastlm import ops, reference
from tests.support import conformance, samples, strategies
from tests.support.conformance import assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.sliding_window_attention import qkv

UPDATE = samples.of("sliding_window_attention_update")
NAN = float("nan")


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", UPDATE, ids=str)
def test_update_matches_reference(sample, device):
    assert_matches_reference(
        ops.sliding_window_attention_update,
        reference.sliding_window_attention_update,
        sample.build(device),
    )


# ---- properties -----------------------------------------------------------------------------------------


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
    q, k, v = qkv(draw, length, heads=(2 * group, 2))
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


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", UPDATE, ids=str)
def test_opcheck_of_update(sample):
    conformance.assert_opcheck(sample, with_grad=False)


def test_compile_update():
    (sample,) = samples.of("sliding_window_attention_update", "rotary_bfloat16_tables")
    conformance.assert_compiles(sample, ops.sliding_window_attention_update, with_grad=False)


# ---- errors ---------------------------------------------------------------------------------------------


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


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


@pytest.mark.host_values
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


@pytest.mark.parametrize("sample", UPDATE, ids=str)
def test_every_level_of_update(sample):
    conformance.assert_levels_match_reference(
        sample,
        ops.sliding_window_attention_update,
        reference.sliding_window_attention_update,
        with_grad=False,
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
