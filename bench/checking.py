"""No timing before correctness: every contender is compared with the float64 reference first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .case import MODES, Build, Call, Case, Contender, Inputs, Outputs


@dataclass(frozen=True)
class Expected:
    """Results of the reference in float64."""

    outputs: dict[str, Tensor]  # outputs and mutated inputs
    gradients: dict[str, Tensor]
    doutputs: tuple[Tensor, ...]  # gradients fed into every backward pass, float64


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """One output or several, always as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def leaves_of(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """The inputs, with those in `names` ready to be differentiated by."""
    return {name: t.detach().requires_grad_() if name in names else t for name, t in inputs.items()}


def copies_of(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """The inputs, with those in `names` copied, so that a call may write into them."""
    return {name: t.clone() if name in names else t for name, t in inputs.items()}


def backward_call(call: Call, leaves: Inputs, names: Sequence[str], doutputs: Sequence[Tensor]) -> Call:
    """Forward and backward as one call that returns the gradients."""
    wanted = [leaves[name] for name in names]

    def both() -> tuple[Tensor, ...]:
        outputs = as_tuple(call())
        return torch.autograd.grad(outputs, wanted, doutputs[: len(outputs)])

    return both


def doutputs_like(doutputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The reference's output gradients in dtype and layout of a contender's outputs."""
    return tuple(torch.empty_like(out).copy_(dout) for dout, out in zip(doutputs, outputs, strict=True))


def compute_expected(case: Case, inputs: Inputs, build: Build) -> Expected:
    """Runs the reference on the inputs in float64."""
    inputs64 = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    inputs64 = copies_of(inputs64, case.mutated)
    leaves = leaves_of(inputs64, case.gradients)
    outputs = as_tuple(build(leaves)())
    generator = torch.Generator().manual_seed(1)
    doutputs = tuple(
        torch.ones_like(out)
        if out.dim() == 0
        else torch.randn(out.shape, generator=generator, dtype=torch.float64)
        for out in outputs
    )
    gradients: dict[str, Tensor] = {}
    if case.gradients:
        found = torch.autograd.grad(outputs, [leaves[name] for name in case.gradients], doutputs)
        gradients = {f"d{name}": g for name, g in zip(case.gradients, found, strict=True)}
    return Expected(_named(outputs, leaves, case.mutated), gradients, doutputs)


def check(
    case: Case, contender: Contender, inputs: Inputs, expected: Expected, *, backward: bool = True
) -> dict[str, float]:
    """Relative errors by name of result; infinity where values are missing, of another shape or not finite.

    Args:
        case: what is computed.
        contender: who is checked.
        inputs: in the case's dtype.
        expected: from the reference.
        backward: also check gradients, if the case has any.

    Raises:
        UnavailableError: the contender cannot take part.
    """
    own = copies_of(inputs, case.mutated)
    with MODES[contender.mode]():
        outputs = as_tuple(contender.build(own)())
    errors = compare(_named(outputs, own, case.mutated), expected.outputs)
    if case.gradients and backward:
        leaves = leaves_of(inputs, case.gradients)
        call = contender.build(leaves)
        doutputs = doutputs_like(expected.doutputs, outputs)
        gradients = as_tuple(backward_call(call, leaves, case.gradients, doutputs)())
        found = {f"d{name}": g for name, g in zip(case.gradients, gradients, strict=True)}
        errors |= compare(found, expected.gradients)
    return errors


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """`||found - expected|| / ||expected||` per name."""
    if found.keys() != expected.keys():
        return {name: float("inf") for name in expected.keys() ^ found.keys()}
    return {name: relative_error(found[name], want) for name, want in expected.items()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root of the summed squared differences over that of the expected values."""
    if found.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    found = found.detach().double()
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    scale = torch.linalg.vector_norm(expected).clamp_min(1e-300)
    return float(torch.linalg.vector_norm(found - expected) / scale)


def _named(outputs: Sequence[Tensor], inputs: Inputs, mutated: Sequence[str]) -> dict[str, Tensor]:
    named = {f"out{i}" if i else "out": out.detach() for i, out in enumerate(outputs)}
    return named | {name: inputs[name].detach().clone() for name in mutated}
