"""slm_loss: fake kernels, gradients and autocast. Checks use the words of csrc/ops/slm_loss/checks.cpp."""

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


def _fake_select(
    score: Tensor,
    eligible: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    keep_ratio: float,
    tie_break: str = "index",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "select_tokens"
    checks.floating(op, "score", score)
    checks.shape(op, "eligible", eligible, score.shape)
    torch._check_value(
        eligible.dtype == torch.bool,
        lambda: f"{op}: eligible must have dtype bool, got {checks.name_of(eligible.dtype)}",
    )
    checks.same_device(op, "eligible", eligible, "score", score)
    segments: int | torch.SymInt = 1
    if cu_seqlens is not None:
        checks.cu_seqlens(op, "cu_seqlens", cu_seqlens)
        checks.same_device(op, "cu_seqlens", cu_seqlens, "score", score)
        segments = cu_seqlens.shape[0] - 1
    torch._check_value(
        0 <= keep_ratio <= 1, lambda: f"{op}: keep_ratio must be in [0, 1], got {keep_ratio:g}"
    )
    torch._check_value(
        tie_break in ("index", "random"),
        lambda: f"{op}: tie_break must be 'index' or 'random', got '{tie_break}'",
    )
    return (
        score.new_empty(score.shape, dtype=torch.bool),
        score.new_empty((segments,), dtype=_loss_dtype(score)),
        score.new_empty((segments, 3), dtype=torch.int64),
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
    if torch.is_grad_enabled():  # create_graph=True
        needed = (need_dhidden, need_dweight, need_dbias)
        found = _differentiable_gradients(
            (dnll, dlse, dentropy), (hidden, weight, bias), needed, labels, ctx.ignore_index, ctx.softcap
        )
        return found[0], found[1], None, found[2]
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


def _differentiable_gradients(
    grads: tuple[Tensor | None, ...],
    inputs: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    labels: Tensor,
    ignore_index: int,
    softcap: float,
) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias by PyTorch's operators, for a second differentiation; with the logits in memory.

    Tokens whose loss has gradient 0 are not left out: the second derivative in that gradient is not 0.
    """
    hidden, weight, bias = inputs
    assert hidden is not None
    assert weight is not None
    acc = _loss_dtype(hidden)
    # CUDA takes any labels, and those that are no words as ignored.
    valid = (labels != ignore_index) & (labels >= 0) & (labels < weight.shape[0])
    rows = hidden[valid].to(acc)
    logits = rows @ weight.to(acc).T
    if bias is not None:
        logits = logits + bias.to(acc)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    lse = torch.logsumexp(logits, -1)
    nll = lse - logits.gather(-1, labels[valid].long().unsqueeze(-1)).squeeze(-1)
    finite = torch.where(
        logits == -torch.inf, 0.0, logits
    )  # a word of probability 0 counts 0, and not 0 * -inf
    outputs = [nll, lse, lse - (torch.exp(logits - lse.unsqueeze(-1)) * finite).sum(-1)]
    given = [(t, grad[valid]) for t, grad in zip(outputs, grads, strict=True) if grad is not None]
    wanted = [t for t, is_needed in zip(inputs, needed, strict=True) if is_needed and t is not None]
    found = iter(
        torch.autograd.grad(
            [t for t, _ in given],
            wanted,
            [grad for _, grad in given],
            create_graph=True,
            materialize_grads=True,
        )
    )
    return [next(found) if is_needed else None for is_needed in needed]


def _keep_nothing(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.mark_non_differentiable(*output)


def _no_gradient(ctx: Any, *grads: Tensor | None) -> tuple[None, None, None]:
    """A choice has no derivative. Without a formula torch would warn whoever goes through the threshold."""
    return None, None, None


FAKES = {
    "linear_nll": _fake_forward,
    "linear_nll_backward": _fake_backward,
    "select_tokens": _fake_select,
}
GRADIENTS = {"linear_nll": (_setup_context, _backward), "select_tokens": (_keep_nothing, _no_gradient)}
# Under autocast the head behaves like F.linear: hidden and weight take autocast's dtype. The bias is added in float32 as it is.
AUTOCAST = {"linear_nll": Cast(("hidden", "weight"))}
