"""Layer normalisation with weight and bias, statistics in float32. Bound by memory, like `RMSNorm`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlm.layers.rms_norm import at_least_float32, compute_dtype


class LayerNorm(nn.Module):
    """Normalises the last dimension: `y = (x - mean) / sqrt(var + eps) * weight + bias`.

    Args:
        hidden_size: length of the last dimension.
        eps: added to the variance.
        device, dtype: of `weight` and `bias`.

    Note:
        Precision and the dtype of the result are those of `RMSNorm`.

    Source: Ba, Kiros and Hinton, arXiv 1607.06450.

    Example:
        >>> import torch
        >>> LayerNorm(2)(torch.tensor([[1.0, 3.0]])).round(decimals=3)
        tensor([[-1.,  1.]], grad_fn=<RoundBackward1>)
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the weight to one and the bias to zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x (..., hidden_size)`."""
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        x32 = x.to(torch.promote_types(x.dtype, weight.dtype))
        y = functional.layer_norm(x32, self.weight.shape, weight.to(x32.dtype), bias.to(x32.dtype), self.eps)
        return y.to(compute_dtype(x, self.weight))

    def extra_repr(self) -> str:
        """Size and eps, for `print(model)`."""
        return f"{self.weight.numel()}, eps={self.eps}"
