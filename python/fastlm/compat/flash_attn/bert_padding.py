"""From padded batches to packed sequences and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """`input[indices]`: rows `indices (n,)` of `input (rows, ...)`; differentiable in `input`."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """The reverse: `values (n, ...)` at rows `indices (n,)` of `first_axis_dim` rows, 0 elsewhere; differentiable."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Drops padding.

    Args:
        hidden_states: shape `(B, L, ...)`.
        attention_mask: shape `(B, L)`, boolean or integer: tokens that count.
        unused_mask: shape `(B, L)`: further tokens to keep room for; default none.

    Returns:
        hidden_states: shape `(T, ...)`, the tokens of either mask in order.
        indices: shape `(T,)`, int64, where each one was in `(B * L)`.
        cu_seqlens: shape `(B+1,)`, int32: bounds of the rows.
        max_seqlen_in_batch: tokens of the longest row.
        seqused: shape `(B,)`, int32: tokens of `attention_mask` alone in each row.

    Raises:
        ValueError: a mask does not have the shape of the first two dimensions.

    Note:
        Differentiable in hidden_states.

    Source: Dao-AILab/flash-attention, `bert_padding.unpad_input`.
    """
    for argument, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None and mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"unpad_input: {argument} must have shape {tuple(hidden_states.shape[:2])}, got {tuple(mask.shape)}"
            )
    used = attention_mask.bool()
    kept = used if unused_mask is None else used | unused_mask.bool()
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().squeeze(1)
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        int(lengths.max()) if lengths.numel() else 0,
        used.sum(dim=-1, dtype=torch.int32),
    )


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Puts padding back: `hidden_states (T, ...)` at `indices (T,)` of `(batch, seqlen, ...)`, 0 elsewhere."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.view((batch, seqlen, *padded.shape[1:]))
