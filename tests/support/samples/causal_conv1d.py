"""Samples of causal_conv1d, its backward and its decoding step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.support.layouts import Draw
from tests.support.samples.sample import Call, Recipe


def _forward(
    shape: tuple[int, int, int] = (2, 5, 17),
    *,
    draw: Draw,
    width: int = 4,
    dtype: torch.dtype = torch.float32,
    params: torch.dtype | None = None,
    layout: str = "contiguous",
    bias: bool = True,
    initial: bool = False,
    activation: str | None = "silu",
    documents: list[list[int]] | None = None,
    cu_seqlens: list[int] | None = None,
    index_dtype: torch.dtype = torch.int32,
) -> Call:
    batch, dim, _ = shape
    params = params or dtype
    kwargs: dict[str, Any] = {"activation": activation}
    x = draw.normal(*shape, dtype=dtype, layout=layout)
    weight = draw.normal(dim, width, dtype=params, scale=0.5)
    if bias:
        kwargs["bias"] = draw.normal(dim, dtype=params)
    if documents is not None:
        kwargs["seq_idx"] = draw.index([i for row in documents for i in row], index_dtype).view(
            len(documents), -1
        )
    if cu_seqlens is not None:
        kwargs["cu_seqlens"] = draw.index(cu_seqlens, index_dtype)
    if initial:
        rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
        kwargs["initial_states"] = draw.normal(rows, dim, width - 1, dtype=dtype)
    return Call((x, weight), kwargs)


def _backward(*, draw: Draw, forward: Recipe, final: bool = True) -> Call:
    call = forward(draw=draw)
    x, weight = call.args
    keys = ("bias", "seq_idx", "initial_states", "activation", "cu_seqlens")
    rest = [call.kwargs.get(key) for key in keys]
    dout = draw.normal(*x.shape, dtype=x.dtype)
    cu_seqlens = call.kwargs.get("cu_seqlens")
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    dfinal = draw.normal(rows, x.shape[1], weight.shape[1] - 1, dtype=x.dtype) if final else None
    return Call((dout, dfinal, x, weight, *rest), {})


def _update(
    batch: int = 3,
    dim: int = 5,
    new: int | None = None,
    *,
    draw: Draw,
    width: int = 4,
    size: int = 4,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    bias: bool = True,
    activation: str | None = "silu",
    seen: list[int] | None = None,
    slots: list[int] | None = None,
    num_slots: int = 0,
) -> Call:
    x = draw.normal(batch, dim, *(() if new is None else (new,)), dtype=dtype, layout=layout)
    state = draw.normal(num_slots or batch, dim, size, dtype=dtype)
    kwargs: dict[str, Any] = {"activation": activation}
    if bias:
        kwargs["bias"] = draw.normal(dim, dtype=dtype)
    if seen is not None:
        kwargs["cache_seqlens"] = draw.index(seen)
    if slots is not None:
        kwargs["conv_state_indices"] = draw.index(slots)
        unused = sorted(set(range(num_slots)) - set(slots))
        state[unused] = float("nan")
    return Call((x, state, draw.normal(dim, width, dtype=dtype, scale=0.5)), kwargs)


_TWO_ROWS = [[0] * 5 + [1] * 12, [3] * 8 + [-1] * 4 + [7] * 5]

_FORWARD: dict[str, Recipe] = {
    "plain": partial(_forward, bias=False, activation=None),
    "silu": _forward,
    "swish": partial(_forward, activation="swish"),
    "bfloat16": partial(_forward, dtype=torch.bfloat16),
    "float16": partial(_forward, dtype=torch.float16),
    "float64": partial(_forward, dtype=torch.float64),
    "bfloat16_float32_weights": partial(_forward, dtype=torch.bfloat16, params=torch.float32),
    "channel_last": partial(_forward, layout="channel_last"),
    "channel_last_bfloat16": partial(_forward, (2, 33, 19), layout="channel_last", dtype=torch.bfloat16),
    "gaps": partial(_forward, layout="gaps"),
    "no_unit_stride": partial(_forward, layout="no_unit_stride"),
    "broadcast": partial(_forward, layout="broadcast"),
    "initial": partial(_forward, initial=True),
    "initial_channel_last": partial(_forward, initial=True, layout="channel_last"),
    "documents": partial(_forward, documents=_TWO_ROWS),
    "documents_initial": partial(_forward, documents=_TWO_ROWS, initial=True, index_dtype=torch.int64),
    "packed": partial(_forward, (1, 5, 17), cu_seqlens=[0, 1, 1, 4, 17]),
    "packed_initial": partial(_forward, (1, 5, 17), cu_seqlens=[0, 0, 2, 9, 17], initial=True),
    "packed_channel_last_int64": partial(
        _forward,
        (1, 5, 17),
        cu_seqlens=[0, 16, 17],
        initial=True,
        layout="channel_last",
        index_dtype=torch.int64,
    ),
    "packed_nothing": partial(_forward, (1, 5, 0), cu_seqlens=[0]),
    "one_position": partial(_forward, (2, 5, 1), initial=True),
    "shorter_than_filter": partial(_forward, (2, 5, 2), initial=True),
    "one_tap": partial(_forward, width=1),
    "one_tap_initial": partial(_forward, width=1, initial=True),
    "two_taps": partial(_forward, width=2, initial=True),
    "three_taps": partial(_forward, width=3, initial=True),
    "many_taps": partial(_forward, width=9, initial=True),
    "one_channel": partial(_forward, (1, 1, 9)),
    "past_a_tile": partial(_forward, (2, 65, 130)),
    "past_a_tile_channel_last": partial(_forward, (2, 65, 130), layout="channel_last"),
    # Sizes of which a device moves 16 bytes at once, along channels and along time.
    "vectors_of_channels": partial(_forward, (2, 40, 75), initial=True, layout="channel_last"),
    "vectors_of_channels_float16": partial(
        _forward, (2, 40, 40), width=3, layout="channel_last", dtype=torch.float16, params=torch.float32
    ),
    "vectors_of_channels_packed": partial(
        _forward,
        (1, 72, 150),
        cu_seqlens=[0, 1, 1, 64, 66, 150],
        initial=True,
        layout="channel_last",
        dtype=torch.bfloat16,
    ),
    "vectors_of_channels_documents": partial(
        _forward,
        (2, 16, 45),
        width=2,
        documents=[[0] * 5 + [1] * 40, [3] * 38 + [-1] * 4 + [7] * 3],
        initial=True,
        layout="channel_last",
        dtype=torch.bfloat16,
        bias=False,
    ),
    "vectors_of_time": partial(_forward, (2, 5, 88), initial=True, dtype=torch.bfloat16),
    "vectors_of_time_packed": partial(
        _forward, (1, 3, 304), cu_seqlens=[0, 64, 65, 65, 301, 304], initial=True, width=3
    ),
    "no_length": partial(_forward, (2, 5, 0), initial=True),
    "no_batch": partial(_forward, (0, 5, 8)),
    "no_channels": partial(_forward, (2, 0, 8)),
}

RECIPES: dict[str, dict[str, Recipe]] = {
    "causal_conv1d": _FORWARD,
    "causal_conv1d_backward": {
        **{name: partial(_backward, forward=recipe) for name, recipe in _FORWARD.items()},
        "no_final_gradient": partial(_backward, forward=_FORWARD["initial"], final=False),
    },
    "causal_conv1d_update": {
        "one_input": _update,
        "plain": partial(_update, bias=False, activation=None),
        "bfloat16": partial(_update, dtype=torch.bfloat16),
        "float16": partial(_update, dtype=torch.float16),
        "float64": partial(_update, dtype=torch.float64),
        "smallest_state": partial(_update, size=3),
        "one_new": partial(_update, new=1),
        "several_new": partial(_update, new=3),
        "several_new_channel_last": partial(_update, new=3, layout="channel_last"),
        "more_new_than_state": partial(_update, new=7, size=5),
        "ring": partial(_update, seen=[0, 2, 1000003], size=5),
        "ring_several_new": partial(_update, new=3, seen=[0, 4, 17], size=6),
        "ring_wraps_within": partial(_update, new=7, seen=[0, 4, 17], size=5),
        "slots": partial(_update, slots=[4, 0, 2], num_slots=6),
        "slots_padding": partial(_update, slots=[4, -1, 2], num_slots=6),
        "slots_ring_padding": partial(_update, new=2, seen=[5, 0, 9], slots=[-7, 3, 1], num_slots=4),
        "one_tap": partial(_update, width=1, size=1),
        "no_state": partial(_update, width=1, size=0),
        "no_unit_stride": partial(_update, layout="no_unit_stride"),
        "no_batch": partial(_update, 0),
        "no_new": partial(_update, new=0),
        "wide": partial(_update, 2, 70),
        "dense": partial(_update, 2, 83, size=3),
        "dense_bfloat16": partial(_update, 2, 83, size=3, dtype=torch.bfloat16),
        "vectors": partial(_update, 3, 24, slots=[1, -1, 2], num_slots=3),
        "vectors_bfloat16": partial(_update, 2, 264, size=3, dtype=torch.bfloat16),
        "dense_float16": partial(_update, 2, 83, size=3, dtype=torch.float16, bias=False),
    },
}
