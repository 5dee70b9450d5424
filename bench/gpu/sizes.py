"""Samples in odd sizes: one below, at and past every tile; head dims and state sizes from 1 to the largest; packed sequences with
empty ones; windows at their edges; groups of heads.

Each is a recipe of the test suite with other sizes, so a family joins by adding recipes there and lines here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from .operators import support

LENGTHS = (1, 63, 64, 65, 127, 128, 129)
STATES = (1, 4, 8, 16, 17, 64, 256)
HEAD_DIMS = (1, 24, 64, 80, 128, 256, 512)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_PACKED = [0, 0, 1, 64, 64, 129, 200, 200, 257]


def samples(op: str, *, tiny: bool = False) -> list[Any]:
    """Samples of one operator in odd sizes; `tiny`: a few of them."""
    library = support()
    recipes = {
        name: recipe for family in library.FAMILIES.values() for name, recipe in family.RECIPES.items()
    }
    makers = {
        "selective_scan": _scan,
        "selective_state_update": _state_update,
        "causal_conv1d": _conv,
        "causal_conv1d_update": _conv_update,
        "sliding_window_attention": _attention,
        "sliding_window_attention_update": _attention_update,
        "samba_decode_step": _decode_step,
        "grouped_gemm": _products,
        "moe_experts": _experts,
        "linear_nll": _nll,
        "select_tokens": _select,
        "grin_route": _route,
        "moe_plan": _plan,
    }
    if op == "scan_swa":
        found = _scan_swa(recipes)
    elif op in makers:
        found = makers[op](recipes[op])
    else:
        return []
    made = [library.Sample(op, name, recipe) for name, recipe in found]
    return made[:: max(1, len(made) // 3)] if tiny else made


Named = Iterator[tuple[str, Any]]


def _scan(recipes: dict[str, Any]) -> Named:
    base = recipes["everything"]
    for length in LENGTHS:
        for word, dtype in DTYPES.items():
            layout = "channel_last" if word != "fp16" else "contiguous"
            yield (
                f"L{length}_{word}",
                partial(base, shape=(2, 33, length), state=16, dtype=dtype, layout=layout),
            )
    for state in STATES:
        for word in ("fp32", "bf16"):
            for layout in ("contiguous", "channel_last"):
                sizes = {"shape": (1, 21, 65), "state": state, "dtype": DTYPES[word], "layout": layout}
                yield f"N{state}_{word}_{layout}", partial(base, **sizes)
    for dim in (1, 31, 32, 64, 130):
        yield (
            f"D{dim}_bf16",
            partial(base, shape=(3, dim, 70), state=16, dtype=torch.bfloat16, layout="channel_last"),
        )
    for layout in ("contiguous", "channel_last"):
        for word in ("fp32", "bf16"):
            sizes = {"shape": (1, 36, 257), "state": 16, "dtype": DTYPES[word], "layout": layout}
            yield f"packed_{word}_{layout}", partial(base, cu_seqlens=_PACKED, **sizes)
            yield f"groups_{word}_{layout}", partial(base, groups_b=2, groups_c=3, **sizes)
    constant = {"groups_b": "constant", "groups_c": "constant"}
    yield "constant_L129", partial(base, shape=(2, 33, 129), state=16, **constant)
    yield "all_states_L129", partial(base, shape=(1, 17, 129), state=16, all_states=True)
    yield (
        "many_chunks",
        partial(base, shape=(1, 40, 390), state=16, dtype=torch.bfloat16, layout="channel_last"),
    )


def _state_update(recipes: dict[str, Any]) -> Named:
    base = recipes["everything"]
    for state in STATES:
        for word, dtype in DTYPES.items():
            yield f"N{state}_{word}", partial(base, batch=3, dim=33, state=state, dtype=dtype)
    for batch in (1, 2, 17, 64):
        yield f"B{batch}_bf16", partial(base, batch=batch, dim=130, state=16, dtype=torch.bfloat16)
    for dim in (1, 31, 127, 129):
        yield f"D{dim}_fp32", partial(base, batch=2, dim=dim, state=16)
    slots = {"slots": [3, -1, 0, 6], "num_slots": 8}
    yield "slots_bf16", partial(base, batch=4, dim=70, state=16, dtype=torch.bfloat16, **slots)


def _conv(recipes: dict[str, Any]) -> Named:
    base = recipes["initial"]
    for length in LENGTHS:
        for word, dtype in DTYPES.items():
            layout = "channel_last" if word in ("bf16", "fp64") else "contiguous"
            yield f"L{length}_{word}", partial(base, shape=(2, 33, length), dtype=dtype, layout=layout)
    for width in (1, 2, 3, 4, 5, 9):
        for layout in ("contiguous", "channel_last"):
            sizes = {"shape": (2, 21, 65), "width": width, "dtype": torch.bfloat16, "layout": layout}
            yield f"W{width}_{layout}", partial(base, **sizes)
    for dim in (1, 63, 64, 65, 257):
        for layout in ("contiguous", "channel_last"):
            yield f"D{dim}_{layout}", partial(base, shape=(1, dim, 70), dtype=torch.bfloat16, layout=layout)
    for layout in ("contiguous", "channel_last"):
        yield f"packed_{layout}", partial(base, shape=(1, 36, 257), cu_seqlens=_PACKED, layout=layout)


def _conv_update(recipes: dict[str, Any]) -> Named:
    base = recipes["one_input"]
    for dim in (1, 31, 127, 129, 1030):
        for word, dtype in DTYPES.items():
            yield f"D{dim}_{word}", partial(base, batch=3, dim=dim, size=3, dtype=dtype)
    for batch in (1, 17, 64):
        yield f"B{batch}", partial(base, batch=batch, dim=70, size=3, dtype=torch.bfloat16)
    for new in (1, 2, 5, 9):
        yield f"new{new}", partial(base, batch=2, dim=70, new=new, size=6, seen=[0, 11], dtype=torch.bfloat16)


def _attention(recipes: dict[str, Any]) -> Named:
    base = recipes["window"]
    for length in LENGTHS:
        for word, dtype in DTYPES.items():
            sizes = {"batch": 2, "queries": length, "head_dim": 64, "dtype": dtype}
            yield f"L{length}_{word}", partial(base, window_size=(40, 0), **sizes)
    for head_dim in HEAD_DIMS:
        for word in ("bf16", "fp16", "fp32"):
            sizes = {"batch": 1, "queries": 129, "head_dim": head_dim, "dtype": DTYPES[word]}
            yield f"K{head_dim}_{word}", partial(base, window_size=(64, 0), **sizes)
    for left in (-1, 0, 1, 62, 63, 64, 65, 126, 127, 128, 129, 400):
        sizes = {"batch": 1, "queries": 300, "head_dim": 64, "heads": (2, 1), "dtype": torch.bfloat16}
        yield f"window{left}", partial(base, window_size=(left, 0), **sizes)
    for heads in ((8, 1), (6, 2), (4, 4), (18, 18), (11, 1)):
        sizes = {"batch": 1, "queries": 130, "head_dim": 128, "heads": heads, "dtype": torch.bfloat16}
        yield f"heads{heads[0]}_{heads[1]}", partial(base, window_size=(70, 0), **sizes)
    for causal, window in ((False, (30, 20)), (False, (-1, -1)), (False, (-1, 5)), (True, (-1, -1))):
        sizes = {"batch": 1, "queries": 140, "head_dim": 64, "dtype": torch.bfloat16, "causal": causal}
        yield f"sides{window[0]}_{window[1]}_{causal}", partial(base, window_size=window, **sizes)
    for queries, keys in ((1, 257), (64, 257), (129, 65), (257, 1), (200, 0)):
        sizes = {"queries": queries, "keys": keys, "head_dim": 64, "dtype": torch.bfloat16}
        yield f"q{queries}_k{keys}", partial(base, window_size=(64, 0), **sizes)
    for head_dim in (64, 128, 80):
        sizes = {"head_dim": head_dim, "dtype": torch.bfloat16, "window_size": (50, 0)}
        yield f"packed_K{head_dim}", partial(base, cu_seqlens_q=_PACKED, **sizes)
        more = [0, 5, 70, 200, 200, 300, 371, 380, 500]
        yield f"packed_more_keys_K{head_dim}", partial(base, cu_seqlens_q=_PACKED, cu_seqlens_k=more, **sizes)
    for layout in ("channel_last", "gaps", "no_unit_stride"):
        sizes = {"queries": 130, "head_dim": 64, "dtype": torch.bfloat16, "layout": layout}
        yield f"layout_{layout}", partial(base, window_size=(64, 0), **sizes)
    sizes = {"queries": 140, "head_dim": 128, "dtype": torch.bfloat16, "window_size": (64, 0)}
    yield "softcap_bf16", partial(base, softcap=2.0, scale=2.0, **sizes)
    yield "long_bf16", partial(base, batch=1, **(sizes | {"queries": 1100, "window_size": (511, 0)}))


def _attention_update(recipes: dict[str, Any]) -> Named:
    base = recipes["one_new"]
    for head_dim in (1, 24, 64, 80, 128, 256, 512):
        for word, dtype in DTYPES.items():
            sizes = {"ring": 70, "head_dim": head_dim, "dtype": dtype, "window_size": (63, 0)}
            yield f"K{head_dim}_{word}", partial(base, seen=(0, 30, 500), **sizes)
    for heads in ((8, 1), (4, 4), (18, 18), (11, 1)):
        sizes = {
            "ring": 128,
            "head_dim": 128,
            "heads": heads,
            "dtype": torch.bfloat16,
            "window_size": (127, 0),
        }
        yield f"heads{heads[0]}_{heads[1]}", partial(base, seen=(700, 5), **sizes)
    for new in (2, 5, 17):
        sizes = {"ring": 100, "head_dim": 64, "new": new, "dtype": torch.bfloat16, "window_size": (63, 0)}
        yield f"new{new}", partial(base, seen=(0, 99, 250), rotary=True, **sizes)
    for ring in (1, 63, 64, 65, 2048):
        sizes = {"ring": ring, "head_dim": 64, "dtype": torch.bfloat16, "window_size": (ring - 1, 0)}
        yield f"ring{ring}", partial(base, seen=(3 * ring + 1,), rotary=True, **sizes)


def _decode_step(recipes: dict[str, Any]) -> Named:
    base = recipes["model"]
    sizes = {
        "width": 256,
        "dim": 512,
        "state": 16,
        "rank": 16,
        "heads": (4, 2),
        "head_dim": 64,
        "inner": (688, 688),
    }
    window = {"ring": 128, "window_size": (127, 0)}
    for word, dtype in DTYPES.items():
        yield f"demo_{word}", partial(base, seen=(300, 4), dtype=dtype, **sizes, **window)
    for rows in (1, 3, 4, 5, 9):
        seen = tuple(37 * (i + 1) for i in range(rows))
        yield f"rows{rows}_bf16", partial(base, seen=seen, dtype=torch.bfloat16, **sizes, **window)
    odd = {
        "width": 130,
        "dim": 259,
        "state": 16,
        "rank": 9,
        "heads": (3, 1),
        "head_dim": 80,
        "inner": (345, 129),
    }
    yield "odd_bf16", partial(base, seen=(300,), dtype=torch.bfloat16, **odd, **window)
    yield "states_bf16", partial(base, seen=(5,), dtype=torch.bfloat16, **(sizes | {"state": 64}), **window)


def _select(recipes: dict[str, Any]) -> Named:
    base = recipes["ties"]
    for tokens in (*LENGTHS, 4097, 40960, 40961, 70001):  # one block takes 40960 scores in fp32
        for tie_break in ("index", "random"):
            yield f"T{tokens}_{tie_break}", partial(base, (tokens,), tie_break=tie_break, special=tokens > 4)
    for word, dtype in DTYPES.items():
        yield f"T50003_{word}", partial(base, (50003,), dtype=dtype, special=True, tie_break="random", seed=3)
    lengths = tuple(b - a for a, b in pairwise(_PACKED))
    yield "packed", partial(base, (sum(lengths),), lengths=lengths)
    yield "packed_several_blocks", partial(base, (90_004,), lengths=(60_001, 0, 3, 30_000))
    yield "many_segments", partial(base, (4000,), lengths=(7, 0, 1, 12) * 200)


def _route(recipes: dict[str, Any]) -> Named:
    base = recipes["seed"]
    for experts in (2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 515):
        for word, dtype in DTYPES.items():
            yield f"E{experts}_{word}", partial(base, 67, experts, dtype=dtype)
    for tokens in (1, 31, 33, 1030, 70_000):
        yield f"T{tokens}_bf16", partial(base, tokens, 16, dtype=torch.bfloat16)
        yield f"T{tokens}_eval", partial(base, tokens, 64, random="", near=False, top_k=8)
    yield "everyone_E64", partial(recipes["noise"], 300, 64, jitter_eps=10.0, top_k=8)


def _plan(recipes: dict[str, Any]) -> Named:
    base = recipes["plain"]
    for experts in (1, 16, 371, 372, 1364, 1365, 5000):
        for tokens in (1, 1023, 1025, 4096, 4097):
            yield f"T{tokens}_E{experts}", partial(base, tokens, 2, experts)
    for routing in ("one_pair", "twice", "some_left_out", "none"):
        yield f"{routing}_E64", partial(base, 40_000, 8, 64, routing, torch.int32)


def _scan_swa(recipes: dict[str, Any]) -> Named:
    scans, attentions = (
        dict(_scan(recipes["selective_scan"])),
        dict(_attention(recipes["sliding_window_attention"])),
    )
    pairs = [
        *((f"L{length}_bf16", f"L{length}_bf16") for length in LENGTHS),
        ("L129_fp32", "L129_fp32"),
        ("L129_fp16", "L129_fp16"),
        ("packed_bf16_channel_last", "packed_K128"),
        ("many_chunks", "long_bf16"),
        ("N64_bf16_channel_last", "K80_bf16"),
        ("L64_bf16", "K256_bf16"),
        ("many_chunks", "L65_bf16"),
        ("L1_bf16", "long_bf16"),
    ]
    both = support().scan_swa.side_by_side
    for scan, attention in pairs:
        yield f"{scan}__{attention}", partial(both, scans[scan], attentions[attention])


_GROUPS = {
    "edges": (1, 0, 127, 128, 129, 64, 255, 0, 257),
    "one_large": (700,),
    "skewed": (0, 0, 530, 1, 0, 3),
    "few_each": (1, 2, 0, 3, 1, 8, 16, 17),
}


def _products(recipes: dict[str, Any]) -> Named:
    base = recipes["plain"]
    for name, groups in _GROUPS.items():
        for word, dtype in DTYPES.items():
            for trans_b in (True, False):
                sizes = {"groups": groups, "depth": 136, "columns": 264, "rest": 5, "dtype": dtype}
                yield f"{name}_{word}_{trans_b}", partial(base, trans_b=trans_b, **sizes)
    for depth in (1, 8, 31, 63, 64, 65, 128, 200):
        for columns in (1, 8, 129, 256, 257):
            sizes = {"groups": (3, 130, 0, 70), "depth": depth, "columns": columns, "dtype": torch.bfloat16}
            yield f"Kd{depth}_N{columns}", partial(base, **sizes)


def _experts(recipes: dict[str, Any]) -> Named:
    base = recipes["plain"]
    for tokens in (1, 5, 64, 127, 129, 400):
        for word, dtype in DTYPES.items():
            sizes = {"tokens": tokens, "experts": 6, "size": 136, "inner": 200, "dtype": dtype}
            yield f"T{tokens}_{word}", partial(base, **sizes)
    for size, inner in ((1, 1), (8, 128), (64, 129), (136, 264), (67, 33)):
        sizes = {"tokens": 150, "size": size, "inner": inner, "dtype": torch.bfloat16, "bias": True}
        yield f"h{size}_I{inner}", partial(base, **sizes)
    for routing in ("one_pair", "few", "some_left_out", "none", "twice"):
        sizes = {"tokens": 300, "experts": 9, "size": 72, "inner": 136, "dtype": torch.bfloat16}
        yield f"routing_{routing}", partial(base, routing=routing, bias=True, grad_weights=True, **sizes)
    for activation in ("silu", "gelu_tanh", "relu", "relu2"):
        for gated in (True, False):
            sizes = {"tokens": 150, "size": 72, "inner": 136, "dtype": torch.bfloat16, "gated": gated}
            yield f"{activation}_{gated}", partial(base, activation=activation, **sizes)
    yield (
        "transposed",
        partial(base, tokens=150, size=72, inner=136, dtype=torch.bfloat16, transposed=True),
    )
    yield "many_experts", partial(base, tokens=200, experts=130, top_k=8, size=72, inner=40)


def _nll(recipes: dict[str, Any]) -> Named:
    base = recipes["plain"]
    for tokens in LENGTHS:
        for word, dtype in DTYPES.items():
            yield f"T{tokens}_{word}", partial(base, tokens, 520, 72, dtype=dtype)
    for vocab in (1, 8, 63, 255, 256, 257, 4095, 4097, 9000):
        for word in ("fp32", "bf16"):
            sizes = {"dtype": DTYPES[word], "bias": True, "return_entropy": True}
            yield f"V{vocab}_{word}", partial(base, 70, vocab, 40, **sizes)
    for hidden in (1, 31, 64, 65, 264):
        yield f"h{hidden}", partial(base, 130, 300, hidden, dtype=torch.bfloat16, softcap=5.0)
    for ignored in ("some", "all", "none"):
        yield f"ignored_{ignored}", partial(base, 600, 300, 64, dtype=torch.bfloat16, ignored=ignored)
