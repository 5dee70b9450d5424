"""Samples of sliding_window_attention, its backward and its decoding step; its inputs in any size."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.support.layouts import Draw
from tests.support.samples.sample import Call, Recipe


def qkv(
    draw: Draw,
    queries: int,
    keys: int | None = None,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of two sequences; as many keys as queries by default."""
    keys = queries if keys is None else keys
    q = draw.normal(2, queries, heads[0], head_dim, dtype=dtype)
    return q, *(draw.normal(2, keys, heads[1], head_dim, dtype=dtype) for _ in range(2))


def _forward(
    batch: int = 2,
    queries: int = 11,
    keys: int | None = None,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 8,
    *,
    draw: Draw,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    cu_seqlens_q: list[int] | None = None,
    cu_seqlens_k: list[int] | None = None,
    index_dtype: torch.dtype = torch.int32,
    scale: float = 1.0,
    **options: Any,
) -> Call:
    keys = queries if keys is None else keys
    rows: tuple[int, ...] = (batch,)
    kwargs = dict(options)
    if cu_seqlens_q is not None:
        cu_seqlens_k = cu_seqlens_k or cu_seqlens_q
        rows, queries, keys = (), cu_seqlens_q[-1], cu_seqlens_k[-1]
        kwargs["cu_seqlens_q"] = draw.index(cu_seqlens_q, index_dtype)
        kwargs["cu_seqlens_k"] = draw.index(cu_seqlens_k, index_dtype)
    q = draw.normal(*rows, queries, heads[0], head_dim, dtype=dtype, layout=layout, scale=scale)
    k = draw.normal(*rows, keys, heads[1], head_dim, dtype=dtype, layout=layout, scale=scale)
    v = draw.normal(*rows, keys, heads[1], head_dim, dtype=dtype, layout=layout)
    return Call((q, k, v), kwargs)


# What the operators take beside tensors, by default.
DEFAULTS: dict[str, Any] = {
    "window_size": (-1, -1),
    "causal": True,
    "softmax_scale": None,
    "softcap": 0.0,
    "max_seqlen_q": None,
    "max_seqlen_k": None,
}


def _backward(*, draw: Draw, forward: Recipe, lse: bool = True) -> Call:
    call = forward(draw=draw)
    q = call.args[0]
    out, lse_of_rows = torch.ops.fastlm.sliding_window_attention(*call.args, **call.kwargs)
    dout = draw.normal(*q.shape, dtype=q.dtype)
    dlse = draw.normal(*lse_of_rows.shape, dtype=lse_of_rows.dtype) if lse else None
    bounds = (call.kwargs.get("cu_seqlens_q"), call.kwargs.get("cu_seqlens_k"))
    options = {name: call.kwargs.get(name, default) for name, default in DEFAULTS.items()}
    return Call((dout, dlse, *call.args, out, lse_of_rows, *bounds), options)


def _update(
    seen: tuple[int, ...] = (0, 3, 29),
    new: int = 1,
    ring: int = 8,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 8,
    *,
    draw: Draw,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    rotary: bool = False,
    rotary_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype = torch.int32,
    window_size: tuple[int, int] = (5, 0),
    **options: Any,
) -> Call:
    batch = len(seen)
    q = draw.normal(batch, new, heads[0], head_dim, dtype=dtype, layout=layout)
    k = draw.normal(batch, new, heads[1], head_dim, dtype=dtype, layout=layout)
    v = draw.normal(batch, new, heads[1], head_dim, dtype=dtype, layout=layout)
    caches = [draw.normal(batch, ring, heads[1], head_dim, dtype=dtype) for _ in range(2)]
    for row, tokens in enumerate(seen):
        for cache in caches:
            cache[row, min(tokens, ring) :] = float("nan")  # not written yet
    kwargs: dict[str, Any] = {"window_size": window_size, **options}
    if rotary:
        positions = torch.arange(max(seen, default=0) + new, dtype=torch.float64).unsqueeze(1)
        frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        table = rotary_dtype or torch.promote_types(dtype, torch.float32)
        kwargs["rotary_cos"] = (positions * frequency).cos().to(table).to(draw.device)
        kwargs["rotary_sin"] = (positions * frequency).sin().to(table).to(draw.device)
    return Call((q, k, v, *caches, draw.index(seen, index_dtype)), kwargs)


_FORWARD: dict[str, Recipe] = {
    "causal": _forward,
    "window": partial(_forward, window_size=(3, 0)),
    "window_of_one": partial(_forward, window_size=(0, 0)),
    "window_larger_than_length": partial(_forward, window_size=(64, 0)),
    "window_both_sides": partial(_forward, window_size=(2, 3), causal=False),
    "window_right_only": partial(_forward, window_size=(-1, 2), causal=False),
    "full": partial(_forward, causal=False),
    "bfloat16": partial(_forward, dtype=torch.bfloat16, window_size=(4, 0)),
    "float16": partial(_forward, dtype=torch.float16, window_size=(4, 0)),
    "float64": partial(_forward, dtype=torch.float64, window_size=(4, 0)),
    "gaps": partial(_forward, layout="gaps"),
    "gaps_bfloat16": partial(_forward, layout="gaps", head_dim=64, dtype=torch.bfloat16, window_size=(4, 0)),
    "no_unit_stride": partial(_forward, layout="no_unit_stride"),
    "head_major": partial(_forward, layout="channel_last", window_size=(4, 0)),
    "broadcast": partial(_forward, layout="broadcast"),
    "one_kv_head": partial(_forward, heads=(6, 1)),
    "as_many_kv_heads": partial(_forward, heads=(3, 3)),
    "odd_head_dim": partial(_forward, head_dim=5, window_size=(4, 0)),
    "head_dim_64": partial(_forward, head_dim=64, window_size=(6, 0)),
    "scale": partial(_forward, softmax_scale=0.3),
    "softcap": partial(_forward, softcap=2.0, scale=2.0, window_size=(5, 0)),
    "more_keys": partial(_forward, queries=4, keys=15, window_size=(6, 0)),
    "rows_that_see_nothing": partial(_forward, queries=9, keys=5),
    "rows_that_see_nothing_window": partial(_forward, queries=9, keys=5, window_size=(1, 0)),
    "packed": partial(_forward, cu_seqlens_q=[0, 1, 6, 6, 17], window_size=(3, 0)),
    "packed_int64": partial(_forward, cu_seqlens_q=[0, 4, 9], index_dtype=torch.int64),
    "packed_more_keys": partial(
        _forward,
        cu_seqlens_q=[0, 2, 5, 5, 6],
        cu_seqlens_k=[0, 7, 10, 13, 13],
        window_size=(4, 0),
        max_seqlen_q=3,
        max_seqlen_k=7,
    ),
    "packed_bfloat16": partial(_forward, cu_seqlens_q=[0, 3, 20], dtype=torch.bfloat16, window_size=(5, 0)),
    "packed_nothing": partial(_forward, cu_seqlens_q=[0]),
    "one_query": partial(_forward, queries=1, keys=9, window_size=(3, 0)),
    "one_of_everything": partial(_forward, 1, 1, 1, (1, 1), 1),
    "no_queries": partial(_forward, queries=0, keys=5),
    "no_keys": partial(_forward, queries=5, keys=0),
    "no_batch": partial(_forward, batch=0),
    "past_a_tile": partial(_forward, 1, 131, head_dim=32, window_size=(66, 0)),
    "past_a_tile_bfloat16": partial(_forward, 1, 130, head_dim=64, window_size=(70, 0), dtype=torch.bfloat16),
}

RECIPES: dict[str, dict[str, Recipe]] = {
    "sliding_window_attention": _FORWARD,
    "sliding_window_attention_backward": {
        **{name: partial(_backward, forward=recipe) for name, recipe in _FORWARD.items()},
        "no_lse_gradient": partial(_backward, forward=_FORWARD["window"], lse=False),
    },
    "sliding_window_attention_update": {
        "one_new": _update,
        "several_new": partial(_update, new=3),
        "several_new_at_the_wrap": partial(_update, (6, 7, 8, 15), new=3),
        "rotary": partial(_update, new=2, rotary=True),
        "rotary_bfloat16": partial(_update, dtype=torch.bfloat16, rotary=True),
        "rotary_bfloat16_tables": partial(
            _update, dtype=torch.bfloat16, rotary=True, rotary_dtype=torch.bfloat16
        ),
        "no_window": partial(_update, (0, 3, 5), new=2, window_size=(-1, -1)),
        "no_window_wrapped": partial(_update, new=1, window_size=(-1, 0)),
        "window_of_one": partial(_update, window_size=(0, 0), ring=1),
        "smallest_ring": partial(_update, new=4, ring=9, window_size=(5, 0)),
        "bfloat16": partial(_update, dtype=torch.bfloat16),
        "float16": partial(_update, dtype=torch.float16),
        "float64": partial(_update, dtype=torch.float64, rotary=True),
        "scale": partial(_update, softmax_scale=0.2),
        "one_kv_head": partial(_update, heads=(6, 1)),
        "odd_head_dim": partial(_update, head_dim=5),
        "no_unit_stride": partial(_update, new=2, layout="no_unit_stride"),
        "gaps": partial(_update, new=2, layout="gaps"),
        "int64": partial(_update, index_dtype=torch.int64),
        "far": partial(_update, (2_000_000_011,)),
        "samba_sizes": partial(_update, (100, 7), ring=64, window_size=(63, 0), head_dim=64, rotary=True),
        "no_batch": partial(_update, ()),
        "no_new": partial(_update, new=0),
    },
}
