"""Depthwise causal convolution with optional SiLU: whole sequences and decoding steps."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastlm import _ops

Activation = Literal["silu", "swish"] | None


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
    initial_states: Tensor | None = ...,
    return_final_states: Literal[False] = ...,
    final_states_out: None = ...,
    activation: Activation = ...,
    *,
    cu_seqlens: Tensor | None = ...,
) -> Tensor: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
    initial_states: Tensor | None = ...,
    return_final_states: bool = ...,
    final_states_out: Tensor | None = ...,
    activation: Activation = ...,
    *,
    cu_seqlens: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: Activation = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Filters every channel along time with its own taps, looking only backwards.

    `p[t] = bias + sum_j weight[j] * x[t - (W-1) + j]`, `out[t] = p[t]` or `p[t] * sigmoid(p[t])`. Inputs before a sequence are
    `initial_states`, or zeros. Sums are kept in float32 (float64 for float64).

    Args:
        x: shape `(B, D, L)`, float32, bfloat16, float16 or float64; unit stride over `L` or over `D` is taken without a copy.
        weight: shape `(D, W)`, any floating dtype, `1 <= W <= 32`.
        bias: shape `(D,)`, any floating dtype; default none.
        seq_idx: shape `(B, L)`, int32 or int64: document of each position; taps do not cross from one document into another,
            and positions with a negative id give 0. An id must not come back within `W - 1` positions.
        initial_states: shape `(B, D, W-1)`, dtype of `x`: the inputs before each row, oldest first; with `seq_idx` they belong to
            the first document; with `cu_seqlens` their shape is `(S, D, W-1)`.
        return_final_states: also return the last `W - 1` inputs of every row.
        final_states_out: shape of the final states; they are copied into it as well.
        activation: `"silu"`, `"swish"` (the same) or None.
        cu_seqlens: shape `(S+1,)`, int32 or int64: bounds of packed sequences; the batch must be 1.

    Returns:
        out: shape `(B, D, L)`, dtype and memory layout of `x`; with `return_final_states` the pair `(out, final_states)`, the
        latter of shape `(B, D, W-1)` (or `(S, D, W-1)`), dtype of `x`.

    Raises:
        ValueError: a shape, dtype, device or the values of `seq_idx`, `cu_seqlens` or `activation` do not fit; the text names the
            argument, what was expected and what was found.

    Note:
        Differentiable in x, weight, bias and initial_states, and through final_states. The backward pass recomputes the
        pre-activation, keeps nothing but the inputs, and is deterministic. Under autocast x and initial_states are cast to the
        autocast dtype, and final_states follow; weight and bias stay as they are, and so does float64.

    Source: Dao-AILab/causal-conv1d (argument names and meanings); `cu_seqlens`, and `seq_idx` together with states, are additions.

    Example:
        >>> import torch, fastlm
        >>> x, w = torch.randn(2, 8, 16), torch.randn(8, 4)
        >>> fastlm.ops.causal_conv1d(x, w, activation="silu").shape
        torch.Size([2, 8, 16])
    """
    out, final_states = _ops.causal_conv1d(x, weight, bias, seq_idx, initial_states, activation, cu_seqlens)
    if final_states_out is not None:
        with torch.no_grad():  # a buffer of the caller's; gradients go through the returned states
            final_states_out.copy_(final_states)
    return (out, final_states) if return_final_states else out


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Filters one or a few new inputs per row and updates the state in place.

    Without `cache_seqlens` the state holds the last `S` inputs, oldest first, and is shifted; with it the state is a ring in which
    input number `n` of a row lies at slot `n mod S`.

    Args:
        x: shape `(B, D)` or `(B, D, m)`, any floating dtype and any strides.
        conv_state: shape `(B, D, S)`, dtype of `x`, `S >= W - 1`, written in place; `(slots, D, S)` with `conv_state_indices`.
        weight: shape `(D, W)`, any floating dtype, `1 <= W <= 32`.
        bias: shape `(D,)`, any floating dtype; default none.
        activation: `"silu"`, `"swish"` (the same) or None.
        cache_seqlens: shape `(B,)`, int32 or int64: inputs seen so far by each row.
        conv_state_indices: shape `(B,)`, int32 or int64: the slot of each row, each at most once; a negative slot marks a padding
            row, whose output is 0 and which touches no state.

    Returns:
        out: shape and dtype of `x`.

    Raises:
        ValueError: a shape, dtype, device or value does not fit.
        IndexError: `conv_state_indices` names a slot that does not exist.

    Note:
        Not differentiable. Under autocast x takes the dtype of conv_state: the state is written in place, so it keeps its own, and
        it decides. float64 stays.

    Source: Dao-AILab/causal-conv1d.

    Example:
        >>> import torch, fastlm
        >>> state = torch.zeros(1, 8, 3)
        >>> fastlm.ops.causal_conv1d_update(torch.randn(1, 8), state, torch.randn(8, 4)).shape
        torch.Size([1, 8])
    """
    return _ops.causal_conv1d_update(
        x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices
    )
