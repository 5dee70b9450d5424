"""Unmodified transformers models on fastlm's operators.

    fastlm.compat.transformers.enable()     # and .disable()

puts the Mamba-1 mixers of transformers (Mamba, Falcon-Mamba, Jamba) on `selective_scan` and `causal_conv1d`, and
PhiMoE's router on `grin_route`. It makes `attn_implementation="fastlm"` known, which runs causal and sliding-window
attention on `sliding_window_attention`, and `experts_implementation="fastlm"`, which runs experts on `moe_experts`.
Importing this package does not import transformers. It needs the extra `fastlm[hf]`.
"""

from fastlm.compat.transformers._parts import disable, enable

__all__ = ["disable", "enable"]
