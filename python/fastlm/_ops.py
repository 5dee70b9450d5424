"""Binds the one overload of every operator, so that a call costs no attribute look-up. `_ops.pyi` has the types."""

import torch

_fastlm = torch.ops.fastlm

causal_conv1d = _fastlm.causal_conv1d.default
causal_conv1d_backward = _fastlm.causal_conv1d_backward.default
causal_conv1d_update = _fastlm.causal_conv1d_update.default
selective_scan = _fastlm.selective_scan.default
selective_scan_backward = _fastlm.selective_scan_backward.default
selective_state_update = _fastlm.selective_state_update.default
sliding_window_attention = _fastlm.sliding_window_attention.default
sliding_window_attention_backward = _fastlm.sliding_window_attention_backward.default
sliding_window_attention_update = _fastlm.sliding_window_attention_update.default
scan_swa = _fastlm.scan_swa.default
samba_decode_step = _fastlm.samba_decode_step.default
grin_route = _fastlm.grin_route.default
grin_route_backward = _fastlm.grin_route_backward.default
moe_plan = _fastlm.moe_plan.default
grouped_gemm = _fastlm.grouped_gemm.default
grouped_gemm_backward = _fastlm.grouped_gemm_backward.default
moe_experts = _fastlm.moe_experts.default
moe_experts_backward = _fastlm.moe_experts_backward.default
linear_nll = _fastlm.linear_nll.default
linear_nll_backward = _fastlm.linear_nll_backward.default
select_tokens = _fastlm.select_tokens.default
