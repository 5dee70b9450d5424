"""Decoding against a cache of keys and values, which new ones are first written into."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastlm.compat.flash_attn.attend import Options, Window, attend
from fastlm.compat.flash_attn.pages import check_pages, gather_pages, page_places
from fastlm.compat.flash_attn.rotary import rotate_at

_NAME = "flash_attn_with_kvcache"


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends new keys and values to the cache, if there are any, and attends to what it holds.

    The queries of row `b` see cache positions `cache_leftpad[b] .. cache_seqlens[b] + m - 1`, the mask aligned to
    the last of them (bottom-right).

    Args:
        q: shape `(B, Lq, H, K)`.
        k_cache, v_cache: shape `(Bc, S, Hkv, K)`; with `block_table` `(pages, page_size, Hkv, K)`; written in place.
        k, v: shape `(B, m, Hkv, K)`: stored at positions `cache_seqlens[b] .. cache_seqlens[b] + m - 1`; default
            none.
        rotary_cos, rotary_sin: shape `(P, R/2)`, row `p` for position `p`: new keys are turned at the position they
            are stored at; query `i` at `cache_seqlens[b] + i` if causal or with a window, else at
            `cache_seqlens[b]`. Only together with `k`.
        cache_seqlens: tokens in the cache before this call, one integer or shape `(B,)`, integer; default: all of
            it. Not changed.
        cache_batch_idx: shape `(B,)`, integer: the row of the cache for each row of q; default: its own. Costs one
            copy of those rows.
        cache_leftpad: shape `(B,)`, integer: where each row begins; default 0.
        block_table: shape `(B, M)`, integer: the pages of each row, in order. Costs one copy of what the cache
            holds; pages may have any size.
        softmax_scale, causal, window_size, softcap: as in `flash_attn_func`.
        rotary_interleaved: dimensions `2i` and `2i + 1` turn together, instead of `i` and `i + R/2`.
        alibi_slopes: must be None.
        num_splits: how the original divides its work; no influence here.
        return_softmax_lse: also return the log-sum-exp.

    Returns:
        out: shape and dtype of `q`; with `return_softmax_lse` the pair `(out, lse)`, the latter of shape
        `(B, H, Lq)`, float32 (float64 for float64).

    Raises:
        NotImplementedError: `alibi_slopes` is given.
        ValueError: an argument is given without another that it needs, or with one it cannot go with; a shape does
            not fit; the cache is too short; the rest in the words of `fastlm.ops.sliding_window_attention`.
        IndexError: a row, page or position that does not exist.

    Note:
        Not differentiable. Where the rows of the cache do not follow each other in memory, they are copied once.
        Values are checked on CPU; nothing of the cache beyond what is seen has any influence, not even NaN.

    Source: Dao-AILab/flash-attention, `flash_attn_with_kvcache`.
    """
    options = Options(_NAME, 0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
    options.refuse_unsupported()
    by_token = causal or options.window() != (-1, -1)
    _check_given_together(k=k, v=v)
    _check_given_together(rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    _check_shapes(q, k_cache, v_cache, k, v)
    rows = _vector("cache_batch_idx", cache_batch_idx, q)
    leftpad = _vector("cache_leftpad", cache_leftpad, q)
    seen = _vector("cache_seqlens", cache_seqlens, q)
    for argument, t in (("cache_batch_idx", rows), ("cache_leftpad", leftpad)):
        if t is not None and block_table is not None:
            raise ValueError(f"{_NAME}: {argument} must be None when block_table is given, got {t.tolist()}")
    if k is None:
        for argument, t in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
            if t is not None:
                raise ValueError(f"{_NAME}: {argument} must be None without k, got shape {tuple(t.shape)}")
        if seen is None:
            capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[-1])
            seen = torch.full((q.shape[0],), capacity, device=q.device)
    elif seen is None:
        raise ValueError(f"{_NAME}: cache_seqlens must be given when k is, got None")
    ends = seen if k is None else seen + k.shape[1]
    if rows is None and block_table is None:
        k_cache, v_cache = k_cache[: q.shape[0]], v_cache[: q.shape[0]]
    _check_values(q, seen, ends, k_cache, rows, block_table)

    if k is not None and v is not None:
        new = seen.unsqueeze(1) + torch.arange(k.shape[1], device=q.device)  # (B, m), positions
        if rotary_cos is not None and rotary_sin is not None:
            at = seen.unsqueeze(1) + torch.arange(q.shape[1], device=q.device) * int(by_token)
            q = rotate_at(_NAME, q, rotary_cos, rotary_sin, at, rotary_interleaved)
            k = rotate_at(_NAME, k, rotary_cos, rotary_sin, new, rotary_interleaved)
        row = torch.arange(q.shape[0], device=q.device) if rows is None else rows
        places = row.unsqueeze(1), new
        if block_table is not None:
            places = page_places(block_table, *places, k_cache.shape[1])
        k_cache[places], v_cache[places] = k, v

    length_q = torch.arange(q.shape[0] + 1, device=q.device) * q.shape[1]
    if block_table is not None:
        keys, values = gather_pages(_NAME, "k_cache", k_cache, v_cache, block_table, ends)
        bounds_q, bounds_k = length_q, functional.pad(ends.cumsum(0), (1, 0))
    else:
        if rows is not None:
            longest = int(ends.max()) if ends.numel() else 0
            k_cache, v_cache = k_cache[rows, :longest], v_cache[rows, :longest]
        begins = torch.zeros_like(ends) if leftpad is None else leftpad.clamp(min=0).minimum(ends)
        keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
        bounds_q, bounds_k = length_q.repeat_interleave(2), _bounds_with_gaps(begins, ends, k_cache.shape[1])
    out, lse = attend(q.flatten(0, 1), keys, values, options, cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k)
    out = out.view(q.shape)
    if not return_softmax_lse:
        return out
    return out, lse.view(q.shape[2], *q.shape[:2]).transpose(0, 1).contiguous()


def _bounds_with_gaps(begins: Tensor, ends: Tensor, row_length: int) -> Tensor:
    """Bounds of packed keys for a cache read where it lies.

    The cache is seen as one row of `B * S` keys, cut into `2B + 1` sequences: what lies in front of a row's part,
    the part, and so on. Those between get no queries, so that nothing of them is read.
    """
    offsets = torch.arange(begins.shape[0], device=begins.device) * row_length
    inner = torch.stack((offsets + begins, offsets + ends), dim=1).flatten()
    return torch.cat((inner.new_zeros(1), inner, inner.new_full((1,), begins.shape[0] * row_length)))


def _vector(argument: str, given: int | Tensor | None, q: Tensor) -> Tensor | None:
    """An integer per row of `q`, int64; None stays."""
    if given is None:
        return None
    if not isinstance(given, Tensor):
        return torch.full((q.shape[0],), given, device=q.device)
    if given.shape != (q.shape[0],) or given.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{_NAME}: {argument} must have shape ({q.shape[0]},) and dtype int32 or int64, "
            f"got {tuple(given.shape)}, {given.dtype}"
        )
    return given.long()


def _check_given_together(**pair: Tensor | None) -> None:
    missing = [argument for argument, t in pair.items() if t is None]
    if len(missing) == 1:
        given = next(argument for argument in pair if argument != missing[0])
        raise ValueError(f"{_NAME}: {missing[0]} must be given when {given} is, got None")


def _check_shapes(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None) -> None:
    """Shapes and dtypes fit; the operator would say so too, but the cache is written before it is asked."""
    for argument, t in (("q", q), ("k_cache", k_cache)):
        if t.dim() != 4:
            raise ValueError(f"{_NAME}: {argument} must have 4 dimensions, got shape {tuple(t.shape)}")
    kv_heads, head_dim = k_cache.shape[2:]
    if q.shape[3] != head_dim or kv_heads == 0 or q.shape[2] % kv_heads:
        raise ValueError(
            f"{_NAME}: q must have a multiple of {kv_heads} heads of {head_dim} dimensions, got {tuple(q.shape)}"
        )
    expected = {"v_cache": (v_cache, tuple(k_cache.shape)), "q": (q, tuple(q.shape))}
    if k is not None and v is not None:
        shape = (q.shape[0], *k.shape[1:2], kv_heads, head_dim)
        expected |= {"k": (k, shape), "v": (v, shape)}
    for argument, (t, shape) in expected.items():
        if tuple(t.shape) != shape:
            raise ValueError(f"{_NAME}: {argument} must have shape {shape}, got {tuple(t.shape)}")
        if t.dtype != k_cache.dtype:
            raise ValueError(
                f"{_NAME}: {argument} must have the dtype of k_cache, {k_cache.dtype}, got {t.dtype}"
            )


def _check_values(
    q: Tensor, seen: Tensor, ends: Tensor, k_cache: Tensor, rows: Tensor | None, block_table: Tensor | None
) -> None:
    """Rows, pages and lengths lie inside the cache; values are looked at on the CPU only."""
    capacity = k_cache.shape[1]
    if block_table is not None:
        check_pages(_NAME, "k_cache", k_cache, block_table, ends)
        capacity *= block_table.shape[1]
    elif rows is None and k_cache.shape[0] < q.shape[0]:
        raise ValueError(f"{_NAME}: k_cache must have at least {q.shape[0]} rows, got {k_cache.shape[0]}")
    if q.device.type != "cpu" or q.shape[0] == 0:
        return
    if rows is not None and not 0 <= int(rows.min()) <= int(rows.max()) < k_cache.shape[0]:
        raise IndexError(
            f"{_NAME}: cache_batch_idx must name rows below {k_cache.shape[0]}, got {rows.tolist()}"
        )
    if int(seen.min()) < 0 or int(ends.max()) > capacity:
        raise ValueError(
            f"{_NAME}: cache_seqlens must be at least 0 and leave room for the new keys in {capacity} positions, "
            f"got {seen.tolist()} and {int((ends - seen).max())} new keys"
        )
