"""Layers over `fastlm.ops`: parameters named as in public checkpoints, state passed explicitly."""

from fastlm.layers.grin_moe import Experts, GrinMoE, Routing
from fastlm.layers.kv_ring import KVRing, RingPlan
from fastlm.layers.layer_norm import LayerNorm
from fastlm.layers.mamba import Mamba, MambaState
from fastlm.layers.rms_norm import RMSNorm
from fastlm.layers.rotary import RotaryTable, apply_rotary, rotary_angles
from fastlm.layers.sliding_window_attention import SlidingWindowAttention, packed_positions, split_packed_qkv
from fastlm.layers.swiglu import SwiGLU

__all__ = [
    "Experts",
    "GrinMoE",
    "KVRing",
    "LayerNorm",
    "Mamba",
    "MambaState",
    "RMSNorm",
    "RingPlan",
    "RotaryTable",
    "Routing",
    "SlidingWindowAttention",
    "SwiGLU",
    "apply_rotary",
    "packed_positions",
    "rotary_angles",
    "split_packed_qkv",
]
