"""Fake kernels and gradients of the operators, attached to `torch.ops.fastlm` when the package is imported."""

from fastlm._registration._attach import attach

__all__ = ["attach"]
