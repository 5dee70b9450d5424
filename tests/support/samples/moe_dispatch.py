"""Samples of moe_plan, grouped_gemm, moe_experts and their backward passes; inputs of experts in any size."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tests.support.layouts import Draw, with_layout
from tests.support.samples.sample import Call, Recipe


def picks(
    draw: Draw,
    tokens: int,
    top_k: int,
    experts: int,
    routing: str = "random",
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """`(T, k)` experts of each token.

    random: k different ones where there are so many; balanced: one after the other, round and round; one_pair: the same for every
    token; few: only every third expert; some_left_out: random, every third pick -1; none: -1 everywhere; twice: the same expert in
    all picks of a token.
    """
    slots = torch.arange(tokens * top_k, device=draw.device).view(tokens, top_k)
    if routing == "balanced":
        ids = slots % experts
    elif routing == "one_pair":
        ids = torch.arange(top_k).expand(tokens, top_k) % experts
    elif routing == "few":
        ids = draw.integers(0, -(-experts // 3), (tokens, top_k)) * 3
    elif routing == "twice":
        ids = draw.integers(0, experts, (tokens, 1)).expand(tokens, top_k)
    elif routing == "none":
        ids = torch.full_like(slots, -1)
    else:
        ids = draw.normal(tokens, experts).argsort(1)[:, torch.arange(top_k) % experts]
        if routing == "some_left_out":
            ids = torch.where(slots % 3 == 1, -1, ids)
    return ids.to(draw.device, dtype).contiguous()


def experts_call(
    tokens: int = 11,
    top_k: int = 2,
    experts: int = 4,
    size: int = 12,
    inner: int = 7,
    *,
    draw: Draw,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
    id_dtype: torch.dtype = torch.int64,
    routing: str = "random",
    layout: str = "contiguous",
    transposed: bool = False,
    gated: bool = True,
    bias: bool = False,
    grad_weights: bool = False,
    **options: Any,
) -> Call:
    """One call of moe_experts; `transposed`: projections lie as `(E, h, 2 I)` and `(E, I, h)`."""

    def projection(rows: int, columns: int) -> Tensor:
        scale = columns**-0.5 if columns else 1.0
        if transposed:
            return draw.normal(experts, columns, rows, dtype=dtype, layout=layout, scale=scale).mT
        return draw.normal(experts, rows, columns, dtype=dtype, layout=layout, scale=scale)

    def weights() -> Tensor:
        kind = weight_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
        return draw.normal(tokens, top_k, dtype=kind, layout=layout)

    rows = 2 * inner if gated else inner
    hidden = draw.normal(tokens, size, dtype=dtype, layout=layout)
    ids = with_layout(picks(draw, tokens, top_k, experts, routing, id_dtype), layout)
    args = (hidden, projection(rows, size), projection(size, inner), ids, weights())
    kwargs = dict(options)
    if bias:
        kind = bias_dtype or dtype
        kwargs["gate_up_proj_bias"] = draw.normal(experts, rows, dtype=kind, layout=layout)
        kwargs["down_proj_bias"] = draw.normal(experts, size, dtype=kind, layout=layout)
    if grad_weights:
        kwargs["grad_weights"] = weights()
    return Call(args, kwargs)


def _experts_backward(
    *,
    draw: Draw,
    forward: Recipe,
    keep: bool = True,
    needed: tuple[str, ...] = ("hidden_states", "proj", "topk_weights"),
) -> Call:
    call = forward(draw=draw)
    biases = ("gate_up_proj_bias", "down_proj_bias", "grad_weights")
    optional = [call.kwargs.get(name) for name in biases]
    activation = call.kwargs.get("activation", "silu")
    _, gate_up = torch.ops.fastlm.moe_experts(*call.args, *optional, activation=activation, keep_gate_up=keep)
    if keep:
        # Rows of picks without an expert stand at the end and have no meaning.
        rows = torch.arange(gate_up.shape[0], device=gate_up.device)
        without = rows >= (call.args[3] >= 0).sum()
        gate_up = gate_up.masked_fill(without.unsqueeze(1), torch.nan)
    hidden = call.args[0]
    dout = draw.normal(*hidden.shape, dtype=hidden.dtype)
    options = {f"need_d{name}": name in needed for name in ("hidden_states", "proj", "topk_weights")}
    return Call((dout, *call.args, *optional, gate_up), {"activation": activation, **options})


_EXPERTS: dict[str, Recipe] = {
    "plain": experts_call,
    "everything": partial(experts_call, bias=True, grad_weights=True, routing="some_left_out"),
    "bias": partial(experts_call, bias=True),
    "grad_weights": partial(experts_call, grad_weights=True),
    "gelu_tanh": partial(experts_call, activation="gelu_tanh", bias=True),
    "relu": partial(experts_call, activation="relu", bias=True),
    "relu2": partial(experts_call, activation="relu2"),
    "no_gate": partial(experts_call, gated=False, activation="relu2", bias=True),
    "no_gate_bfloat16": partial(experts_call, gated=False, activation="gelu_tanh", dtype=torch.bfloat16),
    "bfloat16": partial(experts_call, dtype=torch.bfloat16, bias=True),
    "bfloat16_float32_bias": partial(experts_call, dtype=torch.bfloat16, bias=True, bias_dtype=torch.float32),
    "float16": partial(experts_call, dtype=torch.float16, bias=True, grad_weights=True),
    "float64": partial(experts_call, dtype=torch.float64, bias=True, grad_weights=True),
    "int32_ids": partial(experts_call, id_dtype=torch.int32),
    "one_pick": partial(experts_call, top_k=1),
    "eight_picks": partial(experts_call, top_k=8, experts=9, bias=True),
    "more_picks_than_experts": partial(experts_call, top_k=5, experts=2),
    "the_same_expert_twice": partial(experts_call, top_k=3, routing="twice", bias=True),
    "some_left_out": partial(experts_call, routing="some_left_out"),
    "all_left_out": partial(experts_call, routing="none", bias=True),
    "empty_experts": partial(experts_call, experts=10, routing="few"),
    "one_expert": partial(experts_call, top_k=1, experts=1, bias=True),
    "gaps": partial(experts_call, layout="gaps", bias=True),
    "no_unit_stride": partial(experts_call, layout="no_unit_stride", bias=True, grad_weights=True),
    "transposed": partial(experts_call, transposed=True, bias=True),
    "transposed_bfloat16": partial(
        experts_call, 40, size=33, inner=35, transposed=True, dtype=torch.bfloat16
    ),
    "one_token": partial(experts_call, 1),
    "one_feature": partial(experts_call, size=1, inner=1),
    "no_tokens": partial(experts_call, 0, bias=True),
    "no_hidden": partial(experts_call, size=0, bias=True),
    "no_inner": partial(experts_call, inner=0, bias=True),
    "past_a_tile": partial(experts_call, 67, size=65, inner=97, bias=True),
    "past_a_tile_bfloat16": partial(experts_call, 67, size=65, inner=97, dtype=torch.bfloat16, bias=True),
}


def product_call(
    groups: tuple[int, ...] = (3, 0, 5, 1),
    depth: int = 12,
    columns: int = 7,
    rest: int = 0,
    *,
    draw: Draw,
    dtype: torch.dtype = torch.float32,
    offset_dtype: torch.dtype = torch.int32,
    layout: str = "contiguous",
    trans_b: bool = True,
    **options: Any,
) -> Call:
    """One call of grouped_gemm: groups of so many rows, and `rest` rows behind them."""
    offsets = with_layout(draw.index([0, *accumulate(groups)], offset_dtype), layout)
    a = draw.normal(sum(groups) + rest, depth, dtype=dtype, layout=layout)
    b_shape = (columns, depth) if trans_b else (depth, columns)
    b = draw.normal(len(groups), *b_shape, dtype=dtype, layout=layout)
    if not trans_b:
        options["trans_b"] = False
    return Call((a, b, offsets), options)


def _product_backward(*, draw: Draw, forward: Recipe, needed: tuple[str, ...] = ("da", "db")) -> Call:
    call = forward(draw=draw)
    a, b, _ = call.args
    trans_b = call.kwargs.get("trans_b", True)
    dout = draw.normal(a.shape[0], b.shape[1 if trans_b else 2], dtype=a.dtype)
    options = {f"need_{name}": name in needed for name in ("da", "db")}
    return Call((dout, *call.args), {"trans_b": trans_b, **options})


_PRODUCTS: dict[str, Recipe] = {
    "plain": product_call,
    "not_transposed": partial(product_call, trans_b=False),
    "rows_behind": partial(product_call, rest=4),
    "bfloat16": partial(product_call, dtype=torch.bfloat16),
    "bfloat16_not_transposed": partial(product_call, dtype=torch.bfloat16, trans_b=False, rest=2),
    "float16": partial(product_call, dtype=torch.float16),
    "float64": partial(product_call, dtype=torch.float64),
    "int64_offsets": partial(product_call, offset_dtype=torch.int64),
    "gaps": partial(product_call, layout="gaps"),
    "no_unit_stride": partial(product_call, layout="no_unit_stride", trans_b=False),
    "one_group": partial(product_call, (9,)),
    "empty_groups": partial(product_call, (0, 0, 4, 0), rest=1),
    "no_rows": partial(product_call, (0, 0)),
    "only_rows_behind": partial(product_call, (0, 0), rest=3),
    "one_row_each": partial(product_call, (1, 1, 1)),
    "one_feature": partial(product_call, depth=1, columns=1),
    "no_depth": partial(product_call, depth=0),
    "no_columns": partial(product_call, columns=0),
    "past_a_tile": partial(product_call, (2, 9, 0, 33, 8), 97, 65),
    "past_a_tile_bfloat16": partial(product_call, (2, 9, 0, 33, 8), 97, 65, dtype=torch.bfloat16),
}


def _plan(
    tokens: int = 11,
    top_k: int = 2,
    experts: int = 4,
    routing: str = "random",
    dtype: torch.dtype = torch.int64,
    layout: str = "contiguous",
    *,
    draw: Draw,
) -> Call:
    return Call((with_layout(picks(draw, tokens, top_k, experts, routing, dtype), layout), experts), {})


_PLANS: dict[str, Recipe] = {
    "plain": _plan,
    "int32": partial(_plan, dtype=torch.int32),
    "some_left_out": partial(_plan, routing="some_left_out"),
    "all_left_out": partial(_plan, routing="none"),
    "empty_experts": partial(_plan, experts=10, routing="few"),
    "one_pick": partial(_plan, top_k=1),
    "eight_picks": partial(_plan, top_k=8, experts=64),
    "one_expert": partial(_plan, experts=1),
    "no_unit_stride": partial(_plan, layout="no_unit_stride"),
    "no_tokens": partial(_plan, 0),
    "many": partial(_plan, 1000, 4, 33),
}

RECIPES: dict[str, dict[str, Recipe]] = {
    "moe_plan": _PLANS,
    "grouped_gemm": _PRODUCTS,
    "grouped_gemm_backward": {
        **{name: partial(_product_backward, forward=recipe) for name, recipe in _PRODUCTS.items()},
        "a_only": partial(_product_backward, forward=_PRODUCTS["rows_behind"], needed=("da",)),
        "b_only": partial(_product_backward, forward=_PRODUCTS["rows_behind"], needed=("db",)),
    },
    "moe_experts": _EXPERTS,
    "moe_experts_backward": {
        **{name: partial(_experts_backward, forward=recipe) for name, recipe in _EXPERTS.items()},
        "recomputed": partial(_experts_backward, forward=_EXPERTS["everything"], keep=False),
        "recomputed_bfloat16": partial(
            _experts_backward, forward=_EXPERTS["past_a_tile_bfloat16"], keep=False
        ),
        "hidden_only": partial(_experts_backward, forward=_EXPERTS["everything"], needed=("hidden_states",)),
        "proj_only": partial(_experts_backward, forward=_EXPERTS["everything"], needed=("proj",)),
        "weights_only": partial(_experts_backward, forward=_EXPERTS["everything"], needed=("topk_weights",)),
        "nothing": partial(_experts_backward, forward=_EXPERTS["everything"], needed=()),
    },
}
