"""The one place that registers fake kernels and autograd formulas.

A family module holds plain functions and lists them in `FAKES` and `GRADIENTS`; nothing else in the package calls torch.library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastlm._registration import causal_conv1d

FAMILIES = (causal_conv1d,)


class Gradient(NamedTuple):
    """Autograd formula of one operator: what to keep from the forward pass, and the backward pass itself."""

    setup_context: Callable[..., None]
    backward: Callable[..., Any]


def attach() -> None:
    """Registers everything; called once, by `import fastlm`."""
    for family in FAMILIES:
        for name, fake in family.FAKES.items():
            torch.library.register_fake(f"fastlm::{name}", fake)
        for name, (setup_context, backward) in family.GRADIENTS.items():
            torch.library.register_autograd(f"fastlm::{name}", backward, setup_context=setup_context)
