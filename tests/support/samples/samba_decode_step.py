"""Samples of samba_decode_step: a pair of small blocks and what they remember."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.support.layouts import Draw
from tests.support.samples.sample import Call, Recipe


def _step(
    seen: tuple[int, ...] = (0, 3, 29),
    width: int = 12,
    dim: int = 20,
    state: int = 4,
    rank: int = 3,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 6,
    inner: tuple[int, int] = (18, 10),
    ring: int = 8,
    *,
    draw: Draw,
    dtype: torch.dtype = torch.float32,
    params: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    bias: bool = True,
    rotary: bool = True,
    taps: int = 4,
    index_dtype: torch.dtype = torch.int32,
    window_size: tuple[int, int] = (5, 0),
    **options: Any,
) -> Call:
    batch = len(seen)
    acc = torch.promote_types(dtype, torch.float32)
    params = params or acc

    def weight(*shape: int) -> torch.Tensor:
        return draw.normal(*shape, dtype=dtype, layout=layout, scale=shape[-1] ** -0.5)

    def vector(n: int, shift: float = 0.0) -> torch.Tensor:
        return draw.normal(n, dtype=params, scale=0.2, shift=shift)

    kwargs: dict[str, Any] = {
        "mamba_norm": vector(width, 1.0),
        "in_proj": weight(2 * dim, width),
        "conv_weight": draw.normal(dim, taps, dtype=params, scale=0.5),
        "conv_bias": vector(dim) if bias else None,
        "x_proj": weight(rank + 2 * state, dim),
        "dt_proj": weight(dim, rank),
        "dt_bias": vector(dim, -1.0),
        "A_log": draw.normal(dim, state, dtype=params),
        "D": vector(dim, 1.0),
        "out_proj": weight(width, dim),
        "mamba_mlp_norm": vector(width, 1.0),
        "mamba_w1": weight(inner[0], width),
        "mamba_w2": weight(inner[0], width),
        "mamba_w3": weight(width, inner[0]),
        "conv_state": draw.normal(batch, dim, taps - 1, dtype=dtype),
        "scan_state": draw.normal(batch, dim, state, dtype=state_dtype or acc),
        "attn_norm": vector(width, 1.0),
        "q_proj": weight(heads[0] * head_dim, width),
        "k_proj": weight(heads[1] * head_dim, width),
        "v_proj": weight(heads[1] * head_dim, width),
        "o_proj": weight(width, heads[0] * head_dim),
        "attn_mlp_norm": vector(width, 1.0),
        "attn_w1": weight(inner[1], width),
        "attn_w2": weight(inner[1], width),
        "attn_w3": weight(width, inner[1]),
        "k_cache": draw.normal(batch, ring, heads[1], head_dim, dtype=dtype),
        "v_cache": draw.normal(batch, ring, heads[1], head_dim, dtype=dtype),
        "cache_seqlens": draw.index(seen, index_dtype),
        "window_size": window_size,
        **options,
    }
    for row, tokens in enumerate(seen):
        for cache in ("k_cache", "v_cache"):
            kwargs[cache][row, min(tokens, ring) :] = float("nan")  # not written yet
    if rotary:
        positions = torch.arange(max(seen, default=0) + 1, dtype=torch.float64).unsqueeze(1)
        frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        kwargs["rotary_cos"] = (positions * frequency).cos().to(acc).to(draw.device)
        kwargs["rotary_sin"] = (positions * frequency).sin().to(acc).to(draw.device)
    return Call((draw.normal(batch, width, dtype=acc),), kwargs)


RECIPES: dict[str, dict[str, Recipe]] = {
    "samba_decode_step": {
        "model": _step,
        "bfloat16": partial(_step, dtype=torch.bfloat16),
        "float16": partial(_step, dtype=torch.float16),
        "float64": partial(_step, dtype=torch.float64),
        "bfloat16_parameters": partial(_step, dtype=torch.bfloat16, params=torch.bfloat16),
        "bfloat16_state": partial(_step, dtype=torch.bfloat16, state_dtype=torch.bfloat16),
        "no_bias": partial(_step, bias=False),
        "no_positions": partial(_step, rotary=False, softmax_scale=0.3, eps=1e-3),
        "gaps": partial(_step, layout="gaps"),
        "no_unit_stride": partial(_step, layout="no_unit_stride"),
        "one_row": partial(_step, (7,)),
        "five_rows": partial(_step, (7, 0, 1, 100, 8)),
        "one_kv_head": partial(_step, heads=(3, 1), index_dtype=torch.int64),
        "two_taps": partial(_step, taps=2),
        "odd_sizes": partial(_step, (2, 5), 37, 41, 5, 7, (3, 3), 10, (51, 1), 9),
        "odd_states_one_row": partial(_step, (4,), state=5),
        "odd_states_one_row_bfloat16": partial(_step, (4,), state=3, dtype=torch.bfloat16),
        "past_a_piece": partial(
            _step, (40,), 128, 300, 16, 8, (4, 4), 32, (200, 200), 64, window_size=(63, 0)
        ),
        "past_a_piece_bfloat16": partial(
            _step, (40, 2), 128, 300, 16, 8, (4, 4), 32, (200, 200), 64, dtype=torch.bfloat16
        ),
        "no_batch": partial(_step, ()),
    }
}
