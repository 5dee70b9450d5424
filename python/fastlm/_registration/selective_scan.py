"""selective_scan: fake kernels, gradient and autocast. Checks use the words of csrc/ops/selective_scan/checks.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import _ops
from fastlm._registration import checks
from fastlm._registration.autocast import Cast
from fastlm._registration.layout import empty_like_layout, no_tensor

_MAX_STATE = 256
_CHUNK = 64  # kChunk of csrc/ops/selective_scan/params.h


def _check_decay(op: str, A: Tensor, main: str, like: Tensor) -> int | torch.SymInt:
    dim = like.shape[1]
    checks.floating(op, "A", A)
    checks.dim(op, "A", A, 2, "(D, N)")
    torch._check_value(
        A.shape[0] == dim, lambda: f"{op}: A must have shape ({dim}, N), got {checks.shape_text(A.shape)}"
    )
    torch._check_value(
        1 <= A.shape[1] <= _MAX_STATE,
        lambda: f"{op}: A must have a state size between 1 and {_MAX_STATE}, got {A.shape[1]}",
    )
    checks.same_device(op, "A", A, main, like)
    return A.shape[1]


def _check_groups(op: str, name: str, t: Tensor, dim: int | torch.SymInt) -> None:
    torch._check_value(
        t.shape[1] >= 1 and dim % t.shape[1] == 0,
        lambda: f"{op}: {name} must have a number of groups that divides {dim}, got {t.shape[1]}",
    )


def _check_projection(op: str, name: str, t: Tensor, u: Tensor, state: int | torch.SymInt) -> None:
    torch._check_value(
        t.dim() in (2, 3, 4),
        lambda: (
            f"{op}: {name} must have shape (B, N, L), (B, G, N, L) or (D, N), got {checks.shape_text(t.shape)}"
        ),
    )
    batch, dim, length = u.shape
    if t.dim() == 2:
        checks.floating(op, name, t)
        checks.shape(op, name, t, (dim, state))
    else:
        checks.same_dtype(op, name, t, "u", u)
        if t.dim() == 4:
            _check_groups(op, name, t, dim)
            checks.shape(op, name, t, (batch, t.shape[1], state, length))
        else:
            checks.shape(op, name, t, (batch, state, length))
    checks.same_device(op, name, t, "u", u)


def _check_like(op: str, name: str, t: Tensor, main: str, like: Tensor) -> None:
    checks.shape(op, name, t, like.shape)
    checks.same_dtype(op, name, t, main, like)
    checks.same_device(op, name, t, main, like)


def _check_vector(op: str, name: str, t: Tensor | None, main: str, like: Tensor) -> None:
    if t is None:
        return
    checks.floating(op, name, t)
    checks.shape(op, name, t, (like.shape[1],))
    checks.same_device(op, name, t, main, like)


def _num_states(u: Tensor, cu_seqlens: Tensor | None) -> int | torch.SymInt:
    return u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _acc(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def check_forward(
    op: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    checks.floating(op, "u", u)
    checks.dim(op, "u", u, 3, "(B, D, L)")
    _check_like(op, "delta", delta, "u", u)
    state = _check_decay(op, A, "u", u)
    _check_projection(op, "B", B, u, state)
    _check_projection(op, "C", C, u, state)
    _check_vector(op, "D", D, "u", u)
    if z is not None:
        _check_like(op, "z", z, "u", u)
    _check_vector(op, "delta_bias", delta_bias, "u", u)
    if cu_seqlens is not None:
        checks.cu_seqlens(op, "cu_seqlens", cu_seqlens)
        torch._check_value(
            u.shape[0] == 1,
            lambda: f"{op}: u must have batch 1 when cu_seqlens is given, got {u.shape[0]}",
        )
        checks.same_device(op, "cu_seqlens", cu_seqlens, "u", u)
    if initial_state is not None:
        checks.floating(op, "initial_state", initial_state)
        checks.shape(op, "initial_state", initial_state, (_num_states(u, cu_seqlens), u.shape[1], state))
        checks.same_device(op, "initial_state", initial_state, "u", u)


def _fake_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    return_all_states: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_forward("selective_scan", u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    return empty_outputs(u, A, cu_seqlens, all_states=return_all_states)


def empty_outputs(
    u: Tensor, A: Tensor, cu_seqlens: Tensor | None, *, all_states: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, last_state, chunk_states and all_states of a forward pass."""
    batch, dim, length = u.shape
    state, acc = A.shape[1], _acc(u)
    return (
        empty_like_layout(u),
        u.new_empty((_num_states(u, cu_seqlens), dim, state), dtype=acc),
        u.new_empty((batch, length // _CHUNK, state, dim), dtype=acc),
        u.new_empty((batch, length, dim, state), dtype=acc) if all_states else no_tensor(u, acc),
    )


def _empty_projection(like: Tensor) -> Tensor:
    """A gradient of B or C: states contiguous if they are in `like`."""
    if like.dim() == 2:
        return like.new_empty(like.shape)
    if like.dim() == 3:
        return empty_like_layout(like)
    if like.stride(3) == 1 or like.stride(2) != 1:
        return like.new_empty(like.shape)
    batch, groups, state, length = like.shape
    return like.new_empty((batch, length, groups, state)).permute(0, 2, 3, 1)


def _fake_backward(
    dout: Tensor,
    dlast_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    chunk_states: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    op = "selective_scan_backward"
    check_forward(op, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    _check_like(op, "dout", dout, "u", u)
    acc = _acc(u)
    batch, dim, length = u.shape

    def check_accumulated(name: str, t: Tensor, shape: tuple[int | torch.SymInt, ...]) -> None:
        checks.shape(op, name, t, shape)
        torch._check_value(
            t.dtype == acc,
            lambda: f"{op}: {name} must have dtype {checks.name_of(acc)}, got {checks.name_of(t.dtype)}",
        )
        checks.same_device(op, name, t, "u", u)

    if dlast_state is not None:
        check_accumulated("dlast_state", dlast_state, (_num_states(u, cu_seqlens), dim, A.shape[1]))
    check_accumulated("chunk_states", chunk_states, (batch, length // _CHUNK, A.shape[1], dim))

    def like(t: Tensor | None) -> Tensor:
        return no_tensor(u, acc) if t is None else t.new_empty(t.shape)

    return (
        empty_like_layout(u),
        empty_like_layout(delta),
        like(A),
        _empty_projection(B),
        _empty_projection(C),
        like(D),
        no_tensor(u) if z is None else empty_like_layout(z),
        like(delta_bias),
        like(initial_state),
    )


def check_update(
    op: str,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_batch_indices: Tensor | None,
) -> None:
    checks.floating(op, "x", x)
    checks.dim(op, "x", x, 2, "(B, D)")
    _check_like(op, "dt", dt, "x", x)
    batch, dim = x.shape
    n = _check_decay(op, A, "x", x)
    checks.floating(op, "state", state)
    checks.dim(op, "state", state, 3, "(B, D, N)")
    if x.dtype == torch.float64:
        checks.same_dtype(op, "state", state, "x", x)
    else:
        torch._check_value(
            state.dtype != torch.float64,
            lambda: f"{op}: state must have dtype float32, bfloat16 or float16, got float64",
        )
    checks.same_device(op, "state", state, "x", x)
    if state_batch_indices is not None:
        checks.shape(op, "state", state, (state.shape[0], dim, n))
        checks.index_vector(op, "state_batch_indices", state_batch_indices)
        checks.shape(op, "state_batch_indices", state_batch_indices, (batch,))
        checks.same_device(op, "state_batch_indices", state_batch_indices, "x", x)
    else:
        checks.shape(op, "state", state, (batch, dim, n))
    for i in range(3):
        torch._check_value(
            bool(state.stride(i) != 0 or state.shape[i] <= 1),
            lambda i=i: f"{op}: state must not repeat memory, got stride 0 in dimension {i}",
        )
    for name, t in (("B", B), ("C", C)):
        torch._check_value(
            t.dim() in (2, 3),
            lambda name=name, t=t: (
                f"{op}: {name} must have shape (B, N) or (B, G, N), got {checks.shape_text(t.shape)}"
            ),
        )
        checks.same_dtype(op, name, t, "x", x)
        if t.dim() == 3:
            _check_groups(op, name, t, dim)
            checks.shape(op, name, t, (batch, t.shape[1], n))
        else:
            checks.shape(op, name, t, (batch, n))
        checks.same_device(op, name, t, "x", x)
    _check_vector(op, "D", D, "x", x)
    if z is not None:
        _check_like(op, "z", z, "x", x)
    _check_vector(op, "dt_bias", dt_bias, "x", x)


def _fake_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    check_update(
        "selective_state_update",
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        state_batch_indices,
    )
    return x.new_empty(x.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    *tensors, delta_softplus, initial_state, cu_seqlens = inputs
    _, _, chunk_states, all_states = output
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, chunk_states)
    ctx.delta_softplus = delta_softplus
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(chunk_states, all_states)


def _backward(
    ctx: Any, dout: Tensor | None, dlast_state: Tensor | None, _chunk_states: None, _all_states: None
) -> tuple[Tensor | None, ...]:
    return *gradients(ctx.saved_tensors, ctx.delta_softplus, dout, dlast_state), None


def gradients(
    saved: tuple[Any, ...], delta_softplus: bool, dout: Tensor | None, dlast_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    """One per argument from `u` to `initial_state`, from what the forward pass saved."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, chunk_states = saved
    if dout is None and dlast_state is None:
        return (None,) * 10
    if dout is None:
        dout = torch.zeros_like(u)
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = _ops.selective_scan_backward(
        dout,
        dlast_state,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        chunk_states,
        initial_state,
        cu_seqlens,
    )
    return (
        du,
        ddelta,
        dA,
        dB,
        dC,
        None if D is None else dD,
        None if z is None else dz,
        None if delta_bias is None else ddelta_bias,
        None,
        None if initial_state is None else dinitial_state,
    )


FAKES = {
    "selective_scan": _fake_forward,
    "selective_scan_backward": _fake_backward,
    "selective_state_update": _fake_update,
}
GRADIENTS = {"selective_scan": (_setup_context, _backward)}
# What varies over positions is cast. Parameters and states may have any dtype and stay; a constant B or C (D, N) is a parameter.
AUTOCAST = {
    "selective_scan": Cast(("u", "delta", "B", "C", "z"), least_dim=3),
    "selective_state_update": Cast(("x", "dt", "B", "C", "z")),
}
