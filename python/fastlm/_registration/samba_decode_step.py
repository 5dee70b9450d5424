"""samba_decode_step: fake kernel and autocast. Checks use the words of csrc/ops/samba_decode_step/cpu.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm._registration import causal_conv1d, checks, selective_scan, sliding_window_attention
from fastlm._registration.autocast import Cast

_OP = "samba_decode_step"


def _check_weight(name: str, t: Tensor, shape: Sequence[int | torch.SymInt], like: Tensor) -> None:
    checks.shape(_OP, name, t, tuple(shape))
    checks.same_dtype(_OP, name, t, "in_proj", like)
    checks.same_device(_OP, name, t, "hidden", like)


def _check_parameter(name: str, t: Tensor, size: int | torch.SymInt, like: Tensor) -> None:
    checks.floating(_OP, name, t)
    checks.shape(_OP, name, t, (size,))
    checks.same_device(_OP, name, t, "hidden", like)


def _check_mlp(prefix: str, norm: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, like: Tensor) -> None:
    width = like.shape[1]
    _check_parameter(f"{prefix}_mlp_norm", norm, width, like)
    checks.dim(_OP, f"{prefix}_w1", w1, 2, "(f, d)")
    inner = w1.shape[0]
    _check_weight(f"{prefix}_w1", w1, (inner, width), like)
    _check_weight(f"{prefix}_w2", w2, (inner, width), like)
    _check_weight(f"{prefix}_w3", w3, (width, inner), like)


def _fake_step(
    hidden: Tensor,
    mamba_norm: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    mamba_mlp_norm: Tensor,
    mamba_w1: Tensor,
    mamba_w2: Tensor,
    mamba_w3: Tensor,
    conv_state: Tensor,
    scan_state: Tensor,
    attn_norm: Tensor,
    q_proj: Tensor,
    k_proj: Tensor,
    v_proj: Tensor,
    o_proj: Tensor,
    attn_mlp_norm: Tensor,
    attn_w1: Tensor,
    attn_w2: Tensor,
    attn_w3: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    window_size: Sequence[int],
    eps: float = 1e-5,
    softmax_scale: float | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
) -> Tensor:
    checks.floating(_OP, "in_proj", in_proj)
    acc = torch.float64 if in_proj.dtype == torch.float64 else torch.float32
    checks.dim(_OP, "hidden", hidden, 2, "(B, d)")
    torch._check_value(
        hidden.dtype == acc,
        lambda: (
            f"{_OP}: hidden must have dtype {checks.name_of(acc)} (that of sums), got {checks.name_of(hidden.dtype)}"
        ),
    )
    batch, width = hidden.shape
    checks.dim(_OP, "A_log", A_log, 2, "(D, N)")
    checks.floating(_OP, "A_log", A_log)
    checks.same_device(_OP, "A_log", A_log, "hidden", hidden)
    dim, state = A_log.shape
    checks.same_device(_OP, "in_proj", in_proj, "hidden", hidden)
    _check_parameter("mamba_norm", mamba_norm, width, hidden)
    checks.shape(_OP, "in_proj", in_proj, (2 * dim, width))
    checks.dim(_OP, "dt_proj", dt_proj, 2, "(D, R)")
    rank = dt_proj.shape[1]
    _check_weight("x_proj", x_proj, (rank + 2 * state, dim), in_proj)
    _check_weight("dt_proj", dt_proj, (dim, rank), in_proj)
    _check_weight("out_proj", out_proj, (width, dim), in_proj)
    _check_mlp("mamba", mamba_mlp_norm, mamba_w1, mamba_w2, mamba_w3, in_proj)
    _check_parameter("attn_norm", attn_norm, width, hidden)
    checks.dim(_OP, "k_cache", k_cache, 4, "(B, R, Hkv, K)")
    kv_heads, head_dim = k_cache.shape[2:]
    checks.dim(_OP, "q_proj", q_proj, 2, "(H K, d)")
    torch._check_value(
        head_dim > 0 and q_proj.shape[0] % head_dim == 0,
        lambda: (
            f"{_OP}: q_proj must have a multiple of {head_dim} rows (the head dim of k_cache), got {q_proj.shape[0]}"
        ),
    )
    heads = q_proj.shape[0] // head_dim
    _check_weight("q_proj", q_proj, (heads * head_dim, width), in_proj)
    _check_weight("k_proj", k_proj, (kv_heads * head_dim, width), in_proj)
    _check_weight("v_proj", v_proj, (kv_heads * head_dim, width), in_proj)
    _check_weight("o_proj", o_proj, (width, heads * head_dim), in_proj)
    _check_mlp("attn", attn_mlp_norm, attn_w1, attn_w2, attn_w3, in_proj)
    torch._check_value(eps >= 0, lambda: f"{_OP}: eps must not be negative, got {eps:g}")

    decay = A_log.new_empty(dim, state, dtype=acc)
    x, low = in_proj.new_empty(batch, dim), in_proj.new_empty(batch, state)
    causal_conv1d.check_update(_OP, x, conv_state, conv_weight, conv_bias, "silu", None, None)
    selective_scan.check_update(_OP, scan_state, x, x, decay, low, low, D, x, dt_bias, None)
    q = in_proj.new_empty(batch, 1, heads, head_dim)
    k = in_proj.new_empty(batch, 1, kv_heads, head_dim)
    sliding_window_attention.check_update(
        _OP, q, k, k, k_cache, v_cache, cache_seqlens, window_size, softmax_scale, rotary_cos, rotary_sin
    )
    return hidden.new_empty(hidden.shape)


FAKES = {_OP: _fake_step}
# States and rings are written in place and cannot be cast, so nothing is: weights, states and rings have one dtype.
AUTOCAST = {_OP: Cast(())}
