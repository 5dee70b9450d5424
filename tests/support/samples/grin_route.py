"""Samples of grin_route and its backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.support.layouts import Draw, with_layout
from tests.support.samples.sample import Call, Recipe


def uniform(
    draw: Draw, *shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> Tensor:
    """Numbers in the open interval (0, 1), multiples of 2^-10, so that every dtype of logits sees the same."""
    values = (draw.integers(0, 1 << 10, shape).double() + 0.5) / (1 << 10)
    return with_layout(values.to(dtype), layout)


def crowded(
    draw: Draw, tokens: int, experts: int, dtype: torch.dtype = torch.float32, **options: Any
) -> Tensor:
    """Logits near each other, of which many survive the mask."""
    return draw.normal(tokens, experts, dtype=dtype, scale=0.1, shift=2.0, **options)


def _route(
    tokens: int = 37,
    experts: int = 16,
    *,
    draw: Draw,
    dtype: torch.dtype = torch.float32,
    noise_dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    random: str = "",
    padding: bool = False,
    near: bool = True,
    special: bool = False,
    **options: Any,
) -> Call:
    kwargs = dict(options)
    make = partial(crowded, draw) if near else draw.normal
    logits = make(tokens, experts, dtype=dtype, layout=layout)
    if special:
        logits[0] = 0
        logits[1, 0] = -torch.inf
        logits[2] = -logits[2].abs()
        logits[3, ::2] = 2.5
    if random:
        kwargs |= {"training": True, "jitter_eps": kwargs.get("jitter_eps", 0.05)}
    if random == "noise":
        shape = (tokens, kwargs.get("top_k", 2), experts + 1)
        kwargs["noise"] = uniform(draw, *shape, dtype=noise_dtype, layout=layout)
    elif random == "seed":
        kwargs["seed"] = draw.integers(-(2**62), 2**62, (1,))
    if padding:
        kwargs["valid"] = with_layout(draw.integers(0, 3, (tokens,)) > 0, "contiguous")
        logits.masked_fill_(~kwargs["valid"].unsqueeze(-1), torch.nan)
    return Call((logits,), kwargs)


def _backward(*, draw: Draw, forward: Recipe) -> Call:
    call = forward(draw=draw)
    weights, ids, _, _ = torch.ops.fastlm.grin_route(*call.args, **call.kwargs)
    options = {
        "jitter_eps": call.kwargs.get("jitter_eps", 0.01),
        "training": call.kwargs.get("training", False),
        "estimator": call.kwargs.get("estimator", "v2"),
    }
    return Call((draw.normal(*weights.shape, dtype=weights.dtype), *call.args, ids), options)


_ROUTE: dict[str, Recipe] = {
    "eval": partial(_route, near=False),
    "noise": partial(_route, random="noise"),
    "seed": partial(_route, random="seed"),
    "seed_spread_out": partial(_route, 100, random="seed", near=False),
    "padding": partial(_route, random="noise", padding=True),
    "padding_seed": partial(_route, random="seed", padding=True),
    "v2_star": partial(_route, random="seed", estimator="v2_star"),
    "v2_star_eval": partial(_route, estimator="v2_star", jitter_eps=0.1),
    "v1": partial(_route, random="noise", estimator="v1", jitter_eps=0.1),
    "bfloat16": partial(_route, dtype=torch.bfloat16, random="noise"),
    "float16": partial(_route, dtype=torch.float16, random="seed"),
    "float64": partial(_route, dtype=torch.float64, noise_dtype=torch.float64, random="noise"),
    "float64_seed": partial(_route, dtype=torch.float64, random="seed"),
    "float64_float32_noise": partial(_route, dtype=torch.float64, random="noise"),
    "exact_maxima": partial(_route, jitter_eps=0.0),
    "everyone_survives": partial(_route, random="noise", jitter_eps=10.0),
    "ties_zeros_infinity": partial(_route, special=True, random="noise"),
    "ties_zeros_infinity_eval": partial(_route, special=True),
    "gaps": partial(_route, layout="gaps", random="noise"),
    "no_unit_stride": partial(_route, layout="no_unit_stride", random="noise", padding=True),
    "broadcast": partial(_route, layout="broadcast", random="seed"),
    "no_tokens": partial(_route, 0, random="noise"),
    "one_token": partial(_route, 1, random="seed"),
    "one_pick": partial(_route, top_k=1, random="seed"),
    "all_picks": partial(_route, experts=8, top_k=8, random="seed"),
    "two_experts": partial(_route, experts=2, random="seed"),
    "odd": partial(_route, 19, 13, top_k=3, random="noise"),
    "many_experts": partial(_route, 21, 256, top_k=4, random="seed"),
    "past_a_tile": partial(_route, 33, 67, top_k=5, random="seed", dtype=torch.bfloat16),
}

RECIPES: dict[str, dict[str, Recipe]] = {
    "grin_route": _ROUTE,
    "grin_route_backward": {name: partial(_backward, forward=recipe) for name, recipe in _ROUTE.items()},
}
