"""Mixture of experts behind any router: the plan of a dispatch, grouped products, experts. No token is dropped."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastlm import _ops

ExpertActivation = Literal["silu", "gelu_tanh", "relu", "relu2"]


def moe_plan(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts a router's picks by expert, stably.

    Slot `s = t * k + j` is pick `j` of token `t`. Sorted rows `offsets[e] .. offsets[e + 1]` are those of expert `e`, in the order of
    their slots; picks of -1, which go to no expert, stand behind all of them. `perm` and `inv` are permutations always, and each is
    the other's inverse.

    Args:
        topk_ids: shape `(T, k)`, int32 or int64, in `[-1, num_experts)`, `k` from 1 to 8, any strides.
        num_experts: `E`, at least 1.

    Returns:
        offsets: shape `(E + 1,)`, int32; the last one counts the picks that go to an expert.
        perm: shape `(T * k,)`, int32: the slot of each sorted row.
        inv: shape `(T * k,)`, int32: the sorted row of each slot.

    Raises:
        ValueError: a shape or dtype does not fit, or `num_experts` is less than 1.
        IndexError: an id outside `[-1, num_experts)`.

    Note:
        Not differentiable. `hidden_states[perm // k]` are the rows that the experts read, `rows[inv].view(T, k, -1)` is the way back.
        The number of picks must be below 2^31.

    Source: a counting sort; no capacity and no dropped token, as in Liu et al., arXiv 2409.12136, section 3.

    Example:
        >>> import torch, fastlm
        >>> offsets, perm, inv = fastlm.ops.moe_plan(torch.tensor([[2, 0], [0, -1]]), 3)
        >>> offsets.tolist(), perm.tolist()
        ([0, 2, 2, 3], [1, 2, 0, 3])
    """
    return _ops.moe_plan(topk_ids, num_experts)


def grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, *, trans_b: bool = True) -> Tensor:
    """Products of groups of rows, each group with its own matrix.

    `out[r] = a[r] @ b[e].T` (`a[r] @ b[e]` with `trans_b=False`) for the rows `offsets[e] <= r < offsets[e + 1]` of group `e`.

    Args:
        a: shape `(M, Kd)`, float32, bfloat16, float16 or float64, any strides.
        b: shape `(E, N, Kd)`, or `(E, Kd, N)` with `trans_b=False`, dtype of `a`, any strides.
        offsets: shape `(E + 1,)`, int32 or int64: starts at 0, never decreases, at most `M`. Groups may be empty.
        trans_b: whether the matrices of `b` are transposed for the product.

    Returns:
        out: shape `(M, N)`, dtype of `a`; rows behind the last group are 0.

    Raises:
        ValueError: a shape, dtype or device does not fit, or `offsets` does not start at 0, decreases, or passes `M`.

    Note:
        Differentiable once in a and b; the gradient of an empty group's matrix is 0. Sums are kept in float32 (float64) and rounded
        once. Rows behind the last group are not read. Same bits for every number of threads and in every run. Under autocast a and b
        are cast as for `torch.mm`.

    Source: the grouped products of a mixture of experts; Gale et al., arXiv 2211.15841.

    Example:
        >>> import torch, fastlm
        >>> a, b = torch.randn(5, 8), torch.randn(3, 4, 8)
        >>> fastlm.ops.grouped_gemm(a, b, torch.tensor([0, 2, 2, 5])).shape
        torch.Size([5, 4])
    """
    return _ops.grouped_gemm(a, b, offsets, trans_b=trans_b)


def moe_experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: ExpertActivation = "silu",
    gate_up_proj_bias: Tensor | None = None,
    down_proj_bias: Tensor | None = None,
    grad_weights: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """The experts' half of a mixture-of-experts layer: what the router picked, weighted and summed, no token dropped.

    Per token, over its picks in their order::

        out[t]       = sum_j topk_weights[t, j] * expert(topk_ids[t, j], hidden_states[t])
        expert(e, x) = down_proj[e] @ (act(gate) * up) + down_proj_bias[e]
        (gate, up)   = gate_up_proj[e] @ x + gate_up_proj_bias[e],  gate rows first

    With `I` rows in `gate_up_proj` there is no gate: `expert(e, x) = down_proj[e] @ act(up) + down_proj_bias[e]`.

    Args:
        hidden_states: shape `(T, h)`, float32, bfloat16, float16 or float64, any strides.
        gate_up_proj: shape `(E, 2 I, h)`, or `(E, I, h)` without a gate, dtype of `hidden_states`, any strides.
        down_proj: shape `(E, h, I)`, dtype of `hidden_states`, any strides.
        topk_ids: shape `(T, k)`, int32 or int64, in `[-1, E)`, `k` from 1 to 8; a pick of -1 goes to no expert and
            contributes nothing.
        topk_weights: shape `(T, k)`, float32 (float64 for float64) or the dtype of `hidden_states`; used as they are, their sum need
            not be 1.
        activation: `"silu"`, `"gelu_tanh"`, `"relu"` or `"relu2"`, the square of relu.
        gate_up_proj_bias: shape of `gate_up_proj` without its last dimension, any floating dtype; default 0.
        down_proj_bias: shape `(E, h)`, any floating dtype; default 0.
        grad_weights: shape and dtype of `topk_weights`: stands for them in the gradient of everything but `topk_weights` itself.
        recompute: the backward pass computes gate and up again instead of keeping them, `(T * k, 2 I)` numbers: less memory, one
            product more.

    Returns:
        out: shape `(T, h)`, dtype of `hidden_states`.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the activation is unknown.
        IndexError: an id outside `[-1, E)`.

    Note:
        Differentiable once in hidden_states, both projections, topk_weights and both biases; not in grad_weights. Sums are kept in
        float32 (float64) and rounded once; in 16 bits `act(gate) * up` is rounded in between, and so are gate and up where they are
        kept. What a pick of -1 would multiply is not read. Same bits for every number of threads and in every run. Under autocast
        hidden_states and both projections are cast as for `F.linear`; topk_weights stay.

    Source: Liu et al., arXiv 2409.12136, section 2; `grad_weights` is its Algorithm 1, where the experts' gradient does not see the
    factor that the forward pass put on them.

    Example:
        >>> import torch, fastlm
        >>> x, gate_up, down = torch.randn(5, 8), torch.randn(4, 2 * 6, 8), torch.randn(4, 8, 6)
        >>> weights, ids = torch.randn(5, 4).softmax(-1).topk(2)
        >>> fastlm.ops.moe_experts(x, gate_up, down, ids, weights).shape
        torch.Size([5, 8])
    """
    learned = (hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_proj_bias, down_proj_bias)
    with_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned)
    out, _ = _ops.moe_experts(
        hidden_states,
        gate_up_proj,
        down_proj,
        topk_ids,
        topk_weights,
        gate_up_proj_bias,
        down_proj_bias,
        grad_weights,
        activation=activation,
        keep_gate_up=with_gradient and not recompute,
    )
    return out
