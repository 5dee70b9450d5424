"""Attention over packed sequences of any length, keys and values optionally in pages."""

from __future__ import annotations

from torch import Tensor

from fastlm.compat.flash_attn.attend import Attended, Options, Window, attend, attended, unpacked
from fastlm.compat.flash_attn.pages import gather_pages


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Attended:
    """`flash_attn_func` for `S` packed sequences, each seeing itself only.

    Args:
        q: shape `(T, H, K)`.
        k, v: shape `(Tk, Hkv, K)`; with `block_table` `(pages, page_size, Hkv, K)`.
        cu_seqlens_q, cu_seqlens_k: shape `(S+1,)`, int32 or int64: bounds of the sequences in q, and in k and v;
            with `block_table` the second gives the lengths of the paged sequences.
        max_seqlen_q, max_seqlen_k: at least the longest sequences, in tokens; checked.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs: as
            in `flash_attn_func`; `lse` has shape `(H, T)`.
        block_table: shape `(S, M)`, integer: the pages of each sequence, in order. Costs one copy of the keys and
            values used; pages may have any size.

    Returns:
        out: shape and dtype of `q`, or the triple `(out, lse, None)`.

    Raises:
        NotImplementedError: `dropout_p` is not 0, or `alibi_slopes` is given.
        ValueError: in the words of the operator; `block_table` has too few columns for the longest sequence.
        IndexError: `block_table` names a page that does not exist.

    Note:
        Differentiable in q, k and v, paged ones included.

    Source: Dao-AILab/flash-attention, `flash_attn_varlen_func`.
    """
    name = "flash_attn_varlen_func"
    options = Options(name, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    options.refuse_unsupported()
    if block_table is not None:
        k, v = gather_pages(name, "k", k, v, block_table, cu_seqlens_k.diff())
    out, lse = attend(
        q,
        k,
        v,
        options,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    return attended(out, lse, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attended:
    """`flash_attn_varlen_func` with keys and values stacked: `kv (Tk, 2, Hkv, K)`, read in place."""
    name = "flash_attn_varlen_kvpacked_func"
    k, v = unpacked(name, "kv", kv, 2, 1)
    out, lse = attend(
        q,
        k,
        v,
        Options(name, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    return attended(out, lse, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attended:
    """`flash_attn_varlen_func` with all three stacked: `qkv (T, 3, H, K)`, read in place; one set of bounds."""
    name = "flash_attn_varlen_qkvpacked_func"
    q, k, v = unpacked(name, "qkv", qkv, 3, 1)
    out, lse = attend(
        q,
        k,
        v,
        Options(name, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
    )
    return attended(out, lse, return_attn_probs)
