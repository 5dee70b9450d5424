"""What every operator is held to on each of its samples: reference, gradients, opcheck, compile, levels, threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.support.compile import assert_compiled_equals_eager
from tests.support.samples import Call, Sample
from tests.support.tolerance import assert_close_to_reference

Function = Callable[..., Any]


def tensors_of(result: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def assert_matches_reference(
    sample: Sample, function: Function, reference: Function, device: torch.device | str = "cpu", **options: Any
) -> None:
    """Outputs, and what is written in place, against the reference in float64; the reference in the sample's dtype sets the bar."""
    runs = []
    for which, fn in (("actual", function), ("plain", reference), ("exact", reference)):
        call = sample.build(device)
        if which == "exact":
            call = call.to(torch.float64)
        result = fn(*call.args, **call.kwargs, **options)
        runs.append(tensors_of(result) + list(call.floating().values()))
    actual, plain, exact = runs
    assert len(actual) == len(exact)
    for i, (got, base, want) in enumerate(zip(actual, plain, exact, strict=True)):
        if got.is_floating_point():
            assert_close_to_reference(f"{sample} tensor {i}", got, want.to(torch.float64), base)
        else:
            torch.testing.assert_close(got, want.to(got.dtype), rtol=0, atol=0)


def assert_gradients_match(
    sample: Sample, function: Function, reference: Function, device: torch.device | str = "cpu", **options: Any
) -> None:
    """Gradients of every floating input, for random gradients of every floating output."""
    upstream: list[Tensor] | None = None
    gradients = {}
    for which, fn in (("exact", reference), ("plain", reference), ("actual", function)):
        call = sample.build(device)
        call = (call.to(torch.float64) if which == "exact" else call).requires_grad()
        outputs = [t for t in tensors_of(fn(*call.args, **call.kwargs, **options)) if t.requires_grad]
        if upstream is None:
            generator = torch.Generator().manual_seed(1)
            upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in outputs]
            dtypes = [t.dtype for t in tensors_of(function(*_plain(sample, device).args, **_plain(sample, device).kwargs, **options))]
            upstream = [u.to(d).to(device) for u, d in zip(upstream, dtypes, strict=False)]
        inputs = call.floating()
        found = torch.autograd.grad(
            outputs,
            list(inputs.values()),
            [u.to(t.dtype) for u, t in zip(upstream, outputs, strict=True)],
            allow_unused=True,
        )
        gradients[which] = dict(zip(inputs, found, strict=True))
    for name, want in gradients["exact"].items():
        got, base = gradients["actual"][name], gradients["plain"][name]
        if want is None:
            assert got is None or not got.any(), f"{sample}: d{name} must be zero or missing"
            continue
        assert got is not None, f"{sample}: d{name} is missing"
        assert_close_to_reference(f"{sample} d{name}", got, want, base)


def _plain(sample: Sample, device: torch.device | str) -> Call:
    return sample.build(device)


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


def run_with_gradients(sample: Sample, function: Function, *, with_grad: bool, **options: Any) -> list[Tensor]:
    """Every tensor a call produces: outputs, written arguments, gradients of their sum."""
    call = sample.build()
    if with_grad:
        call = call.requires_grad()
    result = tensors_of(function(*call.args, **call.kwargs, **options))
    produced = [t.detach().clone() for t in result]
    produced += [t.detach().clone() for t in call.floating().values()]
    roots = [t for t in result if t.requires_grad and t.numel() > 0]
    if with_grad and roots:
        total = torch.stack([torch.where(t.isfinite(), t, 0).double().square().sum() for t in roots]).sum()
        found = torch.autograd.grad(total, list(call.floating().values()), allow_unused=True)
        produced += [g for g in found if g is not None]
    return produced


def assert_same_for_any_thread_count(sample: Sample, function: Function, *, with_grad: bool, **options: Any) -> None:
    """The same bits with 1, 2 and 3 threads, and twice in a row."""
    runs = []
    for threads in (1, 2, 3, 2):
        with num_threads(threads):
            runs.append(run_with_gradients(sample, function, with_grad=with_grad, **options))
    for other in runs[1:]:
        for i, (first, again) in enumerate(zip(runs[0], other, strict=True)):
            torch.testing.assert_close(
                again, first, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"{sample} tensor {i}: {m}"
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
            assert_matches_reference(sample, function, reference, **options)
            if with_grad:
                assert_gradients_match(sample, function, reference, **options)


def assert_same_error(
    function: Function, call: Call, error: type[Exception], text: str, *, on_meta: bool = True
) -> None:
    """The call fails with this exception and text, on real tensors and, unless it depends on values, on meta tensors."""
    import pytest

    with pytest.raises(error) as caught:
        function(*call.args, **call.kwargs)
    assert text in str(caught.value), str(caught.value)
    if not on_meta:
        return
    meta = call.map(lambda a: a.to("meta") if isinstance(a, Tensor) else a)
    with pytest.raises(error) as caught:
        function(*meta.args, **meta.kwargs)
    assert text in str(caught.value), str(caught.value)
