"""Selective scan of Mamba-1 (S6): whole sequences and decoding steps."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fastlm import _ops


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    return_last_state: Literal[False] = ...,
    *,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_all_states: Literal[False] = ...,
) -> Tensor: ...
@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    return_last_state: bool = ...,
    *,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_all_states: bool = ...,
) -> Tensor | tuple[Tensor, ...]: ...
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_all_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Runs a diagonal linear recurrence whose step size, input and output maps depend on the input.

    Per channel, with `n` over the state: `dt[t] = softplus(delta[t] + delta_bias)` (or without softplus),
    `h[t, n] = exp(dt[t] * A[n]) * h[t-1, n] + dt[t] * B[t, n] * u[t]`, `y[t] = sum_n C[t, n] * h[t, n] + D * u[t]`,
    `out[t] = y[t] * z[t] * sigmoid(z[t])` (`y[t]` without z). The state before a sequence is `initial_state`, or zero. Everything
    is computed in float32 (float64 for float64) and rounded once, when it is stored.

    Args:
        u: shape `(B, D, L)`, float32, bfloat16, float16 or float64; unit stride over `L` or over `D` is taken without a copy.
        delta: shape `(B, D, L)`, dtype of `u`: step sizes before bias and softplus.
        A: shape `(D, N)`, any real floating dtype, `1 <= N <= 256`; normally negative.
        B: shape `(B, N, L)`, or `(B, G, N, L)` with group `g` serving channels `[g*D/G, (g+1)*D/G)`, dtype of `u`, any strides; or
            constant `(D, N)`, any floating dtype.
        C: like `B`; it may have another form or number of groups.
        D: shape `(D,)`, any floating dtype: skip connection, added before the gate; default none.
        z: shape `(B, D, L)`, dtype of `u`: gate; default none.
        delta_bias: shape `(D,)`, any floating dtype; default 0.
        delta_softplus: apply softplus to the step sizes (the identity above 20).
        return_last_state: also return the state after the last position.
        initial_state: shape `(B, D, N)`, any floating dtype; with `cu_seqlens` its shape is `(S, D, N)`; default 0.
        cu_seqlens: shape `(S+1,)`, int32 or int64: bounds of packed sequences, each with a state of its own; the batch must be 1.
        return_all_states: also return the state after every position.

    Returns:
        out: shape `(B, D, L)`, dtype and memory layout of `u`. Asked for, after it in this order: last_state, shape `(B, D, N)` (or
        `(S, D, N)`), and all_states, shape `(B, L, D, N)`; both float32 (float64 for float64). The last state of an empty sequence
        is its initial state.

    Raises:
        ValueError: a shape, dtype, device or the values of `cu_seqlens` do not fit; the text names the argument, what was expected
            and what was found.

    Note:
        Differentiable in every floating argument, `initial_state` included, and through last_state; not through all_states. The
        forward pass keeps the state after every 64 positions (`B * L/64 * D * N` floats), from which the backward pass recomputes
        the others. Results are the same bits for every number of threads. Under autocast u, delta, z, and B and C unless they
        are constant, are cast to the autocast dtype; parameters and states stay as they are, and so does float64.

    Source: Gu and Dao, arXiv 2312.00752, section 3 (Euler rule for B); names and shapes of state-spaces/mamba,
    `selective_scan_fn`. Initial state, packing, all_states and the gradient of the last state are additions.

    Example:
        >>> import torch, fastlm
        >>> u, delta = torch.randn(2, 8, 32), torch.rand(2, 8, 32)
        >>> A, B, C = -torch.rand(8, 16), torch.randn(2, 16, 32), torch.randn(2, 16, 32)
        >>> fastlm.ops.selective_scan(u, delta, A, B, C).shape
        torch.Size([2, 8, 32])
    """
    out, last_state, _, all_states = _ops.selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        initial_state,
        cu_seqlens,
        return_all_states=return_all_states,
    )
    if not (return_last_state or return_all_states):
        return out
    return (out, *((last_state,) * return_last_state), *((all_states,) * return_all_states))


def selective_state_update(
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
    """Runs one position of `selective_scan` per row, from and into the state.

    The output is formed from the new state before that is rounded to its own dtype.

    Args:
        state: shape `(B, D, N)`, any strides that repeat no memory, written in place: float32, bfloat16 or float16 (float64 if `x`
            is); `(slots, D, N)` with `state_batch_indices`. A 16-bit state loses small contributions; float32 is recommended.
        x: shape `(B, D)`, any floating dtype and any strides: the input `u` of this position.
        dt: shape `(B, D)`, dtype of `x`: step sizes before bias and softplus.
        A: shape `(D, N)`, any real floating dtype, `1 <= N <= 256`.
        B: shape `(B, N)`, or `(B, G, N)` with group `g` serving channels `[g*D/G, (g+1)*D/G)`, dtype of `x`.
        C: like `B`.
        D: shape `(D,)`, any floating dtype: skip connection; default none.
        z: shape `(B, D)`, dtype of `x`: gate; default none.
        dt_bias: shape `(D,)`, any floating dtype; default 0.
        dt_softplus: apply softplus to the step sizes.
        state_batch_indices: shape `(B,)`, int32 or int64: the slot of each row, each at most once; a negative slot marks a padding
            row, whose output is 0 and which touches no state.

    Returns:
        out: shape `(B, D)`, dtype of `x`.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit, or a slot is named twice.
        IndexError: `state_batch_indices` names a slot that does not exist.

    Note:
        Not differentiable. Under autocast x, dt, B, C and z are cast to the autocast dtype, as in `selective_scan`; the state, which
        is written in place, and the parameters stay as they are, and so does float64.

    Source: state-spaces/mamba, `selective_state_update`.

    Example:
        >>> import torch, fastlm
        >>> state, A = torch.zeros(1, 8, 16), -torch.rand(8, 16)
        >>> x, B, C = torch.randn(1, 8), torch.randn(1, 16), torch.randn(1, 16)
        >>> fastlm.ops.selective_state_update(state, x, torch.rand(1, 8), A, B, C).shape
        torch.Size([1, 8])
    """
    return _ops.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
