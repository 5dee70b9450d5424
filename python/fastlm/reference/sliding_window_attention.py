"""Softmax attention over a window of keys: whole sequences, and decoding steps on a ring buffer."""

from __future__ import annotations

import torch
from torch import Tensor


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

    Query `i` of `Lq` stands at key position `p = i + Lk - Lq` and sees keys `p - left .. p + right`; query
    head `h` uses key and value head `h // (H / Hkv)`::

        s[i, j] = scale * q[i] . k[j],   then softcap * tanh(s / softcap) if softcap > 0
        lse[i]  = log sum_j exp(s[i, j])        over the keys seen
        out[i]  = sum_j exp(s[i, j] - lse[i]) * v[j]

    Args:
        q: shape `(B, Lq, H, K)`; packed `(T, H, K)`.
        k, v: shape `(B, Lk, Hkv, K)`; packed `(Tk, Hkv, K)`. `Hkv` divides `H`.
        window_size: keys seen to the left and to the right of a query's own, which is always counted;
            negative: no bound.
        causal: no key to the right, whatever `window_size` says.
        softmax_scale: default `1 / sqrt(K)`.
        softcap: bound of the scores; 0: none.
        cu_seqlens_q, cu_seqlens_k: shape `(S+1,)`, integer: bounds of packed sequences, given together;
            sequence `s` of queries sees sequence `s` of keys only.
        max_seqlen_q, max_seqlen_k: longest packed sequences, in tokens; a hint without influence on the
            result.
        return_lse: also return the log-sum-exp of each row.

    Returns:
        out: shape and dtype of `q`; with `return_lse` the pair `(out, lse)`, the latter of shape `(B, H, Lq)`
        (packed `(H, T)`), float32 (float64 for float64). A row that sees no key has out 0, lse -inf and
        gradient 0.

    Raises:
        ValueError: one of `cu_seqlens_q` and `cu_seqlens_k` without the other, or of another length.

    Note:
        A key that no query sees is not read: NaN there reaches neither outputs nor gradients.

    Source: flash-attn, `flash_attn_func` and `flash_attn_varlen_func` (names and bounds); Ren et al., arXiv
    2406.07522, section 2.2.
    """
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("sliding_window_attention: cu_seqlens_q and cu_seqlens_k must be given together")
    left, right = window_size
    if causal:
        right = 0
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if cu_seqlens_q is None or cu_seqlens_k is None:
        out, lse = _one_batch(q, k, v, left, right, scale, softcap)
        return (out, lse) if return_lse else out
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError("sliding_window_attention: cu_seqlens_q and cu_seqlens_k must have one shape")
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    acc = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [q[:0]], [q.new_zeros((q.shape[1], 0), dtype=acc)]
    for s in range(len(bounds_q) - 1):
        queries = slice(bounds_q[s], bounds_q[s + 1])
        keys = slice(bounds_k[s], bounds_k[s + 1])
        piece, piece_lse = _one_batch(
            q[None, queries], k[None, keys], v[None, keys], left, right, scale, softcap
        )
        outs.append(piece[0])
        lses.append(piece_lse[0])
    out, lse = torch.cat(outs), torch.cat(lses, dim=-1)
    return (out, lse) if return_lse else out


def _one_batch(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """`(out (B, Lq, H, K), lse (B, H, Lq))` under a window aligned bottom-right."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    position = torch.arange(num_queries, device=q.device).unsqueeze(1) + num_keys - num_queries
    key = torch.arange(num_keys, device=q.device).unsqueeze(0)
    visible = torch.ones((num_queries, num_keys), dtype=torch.bool, device=q.device)
    if left >= 0:
        visible = visible & (key >= position - left)
    if right >= 0:
        visible = visible & (key <= position + right)
    return _masked_attention(q, k, v, visible, scale, softcap)


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Attention where `visible (Lq, Lk)` is True: `(out (B, Lq, H, K) in q's dtype, lse (B, H, Lq))`."""
    acc = torch.promote_types(q.dtype, torch.float32)
    per_kv_head = q.shape[2] // k.shape[2]
    # 0 * NaN is NaN: what no query sees is replaced, so that it cannot reach the products.
    read = visible.any(dim=0)[None, :, None, None]
    k = torch.where(read, k.to(acc), 0.0).repeat_interleave(per_kv_head, dim=2)
    v = torch.where(read, v.to(acc), 0.0).repeat_interleave(per_kv_head, dim=2)

    scores = scale * torch.einsum("bihc,bjhc->bhij", q.to(acc), k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(visible, scores, -torch.inf)
    sees_any = visible.any(dim=1)  # (Lq,)
    # An empty row would be exp(-inf - (-inf)): its log-sum-exp is taken over zeros, and replaced
    # afterwards.
    lse = torch.logsumexp(torch.where(sees_any.unsqueeze(1), scores, 0.0), dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    out = torch.einsum("bhij,bjhc->bihc", weights, v)
    return out.to(q.dtype), torch.where(sees_any, lse, -torch.inf)


@torch.no_grad()
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

    The token at position `p` lies at slot `p mod R`. The query at position `p` sees positions `p - left ..
    p`, as far as the ring still holds them. With rotary tables, `(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1
    sin)` with `x1, x2` the halves of a head turns queries and keys at their positions; keys are stored
    turned, and attended as stored.

    Args:
        q: shape `(B, m, H, K)`.
        k, v: shape `(B, m, Hkv, K)`.
        k_cache, v_cache: shape `(B, R, Hkv, K)`, written in place, `R >= left + m`.
        cache_seqlens: shape `(B,)`, integer: tokens each row has seen before this call; not changed.
        window_size: keys seen to the left of a query's own, negative: all the ring still holds; the right
            bound is 0 here, a token never sees a later one.
        softmax_scale: default `1 / sqrt(K)`.
        rotary_cos, rotary_sin: shape `(P, K/2)`, row `p` for position `p`; default no rotation.

    Returns:
        out: shape and dtype of `q`.

    Raises:
        ValueError: the ring is too small, or only one rotary table is given.
        IndexError: a position beyond the rotary tables.

    Note:
        Not differentiable. Slots that no query sees are not read.

    Source: Ren et al., arXiv 2406.07522 (window); flash-attn, `flash_attn_with_kvcache` (names).
    """
    num_new, ring = q.shape[1], k_cache.shape[1]
    left = window_size[0]
    needed = max(left, 0) + num_new
    if ring < needed:
        raise ValueError(
            f"sliding_window_attention_update: k_cache must have at least {needed} slots, got {ring}"
        )
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("sliding_window_attention_update: rotary_cos and rotary_sin must be given together")
    acc = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        seen = int(cache_seqlens[row])
        positions = torch.arange(seen, seen + num_new, device=q.device)
        queries, keys = q[row].to(acc), k[row].to(acc)
        if rotary_cos is not None and rotary_sin is not None:
            cos, sin = rotary_cos[positions].to(acc), rotary_sin[positions].to(acc)
            queries, keys = _rotate(queries, cos, sin), _rotate(keys, cos, sin)
        k_cache[row, positions % ring] = keys.to(k_cache.dtype)
        v_cache[row, positions % ring] = v[row].to(v_cache.dtype)

        oldest = max(seen + num_new - ring, 0)
        if left >= 0:
            oldest = max(oldest, seen - left)
        held = torch.arange(oldest, seen + num_new, device=q.device)
        visible = held <= positions.unsqueeze(1)
        if left >= 0:
            visible = visible & (held >= positions.unsqueeze(1) - left)
        attended, _ = _masked_attention(
            queries[None],
            k_cache[row, held % ring][None],
            v_cache[row, held % ring][None],
            visible,
            scale,
            0.0,
        )
        out[row] = attended[0].to(q.dtype)
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns every head of `x (m, H, K)` by the angles of `cos, sin (m, K/2)`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
