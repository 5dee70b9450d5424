"""Rows of different lengths in one batch: tokens to the front of their row, padding behind them.

A recurrence has to pass over padding without noticing it. Tokens side by side meet the same neighbours as in a row
without padding, wherever the padding stood; what is behind the last token changes nothing if its step size is zero.
Shapes stay as they are, so nothing waits for the device and `torch.compile` sees one graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokensFirst:
    """The order in which the tokens of each row come first, and the way back.

    Attributes:
        real: `(B, L)` bool, True where there is a token.
        counts: `(B,)` int64, tokens per row.
        forth, back: `(B * L,)` int64, rows of a flattened `(B * L, ...)` tensor.
    """

    real: Tensor
    counts: Tensor
    forth: Tensor
    back: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor, batch: int, length: int) -> TokensFirst | None:
        """The order for the last `length` positions of a mask; None where no position is padding.

        Args:
            attention_mask: `(B, M)` with `M >= length`, any dtype, 0 for padding.
            batch, length: rows and positions of this forward pass.

        Raises:
            ValueError: the mask has another shape.
        """
        shape = tuple(attention_mask.shape)
        if len(shape) != 2 or shape[0] != batch or shape[1] < length:
            raise ValueError(
                f"fastlm.compat.transformers: attention_mask of a Mamba layer must have shape ({batch}, {length}) or "
                f"more positions, got {shape}"
            )
        real = attention_mask[:, attention_mask.shape[1] - length :] != 0
        if not torch.compiler.is_compiling() and bool(real.all()):
            return None
        starts = torch.arange(real.shape[0], device=real.device)[:, None] * length
        forth = torch.argsort(~real, dim=1, stable=True)
        places = (real.cumsum(1) - 1).clamp_min(0)
        return cls(real, real.sum(1), (forth + starts).flatten(), (places + starts).flatten())

    def to_front(self, x: Tensor) -> Tensor:
        """`x (B, L, d)` with the tokens of each row first."""
        return x.flatten(0, 1).index_select(0, self.forth).view_as(x)

    def to_places(self, x: Tensor) -> Tensor:
        """`x (B, L, d)` back in the order it had; zeros where there is padding."""
        placed = x.flatten(0, 1).index_select(0, self.back).view_as(x)
        return torch.where(self.real[:, :, None], placed, 0)

    def behind(self) -> Tensor:
        """`(B, L)` bool: positions behind the last token, once tokens are first."""
        return torch.arange(self.real.shape[1], device=self.real.device) >= self.counts[:, None]

    def last(self, before: Tensor, x: Tensor) -> Tensor:
        """The last `S` columns before the padding, of `before (B, D, S)` followed by `x (B, D, L)` with tokens first."""
        columns = self.counts[:, None] + torch.arange(before.shape[2], device=x.device)
        index = columns[:, None, :].expand(-1, x.shape[1], -1)
        return torch.cat([before, x], dim=2).gather(2, index)
