"""Softmax attention over a window of keys: whole sequences, and decoding steps on a ring buffer."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fastlm import _ops


@overload
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: tuple[int, int] = ...,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    softcap: float = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: tuple[int, int] = ...,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    softcap: float = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: tuple[int, int] = ...,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    softcap: float = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: tuple[int, int] = (-1, -1),
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attends from each query to the keys around its own position, aligned bottom-right.

    Query `i` of `Lq` stands at key position `p = i + Lk - Lq` and sees keys `p - left .. p + right`; query head `h` uses
    key and value head `h // (H / Hkv)`. `s[i, j] = scale * q[i] . k[j]`, then `softcap * tanh(s / softcap)` if
    `softcap > 0`; `lse[i] = log sum_j exp(s[i, j])` over the keys seen; `out[i] = sum_j exp(s[i, j] - lse[i]) * v[j]`.
    Sums are kept in float32 (float64 for float64).

    Args:
        q: shape `(B, Lq, H, K)`, packed `(T, H, K)`; float32, bfloat16, float16 or float64; `1 <= K <= 512`, multiples of
            16 are fastest; unit stride over `K` is taken without a copy, whatever the other strides.
        k, v: shape `(B, Lk, Hkv, K)`, packed `(T, Hkv, K)`, dtype of `q`; `Hkv` divides `H`.
        window_size: `(left, right)`, in keys: how many are seen before and after the one at the query's own position,
            which is seen itself; `(W - 1, 0)` is a window of `W` keys; -1: no bound.
        causal: no key to the right, whatever `window_size` says.
        softmax_scale: default `1 / sqrt(K)`.
        softcap: bound of the scores; 0: none.
        cu_seqlens_q, cu_seqlens_k: shape `(S+1,)`, int32 or int64: bounds of packed sequences, given together; queries of
            sequence `s` see keys of sequence `s` only.
        max_seqlen_q, max_seqlen_k: longest packed sequences, in tokens. Not needed; when given, they are checked against
            the bounds.
        return_lse: also return the log-sum-exp of each row.

    Returns:
        out: shape and dtype of `q`, contiguous; with `return_lse` the pair `(out, lse)`, the latter of shape `(B, H, Lq)`
        (packed `(H, T)`), float32 (float64 for float64). A row that sees no key has out 0, lse -inf and gradient 0.

    Raises:
        ValueError: a shape, dtype, device, a bound of the window, the scale, `softcap`, or the values of `cu_seqlens_q`,
            `cu_seqlens_k`, `max_seqlen_q` or `max_seqlen_k` do not fit; the text names the argument, what was expected and
            what was found.

    Note:
        Differentiable in q, k and v, through out and lse. The backward pass keeps q, k, v, out and lse, recomputes the
        weights block by block, and is deterministic. What a query does not see has no influence on its row, not even
        NaN. Under autocast q, k and v are cast to the autocast dtype; float64 stays.

    Source: flash-attn, `flash_attn_func` and `flash_attn_varlen_func` (names and bounds); Ren et al., arXiv 2406.07522,
        section 2.2; the algorithm is that of Dao et al., arXiv 2205.14135, walking over the window only.

    Example:
        >>> import torch, fastlm
        >>> q, k, v = torch.randn(1, 16, 4, 8), torch.randn(1, 16, 2, 8), torch.randn(1, 16, 2, 8)
        >>> fastlm.ops.sliding_window_attention(q, k, v, window_size=(3, 0)).shape
        torch.Size([1, 16, 4, 8])
    """
    out, lse = _ops.sliding_window_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        window_size=window_size,
        causal=causal,
        softmax_scale=softmax_scale,
        softcap=softcap,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    return (out, lse) if return_lse else out


def sliding_window_attention_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    window_size: tuple[int, int],
    softmax_scale: float | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
) -> Tensor:
    """Writes the next `m` tokens of each row into a ring of keys and values, then attends from them.

    The token at position `n` lies at slot `n mod R`. The query at position `n` sees positions `n - left .. n`, as far as
    the ring still holds them. With rotary tables, `(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)` with `x1, x2` the
    halves of a head turns queries and keys at their positions; keys are stored turned, and attended as stored.

    Args:
        q: shape `(B, m, H, K)`; float32, bfloat16, float16 or float64; `1 <= K <= 512`; unit stride over `K` is taken
            without a copy.
        k, v: shape `(B, m, Hkv, K)`, dtype of `q`; `Hkv` divides `H`.
        k_cache, v_cache: shape `(B, R, Hkv, K)`, dtype of `q`, unit stride over `K`, written in place; `R >= left + m`.
            Slots that hold no token of the row yet are not read.
        cache_seqlens: shape `(B,)`, int32 or int64: tokens each row has seen before this call; not changed.
        window_size: `(left, right)`, in keys, as in `sliding_window_attention`; left -1: all that the ring holds. A token
            never sees a later one, so the right bound is at most 0 whatever it says.
        softmax_scale: default `1 / sqrt(K)`.
        rotary_cos, rotary_sin: shape `(P, K/2)`, any floating dtype, row `n` for position `n`; default no rotation.

    Returns:
        out: shape and dtype of `q`, contiguous.

    Raises:
        ValueError: a shape, dtype, device, stride or value does not fit; the ring is too small for the window and the new
            tokens; only one rotary table is given.
        IndexError: `cache_seqlens` leads to a position beyond the rotary tables.

    Note:
        Not differentiable. The same bits for every number of threads. Under autocast q, k and v take the dtype of the caches:
        they are written in place, so they keep their own, and it decides. float64 stays.

    Source: Ren et al., arXiv 2406.07522 (window); flash-attn, `flash_attn_with_kvcache` (names).

    Example:
        >>> import torch, fastlm
        >>> k_cache, v_cache = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8)
        >>> q, k, v = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8)
        >>> seen = torch.tensor([9], dtype=torch.int32)
        >>> fastlm.ops.sliding_window_attention_update(q, k, v, k_cache, v_cache, seen, window_size=(3, 0)).shape
        torch.Size([1, 1, 4, 8])
    """
    return _ops.sliding_window_attention_update(
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
