"""Sparse mixture of SwiGLU experts with GRIN's router: sampled in training, a gradient for the choice itself, no token dropped.

Bound by the experts' matrix products; with a few tokens by reading the weights of the experts that are used.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlm import ops
from fastlm.layers.rms_norm import at_least_float32, compute_dtype
from fastlm.ops.moe_dispatch import ExpertActivation

Estimator = Literal["v2", "v2_star", "v1", "topk"]
ExpertGrad = Literal["full", "straight_through"]
ESTIMATORS = ("v2", "v2_star", "v1", "topk")
EXPERT_GRADS = ("full", "straight_through")


class Routing(NamedTuple):
    """What the router decided for `T` tokens; `load_balance_loss` needs the first and the last of it.

    Attributes:
        router_logits: `(T, E)`, float32 at least.
        topk_weights: `(T, k)`, what each pick counts in the sum.
        topk_ids: `(T, k)` int32, -1 for tokens that are not valid.
        expert_counts: `(E,)` int32, tokens per expert.
    """

    router_logits: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    expert_counts: Tensor


class Experts(nn.Module):
    """The experts' weights, stacked: `down_proj[e] (act(gate) * up)` with `gate, up = gate_up_proj[e] x`.

    Args:
        num_experts: `E`.
        hidden_size: `h`.
        intermediate_size: `I`, inner width of one expert.
        activation: `"silu"`, `"gelu_tanh"`, `"relu"` or `"relu2"`.
        device, dtype: of the weights `gate_up_proj (E, 2I, h)`, gate rows first, and `down_proj (E, h, I)`.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: ExpertActivation = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation: ExpertActivation = activation
        shape = (num_experts, 2 * intermediate_size, hidden_size)
        self.gate_up_proj = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        shape = (num_experts, hidden_size, intermediate_size)
        self.down_proj = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew, each expert as PyTorch draws linear layers of its size."""
        for weight in (self.gate_up_proj, self.down_proj):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)

    def forward(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        grad_weights: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum over each token's experts; `hidden_states (T, h)`, see `fastlm.ops.moe_experts`."""
        return ops.moe_experts(
            hidden_states,
            self.gate_up_proj,
            self.down_proj,
            topk_ids,
            topk_weights,
            activation=self.activation,
            grad_weights=grad_weights,
        )


class GrinMoE(nn.Module):
    """Mixture-of-experts feed-forward layer of GRIN: `y = sum_k omega_k E_{D_k}(x)`.

    In training each pick is sampled from a masked softmax of the router's logits and the router gets the SparseMixer-v2 gradient;
    in evaluation the largest logits are taken. Weights are not normalised. Every pick is computed: there is no capacity.
    Parameters carry transformers' names: `router.weight`, `experts.gate_up_proj`, `experts.down_proj`.

    Args:
        hidden_size: input and output width `h`.
        intermediate_size: inner width `I` of one expert.
        num_experts: `E`, at least 2.
        num_experts_per_tok: `k`, 1 to 8.
        router_jitter_noise: relative distance from the largest logit within which an expert can be sampled, `r` in the paper's
            masked softmax.
        input_jitter_noise: in training the router sees `x` times uniform noise in `1 +- input_jitter_noise`.
        jitter_experts: let the experts see the same noisy input, as transformers' PhiMoE does.
        estimator: of the router's gradient, `"v2"` (GRIN), `"v2_star"`, `"v1"`, or `"topk"`: no sampling, the `k` largest with
            their softmax normalised, as in GShard and Mixtral.
        expert_grad: `"full"`: experts get the derivative of the forward pass. `"straight_through"`: the paper's Algorithm 1,
            without the factor 1/3 that a pick other than the most likely one may carry.
        activation: of the experts.
        device, dtype: of the weights.

    Raises:
        ValueError: an argument out of its range.

    Note:
        Router logits are computed in float32. Sampling draws one number from torch's generator of the device per call, so
        activation checkpointing replays it.

    Source: Liu et al., arXiv 2409.12136, sections 2 and 3; input jitter on a copy, once, unless `jitter_experts`.

    Example:
        >>> import torch
        >>> layer = GrinMoE(16, 32, num_experts=4)
        >>> layer(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int = 2,
        *,
        router_jitter_noise: float = 0.01,
        input_jitter_noise: float = 0.01,
        jitter_experts: bool = False,
        estimator: Estimator = "v2",
        expert_grad: ExpertGrad = "full",
        activation: ExpertActivation = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 2:
            raise ValueError(f"GrinMoE: num_experts must be at least 2, got {num_experts}")
        if not 1 <= num_experts_per_tok <= min(num_experts, 8):
            raise ValueError(
                f"GrinMoE: num_experts_per_tok must be between 1 and {min(num_experts, 8)}, got {num_experts_per_tok}"
            )
        if estimator not in ESTIMATORS:
            raise ValueError(f"GrinMoE: estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
        if expert_grad not in EXPERT_GRADS:
            raise ValueError(
                f"GrinMoE: expert_grad must be one of {', '.join(EXPERT_GRADS)}, got {expert_grad!r}"
            )
        for name, value in (
            ("router_jitter_noise", router_jitter_noise),
            ("input_jitter_noise", input_jitter_noise),
        ):
            if not 0 <= value < 1:
                raise ValueError(f"GrinMoE: {name} must be in [0, 1), got {value}")
        self.num_experts_per_tok = num_experts_per_tok
        self.router_jitter_noise = router_jitter_noise
        self.input_jitter_noise = input_jitter_noise
        self.jitter_experts = jitter_experts
        self.estimator: Estimator = estimator
        self.expert_grad: ExpertGrad = expert_grad
        self.router = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)
        self.experts = Experts(
            num_experts, hidden_size, intermediate_size, activation=activation, device=device, dtype=dtype
        )

    @property
    def num_experts(self) -> int:
        """`E`."""
        return self.router.out_features

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        self.router.reset_parameters()
        self.experts.reset_parameters()

    def forward(self, hidden_states: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            hidden_states: `(..., h)`.
            valid: `(...)` bool; tokens that are not valid cost nothing, get 0 and are not counted.

        Returns:
            `(..., h)` in the dtype of the next matrix product, see `RMSNorm`.
        """
        return self.forward_with_routing(hidden_states, valid=valid)[0]

    def forward_with_routing(
        self, hidden_states: Tensor, *, valid: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """The output of `forward`, and what the router decided, for `fastlm.ops.load_balance_loss`."""
        if valid is not None and valid.shape != hidden_states.shape[:-1]:
            raise ValueError(
                f"GrinMoE: valid must have shape {tuple(hidden_states.shape[:-1])}, got {tuple(valid.shape)}"
            )
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        noisy = self._jittered(x)
        routing, grad_weights = self._route(noisy, None if valid is None else valid.flatten())
        experts_input = noisy if self.jitter_experts else x
        experts_input = experts_input.to(compute_dtype(x, self.experts.gate_up_proj))
        out = self.experts(experts_input, routing.topk_ids, routing.topk_weights, grad_weights)
        return out.view(hidden_states.shape), routing

    def _jittered(self, x: Tensor) -> Tensor:
        if not self.training or self.input_jitter_noise == 0:
            return x
        noise = torch.empty_like(x).uniform_(1 - self.input_jitter_noise, 1 + self.input_jitter_noise)
        return x * noise

    def _route(self, x: Tensor, valid: Tensor | None) -> tuple[Routing, Tensor | None]:
        """The decision, and what the experts' gradient counts a pick for, if that is another weight."""
        if (
            valid is not None
        ):  # what is not a number there would reach the router's weight through its gradient
            x = torch.where(valid.unsqueeze(-1), x, 0)
        with torch.autocast(x.device.type, enabled=False):
            logits = functional.linear(at_least_float32(x), at_least_float32(self.router.weight))
        if self.estimator == "topk":
            return self._largest(logits, valid), None
        weights, ids, counts, probs = ops.grin_route(
            logits,
            top_k=self.num_experts_per_tok,
            jitter_eps=self.router_jitter_noise,
            training=self.training,
            estimator=self.estimator,
            valid=valid,
            return_probs=True,
        )
        grad_weights = None
        if self.training and self.expert_grad == "straight_through":
            grad_weights = 2 * probs if self.estimator == "v2_star" else probs
        return Routing(logits, weights, ids, counts), grad_weights

    def _largest(self, logits: Tensor, valid: Tensor | None) -> Routing:
        """The `k` most likely experts, their probabilities scaled to sum 1."""
        probs, ids = logits.softmax(-1).topk(self.num_experts_per_tok)
        weights = probs / probs.sum(-1, keepdim=True)
        if valid is not None:
            ids = torch.where(valid.unsqueeze(-1), ids, -1)
            weights = torch.where(valid.unsqueeze(-1), weights, 0)
        flat = ids.flatten() + 1  # tokens that are not valid are counted in front of the experts
        counts = flat.new_zeros(self.num_experts + 1).scatter_add_(0, flat, torch.ones_like(flat))[1:]
        return Routing(logits, weights, ids.to(torch.int32), counts.to(torch.int32))

    def extra_repr(self) -> str:
        """Picks and estimator, for `print(model)`."""
        return f"num_experts_per_tok={self.num_experts_per_tok}, estimator={self.estimator}"
