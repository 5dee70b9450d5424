"""moe_dispatch: fake kernels, gradients and autocast. Checks use the words of csrc/ops/moe_dispatch/checks.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import _ops
from fastlm._registration import checks
from fastlm._registration.autocast import Cast
from fastlm._registration.layout import no_tensor

_MOST_PICKS = 8
_ACTIVATIONS = ("silu", "gelu_tanh", "relu", "relu2")


def _check_ids(op: str, topk_ids: Tensor, num_experts: int) -> None:
    """The bound on the number of picks stays with the real kernel: here it would become one of an exported program."""
    torch._check_value(
        topk_ids.dtype in (torch.int32, torch.int64),
        lambda: f"{op}: topk_ids must have dtype int32 or int64, got {checks.name_of(topk_ids.dtype)}",
    )
    checks.dim(op, "topk_ids", topk_ids, 2, "(T, k)")
    k = topk_ids.shape[1]
    torch._check_value(
        k >= 1 and k <= _MOST_PICKS,
        lambda: f"{op}: topk_ids must have 1 to {_MOST_PICKS} columns, got {k}",
    )
    torch._check_value(num_experts >= 1, lambda: f"{op}: num_experts must be at least 1, got {num_experts}")


def _check_product(op: str, a: Tensor, b: Tensor, offsets: Tensor, trans_b: bool) -> None:
    checks.floating(op, "a", a)
    checks.dim(op, "a", a, 2, "(M, Kd)")
    checks.dim(op, "b", b, 3, "(E, N, Kd)" if trans_b else "(E, Kd, N)")
    checks.same_dtype(op, "b", b, "a", a)
    checks.same_device(op, "b", b, "a", a)
    depth = a.shape[1]
    torch._check_value(
        b.shape[2 if trans_b else 1] == depth,
        lambda: (
            f"{op}: b must have shape {f'(E, N, {depth})' if trans_b else f'(E, {depth}, N)'}, "
            f"got {checks.shape_text(b.shape)}"
        ),
    )
    checks.index_vector(op, "offsets", offsets)
    checks.shape(op, "offsets", offsets, (b.shape[0] + 1,))
    checks.same_device(op, "offsets", offsets, "a", a)


def _check_pick_weights(op: str, name: str, t: Tensor, hidden_states: Tensor, topk_ids: Tensor) -> None:
    own = hidden_states.dtype
    acc = torch.float64 if own == torch.float64 else torch.float32
    words = checks.name_of(acc) if own == acc else f"{checks.name_of(acc)} or {checks.name_of(own)}"
    torch._check_value(
        t.dtype in (acc, own),
        lambda: f"{op}: {name} must have dtype {words}, got {checks.name_of(t.dtype)}",
    )
    checks.shape(op, name, t, topk_ids.shape)
    checks.same_device(op, name, t, "hidden_states", hidden_states)


def _check_experts(
    op: str,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    grad_weights: Tensor | None,
    activation: str,
) -> None:
    checks.floating(op, "hidden_states", hidden_states)
    checks.dim(op, "hidden_states", hidden_states, 2, "(T, h)")
    tokens, size = hidden_states.shape
    checks.dim(op, "down_proj", down_proj, 3, "(E, h, I)")
    experts, _, inner = down_proj.shape
    checks.shape(op, "down_proj", down_proj, (experts, size, inner))
    checks.same_dtype(op, "down_proj", down_proj, "hidden_states", hidden_states)
    checks.same_device(op, "down_proj", down_proj, "hidden_states", hidden_states)

    def is_gate_up(rows: int) -> bool:
        found = gate_up_proj.shape
        return len(found) == 3 and found[0] == experts and found[1] == rows and found[2] == size

    torch._check_value(
        is_gate_up(2 * inner) or is_gate_up(inner),
        lambda: (
            f"{op}: gate_up_proj must have shape {checks.shape_text((experts, 2 * inner, size))} or, without a gate, "
            f"{checks.shape_text((experts, inner, size))}, got {checks.shape_text(gate_up_proj.shape)}"
        ),
    )
    checks.same_dtype(op, "gate_up_proj", gate_up_proj, "hidden_states", hidden_states)
    checks.same_device(op, "gate_up_proj", gate_up_proj, "hidden_states", hidden_states)
    _check_ids(op, topk_ids, experts)
    checks.same_device(op, "topk_ids", topk_ids, "hidden_states", hidden_states)
    torch._check_value(
        topk_ids.shape[0] == tokens,
        lambda: f"{op}: topk_ids must have shape ({tokens}, k), got {checks.shape_text(topk_ids.shape)}",
    )
    _check_pick_weights(op, "topk_weights", topk_weights, hidden_states, topk_ids)
    if grad_weights is not None:
        _check_pick_weights(op, "grad_weights", grad_weights, hidden_states, topk_ids)
    for name, bias, rows in (
        ("gate_up_proj_bias", gate_up_proj_bias, gate_up_proj.shape[1]),
        ("down_proj_bias", down_proj_bias, size),
    ):
        if bias is not None:
            checks.floating(op, name, bias)
            checks.shape(op, name, bias, (experts, rows))
            checks.same_device(op, name, bias, "hidden_states", hidden_states)
    torch._check_value(
        activation in _ACTIVATIONS,
        lambda: f"{op}: activation must be silu, gelu_tanh, relu or relu2, got {activation}",
    )


def _check_gradient(op: str, dout: Tensor, shape: tuple[int, ...], main: str, like: Tensor) -> None:
    checks.shape(op, "dout", dout, shape)
    checks.same_dtype(op, "dout", dout, main, like)
    checks.same_device(op, "dout", dout, main, like)


# ---- fake kernels ---------------------------------------------------------------------------------------


def _fake_plan(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_ids("moe_plan", topk_ids, num_experts)
    slots = (topk_ids.numel(),)
    return (
        topk_ids.new_empty((num_experts + 1,), dtype=torch.int32),
        topk_ids.new_empty(slots, dtype=torch.int32),
        topk_ids.new_empty(slots, dtype=torch.int32),
    )


def _fake_grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, *, trans_b: bool = True) -> Tensor:
    _check_product("grouped_gemm", a, b, offsets, trans_b)
    return a.new_empty((a.shape[0], b.shape[1 if trans_b else 2]))


def _fake_grouped_gemm_backward(
    dout: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    *,
    trans_b: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor]:
    op = "grouped_gemm_backward"
    _check_product(op, a, b, offsets, trans_b)
    _check_gradient(op, dout, (a.shape[0], b.shape[1 if trans_b else 2]), "a", a)
    return (
        a.new_empty(a.shape) if need_da else no_tensor(a),
        b.new_empty(b.shape) if need_db else no_tensor(a),
    )


def _fake_experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj_bias: Tensor | None = None,
    down_proj_bias: Tensor | None = None,
    grad_weights: Tensor | None = None,
    *,
    activation: str = "silu",
    keep_gate_up: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_experts(
        "moe_experts",
        hidden_states,
        gate_up_proj,
        down_proj,
        topk_ids,
        topk_weights,
        gate_up_proj_bias,
        down_proj_bias,
        grad_weights,
        activation,
    )
    kept = (topk_ids.numel(), gate_up_proj.shape[1])
    return (
        hidden_states.new_empty(hidden_states.shape),
        hidden_states.new_empty(kept) if keep_gate_up else no_tensor(hidden_states),
    )


def _fake_experts_backward(
    dout: Tensor,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    grad_weights: Tensor | None,
    gate_up: Tensor,
    *,
    activation: str,
    need_dhidden_states: bool,
    need_dproj: bool,
    need_dtopk_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "moe_experts_backward"
    _check_experts(
        op,
        hidden_states,
        gate_up_proj,
        down_proj,
        topk_ids,
        topk_weights,
        gate_up_proj_bias,
        down_proj_bias,
        grad_weights,
        activation,
    )
    _check_gradient(op, dout, tuple(hidden_states.shape), "hidden_states", hidden_states)
    kept = (topk_ids.numel(), gate_up_proj.shape[1])
    torch._check_value(
        tuple(gate_up.shape) in ((0,), kept),
        lambda: (
            f"{op}: gate_up must have shape {checks.shape_text(kept)} or (0,), "
            f"got {checks.shape_text(gate_up.shape)}"
        ),
    )
    checks.same_dtype(op, "gate_up", gate_up, "hidden_states", hidden_states)
    checks.same_device(op, "gate_up", gate_up, "hidden_states", hidden_states)

    acc = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32

    def like(t: Tensor | None, needed: bool) -> Tensor:
        if t is None or not needed:
            return no_tensor(hidden_states, acc if t is None else t.dtype)
        return t.new_empty(t.shape)

    return (
        like(hidden_states, need_dhidden_states),
        like(gate_up_proj, need_dproj),
        like(down_proj, need_dproj),
        like(topk_weights, need_dtopk_weights),
        like(gate_up_proj_bias, need_dproj),
        like(down_proj_bias, need_dproj),
    )


# ---- gradients ------------------------------------------------------------------------------------------


def _setup_grouped_gemm(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.trans_b = keyword_only_inputs["trans_b"]
    ctx.set_materialize_grads(False)


def _backward_grouped_gemm(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None
    need_da, need_db = ctx.needs_input_grad[:2]
    da, db = _ops.grouped_gemm_backward(
        dout, *ctx.saved_tensors, trans_b=ctx.trans_b, need_da=need_da, need_db=need_db
    )
    return da if need_da else None, db if need_db else None, None


def _setup_experts(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    _, gate_up = output
    ctx.save_for_backward(*inputs, gate_up)
    ctx.activation = keyword_only_inputs["activation"]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gate_up)


def _backward_experts(ctx: Any, dout: Tensor | None, _gate_up: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing unpacks them only once
    inputs = saved[:-1]  # the last one is gate_up
    if dout is None:
        return (None,) * len(inputs)
    # Trailing arguments that were omitted are not in the list.
    asked = list(ctx.needs_input_grad) + [False] * (len(inputs) - len(ctx.needs_input_grad))
    needed = [wanted and t is not None for wanted, t in zip(asked, inputs, strict=True)]
    hidden, gate_up_proj, down_proj, _, weights, gate_up_bias, down_bias, _ = needed
    dhidden, dgate_up_proj, ddown_proj, dweights, dgate_up_bias, ddown_bias = _ops.moe_experts_backward(
        dout,
        *saved,
        activation=ctx.activation,
        need_dhidden_states=hidden,
        need_dproj=gate_up_proj or down_proj or gate_up_bias or down_bias,
        need_dtopk_weights=weights,
    )
    found = (dhidden, dgate_up_proj, ddown_proj, None, dweights, dgate_up_bias, ddown_bias, None)
    return tuple(gradient if wanted else None for gradient, wanted in zip(found, needed, strict=True))


FAKES = {
    "moe_plan": _fake_plan,
    "grouped_gemm": _fake_grouped_gemm,
    "grouped_gemm_backward": _fake_grouped_gemm_backward,
    "moe_experts": _fake_experts,
    "moe_experts_backward": _fake_experts_backward,
}
GRADIENTS = {
    "grouped_gemm": (_setup_grouped_gemm, _backward_grouped_gemm),
    "moe_experts": (_setup_experts, _backward_experts),
}
# Products take autocast's dtype like F.linear. The weights of picks and the biases enter sums in float32 and stay.
AUTOCAST = {
    "grouped_gemm": Cast(("a", "b")),
    "moe_experts": Cast(("hidden_states", "gate_up_proj", "down_proj")),
}
