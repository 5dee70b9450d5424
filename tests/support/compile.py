"""A function under `torch.compile` must give what it gives without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def assert_compiled_equals_eager(
    fn: Callable[..., Any], *args: Any, backend: str = "aot_eager", dynamic: bool = True, **kwargs: Any
) -> None:
    """Runs `fn(*args, **kwargs)` both ways on copies of the arguments and compares, bit for bit.

    Compared are the outputs, what is left in the arguments (operators may write into them), and, for
    arguments that require one, the gradient of the sum of all floating outputs. `backend="aot_eager"` runs
    the same kernels in the same order, hence the same bits; other backends may fuse what surrounds an
    operator.

    Args:
        fn: function of tensors, compiled with `fullgraph=True`: a graph break is a failure.
        backend: of `torch.compile`.
        dynamic: make sizes symbolic from the first call.
    """
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend=backend)
    results = {}
    for name, call in (("eager", fn), ("compiled", compiled)):
        own_args, own_kwargs = pytree.tree_map(_copy, (args, kwargs))
        outputs = call(*own_args, **own_kwargs)
        gradients = _gradients(outputs, own_args, own_kwargs)
        tensors = pytree.tree_leaves((outputs, own_args, own_kwargs, gradients))
        results[name] = [t.detach() for t in tensors if isinstance(t, Tensor)]
    assert len(results["eager"]) == len(results["compiled"])
    for i, (eager, other) in enumerate(zip(results["eager"], results["compiled"], strict=True)):
        assert eager.shape == other.shape, f"tensor {i}: {tuple(other.shape)}, eager {tuple(eager.shape)}"
        assert eager.stride() == other.stride(), (
            f"tensor {i}: strides {other.stride()}, eager {eager.stride()}"
        )
        torch.testing.assert_close(other, eager, rtol=0, atol=0, equal_nan=True)


def _copy(a: Any) -> Any:
    """A leaf of its own with the values, strides and requires_grad of a tensor."""
    if not isinstance(a, Tensor):
        return a
    if 0 in a.stride() and a.numel() > 0:  # broadcast: cannot be written anyway
        return a.detach().requires_grad_(a.requires_grad)
    room = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device)
    return room.copy_(a.detach()).requires_grad_(a.requires_grad)


def _gradients(outputs: Any, args: Any, kwargs: Any) -> list[Tensor | None]:
    inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    results = [
        t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad and t.numel() > 0
    ]
    if not inputs or not results:
        return []
    # Infinite outputs (the log-sum-exp of a row that sees nothing) would drown the rest.
    total = torch.stack([torch.where(t.isfinite(), t, 0).to(torch.float64).sum() for t in results]).sum()
    return list(torch.autograd.grad(total, inputs, allow_unused=True))
