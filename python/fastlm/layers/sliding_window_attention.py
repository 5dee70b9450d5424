"""Causal sliding-window attention with rotary positions and grouped key/value heads, as a layer.

Memory is `(B, L, H, K)` throughout: the projections' outputs, viewed. Bound by the projections for short
windows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.layers.kv_ring import KVRing, RingPlan
from fastlm.layers.rotary import RotaryTable, apply_rotary

RotarySpan = tuple[Tensor, Tensor]


class SlidingWindowAttention(nn.Module):
    """Multi-head attention in which a token sees the last `sliding_window` tokens, itself included.

    Projections are separate and named as in transformers (`q_proj`, `k_proj`, `v_proj`, `o_proj`), so that
    adapters and compression find them by the same names in every model, and so that every head is a view of a
    projection's output. The public Samba code packs the three; `split_packed_qkv` converts its weights.

    Args:
        hidden_size: width `d` of input and output.
        num_attention_heads: `H`, query heads.
        num_key_value_heads: `Hkv`, divides `H`; default `H`. Query head `h` uses key/value head `h // (H /
            Hkv)`.
        head_dim: `K`; default `hidden_size / num_attention_heads`.
        sliding_window: `W`, keys a query sees, at least 1.
        rope_theta: base of the rotary frequencies; None leaves positions out (NoPE).
        bias: the four projections have biases.
        device, dtype: of the weights.

    Raises:
        ValueError: heads do not divide, or the window is smaller than 1.

    Source: Ren et al., arXiv 2406.07522, section 2.2.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int | None = None,
        *,
        head_dim: int | None = None,
        sliding_window: int = 2048,
        rope_theta: float | None = 10000.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_key_value_heads or num_attention_heads
        if num_attention_heads % kv_heads:
            raise ValueError(
                f"SlidingWindowAttention: num_key_value_heads must divide num_attention_heads = "
                f"{num_attention_heads}, got {kv_heads}"
            )
        if head_dim is None and hidden_size % num_attention_heads:
            raise ValueError(
                f"SlidingWindowAttention: num_attention_heads must divide hidden_size = {hidden_size}, "
                f"got {num_attention_heads}. Pass head_dim to choose it freely."
            )
        if sliding_window < 1:
            raise ValueError(
                f"SlidingWindowAttention: sliding_window must be at least 1, got {sliding_window}"
            )
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = kv_heads
        self.sliding_window = sliding_window
        self.rotary = None if rope_theta is None else RotaryTable(self.head_dim, rope_theta)
        q_size, kv_size = num_attention_heads * self.head_dim, kv_heads * self.head_dim
        like: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(hidden_size, q_size, **like)
        self.k_proj = nn.Linear(hidden_size, kv_size, **like)
        self.v_proj = nn.Linear(hidden_size, kv_size, **like)
        self.o_proj = nn.Linear(q_size, hidden_size, **like)

    @property
    def window_size(self) -> tuple[int, int]:
        """The window in the operators' words: keys to the left and right of a query, itself not counted."""
        return (self.sliding_window - 1, 0)

    def reset_parameters(self) -> None:
        """Draw all weights anew, PyTorch's defaults."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            linear.reset_parameters()

    def new_ring(
        self,
        batch_size: int,
        *,
        step_tokens: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVRing:
        """An empty ring for `batch_size` rows, large enough for steps of up to `step_tokens` tokens."""
        slots = self.sliding_window + step_tokens - 1
        weight = self.k_proj.weight
        empty = torch.zeros(
            (batch_size, slots, self.num_key_value_heads, self.head_dim),
            device=device or weight.device,
            dtype=dtype or weight.dtype,
        )
        return KVRing(empty, empty.clone())

    def forward(
        self,
        hidden_states: Tensor,
        ring: KVRing | None = None,
        plan: RingPlan | None = None,
        *,
        rotary: RotarySpan | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attend over a whole sequence, or continue the rows of a ring by several tokens.

        Args:
            hidden_states: `(B, L, d)`; packed sequences `(1, T, d)`.
            ring, plan: keys of earlier tokens and how the new ones meet them, `RingPlan.build(...)`; the ring
                is written.
            rotary: cosines and sines of the tokens' positions, `(L, K/2)` or `(B, L, K/2)`; default positions
                `0 .. L-1`, restarting in each packed sequence. Required with a ring, unless the layer has no
                positions.
            cu_seqlens: `(S+1,)` int32, bounds of packed sequences.
            max_seqlen: longest packed sequence in tokens, if known.

        Returns:
            Shape of `hidden_states`.
        """
        heads, options = self.before_attention(
            hidden_states, ring, plan, rotary=rotary, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
        )
        out = ops.sliding_window_attention(*heads, window_size=self.window_size, **options)
        return self.after_attention(out, hidden_states)

    def before_attention(
        self,
        hidden_states: Tensor,
        ring: KVRing | None = None,
        plan: RingPlan | None = None,
        *,
        rotary: RotarySpan | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """Queries, keys and values of `forward`, and the bounds of packed ones; the ring is written.

        With `after_attention` around an attention of your own this is `forward`.
        """
        if rotary is None and self.rotary is not None:
            rotary = default_rotary(self.rotary, hidden_states, cu_seqlens)
        q, k, v = self._qkv(hidden_states, rotary)
        if ring is not None and plan is not None:
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
            heads = (q, plan.with_past(ring.k, k), plan.with_past(ring.v, v))
            plan.keep(ring.k, k)
            plan.keep(ring.v, v)
            return heads, {
                "cu_seqlens_q": plan.cu_seqlens_q,
                "cu_seqlens_k": plan.cu_seqlens_k,
                "max_seqlen_q": plan.max_seqlen_q,
                "max_seqlen_k": plan.max_seqlen_k,
            }
        if cu_seqlens is not None:
            return (q.squeeze(0), k.squeeze(0), v.squeeze(0)), {
                "cu_seqlens_q": cu_seqlens,
                "cu_seqlens_k": cu_seqlens,
                "max_seqlen_q": max_seqlen,
                "max_seqlen_k": max_seqlen,
            }
        return (q, k, v), {}

    def step(
        self, hidden_states: Tensor, ring: KVRing, positions: Tensor, *, rotary: RotarySpan | None = None
    ) -> Tensor:
        """Attend with the next `m` tokens per row, written to the ring in place. No gradients.

        Args:
            hidden_states: `(B, m, d)`; the ring needs `sliding_window + m - 1` slots.
            ring: keys and values of earlier tokens.
            positions: `(B,)` int32, tokens each row has seen.
            rotary: tables whose row `p` belongs to position `p` as counted by `positions`, `(P, K/2)` each;
                required unless the layer has no positions.

        Returns:
            `(B, m, d)`.
        """
        cos, sin = rotary if rotary is not None else (None, None)
        q, k, v = self._qkv(hidden_states, None)
        out = ops.sliding_window_attention_update(
            q, k, v, ring.k, ring.v, positions, window_size=self.window_size, rotary_cos=cos, rotary_sin=sin
        )
        return self.after_attention(out, hidden_states)

    def _qkv(self, hidden_states: Tensor, rotary: RotarySpan | None) -> tuple[Tensor, Tensor, Tensor]:
        """Heads `(B, L, H | Hkv, K)`, queries and keys rotated if `rotary` is given."""
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(heads)
        k = self.k_proj(hidden_states).view(heads)
        v = self.v_proj(hidden_states).view(heads)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        return q, k, v

    def after_attention(self, out: Tensor, hidden_states: Tensor) -> Tensor:
        """Heads side by side, then the output projection; shape of `hidden_states`."""
        projected: Tensor = self.o_proj(out.flatten(-2).view(*hidden_states.shape[:2], -1))
        return projected


def default_rotary(table: RotaryTable, hidden_states: Tensor, cu_seqlens: Tensor | None) -> RotarySpan:
    """Tables for positions `0 .. L-1` of `hidden_states (B, L, d)`, restarting at every packed sequence."""
    length, device = hidden_states.shape[1], hidden_states.device
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    cos, sin = table.span(0, length, device=device, dtype=dtype)
    if cu_seqlens is None:
        return cos, sin
    positions = packed_positions(cu_seqlens, length)
    return cos[positions], sin[positions]


def packed_positions(cu_seqlens: Tensor, length: int) -> Tensor:
    """Position of each of `length` packed tokens in its own sequence, int64 `(length,)`."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
    return tokens - cu_seqlens[sequence]


def split_packed_qkv(
    weight: Tensor, num_attention_heads: int, num_key_value_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed projection of the public Samba code into query, key and value weights.

    Its rows are ordered by key/value group: the queries of group 0, its key, its value, then group 1, and so
    on.

    Args:
        weight: `((H + 2 Hkv) K, d)`.
        num_attention_heads, num_key_value_heads: `H` and `Hkv`.

    Returns:
        `(H K, d)`, `(Hkv K, d)`, `(Hkv K, d)`.

    Raises:
        ValueError: the rows do not divide by `H + 2 Hkv`.
    """
    heads = num_attention_heads + 2 * num_key_value_heads
    if weight.shape[0] % heads:
        raise ValueError(
            f"split_packed_qkv: weight must have a multiple of {heads} rows, got {weight.shape[0]}"
        )
    per_group = num_attention_heads // num_key_value_heads
    groups = weight.view(num_key_value_heads, per_group + 2, -1, weight.shape[-1])
    q, k, v = torch.split(groups, [per_group, 1, 1], dim=1)
    return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)
