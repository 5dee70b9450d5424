"""The one place that registers fake kernels, autograd formulas and autocast rules.

A family module holds plain functions and lists them in `FAKES` and `GRADIENTS`; nothing else in the package calls torch.library.
`AUTOCAST` says which arguments of an operator are cast under autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastlm._registration import (
    causal_conv1d,
    grin_route,
    moe_dispatch,
    samba_decode_step,
    scan_swa,
    selective_scan,
    sliding_window_attention,
    slm_loss,
)
from fastlm._registration.autocast import Cast

FAMILIES = (
    causal_conv1d,
    selective_scan,
    sliding_window_attention,
    scan_swa,
    samba_decode_step,
    grin_route,
    moe_dispatch,
    slm_loss,
)

# Keeps the registrations below alive.
_LIBRARY = torch.library.Library("fastlm", "IMPL")


class Gradient(NamedTuple):
    """Autograd formula of one operator: what to keep from the forward pass, and the backward pass itself."""

    setup_context: Callable[..., None]
    backward: Callable[..., Any]


def _attach_autocast(name: str, cast: Cast) -> None:
    """Like torch.library.register_autocast, which knows neither keyword arguments nor the dtype that the region asks for."""
    op = getattr(torch.ops.fastlm, name).default
    position = {argument.name: i for i, argument in enumerate(op._schema.arguments)}
    places = [position[argument] for argument in cast.names]

    def is_cast(a: Any) -> bool:
        return (
            isinstance(a, torch.Tensor)
            and a.is_floating_point()
            and a.dtype != torch.float64
            and a.dim() >= cast.least_dim
        )

    def kernel_for(device: str) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            like = None if cast.like is None else args[position[cast.like]]
            dtype = torch.get_autocast_dtype(device) if like is None else like.dtype
            inputs = list(args)
            for place in places:
                # The dispatcher leaves out trailing arguments that have their default. Wrong dtypes are left to the checks.
                if place < len(inputs) and is_cast(inputs[place]) and dtype.is_floating_point:
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
        for name, (setup_context, backward) in getattr(family, "GRADIENTS", {}).items():
            torch.library.register_autograd(f"fastlm::{name}", backward, setup_context=setup_context)
        for name, cast in getattr(family, "AUTOCAST", {}).items():
            _attach_autocast(name, cast)
