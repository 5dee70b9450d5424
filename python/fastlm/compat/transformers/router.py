"""PhiMoE's router on `grin_route`: the same picks and weights in eval, the same estimator in training.

transformers multiplies the block's input by noise in place, in the block and again in its router, so that experts
and whoever else holds the tensor see the noise too. Here the router alone sees it, once, on a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastlm import ops
from fastlm.compat.transformers._names import find, find_function

_PHIMOE = "transformers.models.phimoe.modeling_phimoe"
ROUTER = f"{_PHIMOE}:PhimoeTopKRouter"
BLOCK = f"{_PHIMOE}:PhimoeSparseMoeBlock"
# Functions that are replaced or stood in for, and the parameters they must have.
FUNCTIONS: dict[str, tuple[str, ...]] = {
    f"{ROUTER}.forward": ("self", "hidden_states"),
    f"{BLOCK}.forward": ("self", "hidden_states"),
    f"{_PHIMOE}:sparsemixer": ("scores", "jitter_eps", "training", "top_k"),
}
_PICKS = 2  # transformers routes to two experts whatever `num_experts_per_tok` says

_replaced: dict[Any, Any] = {}  # classes, and their own `forward`


def check() -> None:
    """Raises if transformers lacks a name that is needed."""
    for name, parameters in FUNCTIONS.items():
        find_function(name, parameters)


def install() -> None:
    """Puts the router on fastlm."""
    for name, forward in ((ROUTER, router_forward), (BLOCK, block_forward)):
        module = find(name)
        _replaced[module] = vars(module)["forward"]
        module.forward = forward


def remove() -> None:
    """Gives router and block their own `forward` back."""
    while _replaced:
        module, forward = _replaced.popitem()
        module.forward = forward


def router_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `PhimoeTopKRouter.forward` does.

    Args:
        self: the router, a linear layer without bias.
        hidden_states: `(T, h)`; not changed.

    Returns:
        router_logits: `(T, E)`; in training float32 (float64) whatever the model's dtype, so that rounding makes no
            ties among experts; in eval the dtype of the model, so that picks are those of transformers.
        routing_weights: `(T, 2)`, float32 (float64).
        selected_experts: `(T, 2)`, int64.
    """
    if self.training:
        logits = _logits_in_training(self, hidden_states)
    else:
        logits = functional.linear(hidden_states, self.weight)
    weights, ids, _ = ops.grin_route(
        logits, top_k=_PICKS, jitter_eps=self.router_jitter_noise, training=self.training
    )
    return logits, weights, ids.long()  # other experts implementations index with them


def block_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """What `PhimoeSparseMoeBlock.forward` does, without noise on what the experts see.

    Args:
        self: the block.
        hidden_states: `(B, L, h)`; not changed.

    Returns:
        `(B, L, h)`.
    """
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    _, weights, ids = self.router(x)
    out: Tensor = self.experts(x, ids, weights)
    return out.view(hidden_states.shape)


def _logits_in_training(router: Any, hidden_states: Tensor) -> Tensor:
    """With noise on a copy of the input, in float32 at least: bfloat16 has four numbers between 0.99 and 1.01."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    x = hidden_states.to(dtype)
    if router.input_jitter_noise > 0:
        low, high = 1.0 - router.input_jitter_noise, 1.0 + router.input_jitter_noise
        x = x * torch.empty_like(x).uniform_(low, high)
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x, router.weight.to(dtype))
