"""A selective scan and a sliding-window attention side by side."""

from __future__ import annotations

from torch import Tensor

from fastlm import _ops


def scan_swa(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: tuple[int, int],
    softmax_scale: float | None = None,
    causal: bool = True,
    softcap: float = 0.0,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs `selective_scan` and `sliding_window_attention` on inputs of their own, in one parallel region.

    For two mixers that do not wait for each other: the halves of a parallel hybrid layer, or the scan of one chunk of a
    prompt and the attention of the chunk before it. Threads take pieces of both from one queue, so that none is idle
    while the other half has work. Each half gives the bits of its own operator.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state: of `selective_scan`, `u` of shape `(B, D, L)`.
        q, k, v: of `sliding_window_attention`, `q` of shape `(B', Lq, H, K)`. Batch, length, dtype and packing need not be
            those of the scan.
        window_size: `(left, right)` keys around a query's own position; `(W - 1, 0)` is a window of `W` keys.
        softmax_scale: default `1 / sqrt(K)`.
        causal: no key to the right.
        softcap: bound of the scores; 0: none.
        cu_seqlens: shape `(S+1,)`, int32 or int64: bounds of packed sequences of the scan.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: the same for the attention.

    Returns:
        scan_out, last_state: of the scan, `last_state` float32 (float64 for float64).
        attn_out, lse: of the attention.

    Raises:
        ValueError: what `selective_scan` or `sliding_window_attention` would refuse, in the same words.

    Note:
        Differentiable in every floating input, through all four outputs; the backward pass is that of the two operators,
        one after the other. Deterministic. Under autocast activations are cast as in the two operators.

    Source: Gu and Dao, arXiv 2312.00752; Ren et al., arXiv 2406.07522, section 2.

    Example:
        >>> import torch, fastlm
        >>> x, m = torch.randn(3, 1, 8, 16), torch.randn(2, 1, 4, 16)
        >>> q, k, v = torch.randn(3, 1, 16, 2, 8)
        >>> a = -torch.rand(8, 4)
        >>> outs = fastlm.ops.scan_swa(
        ...     x[0], x[1], a, m[0], m[1], None, x[2], None, True, None, q, k, v, window_size=(7, 0)
        ... )
        >>> [tuple(t.shape) for t in outs]
        [(1, 8, 16), (1, 8, 4), (1, 16, 2, 8), (1, 2, 16)]
    """
    scan_out, last_state, _, attn_out, lse = _ops.scan_swa(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        initial_state,
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens_q,
        cu_seqlens_k,
        window_size=window_size,
        causal=causal,
        softmax_scale=softmax_scale,
        softcap=softcap,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    return scan_out, last_state, attn_out, lse
