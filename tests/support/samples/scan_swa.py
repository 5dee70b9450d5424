"""Samples of scan_swa: one sample of each half, side by side."""

from __future__ import annotations

from functools import partial

from tests.support.layouts import Draw
from tests.support.samples import selective_scan, sliding_window_attention
from tests.support.samples.sample import Call, Recipe

# Arguments of the scan after C, in the order of the schema.
_POSITIONAL = ("D", "z", "delta_bias", "delta_softplus", "initial_state")


def side_by_side(scan: Recipe, attention: Recipe, *, draw: Draw) -> Call:
    """The arguments of both operators as those of one."""
    left, right = scan(draw=draw), attention(draw=draw)
    options = dict(left.kwargs)
    middle = [options.pop(name, None) for name in _POSITIONAL]
    options |= {"window_size": (-1, -1)} | right.kwargs
    return Call((*left.args, *middle, *right.args), options)


def _both(scan: str, attention: str, *, draw: Draw) -> Call:
    scans = selective_scan.RECIPES["selective_scan"]
    attentions = sliding_window_attention.RECIPES["sliding_window_attention"]
    return side_by_side(scans[scan], attentions[attention], draw=draw)


# Name of the sample: samples of the scan and of the attention.
_PAIRS = {
    "hybrid": ("channel_last", "window"),
    "float64": ("float64", "float64"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "float16": ("float16", "float16"),
    "two_dtypes": ("bfloat16", "window"),
    "state": ("everything", "one_kv_head"),
    "packed": ("packed", "packed_more_keys"),
    "plain": ("bare", "window_both_sides"),
    "scale": ("groups", "scale"),
    "softcap": ("constant", "softcap"),
    "strided": ("gaps", "gaps"),
    "past_a_tile": ("past_a_chunk", "past_a_tile"),
    "no_scan": ("no_batch", "window"),
    "no_attention": ("channel_last", "no_queries"),
    "nothing": ("no_batch", "no_batch"),
}
_RECIPES: dict[str, Recipe] = {name: partial(_both, *pair) for name, pair in _PAIRS.items()}
RECIPES = {"scan_swa": _RECIPES}
