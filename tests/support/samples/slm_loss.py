"""Samples of linear_nll, its backward and select_tokens; inputs of a head in any size."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.support.layouts import Draw
from tests.support.samples.sample import Call, Recipe

IGNORE = -100


def head(
    draw: Draw, tokens: int = 23, vocab: int = 41, size: int = 12, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and labels, none ignored."""
    hidden, weight = draw.normal(tokens, size, dtype=dtype), draw.normal(vocab, size, dtype=dtype)
    return hidden, weight, draw.integers(0, vocab, (tokens,))


def _nll(
    tokens: int | tuple[int, ...] = 13,
    vocab: int = 37,
    hidden_size: int = 10,
    *,
    draw: Draw,
    dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype | None = None,
    label_dtype: torch.dtype = torch.int64,
    layout: str = "contiguous",
    bias: bool = False,
    left_out: bool = False,
    ignored: str = "some",
    scale: float = 1.0,
    **options: Any,
) -> Call:
    rows = (tokens,) if isinstance(tokens, int) else tokens
    kwargs = dict(options)
    ignore_index = kwargs.get("ignore_index", -100)
    hidden = draw.normal(*rows, hidden_size, dtype=dtype, layout=layout, scale=scale)
    weight = draw.normal(vocab, hidden_size, dtype=dtype, layout=layout)
    labels = draw.integers(0, vocab, rows, label_dtype)
    if ignored == "some":
        labels.view(-1)[1::3] = ignore_index
    elif ignored == "all":
        labels[:] = ignore_index
    if bias:
        kwargs["bias"] = draw.normal(vocab, dtype=bias_dtype or dtype)
    if left_out:  # a word that cannot come, and that no label names
        labels[labels == 3] = 4
        kwargs["bias"][3] = -torch.inf
    return Call((hidden, weight, labels), kwargs)


def _backward(*, draw: Draw, forward: Recipe, missing: tuple[str, ...] = ()) -> Call:
    call = forward(draw=draw)
    hidden, weight, labels = call.args
    _, lse, entropy = torch.ops.fastlm.linear_nll(*call.args, **call.kwargs)
    upstream = {name: draw.normal(*labels.shape, dtype=lse.dtype) for name in ("dnll", "dlse", "dentropy")}
    if not call.kwargs.get("return_entropy"):
        missing = (*missing, "dentropy")
    gradients = [None if name in missing else t for name, t in upstream.items()]
    bias = call.kwargs.get("bias")
    options = {
        "ignore_index": call.kwargs.get("ignore_index", -100),
        "softcap": call.kwargs.get("softcap", 0.0),
        "need_dhidden": "dhidden" not in missing,
        "need_dweight": "dweight" not in missing,
        "need_dbias": bias is not None and "dbias" not in missing,
    }
    return Call((*gradients, hidden, weight, labels, bias, lse, entropy), options)


def _select(
    shape: tuple[int, ...] = (37,),
    *,
    draw: Draw,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    ties: bool = False,
    special: bool = False,
    lengths: tuple[int, ...] = (),
    **options: Any,
) -> Call:
    kwargs = {"keep_ratio": 0.6} | options
    score = draw.normal(*shape, dtype=dtype, layout=layout)
    if ties:
        score = score.round()
    if special:
        values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], dtype=dtype)
        score.view(-1)[: len(values)] = values
    if lengths:
        kwargs["cu_seqlens"] = torch.tensor((0, *lengths)).cumsum(0)
    return Call((score, draw.integers(0, 4, shape) > 0), kwargs)


_SELECT: dict[str, Recipe] = {
    "plain": _select,
    "ties": partial(_select, ties=True),
    "random_ties": partial(_select, ties=True, tie_break="random", seed=5),
    "special": partial(_select, special=True),
    "bfloat16": partial(_select, dtype=torch.bfloat16),
    "float16": partial(_select, dtype=torch.float16, special=True),
    "float64": partial(_select, dtype=torch.float64, ties=True, tie_break="random"),
    "rows_and_columns": partial(_select, (5, 9)),
    "gaps": partial(_select, (5, 9), layout="gaps"),
    "no_unit_stride": partial(_select, (5, 9), layout="no_unit_stride"),
    "sequences": partial(_select, lengths=(3, 0, 20, 14), ties=True),
    "sequences_random_ties": partial(_select, lengths=(3, 0, 20, 14), ties=True, tie_break="random"),
    "all_of_them": partial(_select, keep_ratio=1.0),
    "none_of_them": partial(_select, keep_ratio=0.0),
    "one_token": partial(_select, (1,)),
    "no_tokens": partial(_select, (0,)),
}

_NLL: dict[str, Recipe] = {
    "plain": partial(_nll, ignored="none"),
    "some_ignored": _nll,
    "all_ignored": partial(_nll, ignored="all"),
    "bias": partial(_nll, bias=True),
    "entropy": partial(_nll, bias=True, return_entropy=True),
    "softcap": partial(_nll, softcap=3.0, scale=2.0),
    "softcap_entropy": partial(_nll, softcap=3.0, bias=True, return_entropy=True),
    "bfloat16": partial(_nll, dtype=torch.bfloat16),
    "bfloat16_float32_bias": partial(_nll, dtype=torch.bfloat16, bias=True, bias_dtype=torch.float32),
    "float16": partial(_nll, dtype=torch.float16, bias=True),
    "float64": partial(_nll, dtype=torch.float64, bias=True, return_entropy=True),
    "word_left_out": partial(_nll, bias=True, left_out=True, return_entropy=True),
    "rows_and_columns": partial(_nll, (3, 5), bias=True),
    "int32_labels": partial(_nll, label_dtype=torch.int32),
    "other_ignore_index": partial(_nll, ignore_index=-1),
    "ignore_index_inside": partial(_nll, ignore_index=0),
    "large_logits": partial(_nll, scale=40.0),
    "gaps": partial(_nll, layout="gaps"),
    "no_unit_stride": partial(_nll, layout="no_unit_stride"),
    "one_token": partial(_nll, 1, ignored="none"),
    "one_label": partial(_nll, vocab=1, bias=True),
    "one_feature": partial(_nll, hidden_size=1),
    "no_tokens": partial(_nll, 0),
    "past_a_tile": partial(_nll, 67, 301, 33, bias=True),
    "past_a_tile_bfloat16": partial(_nll, 67, 301, 40, dtype=torch.bfloat16),
}

RECIPES: dict[str, dict[str, Recipe]] = {
    "linear_nll": _NLL,
    "linear_nll_backward": {
        **{name: partial(_backward, forward=recipe) for name, recipe in _NLL.items()},
        "nll_only": partial(_backward, forward=_NLL["entropy"], missing=("dlse", "dentropy")),
        "hidden_only": partial(_backward, forward=_NLL["entropy"], missing=("dweight", "dbias")),
        "weight_only": partial(_backward, forward=_NLL["entropy"], missing=("dhidden", "dbias")),
        "bias_only": partial(_backward, forward=_NLL["entropy"], missing=("dhidden", "dweight")),
    },
    "select_tokens": _SELECT,
}
