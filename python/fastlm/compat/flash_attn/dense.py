"""Attention over batches of equal length: separate tensors, or keys and values packed into one."""

from __future__ import annotations

from torch import Tensor

from fastlm.compat.flash_attn.attend import Attended, Options, Window, attend, attended, unpacked


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attended:
    """Softmax attention, the mask aligned bottom-right: `fastlm.ops.sliding_window_attention`.

    Args:
        q: shape `(B, Lq, H, K)`, float32, bfloat16, float16 or float64.
        k, v: shape `(B, Lk, Hkv, K)`, dtype of `q`; `Hkv` divides `H`.
        dropout_p: must be 0.
        softmax_scale: default `1 / sqrt(K)`.
        causal: no key to the right of a query's own position.
        window_size: `(left, right)`: keys seen on both sides of it; negative: no bound.
        softcap: bound of the scores; 0 or negative: none.
        alibi_slopes: must be None.
        deterministic: the backward pass is, whatever this says.
        return_attn_probs: also return the log-sum-exp, and None in place of the probabilities.

    Returns:
        out: shape and dtype of `q`; with `return_attn_probs` the triple `(out, lse, None)`, `lse` of shape
        `(B, H, Lq)`, float32 (float64 for float64), -inf in a row that sees no key (whose `out` is 0).

    Raises:
        NotImplementedError: `dropout_p` is not 0, or `alibi_slopes` is given.
        ValueError: in the words of the operator.

    Note:
        Differentiable in q, k and v, through `out` and `lse`.

    Source: Dao-AILab/flash-attention, `flash_attn_func`.
    """
    options = Options("flash_attn_func", dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return attended(*attend(q, k, v, options), return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attended:
    """`flash_attn_func` with keys and values stacked: `kv (B, Lk, 2, Hkv, K)`, read in place."""
    name = "flash_attn_kvpacked_func"
    options = Options(name, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    k, v = unpacked(name, "kv", kv, 2, 2)
    return attended(*attend(q, k, v, options), return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attended:
    """`flash_attn_func` with all three stacked: `qkv (B, L, 3, H, K)`, read in place."""
    name = "flash_attn_qkvpacked_func"
    options = Options(name, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    q, k, v = unpacked(name, "qkv", qkv, 3, 2)
    return attended(*attend(q, k, v, options), return_attn_probs)
