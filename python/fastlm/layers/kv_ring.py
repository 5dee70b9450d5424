"""The key/value ring of a sliding window, and how several new tokens meet it.

Slot `p mod R` of a ring holds position `p`, so `R >= window` slots hold all that a next token may see, in any
order: keys are stored rotated. One token at a time is the operator's work
(`sliding_window_attention_update`). For many tokens at once the visible past is laid out in front of the new
keys, row after row, and attention runs over packed sequences; only then are the new keys written: writing
first would evict keys that the first new queries still see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVRing:
    """Keys (rotated) and values of the last positions of each row, `(B, R, Hkv, K)` each."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class RingPlan:
    """Index lists for one pass of `seqlens[b]` new tokens over rows that hold `positions[b]` tokens; shared
    by all layers.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: `(B+1,)` int32, bounds of the new tokens and of past plus new tokens.
        max_seqlen_q, max_seqlen_k: longest of each, tokens.
        past_slots: `(P,)` flat ring slots (`row * R + slot`) of the visible past, oldest first.
        past_places, new_places: where past and new tokens go in the packed keys.
        kept_tokens, kept_slots: the new tokens that stay in the ring, and their flat slots.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    past_slots: Tensor
    past_places: Tensor
    new_places: Tensor
    kept_tokens: Tensor
    kept_slots: Tensor

    @classmethod
    def build(
        cls,
        positions: Sequence[int],
        seqlens: Sequence[int],
        *,
        window: int,
        slots: int,
        device: torch.device,
    ) -> RingPlan:
        """Plan a pass; `slots` is `R`. Lengths may differ from row to row and may be 0."""
        row_past = [min(p, window - 1) for p in positions]
        row_kept = [min(m, slots) for m in seqlens]
        starts_q, starts_k = [0], [0]
        past_slots, past_places, new_places, kept_tokens, kept_slots = [], [], [], [], []
        for row, (p, m, past, kept) in enumerate(zip(positions, seqlens, row_past, row_kept, strict=True)):
            q0, k0 = starts_q[-1], starts_k[-1]
            past_slots.append(torch.arange(p - past, p) % slots + row * slots)
            past_places.append(torch.arange(k0, k0 + past))
            new_places.append(torch.arange(k0 + past, k0 + past + m))
            kept_tokens.append(torch.arange(q0 + m - kept, q0 + m))
            kept_slots.append(torch.arange(p + m - kept, p + m) % slots + row * slots)
            starts_q.append(q0 + m)
            starts_k.append(k0 + past + m)

        def on_device(pieces: list[Tensor]) -> Tensor:
            return torch.cat(pieces).to(device)

        return cls(
            cu_seqlens_q=torch.tensor(starts_q, dtype=torch.int32, device=device),
            cu_seqlens_k=torch.tensor(starts_k, dtype=torch.int32, device=device),
            max_seqlen_q=max(seqlens, default=0),
            max_seqlen_k=max((past + m for past, m in zip(row_past, seqlens, strict=True)), default=0),
            past_slots=on_device(past_slots),
            past_places=on_device(past_places),
            new_places=on_device(new_places),
            kept_tokens=on_device(kept_tokens),
            kept_slots=on_device(kept_slots),
        )

    def with_past(self, ring: Tensor, new: Tensor) -> Tensor:
        """Packed keys or values: each row's past from `ring (B, R, Hkv, K)`, then its `new (T, Hkv, K)`."""
        if self.past_slots.numel() == 0:
            return new
        packed = new.new_empty(self.past_places.numel() + self.new_places.numel(), *new.shape[1:])
        packed.index_copy_(
            0, self.past_places, ring.flatten(0, 1).index_select(0, self.past_slots).to(new.dtype)
        )
        return packed.index_copy_(0, self.new_places, new)

    @torch.no_grad()
    def keep(self, ring: Tensor, new: Tensor) -> None:
        """Write the new tokens that later ones may see into `ring`, in place."""
        ring.flatten(0, 1).index_copy_(
            0, self.kept_slots, new.index_select(0, self.kept_tokens).to(ring.dtype)
        )
