"""What all blocks need to know about one pass, worked out once: positions, bounds, ring slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastlm.layers import RingPlan, RotaryTable
from fastlm.layers.sliding_window_attention import default_rotary
from fastlm.models.samba.cache import SambaCache


@dataclass(frozen=True)
class Pass:
    """One pass of new tokens through all blocks.

    Attributes:
        rotary: cosines and sines, or None (no positions).
        cu_seqlens, max_seqlen: bounds of packed sequences.
        seqlens: with a cache, the new tokens of each row.
        ring_plan: how the new tokens meet the rings, for several tokens over a cache.
        step_positions: for one token per row over a cache: positions, as the rotary table counts them.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    seqlens: Sequence[int] = ()
    ring_plan: RingPlan | None = None
    step_positions: Tensor | None = None


def plan_pass(
    x: Tensor,
    table: RotaryTable | None,
    cache: SambaCache | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> Pass:
    """The pass of the residual stream `x (B, L, d)`; `table` is None if the model has no positions.

    Raises:
        ValueError: `cu_seqlens` with more than one row, or a cache with another number of rows.
    """
    batch, length = x.shape[:2]
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"SambaModel: input_ids must have 1 row with cu_seqlens, got {batch}")
    if cache is None:
        rotary = None if table is None else default_rotary(table, x, cu_seqlens)
        return Pass(rotary, cu_seqlens, max_seqlen)
    if cu_seqlens is None:
        seqlens = [length] * batch
    else:
        seqlens = [stop - start for start, stop in pairwise(cu_seqlens.tolist())]
    if len(seqlens) != cache.batch_size:
        raise ValueError(f"SambaModel: cache must have {len(seqlens)} rows, got {cache.batch_size}")
    if length == 1 and cu_seqlens is None:
        if table is None:
            return Pass(seqlens=seqlens, step_positions=cache.positions)
        positions, rotary = cache.step_tables(table, length, x.dtype)
        return Pass(rotary, seqlens=seqlens, step_positions=positions)
    rotary = None if table is None else _continued_rotary(table, cache.lengths, seqlens, x)
    return Pass(rotary, cu_seqlens, seqlens=seqlens, ring_plan=cache.ring_plan(seqlens))


def _continued_rotary(
    table: RotaryTable, lengths: Sequence[int], seqlens: Sequence[int], x: Tensor
) -> tuple[Tensor, Tensor]:
    """Tables for `seqlens[b]` tokens after `lengths[b]` earlier ones, in rows or packed as `x` has them."""
    batch, length = x.shape[:2]
    if len(seqlens) == batch and len(set(lengths)) == 1:
        return table.span(lengths[0], lengths[0] + length, device=x.device, dtype=x.dtype)
    positions = [torch.arange(p, p + m) for p, m in zip(lengths, seqlens, strict=True)]
    return table.at(torch.cat(positions).to(x.device).view(batch, length), dtype=x.dtype)
