"""One sample: a named recipe for the arguments of one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.layouts import Draw


@dataclass
class Call:
    """Arguments of one call, the tensors of differentiable operators positional or by name as is handy."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, change: Callable[[Any], Any]) -> Call:
        """The same call with every argument changed."""
        return Call(tuple(change(a) for a in self.args), {name: change(a) for name, a in self.kwargs.items()})

    def to(self, dtype: torch.dtype) -> Call:
        """Floating tensors in `dtype` (float64: the exact values of this call), as fresh leaves."""

        def change(a: Any) -> Any:
            return a.detach().to(dtype, copy=True) if _is_floating(a) else a

        return self.map(change)

    def requires_grad(self) -> Call:
        """The same call with fresh floating tensors that ask for a gradient; memory layouts stay."""

        def change(a: Any) -> Any:
            return a.detach().requires_grad_() if _is_floating(a) else a

        return self.map(change)

    def floating(self) -> dict[str, Tensor]:
        """Floating tensors by name, positional ones as `arg0`, `arg1`, ..."""
        named = {f"arg{i}": a for i, a in enumerate(self.args)} | self.kwargs
        return {name: a for name, a in named.items() if _is_floating(a)}


# Called with `draw=`.
Recipe = Callable[..., Call]


@dataclass(frozen=True)
class Sample:
    """A recipe with its operator and its name."""

    op: str
    name: str
    recipe: Recipe

    def build(self, device: torch.device | str = "cpu") -> Call:
        """Fresh arguments, the same values each time."""
        return self.recipe(draw=Draw(f"{self.op}/{self.name}", device))

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def _is_floating(a: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()
