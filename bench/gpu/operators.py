"""The operators of fastlm: their schemas, which device has them, and their sample inputs out of the test suite."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# What the public function and the reference are asked for beyond their defaults, so that every result is compared.
ASKED_FOR: dict[str, dict[str, Any]] = {
    "causal_conv1d": {"return_final_states": True},
    "selective_scan": {"return_last_state": True},
    "sliding_window_attention": {"return_lse": True},
    "linear_nll": {"return_lse": True},
    "grin_route": {"return_probs": True},
}
# Differentiable without a backward operator of their own name.
_COMPOSED = ("scan_swa",)
# Picks follow ties and noise that rounding decides, so float64 is no reference: only the same dtype is.
CHOICES = ("grin_route", "moe_plan", "select_tokens")
# A float64 gradient of theirs needs a baseline that rounds as layers do, which the test suite builds.
NO_GRADIENT_RULE = ("moe_experts", "grin_route")


def support() -> ModuleType:
    """`tests.support.samples`, which an installed package does not have.

    Raises:
        RuntimeError: outside of a checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if (root / "tests" / "support").is_dir() and str(root) not in sys.path:
        sys.path.append(str(root))
    try:
        from tests.support import samples
    except ImportError as error:
        raise RuntimeError(f"the sample inputs lie in tests/support of a checkout: {error}") from error
    return samples


@functools.cache
def schemas() -> dict[str, Any]:
    """Schemas by name, in a fixed order."""
    import fastlm  # noqa: F401  (registers them)

    found = (s for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastlm::"))
    return {s.name.removeprefix("fastlm::"): s for s in sorted(found, key=lambda s: s.name)}


@functools.cache
def registered(device: str) -> tuple[str, ...]:
    """Operators with a kernel for this device."""
    key = "CUDA" if device == "cuda" else "CPU"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(name for name in schemas() if has(f"fastlm::{name}", key))


def raw(op: str) -> Callable[..., Any]:
    """`torch.ops.fastlm.<op>.default`."""
    return getattr(torch.ops.fastlm, op).default  # type: ignore[no-any-return]


def public(op: str) -> Callable[..., Any]:
    """`fastlm.ops.<op>`."""
    import fastlm.ops

    return getattr(fastlm.ops, op)  # type: ignore[no-any-return]


def definition(op: str) -> Callable[..., Any]:
    """`fastlm.reference.<op>`."""
    import fastlm.reference

    return getattr(fastlm.reference, op)  # type: ignore[no-any-return]


def is_differentiable(op: str) -> bool:
    """Whether gradients flow through it."""
    return f"{op}_backward" in schemas() or op in _COMPOSED


def writes_into_arguments(op: str) -> bool:
    """Whether it has arguments that it changes."""
    return any(a.alias_info is not None for a in schemas()[op].arguments)


def named_arguments(op: str, call: Any) -> dict[str, Any]:
    """A call's arguments by the names of the schema."""
    names = [a.name for a in schemas()[op].arguments]
    found: dict[str, Any] = dict(zip(names, call.args, strict=False))
    return found | call.kwargs


def build(sample: Any, device: str) -> Any:
    """Fresh arguments on the device, memory layouts as the sample has them."""
    call = sample.build(device)

    def move(a: Any) -> Any:
        return a.to(device) if isinstance(a, Tensor) and a.device.type != device else a

    return call.map(move)


def tensors_of(tree: Any) -> list[Tensor]:
    """Every tensor of nested results."""
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def poison_fresh_memory(on: bool = True) -> None:
    """From now on fresh tensors are full of NaN (integers: the largest value)."""
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = on  # type: ignore[attr-defined]


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    """Equal values, NaN where the other has NaN."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    a, b = found.detach(), wanted.detach().to(found.device)
    if a.is_floating_point():
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)
