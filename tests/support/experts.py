"""A mixture of experts in two more ways: without dispatch, as an oracle, and as plain PyTorch writes it, as a baseline."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def dense_experts(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    """Every expert on every token, then the share that each token picked; silu, no bias. Sums in float32 (float64), rounded once."""
    acc = torch.promote_types(hidden_states.dtype, torch.float32)
    x, w1, w2, weights = (t.to(acc) for t in (hidden_states, gate_up_proj, down_proj, topk_weights))
    gate, up = torch.einsum("th,erh->etr", x, w1).chunk(2, dim=-1)
    y = torch.einsum("eti,ehi->eth", functional.silu(gate) * up, w2)
    picked = functional.one_hot(topk_ids.long() + 1, len(w1) + 1)[..., 1:].to(acc)
    share = torch.einsum("tk,tke->te", weights, picked)
    return torch.einsum("te,eth->th", share, y).to(hidden_states.dtype)


def plain_experts(
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
    """One layer after the other in the dtype of the inputs, each rounding its result: how exact gradients in 16 bits can be.

    The gradient of a pick's weight is a sum over what was rounded on the way, whatever its own dtype is.
    """
    dtype = hidden_states.dtype
    acc = torch.promote_types(dtype, torch.float32)
    tokens, top_k = topk_ids.shape
    size, inner = down_proj.shape[1:]
    picks = hidden_states.new_zeros((tokens * top_k, size), dtype=acc)
    for e in range(len(gate_up_proj)):
        slots = (topk_ids.flatten() == e).nonzero().squeeze(1)
        biases = (None if b is None else b[e].to(dtype) for b in (gate_up_proj_bias, down_proj_bias))
        b1, b2 = biases
        parts = functional.linear(hidden_states[slots // top_k], gate_up_proj[e], b1).split(
            inner or 1, dim=-1
        )
        up = parts[-1]
        activated = _activate(parts[0], activation) * up if len(parts) == 2 else _activate(up, activation)
        y = functional.linear(activated, down_proj[e], b2).to(acc)
        weight = topk_weights.flatten()[slots].to(acc).unsqueeze(1)
        if grad_weights is None:
            y = weight * y
        else:
            other = grad_weights.detach().flatten()[slots].to(acc).unsqueeze(1)
            y = weight * y.detach() + other * (y - y.detach())
        picks = picks.index_copy(0, slots, y)
    return picks.view(tokens, top_k, size).sum(1).to(dtype)


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return functional.silu(x)
    if activation == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    x = functional.relu(x)
    return x if activation == "relu" else x.square()
