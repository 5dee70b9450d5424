"""The operators in slow, readable PyTorch: their executable definition.

Every function has the signature of its namesake in `fastlm.ops`, works in any floating dtype on any device,
computes in float32 (float64 for float64 inputs), rounds once at the end, and is differentiable by plain
autograd. Nothing here is ever used as a silent fallback: models and layers call `fastlm.ops`.
"""

from fastlm.reference.causal_conv1d import causal_conv1d, causal_conv1d_update
from fastlm.reference.grin_route import grin_route, load_balance_loss
from fastlm.reference.moe_dispatch import grouped_gemm, moe_experts, moe_plan
from fastlm.reference.samba_decode_step import samba_decode_step
from fastlm.reference.scan_swa import scan_swa
from fastlm.reference.selective_scan import selective_scan, selective_state_update
from fastlm.reference.sliding_window_attention import (
    sliding_window_attention,
    sliding_window_attention_update,
)
from fastlm.reference.slm_loss import (
    SelectionStats,
    linear_cross_entropy,
    linear_nll,
    select_tokens,
    slm_loss,
)

__all__ = [
    "SelectionStats",
    "causal_conv1d",
    "causal_conv1d_update",
    "grin_route",
    "grouped_gemm",
    "linear_cross_entropy",
    "linear_nll",
    "load_balance_loss",
    "moe_experts",
    "moe_plan",
    "samba_decode_step",
    "scan_swa",
    "select_tokens",
    "selective_scan",
    "selective_state_update",
    "sliding_window_attention",
    "sliding_window_attention_update",
    "slm_loss",
]
