"""Shapes and memory layouts that fake kernels share; each mirrors a rule of csrc/adapter/tensor.h."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channel_last(x: Tensor) -> bool:
    """(B, D, L) with unit stride over D and not over L."""
    return bool(x.stride(2) != 1 and x.stride(1) == 1)


def empty_like_layout(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (B, D, L) tensor of its own (no view): channel-last if `x` is, else contiguous."""
    dtype = x.dtype if dtype is None else dtype
    if is_channel_last(x):
        dim, length = x.shape[1:]
        row = torch.sym_max(dim, 1)
        return x.new_empty_strided(x.shape, (torch.sym_max(length, 1) * row, 1, row), dtype=dtype)
    return x.new_empty(x.shape, dtype=dtype)


def no_tensor(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What an output that does not apply looks like."""
    return x.new_empty((0,), dtype=x.dtype if dtype is None else dtype)
