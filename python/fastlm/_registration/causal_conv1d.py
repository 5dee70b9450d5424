"""causal_conv1d: fake kernels, gradient and autocast. Checks use the words of csrc/ops/causal_conv1d/checks.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import _ops
from fastlm._registration import checks
from fastlm._registration.autocast import Cast
from fastlm._registration.layout import empty_like_layout, no_tensor

_MAX_WIDTH = 32


def _check_activation(op: str, activation: str | None) -> None:
    torch._check_value(
        activation in (None, "silu", "swish"),
        lambda: f"{op}: activation must be None, 'silu' or 'swish', got '{activation}'",
    )


def _check_filter(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dim = x.shape[1]
    checks.floating(op, "x", x)
    checks.floating(op, "weight", weight)
    checks.dim(op, "weight", weight, 2, "(D, W)")
    torch._check_value(
        weight.shape[0] == dim,
        lambda: f"{op}: weight must have shape ({dim}, W), got {checks.shape_text(weight.shape)}",
    )
    torch._check_value(
        1 <= weight.shape[1] <= _MAX_WIDTH,
        lambda: f"{op}: weight must have a width between 1 and {_MAX_WIDTH}, got {weight.shape[1]}",
    )
    checks.same_device(op, "weight", weight, "x", x)
    if bias is not None:
        checks.floating(op, "bias", bias)
        checks.shape(op, "bias", bias, (dim,))
        checks.same_device(op, "bias", bias, "x", x)


def _num_states(x: Tensor, cu_seqlens: Tensor | None) -> int | torch.SymInt:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _check_forward(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
) -> None:
    checks.dim(op, "x", x, 3, "(B, D, L)")
    _check_filter(op, x, weight, bias)
    if seq_idx is not None:
        torch._check_value(cu_seqlens is None, lambda: f"{op}: seq_idx and cu_seqlens must not both be given")
        torch._check_value(
            seq_idx.dtype in (torch.int32, torch.int64),
            lambda: f"{op}: seq_idx must have dtype int32 or int64, got {checks.name_of(seq_idx.dtype)}",
        )
        checks.shape(op, "seq_idx", seq_idx, (x.shape[0], x.shape[2]))
        checks.same_device(op, "seq_idx", seq_idx, "x", x)
    if cu_seqlens is not None:
        checks.cu_seqlens(op, "cu_seqlens", cu_seqlens)
        torch._check_value(
            x.shape[0] == 1,
            lambda: f"{op}: x must have batch 1 when cu_seqlens is given, got {x.shape[0]}",
        )
        checks.same_device(op, "cu_seqlens", cu_seqlens, "x", x)
    if initial_states is not None:
        expected = (_num_states(x, cu_seqlens), x.shape[1], weight.shape[1] - 1)
        checks.shape(op, "initial_states", initial_states, expected)
        checks.same_dtype(op, "initial_states", initial_states, "x", x)
        checks.same_device(op, "initial_states", initial_states, "x", x)
    _check_activation(op, activation)


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_forward("causal_conv1d", x, weight, bias, seq_idx, initial_states, activation, cu_seqlens)
    final_states = x.new_empty((_num_states(x, cu_seqlens), x.shape[1], weight.shape[1] - 1))
    return empty_like_layout(x), final_states


def _fake_backward(
    dout: Tensor,
    dfinal_states: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "causal_conv1d_backward"
    _check_forward(op, x, weight, bias, seq_idx, initial_states, activation, cu_seqlens)
    checks.shape(op, "dout", dout, x.shape)
    checks.same_dtype(op, "dout", dout, "x", x)
    if dfinal_states is not None:
        expected = (_num_states(x, cu_seqlens), x.shape[1], weight.shape[1] - 1)
        checks.shape(op, "dfinal_states", dfinal_states, expected)
        checks.same_dtype(op, "dfinal_states", dfinal_states, "x", x)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        empty_like_layout(x),
        weight.new_empty(weight.shape),
        no_tensor(x, acc) if bias is None else bias.new_empty(bias.shape),
        no_tensor(x) if initial_states is None else x.new_empty(initial_states.shape),
    )


def check_update(
    op: str,
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> None:
    torch._check_value(
        x.dim() in (2, 3),
        lambda: f"{op}: x must have shape (B, D) or (B, D, m), got {checks.shape_text(x.shape)}",
    )
    _check_filter(op, x, weight, bias)
    checks.dim(op, "conv_state", conv_state, 3, "(B, D, S)")
    checks.same_dtype(op, "conv_state", conv_state, "x", x)
    checks.same_device(op, "conv_state", conv_state, "x", x)
    found = checks.shape_text(conv_state.shape)
    torch._check_value(
        conv_state.shape[1] == x.shape[1],
        lambda: f"{op}: conv_state must have shape (B, {x.shape[1]}, S), got {found}",
    )
    torch._check_value(
        conv_state.shape[2] >= weight.shape[1] - 1,
        lambda: (
            f"{op}: conv_state must have a length S of at least {weight.shape[1] - 1} (W - 1), "
            f"got {conv_state.shape[2]}"
        ),
    )
    if cache_seqlens is not None:
        checks.index_vector(op, "cache_seqlens", cache_seqlens)
        checks.shape(op, "cache_seqlens", cache_seqlens, (x.shape[0],))
        checks.same_device(op, "cache_seqlens", cache_seqlens, "x", x)
        torch._check_value(
            conv_state.shape[2] >= 1,
            lambda: (
                f"{op}: conv_state must have a length S of at least 1 when cache_seqlens is given, "
                f"got {conv_state.shape[2]}"
            ),
        )
    if conv_state_indices is not None:
        checks.index_vector(op, "conv_state_indices", conv_state_indices)
        checks.shape(op, "conv_state_indices", conv_state_indices, (x.shape[0],))
        checks.same_device(op, "conv_state_indices", conv_state_indices, "x", x)
    else:
        torch._check_value(
            conv_state.shape[0] == x.shape[0],
            lambda: f"{op}: conv_state must have shape ({x.shape[0]}, {x.shape[1]}, S), got {found}",
        )
    _check_activation(op, activation)


def _fake_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    check_update(
        "causal_conv1d_update",
        x,
        conv_state,
        weight,
        bias,
        activation,
        cache_seqlens,
        conv_state_indices,
    )
    return x.new_empty(x.shape) if x.dim() == 2 else empty_like_layout(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, seq_idx, initial_states, activation, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, bias, seq_idx, initial_states, cu_seqlens)
    ctx.activation = activation
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dfinal_states: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, seq_idx, initial_states, cu_seqlens = ctx.saved_tensors
    if dout is None and dfinal_states is None:
        return (None,) * 7
    if dout is None:
        dout = torch.zeros_like(x)
    dx, dweight, dbias, dinitial_states = _ops.causal_conv1d_backward(
        dout, dfinal_states, x, weight, bias, seq_idx, initial_states, ctx.activation, cu_seqlens
    )
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None,
        None if initial_states is None else dinitial_states,
        None,
        None,
    )


FAKES = {
    "causal_conv1d": _fake_forward,
    "causal_conv1d_backward": _fake_backward,
    "causal_conv1d_update": _fake_update,
}
GRADIENTS = {"causal_conv1d": (_setup_context, _backward)}
# The filter may have any dtype, so parameters stay in float32. A decoding step writes into its state, which cannot be cast: it takes
# the state's dtype instead of autocast's.
AUTOCAST = {
    "causal_conv1d": Cast(("x", "initial_states")),
    "causal_conv1d_update": Cast(("x",), like="conv_state"),
}
