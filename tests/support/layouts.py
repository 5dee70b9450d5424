"""Tensors with a given memory layout and reproducible values, surrounded by NaN where the layout leaves
gaps."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "channel_last", "gaps", "no_unit_stride", "broadcast")


class Draw:
    """Draws tensors from a seed made of a name; on the CPU, so that every device sees the same values."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        self._generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self.device = torch.device(device)

    def normal(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> Tensor:
        """Normal values, rounded to `dtype`, in one of `LAYOUTS`."""
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64) * scale + shift
        return with_layout(values.to(dtype).to(self.device), layout)

    def integers(self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        """Uniform integers in `[low, high)`."""
        return torch.randint(low, high, tuple(shape), generator=self._generator).to(dtype).to(self.device)

    def permutation(self, n: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """A permutation of `0 .. n-1`."""
        return torch.randperm(n, generator=self._generator).to(dtype).to(self.device)

    def index(self, values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
        """Given integers, on this device."""
        return torch.tensor(values, dtype=dtype, device=self.device)


def with_layout(t: Tensor, layout: str) -> Tensor:
    """The values of `t`, laid out anew (of `t` where `broadcast` keeps only its first row).

    contiguous; channel_last: unit stride over the second dimension; gaps: unit stride over the last one,
    inside a larger tensor of NaN; no_unit_stride: every second element of each dimension of such a tensor;
    broadcast: stride 0 over the first dimension.
    """
    if layout == "contiguous" or t.dim() == 0:
        return t.contiguous()
    if layout == "channel_last":
        if t.dim() < 3:
            return t.contiguous()
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "broadcast":
        return t if t.shape[0] == 0 else t[:1].contiguous().expand(t.shape)
    if layout == "gaps":
        room = t.new_full([size + 3 for size in t.shape], _poison(t.dtype))
        view = room[tuple(slice(1, size + 1) for size in t.shape)]
    elif layout == "no_unit_stride":
        room = t.new_full([2 * size + 1 for size in t.shape], _poison(t.dtype))
        view = room[tuple(slice(1, 2 * size + 1, 2) for size in t.shape)]
    else:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    view.copy_(t)
    return view


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
