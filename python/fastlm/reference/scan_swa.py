"""A selective scan and a sliding-window attention side by side: by definition, one and then the other."""

from __future__ import annotations

from torch import Tensor

from fastlm.reference.selective_scan import selective_scan
from fastlm.reference.sliding_window_attention import sliding_window_attention


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
    """See `fastlm.ops.scan_swa`."""
    scan_out, last_state = selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        True,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    attn_out, lse = sliding_window_attention(
        q,
        k,
        v,
        window_size=window_size,
        causal=causal,
        softmax_scale=softmax_scale,
        softcap=softcap,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        return_lse=True,
    )
    return scan_out, last_state, attn_out, lse
