"""Rotary position embedding with flash-attn's words: part of a head, pairs of halves or of neighbours, offsets."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.layers import apply_rotary


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Turns the first `R` dimensions of every head by the angles of its position.

    Args:
        x: shape `(B, L, H, K)`; with `cu_seqlens` `(T, H, K)`.
        cos, sin: shape `(P, R/2)`, any floating dtype, row `p` for position `p`; `R <= K`.
        interleaved: dimensions `2i` and `2i + 1` turn together, instead of `i` and `i + R/2`.
        inplace: write the result into `x` and return that.
        seqlen_offsets: position of the first token, one integer or shape `(B,)` (`(S,)` with `cu_seqlens`).
        cu_seqlens: shape `(S+1,)`, integer: bounds of packed sequences, each starting at its own offset.
        max_seqlen: not needed.

    Returns:
        out: shape and dtype of `x`; computed in float32 (float64 for float64), rounded once.

    Raises:
        ValueError: a shape does not fit.
        IndexError: a position without a row in `cos` (on CPU).

    Note:
        Differentiable in x.

    Source: Su et al., arXiv 2104.09864, section 3.2.2; Dao-AILab/flash-attention, `apply_rotary_emb`.
    """
    name = "apply_rotary_emb"
    if x.dim() != (4 if cu_seqlens is None else 3):
        raise ValueError(
            f"{name}: x must have shape {'(B, L, H, K)' if cu_seqlens is None else '(T, H, K)'}, got {tuple(x.shape)}"
        )
    if cu_seqlens is None:
        positions = _column(seqlen_offsets) + torch.arange(x.shape[1], device=x.device)
    else:
        bounds = cu_seqlens.long()
        starts = (seqlen_offsets - bounds[:-1]).repeat_interleave(bounds.diff())
        if starts.shape[0] != x.shape[0]:
            raise ValueError(f"{name}: cu_seqlens must end with {x.shape[0]}, got {int(bounds[-1])}")
        positions = starts + torch.arange(x.shape[0], device=x.device)
    out = rotate_at(name, x, cos, sin, positions, interleaved)
    return x.copy_(out) if inplace else out


def rotate_at(name: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """`x (..., L, H, K)` turned by the rows of the tables at `positions (..., L)`, which may broadcast."""
    if cos.dim() != 2 or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"{name}: rotary_cos must have shape (P, R/2) with R at most {x.shape[-1]}, got {tuple(cos.shape)}"
        )
    if sin.shape != cos.shape:
        raise ValueError(f"{name}: rotary_sin must have shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if positions.device.type == "cpu" and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= cos.shape[0]:
            raise IndexError(
                f"{name}: positions must lie in the {cos.shape[0]} rows of rotary_cos, got {low} to {high}"
            )
    acc = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:  # pairs (half, 2) to halves (2, half) and back
        turned = turned.unflatten(-1, (half, 2)).transpose(-1, -2).flatten(-2)
    turned = apply_rotary(turned, cos[positions].to(acc), sin[positions].to(acc))
    if interleaved:
        turned = turned.unflatten(-1, (2, half)).transpose(-1, -2).flatten(-2)
    return torch.cat((turned, rest), dim=-1)


def _column(offsets: int | Tensor) -> int | Tensor:
    return offsets.long().unsqueeze(1) if isinstance(offsets, Tensor) else offsets
