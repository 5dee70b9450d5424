"""One public call against its reference: outputs, what it leaves in its arguments, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.samples import Call
from tests.support.tolerance import assert_close_to_reference

Function = Callable[..., Any]


def assert_matches_reference(function: Function, reference: Function, call: Call, **options: Any) -> None:
    """Compares `function` with `reference` under the tolerance rule, the latter in float64 and in the call's
    own dtype.

    Args:
        function: of `fastlm.ops`.
        reference: its namesake of `fastlm.reference`.
        call: arguments; each evaluation gets copies.
        options: further keywords for both, such as `return_last_state=True`.
    """
    runs = [
        _run(function, _copy(call), options),
        _run(reference, call.to(torch.float64), options),
        _run(reference, _copy(call), options),
    ]
    _compare(runs)


def assert_gradients_match_reference(
    function: Function, reference: Function, call: Call, *, seed: int = 0, **options: Any
) -> None:
    """Compares gradients of every floating argument, for random gradients of all floating outputs.

    Args:
        function: of `fastlm.ops`.
        reference: its namesake of `fastlm.reference`, differentiated by autograd.
        call: arguments; all floating ones ask for a gradient.
        seed: of the outputs' gradients.
        options: further keywords for both.
    """
    runs = [
        _run_backward(function, call.requires_grad(), options, seed),
        _run_backward(reference, call.to(torch.float64).requires_grad(), options, seed),
        _run_backward(reference, call.requires_grad(), options, seed),
    ]
    _compare(runs)


def _compare(runs: list[dict[str, Tensor]]) -> None:
    actual, exact, baseline = runs
    assert list(actual) == list(exact), f"results must be {list(exact)}, got {list(actual)}"
    for name, got in actual.items():
        assert_close_to_reference(name, got, exact[name], baseline[name])


def _copy(call: Call) -> Call:
    """A call whose arguments may be written; those that share memory are only read, and stay."""

    def copy(a: Any) -> Any:
        if not isinstance(a, Tensor) or (a.numel() > 0 and 0 in a.stride()):
            return a
        return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device).copy_(a)

    return call.map(copy)


def _outputs(result: Any) -> dict[str, Tensor]:
    tensors = result if isinstance(result, tuple) else (result,)
    return {f"output {i}": t for i, t in enumerate(tensors)}


def _run(function: Function, call: Call, options: dict[str, Any]) -> dict[str, Tensor]:
    results = _outputs(function(*call.args, **call.kwargs, **options))
    return results | {f"{name} afterwards": t for name, t in call.floating().items()}


def _run_backward(function: Function, call: Call, options: dict[str, Any], seed: int) -> dict[str, Tensor]:
    outputs = _outputs(function(*call.args, **call.kwargs, **options))
    differentiable = {name: t for name, t in outputs.items() if t.requires_grad}
    inputs = call.floating()
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for t in differentiable.values():
        values = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        # Rounded to bfloat16, the values are the same in every dtype.
        gradients.append(values.bfloat16().to(t))
    grads = torch.autograd.grad(
        list(differentiable.values()), list(inputs.values()), gradients, allow_unused=True
    )
    results = {}
    for (name, t), grad in zip(inputs.items(), grads, strict=True):
        results[f"gradient of {name}"] = torch.zeros_like(t) if grad is None else grad
    return results
