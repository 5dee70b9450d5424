"""SwiGLU feed-forward: `w3(silu(w1 x) * (w2 x))`, no bias. Bound by the three matrix products."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class SwiGLU(nn.Module):
    """Gated feed-forward layer `w3(silu(w1 x) * (w2 x))`.

    The parameters carry the names of the public Samba checkpoints: `w1` gate, `w2` value, `w3` down.

    Args:
        hidden_size: input and output width.
        intermediate_size: inner width; need not be a multiple of anything.
        device, dtype: of the weights.

    Source: Shazeer, arXiv 2002.05202, section 2.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, intermediate_size, bias=False, device=device, dtype=dtype)
        self.w2 = nn.Linear(hidden_size, intermediate_size, bias=False, device=device, dtype=dtype)
        self.w3 = nn.Linear(intermediate_size, hidden_size, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all weights anew, PyTorch's defaults."""
        for linear in (self.w1, self.w2, self.w3):
            linear.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x (..., hidden_size)`; same shape out."""
        out: Tensor = self.w3(functional.silu(self.w1(x)) * self.w2(x))
        return out
