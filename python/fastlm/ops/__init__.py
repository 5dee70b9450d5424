"""The operators as typed Python functions. Each is one call of `torch.ops.fastlm.<name>`."""

from fastlm.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from fastlm.ops.grin_route import grin_route, load_balance_loss
from fastlm.ops.moe_dispatch import grouped_gemm, moe_experts, moe_plan
from fastlm.ops.samba_decode_step import samba_decode_step
from fastlm.ops.scan_swa import scan_swa
from fastlm.ops.selective_scan import selective_scan, selective_state_update
from fastlm.ops.sliding_window_attention import sliding_window_attention, sliding_window_attention_update
from fastlm.ops.slm_loss import SelectionStats, linear_cross_entropy, linear_nll, select_tokens, slm_loss

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
