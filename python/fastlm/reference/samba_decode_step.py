"""One token of decoding through a pair of Samba blocks: every layer written out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastlm.reference.causal_conv1d import causal_conv1d_update
from fastlm.reference.selective_scan import selective_state_update
from fastlm.reference.sliding_window_attention import sliding_window_attention_update


def samba_decode_step(
    hidden: Tensor,
    *,
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
    window_size: tuple[int, int],
    eps: float = 1e-5,
    softmax_scale: float | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
) -> Tensor:
    """See `fastlm.ops.samba_decode_step`."""
    dtype = in_proj.dtype

    def norm(h: Tensor, weight: Tensor) -> Tensor:
        scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        return (h * scale * weight.to(h.dtype)).to(dtype)

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(x.to(hidden.dtype), weight.to(hidden.dtype)).to(dtype)

    def mlp(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        return linear(functional.silu(linear(x, w1)) * linear(x, w2), w3)

    rank, state = dt_proj.shape[1], A_log.shape[1]
    decay = -torch.exp(A_log.to(hidden.dtype))
    x, z = linear(norm(hidden, mamba_norm), in_proj).chunk(2, dim=-1)
    u = causal_conv1d_update(x, conv_state, conv_weight, conv_bias, activation="silu")
    low, b, c = linear(u, x_proj).split([rank, state, state], dim=-1)
    y = selective_state_update(
        scan_state, u, linear(low, dt_proj), decay, b, c, D, z, dt_bias=dt_bias, dt_softplus=True
    )
    h = hidden + linear(y, out_proj)
    h = h + mlp(norm(h, mamba_mlp_norm), mamba_w1, mamba_w2, mamba_w3)

    head_dim = k_cache.shape[3]
    heads = norm(h, attn_norm)
    q, k, v = (
        linear(heads, weight).unflatten(-1, (-1, head_dim)).unsqueeze(1)
        for weight in (q_proj, k_proj, v_proj)
    )
    out = sliding_window_attention_update(
        q,
        k,
        v,
        k_cache,
        v_cache,
        cache_seqlens,
        window_size=window_size,
        softmax_scale=softmax_scale,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
    )
    h = h + linear(out.flatten(1), o_proj)
    return h + mlp(norm(h, attn_mlp_norm), attn_w1, attn_w2, attn_w3)
