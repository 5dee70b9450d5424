"""Root-mean-square normalisation: `y = x / sqrt(mean(x^2) + eps) * weight`, statistics in float32.

Bound by memory: one read and one write of the activation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def compute_dtype(x: Tensor, parameter: Tensor) -> torch.dtype:
    """The dtype matrix products run in: autocast's where it is on for `x`'s device, else the parameter's."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return parameter.dtype


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Normalises the last dimension by its root mean square: `y = x / sqrt(mean(x^2) + eps) * weight`.

    Args:
        hidden_size: length of the last dimension.
        eps: added to the mean square.
        device, dtype: of `weight`.

    Note:
        Statistics and product are float32 (float64 for float64 input) whatever the input. The result has the
        dtype the next matrix product wants: autocast's when autocast is on, else that of `weight`. So a
        float32 residual stream is rounded once here, not once in each projection that follows.

    Source: Zhang and Sennrich, arXiv 1910.07467, equation 4.

    Example:
        >>> import torch
        >>> RMSNorm(4)(torch.full((1, 4), 2.0)).round(decimals=3)
        tensor([[1., 1., 1., 1.]], grad_fn=<RoundBackward1>)
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

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x (..., hidden_size)`; see the class for the dtype of the result."""
        weight = at_least_float32(self.weight)
        x32 = x.to(torch.promote_types(x.dtype, weight.dtype))
        y = functional.rms_norm(x32, self.weight.shape, weight.to(x32.dtype), self.eps)
        return y.to(compute_dtype(x, self.weight))

    def extra_repr(self) -> str:
        """Size and eps, for `print(model)`."""
        return f"{self.weight.numel()}, eps={self.eps}"
