"""Rotary position embedding (RoPE), half-split pairing: dimensions `i` and `i + K/2` turn together by `p *
theta^(-2i/K)`.

Angles are formed in float64: in float32 the product `p * frequency` is off by up to 0.03 rad near one million
tokens. The rotation itself is float32. Tables are small and cached, one span of positions at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Spans that start at 0 grow to a power of two of at least this many rows, so that a rising length rebuilds
# rarely.
_SMALLEST_TABLE = 128


def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10000.0) -> Tensor:
    """Angles `p * theta^(-2i/K)` in radians.

    Args:
        positions: integer positions, shape `(...)`.
        head_dim: `K`, even.
        theta: base of the frequencies.

    Returns:
        float64 `(..., K/2)`.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    return positions.to(torch.float64).unsqueeze(-1) * torch.pow(theta, -exponent)


class RotaryTable:
    """Cosines and sines for spans of positions, cached for the last span asked for on each device.

    Args:
        head_dim: `K`, even.
        theta: base of the frequencies.

    Raises:
        ValueError: `head_dim` is odd or not positive.

    Source: Su et al., arXiv 2104.09864, section 3.2.2; pairing of halves as in the public Llama and Samba
    code.

    Example:
        >>> cos, sin = RotaryTable(64).span(1_000_000, 1_000_004)
        >>> cos.shape
        torch.Size([4, 32])
    """

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"RotaryTable: head_dim must be a positive even number, got {head_dim}")
        self.head_dim = head_dim
        self.theta = theta
        self._spans: dict[tuple[torch.device, torch.dtype], tuple[int, int, Tensor, Tensor]] = {}

    def span(
        self,
        start: int,
        stop: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions `start .. stop - 1`, each `(stop - start, K/2)` in `dtype`."""
        device = torch.device(device)
        if torch.compiler.is_compiling():  # inside a traced graph the tables are part of the graph
            return self.at(torch.arange(start, stop, device=device), dtype=dtype)
        first, last, cos, sin = self._spans.get((device, dtype), (0, 0, None, None))
        if cos is None or sin is None or start < first or stop > last:
            first = start
            last = stop if start else max(_SMALLEST_TABLE, 1 << (stop - 1).bit_length())
            with torch.inference_mode(False), torch.no_grad():
                # tables made under inference_mode could not be saved for a later backward
                cos, sin = self.at(torch.arange(first, last, device=device), dtype=dtype)
            if type(cos) is Tensor:  # a fake tensor must not outlive its mode
                self._spans[(device, dtype)] = (first, last, cos, sin)
        return cos[start - first : stop - first], sin[start - first : stop - first]

    def at(self, positions: Tensor, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Cosines and sines of any `positions (...)`, each `(..., K/2)` in `dtype`; nothing is cached."""
        angles = rotary_angles(positions, self.head_dim, self.theta)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head of `x`: `(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)` with `x1, x2` the halves of
    a head.

    Args:
        x: `(..., L, H, K)`, any floating dtype.
        cos, sin: `(..., L, K/2)` float32 (float64 for float64 `x`), broadcast over heads and, if needed, the
            batch.

    Returns:
        Shape and dtype of `x`; computed in float32, rounded once.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
