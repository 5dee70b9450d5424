"""Hypothesis strategies for what operators take: sizes, dtypes, memory layouts, packed sequences."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tests.support.layouts import LAYOUTS, Draw

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sizes(low: int = 1, high: int = 40) -> st.SearchStrategy[int]:
    """A size, with those next to vector widths and tiles more often than others."""
    special = [n for n in (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65) if low <= n <= high]
    return st.one_of(st.sampled_from(special), st.integers(low, high)) if special else st.integers(low, high)


def dtypes(*, float64: bool = True) -> st.SearchStrategy[torch.dtype]:
    """A floating dtype; `float64=False` where a device lacks it."""
    return st.sampled_from([d for d in FLOATING if float64 or d != torch.float64])


def layouts(*, writable: bool = False) -> st.SearchStrategy[str]:
    """A memory layout of `tests.support.layouts`; `writable` leaves out those whose elements share memory."""
    return st.sampled_from([name for name in LAYOUTS if not (writable and name == "broadcast")])


def lengths(num: int = 5, longest: int = 20) -> st.SearchStrategy[list[int]]:
    """Lengths of one to `num` packed sequences, empty ones included."""
    return st.lists(st.integers(0, longest), min_size=1, max_size=num)


def index_dtypes() -> st.SearchStrategy[torch.dtype]:
    """What cu_seqlens and slots may be stored as."""
    return st.sampled_from([torch.int32, torch.int64])


def cu_seqlens(lengths: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Bounds `(S+1,)` of packed sequences with the given lengths."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return torch.tensor(bounds, dtype=dtype)


def draws() -> st.SearchStrategy[Draw]:
    """A source of reproducible tensors."""
    return st.integers(0, 2**20).map(lambda seed: Draw(f"hypothesis-{seed}"))
