"""sliding_window_attention: fake kernels, gradient and autocast.

Checks use the words of csrc/ops/sliding_window_attention/checks.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm import _ops
from fastlm._registration import checks
from fastlm._registration.autocast import Cast

_MAX_HEAD_DIM = 512


def _check_window(op: str, window_size: Sequence[int]) -> None:
    torch._check_value(
        len(window_size) == 2,
        lambda: f"{op}: window_size must have 2 bounds (left, right), got {len(window_size)}",
    )
    left, right = window_size
    torch._check_value(
        left >= -1 and right >= -1,
        lambda: f"{op}: window_size must have bounds of at least -1 (no bound), got ({left}, {right})",
    )


def _check_scale(op: str, softmax_scale: float | None) -> None:
    if softmax_scale is not None:
        torch._check_value(
            math.isfinite(softmax_scale), lambda: f"{op}: softmax_scale must be finite, got {softmax_scale:g}"
        )


def _check_heads(op: str, q: Tensor, k: Tensor) -> None:
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    torch._check_value(
        1 <= head_dim <= _MAX_HEAD_DIM,
        lambda: f"{op}: q must have a head dim between 1 and {_MAX_HEAD_DIM}, got {head_dim}",
    )
    torch._check_value(
        k.shape[-1] == head_dim,
        lambda: f"{op}: k must have the head dim of q, {head_dim}, got {k.shape[-1]}",
    )
    torch._check_value(
        kv_heads >= 1 and heads % kv_heads == 0,
        lambda: f"{op}: k must have a number of heads that divides that of q, {heads}, got {kv_heads}",
    )


def _check_like(op: str, name: str, t: Tensor, q: Tensor) -> None:
    checks.same_dtype(op, name, t, "q", q)
    checks.same_device(op, name, t, "q", q)


def check_forward(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window_size: Sequence[int],
    softmax_scale: float | None,
    softcap: float,
    max_seqlen_q: int | torch.SymInt | None,
    max_seqlen_k: int | torch.SymInt | None,
) -> None:
    packed = cu_seqlens_q is not None
    torch._check_value(
        packed == (cu_seqlens_k is not None),
        lambda: f"{op}: cu_seqlens_q and cu_seqlens_k must be given together",
    )
    checks.floating(op, "q", q)
    checks.dim(op, "q", q, 3 if packed else 4, "(T, H, K)" if packed else "(B, Lq, H, K)")
    checks.dim(op, "k", k, 3 if packed else 4, "(T, Hkv, K)" if packed else "(B, Lk, Hkv, K)")
    _check_like(op, "k", k, q)
    if not packed:
        torch._check_value(
            k.shape[0] == q.shape[0],
            lambda: f"{op}: k must have the batch size of q, {q.shape[0]}, got {k.shape[0]}",
        )
    _check_heads(op, q, k)
    checks.shape(op, "v", v, k.shape)
    _check_like(op, "v", v, q)
    _check_window(op, window_size)
    _check_scale(op, softmax_scale)
    torch._check_value(
        softcap >= 0 and math.isfinite(softcap),
        lambda: f"{op}: softcap must be finite and not negative, got {softcap:g}",
    )
    if cu_seqlens_q is None or cu_seqlens_k is None:
        torch._check_value(
            max_seqlen_q is None and max_seqlen_k is None,
            lambda: f"{op}: max_seqlen_q and max_seqlen_k must be None without cu_seqlens_q and cu_seqlens_k",
        )
        return
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        checks.cu_seqlens(op, name, t)
        checks.same_device(op, name, t, "q", q)
    checks.shape(op, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape)


def _empty_lse(q: Tensor) -> Tensor:
    """(B, H, Lq), packed (H, T)."""
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(shape, dtype=_lse_dtype(q))


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    window_size: Sequence[int] = (-1, -1),
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    max_seqlen_q: int | torch.SymInt | None = None,
    max_seqlen_k: int | torch.SymInt | None = None,
) -> tuple[Tensor, Tensor]:
    op = "sliding_window_attention"
    bounds = (cu_seqlens_q, cu_seqlens_k)
    check_forward(op, q, k, v, *bounds, window_size, softmax_scale, softcap, max_seqlen_q, max_seqlen_k)
    return empty_outputs(q)


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of a forward pass."""
    return q.new_empty(q.shape), _empty_lse(q)


def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *,
    window_size: Sequence[int],
    causal: bool,
    softmax_scale: float | None,
    softcap: float,
    max_seqlen_q: int | torch.SymInt | None,
    max_seqlen_k: int | torch.SymInt | None,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "sliding_window_attention_backward"
    bounds = (cu_seqlens_q, cu_seqlens_k)
    check_forward(op, q, k, v, *bounds, window_size, softmax_scale, softcap, max_seqlen_q, max_seqlen_k)
    for name, t in (("dout", dout), ("out", out)):
        checks.shape(op, name, t, q.shape)
        _check_like(op, name, t, q)
    checks.shape(op, "lse", lse, _empty_lse(q).shape)
    wanted = _lse_dtype(q)
    torch._check_value(
        lse.dtype == wanted,
        lambda: f"{op}: lse must have dtype {checks.name_of(wanted)}, got {checks.name_of(lse.dtype)}",
    )
    checks.same_device(op, "lse", lse, "q", q)
    if dlse is not None:
        checks.shape(op, "dlse", dlse, lse.shape)
        checks.same_dtype(op, "dlse", dlse, "lse", lse)
        checks.same_device(op, "dlse", dlse, "q", q)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def check_update(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    window_size: Sequence[int],
    softmax_scale: float | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
) -> None:
    checks.floating(op, "q", q)
    checks.dim(op, "q", q, 4, "(B, m, H, K)")
    checks.dim(op, "k", k, 4, "(B, m, Hkv, K)")
    _check_like(op, "k", k, q)
    _check_heads(op, q, k)
    checks.shape(op, "k", k, (q.shape[0], q.shape[1], k.shape[2], q.shape[3]))
    checks.shape(op, "v", v, k.shape)
    _check_like(op, "v", v, q)
    _check_window(op, window_size)
    _check_scale(op, softmax_scale)
    checks.dim(op, "k_cache", k_cache, 4, "(B, R, Hkv, K)")
    checks.shape(op, "k_cache", k_cache, (q.shape[0], k_cache.shape[1], k.shape[2], q.shape[3]))
    _check_like(op, "k_cache", k_cache, q)
    left, new, slots = max(window_size[0], 0), q.shape[1], k_cache.shape[1]
    torch._check_value(
        left + new <= slots,
        lambda: (
            f"{op}: k_cache must have at least {left} + {new} slots (left bound of the window + new tokens), "
            f"got {slots}"
        ),
    )
    checks.shape(op, "v_cache", v_cache, k_cache.shape)
    _check_like(op, "v_cache", v_cache, q)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        torch._check_value(
            cache.stride(3) == 1 or cache.shape[3] <= 1,
            lambda n=name, t=cache: (
                f"{op}: {n} must have stride 1 over its last dimension, got {t.stride(3)}"
            ),
        )
    checks.index_vector(op, "cache_seqlens", cache_seqlens)
    checks.shape(op, "cache_seqlens", cache_seqlens, (q.shape[0],))
    checks.same_device(op, "cache_seqlens", cache_seqlens, "q", q)
    _check_rotary(op, q, rotary_cos, rotary_sin)


def _fake_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    window_size: Sequence[int],
    softmax_scale: float | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
) -> Tensor:
    check_update(
        "sliding_window_attention_update",
        q,
        k,
        v,
        k_cache,
        v_cache,
        cache_seqlens,
        window_size,
        softmax_scale,
        rotary_cos,
        rotary_sin,
    )
    return q.new_empty(q.shape)


def _check_rotary(op: str, q: Tensor, rotary_cos: Tensor | None, rotary_sin: Tensor | None) -> None:
    torch._check_value(
        (rotary_cos is None) == (rotary_sin is None),
        lambda: f"{op}: rotary_cos and rotary_sin must be given together",
    )
    if rotary_cos is None or rotary_sin is None:
        return
    torch._check_value(
        q.shape[3] % 2 == 0,
        lambda: f"{op}: q must have an even head dim when rotary_cos is given, got {q.shape[3]}",
    )
    checks.dim(op, "rotary_cos", rotary_cos, 2, "(P, K/2)")
    checks.floating(op, "rotary_cos", rotary_cos)
    checks.shape(op, "rotary_cos", rotary_cos, (rotary_cos.shape[0], q.shape[3] // 2))
    checks.same_device(op, "rotary_cos", rotary_cos, "q", q)
    checks.shape(op, "rotary_sin", rotary_sin, rotary_cos.shape)
    checks.same_dtype(op, "rotary_sin", rotary_sin, "rotary_cos", rotary_cos)
    checks.same_device(op, "rotary_sin", rotary_sin, "q", q)


_OPTIONS: dict[str, Any] = {
    "window_size": (-1, -1),
    "causal": True,
    "softmax_scale": None,
    "softcap": 0.0,
    "max_seqlen_q": None,
    "max_seqlen_k": None,
}


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.options = options_of(keyword_only_inputs)
    ctx.set_materialize_grads(False)


def options_of(keyword_only_inputs: dict[str, Any]) -> dict[str, Any]:
    """The options of a call, defaults filled in."""
    return {name: keyword_only_inputs.get(name, default) for name, default in _OPTIONS.items()}


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    return *gradients(ctx.saved_tensors, ctx.options, dout, dlse), None, None


def gradients(
    saved: tuple[Any, ...], options: dict[str, Any], dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Of q, k and v, from what the forward pass saved."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse = saved
    if dout is None and dlse is None:
        return (None,) * 3
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv = _ops.sliding_window_attention_backward(
        dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, **options
    )
    return dq, dk, dv


FAKES = {
    "sliding_window_attention": _fake_forward,
    "sliding_window_attention_backward": _fake_backward,
    "sliding_window_attention_update": _fake_update,
}
GRADIENTS = {"sliding_window_attention": (_setup_context, _backward)}
# A decoding step writes into its caches, which cannot be cast: it takes their dtype instead of autocast's.
AUTOCAST = {
    "sliding_window_attention": Cast(("q", "k", "v")),
    "sliding_window_attention_update": Cast(("q", "k", "v"), like="k_cache"),
}
