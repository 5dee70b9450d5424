"""Holds an operator on the device to the reference in float64 on the CPU, by the tolerance rule of the test suite: the error may be
twice that of plain PyTorch in the same dtype.

Every run is made twice and must give the same bits; memory that an operator gets fresh is full of NaN, so an element that it does
not write shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .item import Context, WrongError
from .operators import (
    ASKED_FOR,
    CHOICES,
    NO_GRADIENT_RULE,
    build,
    definition,
    is_differentiable,
    poison_fresh_memory,
    public,
    raw,
    same_bits,
    support,
    tensors_of,
    writes_into_arguments,
)

Results = dict[str, Tensor]


def outputs_of(function: Callable[..., Any], call: Any, options: Mapping[str, Any]) -> Results:
    """Outputs and what is in the floating arguments afterwards."""
    results = tensors_of(function(*call.args, **call.kwargs, **options))
    named = {f"output {i}": t.detach() for i, t in enumerate(results)}
    return named | {f"{name} afterwards": t.detach() for name, t in call.floating().items()}


def gradients_of(function: Callable[..., Any], call: Any, options: Mapping[str, Any]) -> Results:
    """Gradients of the floating arguments for random gradients of the outputs, the same on every device and in every dtype."""
    call = call.requires_grad()
    outputs = [t for t in tensors_of(function(*call.args, **call.kwargs, **options)) if t.requires_grad]
    inputs = call.floating()
    generator = torch.Generator().manual_seed(0)
    upstream = []
    for t in outputs:
        values = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        upstream.append(values.bfloat16().to(t.device, t.dtype))
    found = torch.autograd.grad(outputs, list(inputs.values()), upstream, allow_unused=True)
    pairs = zip(inputs.items(), found, strict=True)
    return {f"gradient of {name}": torch.zeros_like(t) if g is None else g for (name, t), g in pairs}


def assert_same_bits(what: str, first: Results, second: Results) -> None:
    """Two runs agree to the last bit.

    Raises:
        WrongError: with the first result that differs, and by how much.
    """
    if first.keys() != second.keys():
        raise WrongError(f"{what}: results {sorted(first)} and {sorted(second)}")
    for name, a in first.items():
        b = second[name]
        if not same_bits(a, b):
            if a.shape != b.shape or a.dtype != b.dtype:
                raise WrongError(f"{what}: {name}: {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}")
            difference = (a.double() - b.to(a.device).double()).abs().nan_to_num(torch.inf)
            count, most = int((difference > 0).sum()), float(difference.max())
            raise WrongError(
                f"{what}: {name} differs in {count} of {a.numel()} elements, by {most:.3g} at most"
            )


def check_sample(sample: Any, context: Context) -> dict[str, Any]:
    """Outputs and gradients of one sample against the reference."""
    op, options = sample.op, ASKED_FOR.get(sample.op, {})
    poison_fresh_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own kernels are not all deterministic
        context.stage("forward")
        first, second = (
            _quietly(outputs_of, public(op), build(sample, context.device), options) for _ in range(2)
        )
        assert_same_bits("twice in a row", first, second)
        context.stage("reference")
        worst = _compare(
            op, first, lambda dtype: _quietly(outputs_of, definition(op), _on_cpu(sample, dtype), options)
        )
        if is_differentiable(op) and not writes_into_arguments(op):
            worst |= _check_gradients(sample, context, options)
    return {"relative_rms": worst}


def _check_gradients(sample: Any, context: Context, options: Mapping[str, Any]) -> dict[str, float]:
    op = sample.op
    context.stage("backward")
    first, second = (gradients_of(public(op), build(sample, context.device), options) for _ in range(2))
    assert_same_bits("gradients twice in a row", first, second)
    context.stage("gradients of the reference")
    if op in NO_GRADIENT_RULE:
        return {}
    return _compare(op, first, lambda dtype: gradients_of(definition(op), _on_cpu(sample, dtype), options))


def check_backward_operator(sample: Any, context: Context) -> dict[str, Any]:
    """A backward operator called directly, missing gradients included: twice the same bits, and close to itself in float64.

    The float64 call runs on the CPU, with what the CPU's own forward pass saved.
    """
    op = sample.op
    poison_fresh_memory()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        context.stage("on the device")
        first, second = (outputs_of(raw(op), build(sample, context.device), {}) for _ in range(2))
        assert_same_bits("twice in a row", first, second)
        context.stage("on the CPU")
        outputs = {name: t for name, t in first.items() if name.startswith("output")}
        worst = _compare(
            op,
            outputs,
            lambda dtype: _only_outputs(outputs_of(raw(op), _on_cpu(sample, dtype), {})),
        )
    return {"relative_rms": worst}


def _only_outputs(results: Results) -> Results:
    return {name: t for name, t in results.items() if name.startswith("output")}


def _quietly(function: Callable[..., Results], *args: Any) -> Results:
    with torch.no_grad():
        return function(*args)


def _on_cpu(sample: Any, dtype: torch.dtype | None) -> Any:
    call = sample.build("cpu")
    return call if dtype is None else call.to(dtype)


def _compare(op: str, found: Results, run: Callable[[torch.dtype | None], Results]) -> dict[str, float]:
    """Fails unless `found` is close to `run(float64)`, with `run(None)` as what plain PyTorch reaches."""
    support()
    from tests.support.tolerance import assert_close_to_reference

    plain = run(None)
    exact = plain if op in CHOICES else run(torch.float64)
    if list(found) != list(exact):
        raise WrongError(f"results must be {list(exact)}, got {list(found)}")
    worst = {}
    for name, got in found.items():
        got = got.cpu()
        if not got.is_floating_point():
            if not same_bits(got, plain[name]):
                raise WrongError(f"{name}: integers differ from the reference's")
            continue
        assert_close_to_reference(name, got, exact[name].double(), plain[name])
        worst[name] = _relative_rms(got, exact[name])
    return worst


def _relative_rms(got: Tensor, exact: Tensor) -> float:
    if exact.numel() == 0:
        return 0.0
    want, have = exact.double(), got.double()
    finite = want.isfinite() & have.isfinite()
    want, have = torch.where(finite, want, 0.0), torch.where(finite, have, 0.0)
    size = float(want.square().mean().sqrt())
    return float((have - want).square().mean().sqrt()) / (size or 1.0)
