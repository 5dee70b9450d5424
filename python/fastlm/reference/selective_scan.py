"""Selective scan (Mamba-1, S6): whole sequences and decoding steps."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

# Above this, softplus(x) is taken to be x; part of the definition, as in mamba_ssm.
_SOFTPLUS_THRESHOLD = 20.0


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

    Per channel, with `n` over the state::

        dt[t]   = delta[t] + delta_bias,  then softplus (the identity above 20) if asked for
        h[t, n] = exp(dt[t] * A[n]) * h[t-1, n] + dt[t] * B[t, n] * u[t]        h[-1] = initial_state, or 0
        y[t]    = sum_n C[t, n] * h[t, n] + D * u[t]
        out[t]  = y[t] * z[t] * sigmoid(z[t])                                   (y[t] without z)

    Args:
        u: shape `(B, D, L)`.
        delta: shape `(B, D, L)`, step sizes, before bias and softplus.
        A: shape `(D, N)`, normally negative.
        B, C: shape `(B, N, L)`; `(B, G, N, L)`, group `g` serving channels `[g*D/G, (g+1)*D/G)`; or constant
            `(D, N)`.
        D: shape `(D,)`, skip connection, added before the gate; default none.
        z: shape `(B, D, L)`, gate; default none.
        delta_bias: shape `(D,)`; default 0.
        delta_softplus: apply softplus to the step sizes.
        return_last_state: also return the state after the last position.
        initial_state: shape `(B, D, N)`, or `(S, D, N)` with `cu_seqlens`; default 0.
        cu_seqlens: shape `(S+1,)`, integer: the batch is one row of `S` packed sequences, each with a state
            of its own.
        return_all_states: also return the state after every position.

    Returns:
        out: shape and dtype of `u`. Asked for, after it in this order: last_state, shape `(B, D, N)` or
        `(S, D, N)`; all_states, shape `(B, L, D, N)`; both float32 (float64 for float64).

    Raises:
        ValueError: `cu_seqlens` with a batch other than 1.

    Note:
        An empty sequence's last state is its initial state. all_states is detached.

    Source: Gu and Dao, arXiv 2312.00752, section 3 (Euler rule for B); state-spaces/mamba,
    `selective_scan_fn`. Initial state, packing and all_states are additions.
    """
    if cu_seqlens is None:
        out, last_state, all_states = _one_batch(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state
        )
    else:
        if u.shape[0] != 1:
            raise ValueError(
                f"selective_scan: u must have batch 1 when cu_seqlens is given, got {u.shape[0]}"
            )
        acc = torch.promote_types(u.dtype, torch.float32)
        bounds = cu_seqlens.tolist()
        empty = A.new_zeros((0, *A.shape), dtype=acc)
        outs, lasts, alls = [u[..., :0]], [empty], [empty.unsqueeze(0)]
        for s, (begin, end) in enumerate(pairwise(bounds)):
            part = slice(begin, end)
            piece, last, every = _one_batch(
                u[..., part],
                delta[..., part],
                A,
                B if B.dim() == 2 else B[..., part],
                C if C.dim() == 2 else C[..., part],
                D,
                None if z is None else z[..., part],
                delta_bias,
                delta_softplus,
                None if initial_state is None else initial_state[s : s + 1],
            )
            outs.append(piece)
            lasts.append(last)
            alls.append(every)
        out, last_state, all_states = torch.cat(outs, dim=-1), torch.cat(lasts), torch.cat(alls, dim=1)
    extra = (last_state,) * return_last_state + (all_states.detach(),) * return_all_states
    return (out, *extra) if extra else out


def _one_batch(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equal-length rows: `(out (B, D, L), last_state (B, D, N), all_states (B, L, D, N))`."""
    batch, dim, length = u.shape
    acc = torch.promote_types(u.dtype, torch.float32)
    x, dt, a = u.to(acc), _step_size(delta, delta_bias, delta_softplus, acc), A.to(acc)
    b, c = _per_channel(B, batch, dim, length, acc), _per_channel(C, batch, dim, length, acc)  # (B, D, N, L)

    if initial_state is None:
        h = torch.zeros((batch, *A.shape), dtype=acc, device=u.device)
    else:
        h = initial_state.to(acc).clone()
    ys, states = [], []
    for t in range(length):
        step = dt[:, :, t].unsqueeze(-1)  # (B, D, 1)
        h = torch.exp(step * a) * h + step * b[..., t] * x[:, :, t].unsqueeze(-1)
        ys.append((c[..., t] * h).sum(-1))
        states.append(h)
    y = torch.stack(ys, dim=-1) if ys else x
    if D is not None:
        y = y + D.to(acc).unsqueeze(-1) * x
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(acc))
    all_states = torch.stack(states, dim=1) if states else h.new_zeros((batch, 0, *A.shape))
    return y.to(u.dtype), h, all_states


def _step_size(delta: Tensor, bias: Tensor | None, softplus: bool, acc: torch.dtype) -> Tensor:
    """`delta (B, D, L)` plus `bias (D,)`, through softplus if asked for."""
    dt = delta.to(acc)
    if bias is not None:
        dt = dt + bias.to(acc).unsqueeze(-1)
    return torch.nn.functional.softplus(dt, threshold=_SOFTPLUS_THRESHOLD) if softplus else dt


def _per_channel(matrix: Tensor, batch: int, dim: int, length: int, acc: torch.dtype) -> Tensor:
    """Any form of B or C as `(B, D, N, L)`."""
    matrix = matrix.to(acc)
    if matrix.dim() == 2:
        return matrix[None, :, :, None].expand(batch, dim, -1, length)
    if matrix.dim() == 3:
        return matrix.unsqueeze(1).expand(-1, dim, -1, -1)
    return matrix.repeat_interleave(dim // matrix.shape[1], dim=1)


@torch.no_grad()
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
    """One position of `selective_scan`, from and into `state`.

    Args:
        state: shape `(B, D, N)`, any floating dtype, written in place; any number of slots instead of `B`
            with `state_batch_indices`. The output is formed from the new state before it is rounded to the
            state's dtype.
        x: shape `(B, D)`: the input `u` of this position.
        dt: shape `(B, D)`, step sizes, before bias and softplus.
        A: shape `(D, N)`.
        B, C: shape `(B, N)`, or `(B, G, N)` with group `g` serving channels `[g*D/G, (g+1)*D/G)`.
        D: shape `(D,)`; default none.
        z: shape `(B, D)`, gate; default none.
        dt_bias: shape `(D,)`; default 0.
        dt_softplus: apply softplus to the step sizes.
        state_batch_indices: shape `(B,)`, integer: slot of each row. A negative one marks a padding row:
            output 0, no state touched.

    Returns:
        out: shape and dtype of `x`.

    Raises:
        IndexError: a slot that does not exist.

    Note:
        Not differentiable.

    Source: state-spaces/mamba, `selective_state_update`.
    """
    out = torch.zeros_like(x)
    for row in range(x.shape[0]):
        slot = row if state_batch_indices is None else int(state_batch_indices[row])
        if slot < 0:
            continue
        one = slice(row, row + 1)
        y, h, _ = _one_batch(
            x[one].unsqueeze(-1),
            dt[one].unsqueeze(-1),
            A,
            B[one].unsqueeze(-1),
            C[one].unsqueeze(-1),
            D,
            None if z is None else z[one].unsqueeze(-1),
            dt_bias,
            dt_softplus,
            state[slot].unsqueeze(0),
        )
        out[row] = y[0, :, 0]
        state[slot] = h[0].to(state.dtype)
    return out
