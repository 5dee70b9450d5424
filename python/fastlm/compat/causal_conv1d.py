"""The functions of Dao-AILab/causal-conv1d, on fastlm's operators.

Argument names, their order and defaults are that project's; what differs is said in docs/compat.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import ops, reference
from fastlm.ops.causal_conv1d import Activation

VERSION = "1.6.1+fastlm"
_INTERFACE = ("causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_ref")
MODULES = {
    "causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update"),
    "causal_conv1d.causal_conv1d_interface": _INTERFACE,
    "causal_conv1d.causal_conv1d_varlen": ("causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"),
}


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: Activation = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastlm.ops.causal_conv1d`.

    Args:
        x: shape `(B, D, L)`, unit stride over `L` or over `D`.
        weight: shape `(D, W)`.
        bias: shape `(D,)`; default none.
        seq_idx: shape `(B, L)`, integer: document of each position, negative for padding.
        initial_states: shape `(B, D, W-1)`; default 0.
        return_final_states: also return the last `W - 1` inputs of each row.
        final_states_out: shape `(B, D, W-1)`, written in place; no gradient flows through it.
        activation: None, `"silu"` or `"swish"`.

    Returns:
        out: shape, dtype and layout of `x`; with `return_final_states` the pair `(out, final_states)`, the latter
        being `final_states_out` where that is given and no gradient is recorded.

    Raises:
        ValueError: in the words of `fastlm.ops.causal_conv1d`.

    Source: Dao-AILab/causal-conv1d, `causal_conv1d_fn`.
    """
    result = ops.causal_conv1d(x, weight, bias, seq_idx, initial_states, True, activation=activation)
    out, final_states = result
    if final_states_out is not None:
        if final_states_out.shape != final_states.shape:
            raise ValueError(
                f"causal_conv1d_fn: final_states_out must have shape {tuple(final_states.shape)}, "
                f"got {tuple(final_states_out.shape)}"
            )
        with torch.no_grad():  # the buffer is a cache: it must not keep a graph alive
            final_states_out.copy_(final_states)
        if not final_states.requires_grad:
            final_states = final_states_out
    return (out, final_states) if return_final_states else out


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`fastlm.ops.causal_conv1d_update`, which has the same arguments: `conv_state` is written in place."""
    return ops.causal_conv1d_update(
        x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices
    )


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: Activation = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastlm.reference.causal_conv1d`, computed and differentiated in float32 (float64 for float64).

    As in the original there is no `seq_idx` here, and gradients are rounded to the dtype of `x` once.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    initial = None if initial_states is None else initial_states.to(acc)
    result = reference.causal_conv1d(x.to(acc), weight, bias, None, initial, True, None, activation)
    out, final_states = (t.to(x.dtype) for t in result)
    if final_states_out is not None:
        final_states_out.copy_(final_states)
    return (out, final_states) if return_final_states else out


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`fastlm.reference.causal_conv1d_update`; as in the original there are no slots here."""
    return reference.causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)


@torch.no_grad()
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of every packed sequence, as the state a convolution continues from.

    `states[s, :, state_len - 1 - i] = x[cu_seqlens[s+1] - 1 - i]` while that lies in sequence `s`, else 0.

    Args:
        x: shape `(T, D)`, any dtype.
        cu_seqlens: shape `(S+1,)`, int32 or int64: bounds of the sequences.
        state_len: inputs to keep per sequence, at least 1.

    Returns:
        states: shape `(S, D, state_len)`, dtype of `x`, unit stride over `D`.

    Raises:
        ValueError: a shape or dtype does not fit, `state_len` is not positive, or (on CPU) the bounds decrease or
            leave `x`.

    Note:
        Not differentiable.

    Source: Dao-AILab/causal-conv1d, `causal_conv1d_varlen_states`.
    """
    _check_varlen("causal_conv1d_varlen_states", x, cu_seqlens, state_len)
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    back = torch.arange(-state_len, 0, device=x.device)
    at = end.unsqueeze(1) + back  # (S, state_len)
    inside = (at >= begin.unsqueeze(1)) & (at >= 0) & (at < x.shape[0])
    if x.shape[0] == 0:
        states = x.new_zeros((*at.shape, x.shape[1]))
    else:
        states = torch.where(inside.unsqueeze(-1), x[torch.where(inside, at, 0)], 0)
    return states.transpose(1, 2)


@torch.no_grad()
def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """`causal_conv1d_varlen_states`, one sequence after the other."""
    _check_varlen("causal_conv1d_varlen_states_ref", x, cu_seqlens, state_len)
    bounds = cu_seqlens.tolist()
    states = x.new_zeros((len(bounds) - 1, state_len, x.shape[1]))
    for s in range(len(bounds) - 1):
        kept = x[bounds[s] : bounds[s + 1]][-state_len:]
        states[s, state_len - kept.shape[0] :] = kept
    return states.transpose(1, 2)


def _check_varlen(name: str, x: Tensor, cu_seqlens: Tensor, state_len: int) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name}: x must have shape (T, D), got {tuple(x.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: cu_seqlens must have shape (S+1,) and dtype int32 or int64, "
            f"got {tuple(cu_seqlens.shape)}, {cu_seqlens.dtype}"
        )
    if state_len < 1:
        raise ValueError(f"{name}: state_len must be at least 1, got {state_len}")
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] < 0 or bounds[-1] > x.shape[0] or bounds != sorted(bounds):
            raise ValueError(f"{name}: cu_seqlens must rise from 0 to at most {x.shape[0]}, got {bounds}")
