"""The one place that registers fake kernels, autograd formulas and autocast rules.

A family module holds plain functions and lists them in `FAKES` and `GRADIENTS`; nothing else in the package calls torch.library.
Operators that behave like a matrix product under autocast are in `AUTOCAST`, with the names of the arguments it casts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastlm._registration import causal_conv1d, selective_scan, sliding_window_attention, slm_loss

FAMILIES = (causal_conv1d, selective_scan, sliding_window_attention, slm_loss)

# Keeps the registrations below alive.
_LIBRARY = torch.library.Library("fastlm", "IMPL")


class Gradient(NamedTuple):
    """Autograd formula of one operator: what to keep from the forward pass, and the backward pass itself."""

    setup_context: Callable[..., None]
    backward: Callable[..., Any]


def _attach_autocast(name: str, cast: tuple[str, ...]) -> None:
    """Like torch.library.register_autocast, which knows neither keyword arguments nor the dtype that the region asks for."""
    op = getattr(torch.ops.fastlm, name).default
    position = {argument.name: i for i, argument in enumerate(op._schema.arguments)}
    places = [position[argument] for argument in cast]

    def kernel_for(device: str) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            inputs = list(args)
            for place in places:
                if inputs[place].is_floating_point() and inputs[place].dtype != torch.float64:
                    inputs[place] = inputs[place].to(dtype)
            with torch.autocast(device, enabled=False):
                return op(*inputs, **kwargs)

        return kernel

    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _LIBRARY.impl(name, kernel_for(device), key)


def attach() -> None:
    """Registers everything; called once, by `import fastlm`."""
    for family in FAMILIES:
        for name, fake in family.FAKES.items():
            torch.library.register_fake(f"fastlm::{name}", fake)
        for name, (setup_context, backward) in family.GRADIENTS.items():
            torch.library.register_autograd(f"fastlm::{name}", backward, setup_context=setup_context)
        for name, cast in getattr(family, "AUTOCAST", {}).items():
            _attach_autocast(name, cast)
