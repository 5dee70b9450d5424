"""slm_loss: fake kernels, gradient and autocast. Checks use the words of csrc/ops/slm_loss/checks.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import _ops
from fastlm._registration import checks
from fastlm._registration.autocast import Cast
from fastlm._registration.layout import no_tensor


def _loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _check_head(
    op: str, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float
) -> None:
    checks.floating(op, "hidden", hidden)
    torch._check_value(
        hidden.dim() >= 1,
        lambda: f"{op}: hidden must have shape (..., h), got {checks.shape_text(hidden.shape)}",
    )
    checks.dim(op, "weight", weight, 2, "(V, h)")
    torch._check_value(
        weight.shape[1] == hidden.shape[-1],
        lambda: (
            f"{op}: weight must have shape (V, {hidden.shape[-1]}), got {checks.shape_text(weight.shape)}"
        ),
    )
    checks.same_dtype(op, "weight", weight, "hidden", hidden)
    checks.same_device(op, "weight", weight, "hidden", hidden)
    torch._check_value(
        labels.dtype in (torch.int32, torch.int64),
        lambda: f"{op}: labels must have dtype int32 or int64, got {checks.name_of(labels.dtype)}",
    )
    checks.shape(op, "labels", labels, hidden.shape[:-1])
    checks.same_device(op, "labels", labels, "hidden", hidden)
    if bias is not None:
        checks.floating(op, "bias", bias)
        checks.shape(op, "bias", bias, (weight.shape[0],))
        checks.same_device(op, "bias", bias, "hidden", hidden)
    torch._check_value(softcap >= 0, lambda: f"{op}: softcap must not be negative, got {softcap:g}")


def _check_per_token(op: str, name: str, t: Tensor | None, hidden: Tensor, labels: Tensor) -> None:
    if t is None:
        return
    wanted = _loss_dtype(hidden)
    checks.shape(op, name, t, labels.shape)
    torch._check_value(
        t.dtype == wanted,
        lambda: f"{op}: {name} must have dtype {checks.name_of(wanted)}, got {checks.name_of(t.dtype)}",
    )
    checks.same_device(op, name, t, "hidden", hidden)


def _fake_forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float = 0.0,
    return_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_head("linear_nll", hidden, weight, labels, bias, softcap)
    dtype = _loss_dtype(hidden)
    nll = hidden.new_empty(labels.shape, dtype=dtype)
    lse = hidden.new_empty(labels.shape, dtype=dtype)
    return (
        nll,
        lse,
        hidden.new_empty(labels.shape, dtype=dtype) if return_entropy else no_tensor(hidden, dtype),
    )


def _fake_backward(
    dnll: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    *,
    ignore_index: int,
    softcap: float,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "linear_nll_backward"
    _check_head(op, hidden, weight, labels, bias, softcap)
    for name, t in (("dnll", dnll), ("dlse", dlse), ("dentropy", dentropy), ("lse", lse)):
        _check_per_token(op, name, t, hidden, labels)
    if dentropy is not None:
        _check_per_token(op, "entropy", entropy, hidden, labels)
    bias_dtype = _loss_dtype(hidden) if bias is None else bias.dtype
    return (
        hidden.new_empty(hidden.shape) if need_dhidden else no_tensor(hidden),
        hidden.new_empty(weight.shape) if need_dweight else no_tensor(hidden),
        hidden.new_empty((weight.shape[0],), dtype=bias_dtype)
        if need_dbias and bias is not None
        else no_tensor(hidden, bias_dtype),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    hidden, weight, labels, bias = inputs
    _, lse, entropy = output
    ctx.save_for_backward(hidden, weight, labels, bias, lse, entropy)
    ctx.ignore_index = keyword_only_inputs["ignore_index"]
    ctx.softcap = keyword_only_inputs["softcap"]
    ctx.has_entropy = keyword_only_inputs["return_entropy"]
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dnll: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, weight, labels, bias, lse, entropy = ctx.saved_tensors
    if not ctx.has_entropy:
        dentropy = None  # an output of shape (0,) has nothing to say
    if dnll is None and dlse is None and dentropy is None:
        return None, None, None, None
    need_dhidden, need_dweight = ctx.needs_input_grad[:2]
    need_dbias = bias is not None and ctx.needs_input_grad[3]  # an omitted bias is not in the list
    dhidden, dweight, dbias = _ops.linear_nll_backward(
        dnll,
        dlse,
        dentropy,
        hidden,
        weight,
        labels,
        bias,
        lse,
        entropy,
        ignore_index=ctx.ignore_index,
        softcap=ctx.softcap,
        need_dhidden=need_dhidden,
        need_dweight=need_dweight,
        need_dbias=need_dbias,
    )
    return (
        dhidden if need_dhidden else None,
        dweight if need_dweight else None,
        None,
        dbias if need_dbias else None,
    )


FAKES = {"linear_nll": _fake_forward, "linear_nll_backward": _fake_backward}
GRADIENTS = {"linear_nll": (_setup_context, _backward)}
# Under autocast the head behaves like F.linear: hidden and weight take autocast's dtype. The bias is added in float32 as it is.
AUTOCAST = {"linear_nll": Cast(("hidden", "weight"))}
