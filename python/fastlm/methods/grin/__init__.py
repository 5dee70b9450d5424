"""GRIN: top-2 mixture of experts whose router is trained by sampling, no token dropped.

The pieces live with the layers and models; this module gathers them under the method's name.

Implemented: the SparseMixer-v2 gradient and its relatives v2* and v1, experts without capacity, the load-balance loss over a
data-parallel group, input jitter, top-k gates as in GShard for comparison, and the PhiMoE layout of weights.
Not implemented: expert and pipeline parallelism.

Source: Liu et al., GRIN: GRadient-INformed MoE, arXiv 2409.12136; Liu et al., Sparse Backpropagation for MoE Training,
arXiv 2310.00811. docs/methods/grin.md maps the equations to the code.

Example:
    >>> import torch
    >>> from fastlm.methods import grin
    >>> moe = grin.GrinMoE(16, 32, num_experts=4)
    >>> y, routing = moe.forward_with_routing(torch.randn(6, 16))
    >>> loss = y.square().mean() + grin.load_balance_loss(routing.router_logits, routing.expert_counts, alpha=0.01)
"""

from fastlm.layers import Experts, GrinMoE, Routing
from fastlm.models.samba import load_phimoe, save_phimoe
from fastlm.ops import grin_route, load_balance_loss, moe_experts, moe_plan

__all__ = [
    "Experts",
    "GrinMoE",
    "Routing",
    "grin_route",
    "load_balance_loss",
    "load_phimoe",
    "moe_experts",
    "moe_plan",
    "save_phimoe",
]
