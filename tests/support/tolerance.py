"""How close is close enough: the one rule by which results are compared with a float64 reference.

The error of a result may be at most twice that of plain PyTorch in the same dtype, plus a tiny floor. It is
measured twice, as the largest error of an element and as the root mean square, so that neither one bad
element nor a small bias everywhere passes. The floor covers results where plain PyTorch happens to be exact:
one rounding to the result's dtype and a few in the dtype of accumulation.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FACTOR = 2.0
# Roundings of accumulation granted on top. For float64 the reference is itself no better than the kernel, so
# it has no error of its own to compare with, and the floor is all there is.
_ROUNDINGS = {torch.float32: 8.0, torch.float64: 4096.0}


def assert_close_to_reference(
    name: str,
    actual: Tensor,
    exact: Tensor,
    baseline: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Fails unless `actual` is as close to `exact` as plain PyTorch is, up to a factor of two.

    Args:
        name: what is compared, for the message: `"dB"`.
        actual: result under test.
        exact: the reference evaluated in float64.
        baseline: the reference evaluated in the dtype under test; default: `exact`, rounded once.
        dtype: lowest precision a value passed through on its way, if lower than that of `actual`; for example
            bfloat16 for a float32 gradient computed from bfloat16 activations' gradient.

    Raises:
        AssertionError: with name, worst index, both values, and relative RMS errors.
    """
    assert actual.shape == exact.shape, (
        f"{name}: shape must be {tuple(exact.shape)}, got {tuple(actual.shape)}"
    )
    if baseline is None:
        baseline = exact.to(actual.dtype)
    assert baseline.shape == exact.shape, f"{name}: baseline has shape {tuple(baseline.shape)}"
    assert baseline.dtype == actual.dtype, f"{name}: dtype must be {baseline.dtype}, got {actual.dtype}"
    if exact.numel() == 0:
        return
    got, want, plain = (t.detach().to("cpu", torch.float64) for t in (actual, exact, baseline))
    _assert_same_nonfinite(name, got, want)
    # A value beyond the dtype's range is infinite in every evaluation but the exact one.
    finite = want.isfinite() & plain.isfinite()
    got, want, plain = (torch.where(finite, t, 0.0) for t in (got, want, plain))

    error, plain_error = (got - want).abs(), (plain - want).abs()
    floor = _floor(dtype or actual.dtype)
    worst = int(error.argmax())
    allowed = _FACTOR * float(plain_error.max()) + floor * (float(want.abs().max()) + _tiny(actual.dtype))
    rms, plain_rms, size = (float(t.square().mean().sqrt()) for t in (error, plain_error, want))
    allowed_rms = _FACTOR * plain_rms + floor * (size + _tiny(actual.dtype))
    if float(error.max()) <= allowed and rms <= allowed_rms:
        return
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), want.shape))
    scale = size or 1.0
    raise AssertionError(
        f"{name}: worst at {index}: {float(got[index]):.9g}, reference {float(want[index]):.9g}, "
        f"error {float(error.max()):.3g} (allowed {allowed:.3g}); "
        f"relative RMS error {rms / scale:.3g} (allowed {allowed_rms / scale:.3g}); "
        f"shape {tuple(want.shape)}, {actual.dtype}"
    )


def _floor(dtype: torch.dtype) -> float:
    """Relative size of the roundings granted to a value of `dtype`."""
    acc = torch.promote_types(dtype, torch.float32)
    granted = _ROUNDINGS[acc] * torch.finfo(acc).eps
    return granted if dtype == acc else granted + torch.finfo(dtype).eps / 2


def _tiny(dtype: torch.dtype) -> float:
    """An absolute size below which a result counts as zero; for float16 its coarse grid near zero matters."""
    return 1e-7 if dtype == torch.float16 else 1e-12


def _assert_same_nonfinite(name: str, got: Tensor, want: Tensor) -> None:
    """NaN and infinities must stand where the reference has them; overflow of a narrow dtype is allowed."""
    for kind, bad in (
        ("NaN", got.isnan() & ~want.isnan()),
        ("a number", ~got.isnan() & want.isnan()),
        ("a finite value", want.isinf() & (got != want)),
    ):
        if bool(bad.any()):
            index = tuple(int(i) for i in bad.nonzero()[0])
            raise AssertionError(
                f"{name}: {kind} at {index} and {int(bad.sum()) - 1} other places, "
                f"where the reference has {want[index].item()}"
            )
