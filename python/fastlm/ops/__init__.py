"""The operators as typed Python functions. Each is one call of `torch.ops.fastlm.<name>`."""

from fastlm.ops.causal_conv1d import causal_conv1d, causal_conv1d_update

__all__ = ["causal_conv1d", "causal_conv1d_update"]
