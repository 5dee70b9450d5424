"""Mixture of experts behind any router: the plan of a dispatch, grouped products, experts. No token is dropped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


def moe_plan(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts a router's picks by expert, stably.

    Slot `s = t * k + j` is pick `j` of token `t`. Sorted rows `offsets[e] .. offsets[e + 1]` are those of expert `e`, in the order
    of their slots; picks of -1, which go to no expert, stand behind all of them.

    Args:
        topk_ids: shape `(T, k)`, integer, in `[-1, num_experts)`.
        num_experts: `E`, at least 1.

    Returns:
        offsets: shape `(E + 1,)`, int32; the last one counts the picks that go to an expert.
        perm: shape `(T * k,)`, int32: the slot of each sorted row.
        inv: shape `(T * k,)`, int32: the sorted row of each slot.

    Raises:
        IndexError: an id outside `[-1, num_experts)`.

    Source: a counting sort; no capacity and no dropped token, as in Liu et al., arXiv 2409.12136, section 3.
    """
    _check_ids("moe_plan", topk_ids, num_experts)
    ids = topk_ids.flatten().long()
    expert = torch.where(ids < 0, num_experts, ids)
    perm = torch.argsort(expert, stable=True)
    inv = torch.empty_like(perm)
    inv[perm] = torch.arange(perm.numel(), device=perm.device)
    rows = torch.stack([(ids == e).sum() for e in range(num_experts)])
    offsets = functional.pad(rows.cumsum(0), (1, 0))
    return offsets.int(), perm.int(), inv.int()


def grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, *, trans_b: bool = True) -> Tensor:
    """Products of groups of rows, each group with its own matrix.

    `out[r] = a[r] @ b[e].T` for the rows `offsets[e] <= r < offsets[e + 1]` of group `e`.

    Args:
        a: shape `(M, Kd)`.
        b: shape `(E, N, Kd)`, or `(E, Kd, N)` with `trans_b=False`.
        offsets: shape `(E + 1,)`, integer: starts at 0, never decreases, at most `M`. Groups may be empty.
        trans_b: whether the matrices of `b` are transposed for the product.

    Returns:
        out: shape `(M, N)`, dtype of `a`; rows behind the last group are 0.

    Note:
        Rows behind the last group are not read: NaN there reaches neither outputs nor gradients.

    Source: the grouped products of a mixture of experts; Gale et al., arXiv 2211.15841.
    """
    acc = torch.promote_types(a.dtype, torch.float32)
    matrices = b.mT if trans_b else b
    bounds = offsets.tolist()
    groups = [
        a[begin:end].to(acc) @ matrix.to(acc)
        for matrix, begin, end in zip(matrices, bounds[:-1], bounds[1:], strict=True)
    ]
    rest = a.new_zeros((a.shape[0] - bounds[-1], matrices.shape[2]), dtype=acc)
    return torch.cat([*groups, rest]).to(a.dtype)


def moe_experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "silu",
    gate_up_proj_bias: Tensor | None = None,
    down_proj_bias: Tensor | None = None,
    grad_weights: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """The experts' half of a mixture-of-experts layer: what the router picked, weighted and summed.

    Per token, over its picks in their order::

        out[t]       = sum_j topk_weights[t, j] * expert(topk_ids[t, j], hidden_states[t])
        expert(e, x) = down_proj[e] @ (act(gate) * up) + down_proj_bias[e]
        (gate, up)   = gate_up_proj[e] @ x + gate_up_proj_bias[e],  gate rows first

    With `I` rows in `gate_up_proj` there is no gate: `expert(e, x) = down_proj[e] @ act(up) + down_proj_bias[e]`.

    Args:
        hidden_states: shape `(T, h)`.
        gate_up_proj: shape `(E, 2 I, h)`, or `(E, I, h)` without a gate.
        down_proj: shape `(E, h, I)`.
        topk_ids: shape `(T, k)`, integer, in `[-1, E)`; a pick of -1 goes to no expert and contributes nothing.
        topk_weights: shape `(T, k)`; used as they are, their sum need not be 1.
        activation: `"silu"`, `"gelu_tanh"`, `"relu"` or `"relu2"`, the square of relu.
        gate_up_proj_bias: shape of `gate_up_proj` without its last dimension; default 0.
        down_proj_bias: shape `(E, h)`; default 0.
        grad_weights: shape `(T, k)`: stands for `topk_weights` in the gradient of everything but `topk_weights`.
        recompute: a matter of memory in the operator; nothing here.

    Returns:
        out: shape `(T, h)`, dtype of `hidden_states`.

    Raises:
        ValueError: unknown activation.
        IndexError: an id outside `[-1, E)`.

    Note:
        What a pick of -1 would multiply is not read: NaN there reaches neither outputs nor gradients.

    Source: Liu et al., arXiv 2409.12136, section 2; `grad_weights` is its Algorithm 1, where the experts' gradient does not see
    the factor that the forward pass put on them.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"moe_experts: activation must be silu, gelu_tanh, relu or relu2, got {activation}")
    num_experts, rows = gate_up_proj.shape[:2]
    _check_ids("moe_experts", topk_ids, num_experts)
    acc = torch.promote_types(hidden_states.dtype, torch.float32)
    act = _ACTIVATIONS[activation]
    tokens, top_k = topk_ids.shape
    hidden_size, inner = down_proj.shape[1:]
    ids, weights = topk_ids.flatten(), topk_weights.flatten().to(acc)
    expert_weights = weights if grad_weights is None else grad_weights.detach().flatten().to(acc)
    picks = hidden_states.new_zeros((tokens * top_k, hidden_size), dtype=acc)
    for e in range(num_experts):
        slots = (ids == e).nonzero().squeeze(1)
        x = hidden_states[slots // top_k].to(acc)
        gate_up = x @ gate_up_proj[e].to(acc).T
        if gate_up_proj_bias is not None:
            gate_up = gate_up + gate_up_proj_bias[e].to(acc)
        gate, up = gate_up[:, : rows - inner], gate_up[:, rows - inner :]
        y = (act(gate) * up if rows == 2 * inner else act(up)) @ down_proj[e].to(acc).T
        if down_proj_bias is not None:
            y = y + down_proj_bias[e].to(acc)
        weighted = _weigh(y, weights[slots].unsqueeze(1), expert_weights[slots].unsqueeze(1))
        picks = picks.index_copy(0, slots, weighted)
    return picks.view(tokens, top_k, hidden_size).sum(1).to(hidden_states.dtype)


def _weigh(y: Tensor, weight: Tensor, expert_weight: Tensor) -> Tensor:
    """`weight * y`, whose gradient for `y` is that of `expert_weight * y`: the second term is 0 in value."""
    return weight * y.detach() + expert_weight.detach() * (y - y.detach())


def _check_ids(op: str, topk_ids: Tensor, num_experts: int) -> None:
    ids = topk_ids.flatten()
    outside = (ids < -1) | (ids >= num_experts)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise IndexError(f"{op}: topk_ids must be in [-1, {num_experts}), got {int(ids[at])} at index {at}")
