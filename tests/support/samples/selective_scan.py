"""Samples of selective_scan, its backward and its decoding step; its inputs in any size."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.support.layouts import Draw
from tests.support.samples.sample import Call, Recipe


def scan_inputs(
    draw: Draw,
    batch: int,
    dim: int,
    length: int,
    state: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    groups: int | None = None,
) -> dict[str, Tensor | bool]:
    """Arguments by name, every optional tensor among them but cu_seqlens and initial_state."""
    inner = (state,) if groups is None else (groups, state)
    u, delta, z = (draw.normal(batch, dim, length, dtype=dtype, layout=layout) for _ in range(3))
    return {
        "u": u,
        "delta": delta,
        "A": -draw.normal(dim, state).exp().to(torch.promote_types(dtype, torch.float32)),
        "B": draw.normal(batch, *inner, length, dtype=dtype),
        "C": draw.normal(batch, *inner, length, dtype=dtype),
        "D": draw.normal(dim),
        "z": z,
        "delta_bias": draw.normal(dim, shift=-1.0),
        "delta_softplus": True,
    }


def positions(inputs: dict, begin: int, end: int) -> dict:
    """Positions [begin, end) of every argument that has some."""
    along_time = ("u", "delta", "B", "C", "z")
    return {name: t[..., begin:end] if name in along_time else t for name, t in inputs.items()}


def _matrix(
    draw: Draw, groups: int | str, batch: int, dim: int, state: int, length: int, dtype: torch.dtype
) -> Tensor:
    """B or C: constant per channel, shared by all channels, or by groups of them."""
    if groups == "constant":
        return draw.normal(dim, state)
    if groups == "shared":
        return draw.normal(batch, state, length, dtype=dtype)
    return draw.normal(batch, int(groups), state, length, dtype=dtype)


def _forward(
    shape: tuple[int, int, int] = (2, 6, 13),
    state: int = 4,
    *,
    draw: Draw,
    dtype: torch.dtype = torch.float32,
    params: torch.dtype | None = None,
    layout: str = "contiguous",
    groups_b: int | str = "shared",
    groups_c: int | str = "shared",
    skip: bool = True,
    gate: bool = True,
    bias: bool = True,
    softplus: bool = True,
    initial: bool = False,
    cu_seqlens: list[int] | None = None,
    index_dtype: torch.dtype = torch.int32,
    all_states: bool = False,
    step: float = -1.0,
) -> Call:
    batch, dim, length = shape
    params = params or torch.promote_types(dtype, torch.float32)
    kwargs: dict[str, Any] = {"delta_softplus": softplus}
    u = draw.normal(*shape, dtype=dtype, layout=layout)
    # Without softplus the step sizes themselves must be positive for a stable recurrence.
    delta = draw.normal(*shape, dtype=dtype, layout=layout, scale=1.0 if softplus else 0.1, shift=step)
    if not softplus:
        delta = delta.abs()
    A = -draw.normal(dim, state).exp().to(params)
    B = _matrix(draw, groups_b, batch, dim, state, length, dtype)
    C = _matrix(draw, groups_c, batch, dim, state, length, dtype)
    if "constant" in (groups_b, groups_c):
        B, C = (t.to(params) if t.dim() == 2 else t for t in (B, C))
    if skip:
        kwargs["D"] = draw.normal(dim, dtype=params)
    if gate:
        kwargs["z"] = draw.normal(*shape, dtype=dtype, layout=layout)
    if bias:
        kwargs["delta_bias"] = draw.normal(dim, dtype=params, scale=0.1)
    if cu_seqlens is not None:
        kwargs["cu_seqlens"] = draw.index(cu_seqlens, index_dtype)
    if initial:
        rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
        kwargs["initial_state"] = draw.normal(rows, dim, state, dtype=params)
    if all_states:
        kwargs["return_all_states"] = True
    return Call((u, delta, A, B, C), kwargs)


def _backward(*, draw: Draw, forward: Recipe, last: bool = True) -> Call:
    call = forward(draw=draw)
    u, A = call.args[0], call.args[2]
    _, last_state, chunk_states, _ = torch.ops.fastlm.selective_scan(*call.args, **call.kwargs)
    keys = ("D", "z", "delta_bias", "delta_softplus")
    kwargs = {key: call.kwargs.get(key) for key in ("initial_state", "cu_seqlens")}
    dout = draw.normal(*u.shape, dtype=u.dtype)
    dlast = (
        draw.normal(last_state.shape[0], *A.shape, dtype=torch.promote_types(u.dtype, torch.float32))
        if last
        else None
    )
    rest = [call.kwargs.get(key) for key in keys]
    return Call((dout, dlast, *call.args, *rest, chunk_states), kwargs)


def _update(
    batch: int = 3,
    dim: int = 6,
    state: int = 4,
    *,
    draw: Draw,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    groups: int | None = None,
    skip: bool = True,
    gate: bool = True,
    bias: bool = True,
    softplus: bool = True,
    slots: list[int] | None = None,
    num_slots: int = 0,
) -> Call:
    acc = torch.promote_types(dtype, torch.float32)
    inner = (state,) if groups is None else (groups, state)
    h = draw.normal(num_slots or batch, dim, state, dtype=state_dtype or acc)
    x = draw.normal(batch, dim, dtype=dtype, layout=layout)
    dt = draw.normal(batch, dim, dtype=dtype, layout=layout, shift=-1.0)
    if not softplus:
        dt = dt.abs()
    A = -draw.normal(dim, state, dtype=acc).exp()
    B, C = draw.normal(batch, *inner, dtype=dtype), draw.normal(batch, *inner, dtype=dtype)
    kwargs: dict[str, Any] = {"dt_softplus": softplus}
    if skip:
        kwargs["D"] = draw.normal(dim, dtype=acc)
    if gate:
        kwargs["z"] = draw.normal(batch, dim, dtype=dtype, layout=layout)
    if bias:
        kwargs["dt_bias"] = draw.normal(dim, dtype=acc, scale=0.1)
    if slots is not None:
        kwargs["state_batch_indices"] = draw.index(slots)
        unused = sorted(set(range(num_slots)) - set(slots))
        h[unused] = float("nan")
    return Call((h, x, dt, A, B, C), kwargs)


_FORWARD: dict[str, Recipe] = {
    "everything": partial(_forward, initial=True),
    "bare": partial(_forward, skip=False, gate=False, bias=False, softplus=False),
    "no_gate": partial(_forward, gate=False),
    "no_skip": partial(_forward, skip=False),
    "no_softplus": partial(_forward, softplus=False),
    "bfloat16": partial(_forward, dtype=torch.bfloat16),
    "bfloat16_initial": partial(_forward, dtype=torch.bfloat16, initial=True),
    "bfloat16_parameters": partial(_forward, dtype=torch.bfloat16, params=torch.bfloat16),
    "float16": partial(_forward, dtype=torch.float16),
    "float64": partial(_forward, dtype=torch.float64, initial=True),
    "channel_last": partial(_forward, layout="channel_last"),
    "channel_last_bfloat16": partial(_forward, (2, 34, 19), 16, layout="channel_last", dtype=torch.bfloat16),
    "gaps": partial(_forward, layout="gaps"),
    "no_unit_stride": partial(_forward, layout="no_unit_stride"),
    "broadcast": partial(_forward, layout="broadcast"),
    "one_group": partial(_forward, groups_b=1, groups_c=1),
    "groups": partial(_forward, groups_b=2, groups_c=3),
    "group_per_channel": partial(_forward, groups_b=6, groups_c=2),
    "constant": partial(_forward, groups_b="constant", groups_c="constant"),
    "constant_B": partial(_forward, groups_b="constant", initial=True),
    "constant_C": partial(_forward, groups_c="constant", groups_b=2),
    "packed": partial(_forward, (1, 6, 13), cu_seqlens=[0, 1, 1, 6, 13]),
    "packed_initial": partial(
        _forward, (1, 6, 13), cu_seqlens=[0, 0, 3, 13], initial=True, index_dtype=torch.int64
    ),
    "packed_channel_last": partial(
        _forward, (1, 6, 70), cu_seqlens=[0, 31, 64, 70], initial=True, layout="channel_last", groups_b=3
    ),
    "packed_constant": partial(
        _forward, (1, 6, 13), cu_seqlens=[0, 5, 13], groups_b="constant", groups_c="constant"
    ),
    "packed_nothing": partial(_forward, (1, 6, 0), cu_seqlens=[0]),
    "all_states": partial(_forward, all_states=True, initial=True),
    "all_states_packed": partial(_forward, (1, 6, 13), cu_seqlens=[0, 4, 4, 13], all_states=True),
    "one_position": partial(_forward, (2, 6, 1), initial=True),
    "no_length": partial(_forward, (2, 6, 0), initial=True),
    "no_batch": partial(_forward, (0, 6, 5)),
    "no_channels": partial(_forward, (2, 0, 5)),
    "one_state": partial(_forward, state=1),
    "odd_states": partial(_forward, state=3, initial=True),
    "many_states": partial(_forward, state=17),
    "one_channel": partial(_forward, (1, 1, 9)),
    "large_steps": partial(_forward, step=19.0),
    "past_a_chunk": partial(_forward, (1, 5, 300), 16, initial=True),
    "past_a_chunk_channel_last": partial(_forward, (2, 35, 131), 16, layout="channel_last"),
}

# In a broadcast input all rows share memory, which is fine for reading, and gradients come out one per row.
RECIPES: dict[str, dict[str, Recipe]] = {
    "selective_scan": _FORWARD,
    "selective_scan_backward": {
        **{name: partial(_backward, forward=recipe) for name, recipe in _FORWARD.items()},
        "no_last_gradient": partial(_backward, forward=_FORWARD["everything"], last=False),
    },
    "selective_state_update": {
        "everything": _update,
        "bare": partial(_update, skip=False, gate=False, bias=False, softplus=False),
        "no_skip": partial(_update, skip=False),
        "no_bias": partial(_update, bias=False),
        "bfloat16": partial(_update, dtype=torch.bfloat16),
        "bfloat16_state": partial(_update, dtype=torch.bfloat16, state_dtype=torch.bfloat16),
        "float16": partial(_update, dtype=torch.float16),
        "float64": partial(_update, dtype=torch.float64),
        "groups": partial(_update, groups=3),
        "one_group": partial(_update, groups=1),
        "slots": partial(_update, slots=[3, 0, 5], num_slots=7),
        "slots_padding": partial(_update, slots=[3, -1, 0], num_slots=4),
        "no_unit_stride": partial(_update, layout="no_unit_stride"),
        "gaps": partial(_update, layout="gaps"),
        "mamba_sizes": partial(_update, 2, 70, 16),
        "odd_states": partial(_update, state=3),
        "one_of_everything": partial(_update, 1, 1, 1),
        "no_batch": partial(_update, 0),
    },
}
