"""What every operator is held to: its reference, gradients, opcheck, compile, CPU levels, threads, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.support.compile import assert_compiled_equals_eager
from tests.support.samples import Call, Sample
from tests.support.tolerance import assert_close_to_reference

Function = Callable[..., Any]


def tensors_of(result: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


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


def assert_opcheck(sample: Sample, device: torch.device | str = "cpu", *, with_grad: bool) -> None:
    """torch's own checks of schema, autograd registration, fake kernel and AOT dispatch."""
    call = sample.build(device)
    if with_grad:
        call = call.requires_grad()
    torch.library.opcheck(getattr(torch.ops.fastlm, sample.op).default, call.args, call.kwargs)


def assert_compiles(sample: Sample, function: Function, *, with_grad: bool, **options: Any) -> None:
    call = sample.build()
    if with_grad:
        call = call.requires_grad()
    assert_compiled_equals_eager(function, *call.args, **call.kwargs, **options)


@contextmanager
def cpu_level(name: str) -> Iterator[None]:
    """Runs the kernels of another CPU level inside the block."""
    import fastlm

    before = fastlm.cpu_capability()
    fastlm._C.set_cpu_capability(name)
    try:
        yield
    finally:
        fastlm._C.set_cpu_capability(before)


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_with_gradients(function: Function, call: Call, *, with_grad: bool, **options: Any) -> list[Tensor]:
    """Every tensor a call produces: outputs, written arguments, gradients of the outputs' sum of squares."""
    if with_grad:
        call = call.requires_grad()
    results = tensors_of(function(*call.args, **call.kwargs, **options))
    produced = [t.detach().clone() for t in results + list(call.floating().values())]
    roots = [t for t in results if t.requires_grad and t.numel() > 0]
    if with_grad and roots:
        total = torch.stack([torch.where(t.isfinite(), t, 0).double().square().sum() for t in roots]).sum()
        found = torch.autograd.grad(total, list(call.floating().values()), allow_unused=True)
        produced += [g for g in found if g is not None]
    return produced


def assert_same_for_any_thread_count(
    function: Function, make_call: Callable[[], Call], *, with_grad: bool, **options: Any
) -> None:
    """The same bits with 1, 2 and 3 threads, and twice in a row."""
    runs = []
    for threads in (1, 2, 3, 2):
        with num_threads(threads):
            runs.append(run_with_gradients(function, make_call(), with_grad=with_grad, **options))
    for other in runs[1:]:
        for i, (first, again) in enumerate(zip(runs[0], other, strict=True)):
            torch.testing.assert_close(
                again, first, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"tensor {i}: {m}"
            )


def other_levels() -> list[str]:
    """Levels this machine can run besides the one in use."""
    import fastlm

    return [name for name in fastlm._C.supported_cpu_capabilities() if name != fastlm.cpu_capability()]


def assert_levels_match_reference(
    sample: Sample, function: Function, reference: Function, *, with_grad: bool, **options: Any
) -> None:
    """Every level this machine can run is held to the reference by itself."""
    for level in other_levels():
        with cpu_level(level):
            assert_matches_reference(function, reference, sample.build(), **options)
            if with_grad:
                assert_gradients_match_reference(function, reference, sample.build(), **options)


def assert_same_error(
    function: Function, call: Call, error: type[Exception], text: str, *, on_meta: bool = True
) -> None:
    """The call fails with this exception and text; on meta tensors too, unless values are what is wrong."""
    with pytest.raises(error) as caught:
        function(*call.args, **call.kwargs)
    assert text in str(caught.value), str(caught.value)
    if not on_meta:
        return
    meta = call.map(lambda a: a.to("meta") if isinstance(a, Tensor) else a)
    with pytest.raises(error) as caught:
        function(*meta.args, **meta.kwargs)
    assert text in str(caught.value), str(caught.value)
