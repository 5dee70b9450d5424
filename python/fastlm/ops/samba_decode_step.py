"""One token of decoding through a pair of Samba blocks."""

from __future__ import annotations

from torch import Tensor

from fastlm import _ops


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
    """Takes one token per row through a Mamba block and the sliding-window block behind it, in one parallel region.

    With `norm(x) = x / sqrt(mean(x^2) + eps) * weight`, `mlp(x) = w3(silu(w1 x) * (w2 x))` and every product without bias:
    `x, z = in_proj norm(h)`; `u = silu(conv(x))`; `dt, B, C = x_proj u`; `y` = the scan's step for `u`, `dt_proj dt`, gated by
    `z`; `h += out_proj y`; `h += mlp(norm(h))`; then `q, k, v` of `norm(h)`, turned by their position, the new key and value
    into the ring, attention over the window, `h += o_proj out`; `h += mlp(norm(h))`.

    Args:
        hidden: residual stream `h`, shape `(B, d)`, float32 (float64 if the weights are float64). Not written.
        mamba_norm, mamba_mlp_norm, attn_norm, attn_mlp_norm: weights of the norms, shape `(d,)`, any floating dtype.
        in_proj: shape `(2D, d)`; its dtype is that of all products: float32, bfloat16, float16 or float64.
        conv_weight, conv_bias: `(D, W)` and `(D,)` or None, any floating dtype.
        x_proj, dt_proj, out_proj: `(R + 2N, D)`, `(D, R)`, `(d, D)`, dtype of `in_proj`.
        dt_bias, A_log, D: `(D,)`, `(D, N)`, `(D,)`, any floating dtype; `A = -exp(A_log)`, formed in float32.
        mamba_w1, mamba_w2, mamba_w3: feed-forward layer of the Mamba block, `(f, d)`, `(f, d)`, `(d, f)`, dtype of `in_proj`.
        conv_state: `(B, D, S)`, dtype of `in_proj`, last inputs of the convolution, written in place; see
            `causal_conv1d_update`.
        scan_state: `(B, D, N)`, written in place; see `selective_state_update`.
        q_proj, k_proj, v_proj, o_proj: `(H K, d)`, `(Hkv K, d)`, `(Hkv K, d)`, `(d, H K)`, dtype of `in_proj`.
        attn_w1, attn_w2, attn_w3: feed-forward layer of the attention block.
        k_cache, v_cache: rings `(B, R, Hkv, K)`, dtype of `in_proj`, written in place; see `sliding_window_attention_update`.
        cache_seqlens: `(B,)`, int32 or int64: tokens each row has seen. Not written.
        window_size: `(left, right)`; `(W - 1, 0)` is a window of `W` keys.
        eps: of the norms.
        softmax_scale: default `1 / sqrt(K)`.
        rotary_cos, rotary_sin: `(P, K/2)` by position, or None: no positions.

    Returns:
        The residual stream behind both blocks, shape and dtype of `hidden`.

    Raises:
        ValueError: a shape, dtype or device does not fit; the text names the argument.
        IndexError: a row's position is beyond the rotary tables.

    Note:
        No gradients. Activations are rounded to the dtype of `in_proj` where the layers themselves would round them; sums are
        float32. The same bits for every number of threads, and for a row whatever the rows beside it. Bound by reading the
        weights once: it is meant for few rows.

    Source: Ren et al., arXiv 2406.07522, section 2.

    Example:
        >>> from fastlm.models import SambaConfig, SambaForCausalLM  # a model's decode step calls it
        >>> model = SambaForCausalLM(SambaConfig.from_preset("tiny"))
    """
    return _ops.samba_decode_step(
        hidden,
        mamba_norm,
        in_proj,
        conv_weight,
        conv_bias,
        x_proj,
        dt_proj,
        dt_bias,
        A_log,
        D,
        out_proj,
        mamba_mlp_norm,
        mamba_w1,
        mamba_w2,
        mamba_w3,
        conv_state,
        scan_state,
        attn_norm,
        q_proj,
        k_proj,
        v_proj,
        o_proj,
        attn_mlp_norm,
        attn_w1,
        attn_w2,
        attn_w3,
        k_cache,
        v_cache,
        cache_seqlens,
        window_size=window_size,
        eps=eps,
        softmax_scale=softmax_scale,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
    )
